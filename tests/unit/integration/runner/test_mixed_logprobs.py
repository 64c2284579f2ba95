"""The patch of SGLang's log-probabilities: requests that ask for chosen tokens, in a batch with others that do not."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kunserve_sgl.integration.attach import patches

MODULE = "sglang.srt.layers.logprob_processor"


@pytest.fixture(params=["upstream", "patched"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    package = find_spec("sglang")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).parent.joinpath(*MODULE.split(".")[1:]).with_suffix(".py").read_text()
    if request.param == "patched":
        [patch] = [each for each in patches.load_patches() if each.module == MODULE]
        source = patch.apply(source)
    made = ModuleType(f"{request.param}_logprobs")
    monkeypatch.setitem(sys.modules, made.__name__, made)  # dataclasses look their module up
    exec(compile(source, made.__name__, "exec"), made.__dict__)
    return request.param, made.__dict__


def test_every_request_of_a_batch_has_a_tensor(module: tuple[str, dict[str, Any]]) -> None:
    """SGLang's batch_result_processor.py calls `tolist` of each of them, and ends where one is a list."""
    name, namespace = module
    logprobs = torch.arange(12.0).reshape(3, 4)
    values, indices = namespace["get_token_ids_logprobs"](logprobs, [None, [3, 1], None], no_copy_to_cpu=True)
    assert indices == [[], [3, 1], []]
    if name == "upstream":
        assert isinstance(values[0], list)
    else:
        assert [value.tolist() for value in values] == [[], [7.0, 5.0], []]
    copied, _ = namespace["get_token_ids_logprobs"](logprobs, [None, [3, 1], None])
    assert copied == [[], [7.0, 5.0], []]
