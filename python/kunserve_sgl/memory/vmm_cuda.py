"""Virtual memory on a GPU through the CUDA driver: one handle per frame, so that any frame can go anywhere.

Every frame is its own allocation, because the driver cannot map or unmap a part of one. Access is granted, and taken
away with the mapping, once for each contiguous span, however many frames it has: those are the expensive calls. The
order for a frame's life is create, map, grant, unmap, release; unmapping waits for the streams that used the span.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from kunserve_sgl.memory.cuda_driver import CudaCallError, CudaDriver
from kunserve_sgl.memory.errors import (
    MappingFailedError,
    OutOfMemoryError,
    PeerAccessError,
    TransferError,
)
from kunserve_sgl.memory.frame_export import FrameExport, FrameRun
from kunserve_sgl.memory.virtual_range import Frame, new_arena
from kunserve_sgl.memory.vmm import VmmBackend


class CudaVmm(VmmBackend):
    """Maps memory of one GPU into this process; other GPUs' frames can be imported where peers may
    access."""

    name = "cuda"

    def __init__(
        self,
        gpu: int,
        frame_bytes: int,
        *,
        peer_gpus: Sequence[int] = (),
        driver: CudaDriver | None = None,
    ) -> None:
        """`gpu` is the number torch gives it; `peer_gpus` are further GPUs of this process that may read and
        write the mapped memory.

        Raises FrameSizeError, BackendUnavailableError and PeerAccessError.
        """
        self._driver = driver if driver is not None else CudaDriver()
        self._gpu = gpu
        self._driver.require_support(gpu)
        super().__init__(frame_bytes, self._driver.granularity_bytes(gpu), torch.device("cuda", gpu))
        for peer in peer_gpus:
            if not self._driver.can_access(peer, gpu):
                raise PeerAccessError(f"GPU {peer} cannot access memory of GPU {gpu}")
        self._access_gpus = (gpu, *peer_gpus)
        self._handles: dict[Frame, int] = {}

    def _reserve(self, size_bytes: int) -> int:
        try:
            return self._driver.reserve(size_bytes, self.frame_bytes)
        except CudaCallError as error:
            raise OutOfMemoryError(f"cannot reserve {size_bytes} bytes of address space: {error}") from error

    def _release(self, address: int, size_bytes: int) -> None:
        self._driver.free(address, size_bytes)

    def _create(self, frames: Sequence[Frame]) -> None:
        handles: list[int] = []
        try:
            for _ in frames:
                handles.append(self._driver.create(self.frame_bytes, self._gpu))
        except CudaCallError as error:
            self._undo(lambda: self._release_handles(handles))
            raise OutOfMemoryError(
                f"GPU {self._gpu} had memory for {len(handles)} of {len(frames)} frames "
                f"of {self.frame_bytes} bytes: {error}"
            ) from error
        self._handles.update(zip(frames, handles, strict=True))

    def _destroy(self, frames: Sequence[Frame]) -> None:
        # A handle that cannot be released leaves a leak, and the driver in an unknown state: nothing to undo.
        self._undo(lambda: self._release_handles([self._handles.pop(frame) for frame in frames]))

    def _map(self, address: int, frames: Sequence[Frame]) -> None:
        mapped = 0
        try:
            for frame in frames:
                self._driver.map(address + mapped * self.frame_bytes, self.frame_bytes, self._handles[frame])
                mapped += 1
            self._driver.allow_access(address, len(frames) * self.frame_bytes, self._access_gpus)
        except CudaCallError as error:
            if mapped:
                self._undo(lambda: self._driver.unmap(address, mapped * self.frame_bytes))
            raise MappingFailedError(f"mapping {len(frames)} frames: {error}") from error

    def _unmap(self, address: int, frames: Sequence[Frame]) -> None:
        try:
            # The driver takes several mappings at once, as long as each is whole and no hole is between them.
            self._driver.unmap(address, len(frames) * self.frame_bytes)
        except CudaCallError as error:
            raise MappingFailedError(f"unmapping {len(frames)} frames: {error}") from error

    def _export(self, frames: Sequence[Frame]) -> FrameExport:
        fds: list[int] = []
        try:
            for frame in frames:
                fds.append(self._driver.export_fd(self._handles[frame]))
        except CudaCallError as error:
            for fd in fds:
                os.close(fd)
            raise OutOfMemoryError(f"exported {len(fds)} of {len(frames)} frames: {error}") from error
        runs = tuple(FrameRun(slot, 0, 1) for slot in range(len(fds)))
        return FrameExport(self.name, self.frame_bytes, runs, tuple(fds))

    def _import(self, export: FrameExport) -> tuple[Frame, ...]:
        if sorted(run.fd_slot for run in export.runs) != list(range(len(export.fds))) or any(
            (run.first, run.count) != (0, 1) for run in export.runs
        ):
            raise TransferError("a CUDA export has one file descriptor for each frame")
        handles: list[int] = []
        try:
            for run in export.runs:
                handles.append(self._driver.import_fd(export.fds[run.fd_slot]))
                if len(handles) == 1:  # an owner's frames lie on one GPU
                    self._require_peer_access(handles[0])
        except (CudaCallError, PeerAccessError) as error:
            self._undo(lambda: self._release_handles(handles))
            if isinstance(error, PeerAccessError):
                raise
            raise TransferError(f"imported {len(handles)} of {len(export.runs)} frames: {error}") from error
        arena = new_arena()
        frames = tuple(Frame(arena, number) for number in range(len(handles)))
        self._handles.update(zip(frames, handles, strict=True))
        return frames

    def _require_peer_access(self, handle: int) -> None:
        owner = self._driver.device_of(handle)
        for device in self._access_gpus:
            if device != owner and not self._driver.can_access(device, owner):
                raise PeerAccessError(f"GPU {device} cannot access memory of GPU {owner}")

    def _synchronize(self) -> None:
        self._driver.synchronize(self._gpu)

    def _release_handles(self, handles: Sequence[int]) -> None:
        for handle in handles:
            self._driver.release(handle)
