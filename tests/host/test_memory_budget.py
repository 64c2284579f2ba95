"""The KV cache, its sink and the activation buffer fit into what SGLang finds left, in real model runners."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from preloaded import Preloaded

pytestmark = pytest.mark.server

PROGRAM = Path(__file__).with_name("_budget_program.py")
DEADLINE_S = 900
FRAME_BYTES = 2 << 20  # as on CUDA
LEFT_BYTES = (160 << 20) + 4321
ARCHITECTURES = ("llama", "deepseek_v2")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, preloaded: Preloaded) -> dict[str, dict[str, int]]:
    """What the program says of each model."""
    directory = tmp_path_factory.mktemp("budgets")
    for arch in ARCHITECTURES:
        write_tiny_model(TinyModelSpec(arch=arch), directory / arch)
    models = [str(directory / arch) for arch in ARCHITECTURES]
    output = preloaded.output_of(str(PROGRAM), str(LEFT_BYTES), str(FRAME_BYTES), *models, deadline_s=DEADLINE_S)
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(found) == len(ARCHITECTURES), output[-4000:]
    return {Path(each["model"]).name: each for each in found}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_that_is_taken_fits_and_no_granule_is_left_over(arch: str, said: dict[str, dict[str, int]]) -> None:
    found = said[arch]
    taken = found["kv_bytes"] + found["activation_bytes"]
    assert found["tokens"] == found["slots"] > 0
    # The buffer takes whole frames, and fewer requests may run at last than were reckoned with.
    assert taken <= LEFT_BYTES < taken + found["granule_bytes"] + (8 << 20)
