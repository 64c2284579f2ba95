"""The CPU attention backend inside SGLang: the same greedy tokens as torch_native.

Latent attention is compared with transformers, in `test_architectures.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attention

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform is off where CUDA is present"),
]


def test_same_tokens_as_torch_native(tiny_model: Path) -> None:
    """The decode part of bench/attention.py: both backends on one model runner, step by step."""
    flags = ["--dtype", "float32", "--batch", "5", "--context", "150", "--steps", "20"]
    kernels, steps = attention.run(tiny_model, attention.parse([*flags, "--grid-batch", "--grid-context"]))
    assert kernels == []
    assert steps[0].tokens_compared >= 5 * 21
    assert steps[0].tokens_different == 0
