"""Where a check runs: the device, the directories for caches and output, and the sizes that fit the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CUDA, CPU = "cuda", "cpu"
DEVICES = (CUDA, CPU)


class CheckError(RuntimeError):
    """The check has found something that is not as it must be; the message says what."""


class SkippedError(Exception):
    """The check makes no sense on this device; the message says why."""


@dataclass(frozen=True)
class Place:
    """What a check is told. `cache` may hold compiled kernels and models from before; `output` is for results."""

    device: str
    cache: Path
    output: Path

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU to check."""
        return self.device == CUDA

    @property
    def start_s(self) -> float:
        """How long servers may take to start: less than their check on a GPU, where the check's deadline comes first;
        on a CPU they may share two cores with others."""
        return 200.0 if self.is_cuda else 600.0


def environment(place: Place) -> Mapping[str, str]:
    """The environment of a check: all that compiles keeps what it makes in the cache directory, and nothing looks for
    a network."""
    cache = place.cache.resolve()
    folders = {
        "TRITON_CACHE_DIR": "triton",
        "TVM_FFI_CACHE_DIR": "tvm-ffi",
        "CUDA_CACHE_PATH": "cuda",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "FLASHINFER_WORKSPACE_BASE": "flashinfer",
        "SGLANG_CACHE_DIR": "sglang",
        "NUMBA_CACHE_DIR": "numba",
    }
    return {
        **{name: str(cache / folder) for name, folder in folders.items()},
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # A module that is loaded lazily waits for the whole device, in the middle of a batch.
        "CUDA_MODULE_LOADING": "EAGER",
    }
