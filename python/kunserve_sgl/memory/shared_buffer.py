"""Memory that one process owns and others map, for bytes that are passed from hand to hand, such as activations.

It is no part of a frame pool, so that no ledger counts it. Nothing here orders reads and writes: a message says whose
turn it is. On a CPU it takes memory only where it was written. The memory lives until the last process that mapped
it has closed it or is dead, whether the owner lives or not, and has no name that could stay behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kunserve_sgl.memory.errors import OutOfRangeError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.virtual_range import Frame, Span
from kunserve_sgl.memory.vmm import VmmBackend


class SharedBuffer:
    """Maps a whole number of frames, one behind the other. `create` and `open` make it."""

    def __init__(self, vmm: VmmBackend, frames: Sequence[Frame]) -> None:
        """Takes `frames`, which are mapped nowhere; leaves them alone where it fails."""
        self._vmm = vmm
        self._frames = tuple(frames)
        self._range = vmm.reserve(len(self._frames), "shared buffer")
        try:
            vmm.map(self._span, self._frames)
        except BaseException:
            vmm.release(self._range)
            raise
        self._closed = False

    @classmethod
    def create(cls, vmm: VmmBackend, size_bytes: int) -> SharedBuffer:
        """Makes a buffer of at least `size_bytes` of undefined content. `vmm` is not that of a frame pool, whose check
        would find frames that it does not know. Raises OutOfMemoryError, MappingFailedError."""
        return cls._over(vmm, vmm.create_frames(-(-size_bytes // vmm.frame_bytes)))

    @classmethod
    def open(cls, vmm: VmmBackend, export: FrameExport) -> SharedBuffer:
        """Maps another process's buffer; `export` stays the caller's to close. Raises TransferError, PeerAccessError,
        OutOfMemoryError, MappingFailedError."""
        return cls._over(vmm, vmm.import_frames(export))

    @classmethod
    def _over(cls, vmm: VmmBackend, frames: Sequence[Frame]) -> SharedBuffer:
        try:
            return cls(vmm, frames)
        except BaseException:
            vmm.destroy_frames(frames)
            raise

    @property
    def size_bytes(self) -> int:
        """Gives the size in bytes, rounded up to whole frames."""
        return self._range.size_bytes

    def export(self) -> FrameExport:
        """Returns what `open` needs in another process; the caller closes it. Only the owner can export."""
        return self._vmm.export_frames(self._frames)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int = 0) -> torch.Tensor:
        """Makes a tensor of `shape` over the buffer from `offset_bytes` on, which is a multiple of the element size.
        The buffer cannot be closed while it lives. Raises OutOfRangeError."""
        if offset_bytes % dtype.itemsize:
            raise OutOfRangeError(f"{dtype} cannot begin at byte {offset_bytes}")
        size_bytes = math.prod(shape) * dtype.itemsize
        if not size_bytes:
            return torch.empty(tuple(shape), dtype=dtype, device=self._vmm.device)
        return self._vmm.tensor(self._range, offset_bytes, size_bytes).view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Unmaps the buffer here, when the device has finished. Raises ViewInUseError, with nothing changed, while a
        tensor over it lives. Closing twice is allowed."""
        if self._closed:
            return
        self._vmm.unmap(self._span)
        self._closed = True
        self._vmm.release(self._range)
        self._vmm.destroy_frames(self._frames)

    @property
    def _span(self) -> Span:
        return Span(self._range, 0, self._range.frame_count)
