"""Every architecture of the tiny models that is said to run on the host does, with the tokens of its reference. Cut
into ranges of layers, and with all layers dropped and restored, it computes the same. See `_model_program.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import ARCHITECTURES, MlaSpec, TinyModelSpec

pytestmark = pytest.mark.server

PROGRAM = Path(__file__).with_name("_model_program.py")
DEADLINE_S = 550
TINY = {
    **{name: TinyModelSpec(arch=name, dtype="float32") for name, entry in ARCHITECTURES.items() if entry.runs_on_host},
    "deepseek_v2-q-lora": TinyModelSpec(arch="deepseek_v2", layers=3, mla=MlaSpec(q_lora_rank=48), dtype="float32"),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the program says of all models: importing SGLang once takes longer than all of them together."""
    directory = tmp_path_factory.mktemp("models")
    for name, spec in TINY.items():
        write_tiny_model(spec, directory / name)
    command = [sys.executable, str(PROGRAM), *(str(directory / name) for name in TINY)]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=DEADLINE_S)
    return found.stdout


@pytest.mark.parametrize("name", TINY)
def test_a_model_computes_the_same_dropped_and_restored(name: str, output: str) -> None:
    answers = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    wrong = {Path(answer["model"]).name: answer["wrong"] for answer in answers}
    assert name in wrong, output
    assert wrong[name] is None, output
