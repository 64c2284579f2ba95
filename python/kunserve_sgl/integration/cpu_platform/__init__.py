"""CPU platform: the whole SGLang runtime on a CPU. This module owns the decision whether it becomes active."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import entry_points

PLATFORM_NAME = "kunserve_host"
ATTENTION_BACKEND = "kunserve_host"
_ENTRY_POINT_GROUP = "sglang.srt.platforms"
# Accelerators whose torch support comes as a separate package; importing it to ask would be slow and may fail.
_ACCELERATOR_PACKAGES = ("torch_npu", "habana_frameworks", "torchada")


def activate() -> str | None:
    """Returns the platform class to SGLang's platform discovery, whose entry point this is, or None to stay out of the
    way.

    It is active only where there is no accelerator and nothing else was asked for. With CUDA present it must never be
    active: SGLang would then treat the machine as out-of-tree and lose its CUDA paths.
    """
    if _accelerator_present() or _something_else_asked_for():
        return None
    return "kunserve_sgl.integration.cpu_platform.platform:CpuPlatform"


def _accelerator_present() -> bool:
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available():
        return True
    return any(importlib.util.find_spec(package) is not None for package in _ACCELERATOR_PACKAGES)


def _something_else_asked_for() -> bool:
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return True
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected:
        return selected != PLATFORM_NAME
    # Two active platforms are an error in SGLang, so another installed one goes first.
    return any(entry.name != PLATFORM_NAME for entry in entry_points(group=_ENTRY_POINT_GROUP))
