"""What a scheduler's process sets before it uses the device."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from kunserve_sgl.args import Activations
from kunserve_sgl.integration.attach.process import load_kernels_at_start


@pytest.mark.parametrize(
    ("activations", "replicas", "per_gpu", "loading"),
    [
        (Activations.COLLECTIVE, 2, 1, "EAGER"),
        (Activations.AUTO, 4, 2, "EAGER"),
        (Activations.AUTO, 2, 2, "AUTO"),  # NCCL does not send within a GPU
        (Activations.AUTO, 1, 1, "AUTO"),
        (Activations.MAPPED, 2, 1, "AUTO"),
    ],
)
def test_kernels_are_loaded_at_start_where_activations_may_be_sent(
    monkeypatch: pytest.MonkeyPatch, activations: Activations, replicas: int, per_gpu: int, loading: str
) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "AUTO")  # as SGLang's launcher does
    load_kernels_at_start(
        SimpleNamespace(kunserve_activations=activations.value, dp_size=replicas, kunserve_replicas_per_gpu=per_gpu)
    )
    assert os.environ["CUDA_MODULE_LOADING"] == loading
