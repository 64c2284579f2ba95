"""The KV cache, its sink and the activation buffer fit into what SGLang finds left, in real model runners."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec

DEADLINE_S = 300
FRAME_BYTES = 2 << 20  # as on CUDA


@pytest.mark.parametrize("arch", ["llama", "deepseek_v2"])
def test_all_that_is_taken_fits_and_no_granule_is_left_over(tmp_path: Path, arch: str) -> None:
    write_tiny_model(TinyModelSpec(arch=arch), tmp_path / arch)
    left_bytes = (160 << 20) + 4321
    program = [sys.executable, str(Path(__file__).with_name("_budget_program.py"))]
    answer = subprocess.run(
        [*program, str(tmp_path / arch), str(left_bytes), str(FRAME_BYTES)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    taken = found["kv_bytes"] + found["activation_bytes"]
    assert found["tokens"] == found["slots"] > 0
    # The buffer takes whole frames, and fewer requests may run at last than were reckoned with.
    assert taken <= left_bytes < taken + found["granule_bytes"] + (8 << 20)
