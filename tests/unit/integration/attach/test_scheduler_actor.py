"""What a node of Ray must have for a scheduler to start there."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.attach.scheduler_actor import keep_metrics, own_metrics, require_files


def test_a_node_without_the_model_is_named(tmp_path: Path) -> None:
    there, missing = str(tmp_path), str(tmp_path / "model")
    for model, tokenizer in ((there, None), (there, there), ("org/model", "org/model")):
        require_files(SimpleNamespace(model_path=model, tokenizer_path=tokenizer, kunserve_host="10.0.0.2"))
    for model, tokenizer, flag in ((missing, None, "--model-path"), (there, missing, "--tokenizer-path")):
        where = f"on the node {os.uname().nodename} of Ray, at 10.0.0.2; accepted"
        with pytest.raises(ConfigurationError, match=f"{flag} {missing}: there is no such file or directory {where}"):
            require_files(SimpleNamespace(model_path=model, tokenizer_path=tokenizer, kunserve_host="10.0.0.2"))


def test_metrics_have_a_place_on_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PROMETHEUS_MULTIPROC_DIR"
    monkeypatch.delenv(name, raising=False)
    keep_metrics(str(tmp_path), "replica1.0")
    assert name not in os.environ
    assert own_metrics(str(tmp_path)) is None
    for shared, used in ((tmp_path, None), (tmp_path / "missing", tmp_path / "metrics" / "replica1.0")):
        for _ in range(2):  # ranks of one node
            monkeypatch.setenv(name, str(shared))
            keep_metrics(str(tmp_path), "replica1.0")
            assert os.environ[name] == str(used or shared)
            assert own_metrics(str(tmp_path)) == used
    assert (tmp_path / "metrics" / "replica1.0").is_dir()
