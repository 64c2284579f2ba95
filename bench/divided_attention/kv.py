"""The KV of a step in frames, as a server has it: all of one process, or in part of another, which is mapped."""

from __future__ import annotations

import math

import torch

from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.virtual_range import Frame, Span
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

FRAME_BYTES = 1 << 16


def whole_frames(slots: int, slot_bytes: int) -> int:
    """The least number of slots, not below `slots`, that fills whole frames of a buffer with `slot_bytes` per slot."""
    granule = math.lcm(FRAME_BYTES, slot_bytes) // slot_bytes
    return -(-slots // granule) * granule


class StepKv:
    """Buffers over frames of one process, each (slots, heads, dimension)."""

    def __init__(self) -> None:
        self._vmm = MemfdVmm(FRAME_BYTES)
        self._frames: list[tuple[Frame, ...]] = []  # by buffer

    def buffer(
        self, shape: tuple[int, int, int], dtype: torch.dtype, borrowed: FrameExport | None = None
    ) -> torch.Tensor:
        """A buffer of undefined content that takes whole frames, the last of them those that are `borrowed`."""
        size_bytes = math.prod(shape) * dtype.itemsize
        count = size_bytes // FRAME_BYTES
        imported = () if borrowed is None else self._vmm.import_frames(borrowed)
        own = count - len(imported)
        frames = (*(self._vmm.create_frames(own) if own else ()), *imported)
        area = self._vmm.reserve(count, f"buffer {len(self._frames)}")
        self._vmm.map(Span(area, 0, count), frames)
        self._frames.append(frames)
        return self._vmm.virtual_tensor(area, 0, size_bytes).view(dtype).view(shape)

    def exports(self, first: int, slots: int) -> list[FrameExport]:
        """What another process needs to map the slots from `first` on of each buffer, which has `slots`. To be closed.
        `first` is at the start of a frame."""
        return [self._vmm.export_frames(frames[first * len(frames) // slots :]) for frames in self._frames]

    def close(self) -> None:
        """Gives the memory back. No tensor over it lives any more."""
        self._vmm.close()
