"""Virtual memory on a GPU through the CUDA driver: one handle per frame, or per piece of several.

The driver cannot map or unmap a part of what a handle stands for, so the frames of a piece stay together until they are
destroyed; a piece costs as many calls as a frame. Access is granted, and taken away with the mapping, once for each
contiguous span, however many frames it has: those are the expensive calls. The order for a piece's life is create, map,
grant, unmap, release; unmapping waits for the streams that used the span.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from typing_extensions import override

from kunserve_sgl.memory.cuda_driver import CudaCallError, CudaDriver
from kunserve_sgl.memory.errors import (
    MappingFailedError,
    OutOfMemoryError,
    PeerAccessError,
    SplitPieceError,
    TransferError,
)
from kunserve_sgl.memory.frame_export import FrameExport, FrameRun
from kunserve_sgl.memory.virtual_range import Frame, new_arena
from kunserve_sgl.memory.vmm import VmmBackend


class CudaVmm(VmmBackend):
    """Maps memory of one GPU into this process; other GPUs' frames can be imported where peers may
    access."""

    name = "cuda"
    keeps_pieces_whole = True

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
        self._handles: dict[Frame, int] = {}  # by the first frame of a piece; most pieces are one frame
        self._whole: dict[int, tuple[Frame, ...]] = {}  # by arena, where its frames are one piece

    def _reserve(self, size_bytes: int) -> int:
        try:
            # The driver aligns to powers of two; this is the largest that a frame is a multiple of.
            return self._driver.reserve(size_bytes, self.frame_bytes & -self.frame_bytes)
        except CudaCallError as error:
            raise OutOfMemoryError(f"cannot reserve {size_bytes} bytes of address space: {error}") from error

    def _release(self, address: int, size_bytes: int) -> None:
        self._driver.free(address, size_bytes)

    def _create(self, frames: Sequence[Frame], in_one_piece: bool) -> None:
        if in_one_piece:
            self._create_piece(frames)
            return
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

    def _create_piece(self, frames: Sequence[Frame]) -> None:
        size_bytes = len(frames) * self.frame_bytes
        try:
            self._handles[frames[0]] = self._driver.create(size_bytes, self._gpu)
        except CudaCallError as error:
            raise OutOfMemoryError(
                f"GPU {self._gpu} had no memory for one piece of {size_bytes} bytes: {error}"
            ) from error
        self._whole[frames[0].arena] = tuple(frames)

    def _destroy(self, frames: Sequence[Frame]) -> None:
        pieces = self.pieces(sorted(frames))
        for piece in pieces:
            self._whole.pop(piece[0].arena, None)
        # A handle that cannot be released leaves a leak, and the driver in an unknown state: nothing to undo.
        self._undo(lambda: self._release_handles([self._handles.pop(piece[0]) for piece in pieces]))

    def _map(self, address: int, frames: Sequence[Frame]) -> None:
        mapped, pieces = 0, self.pieces(frames)
        try:
            for piece in pieces:
                size_bytes = len(piece) * self.frame_bytes
                self._driver.map(address + mapped * self.frame_bytes, size_bytes, self._handles[piece[0]])
                mapped += len(piece)
            self._driver.allow_access(address, len(frames) * self.frame_bytes, self._access_gpus)
        except CudaCallError as error:
            if mapped:
                self._undo(lambda: self._driver.unmap(address, mapped * self.frame_bytes))
            raise MappingFailedError(f"mapping {len(frames)} frames: {error}") from error

    def _unmap(self, address: int, frames: Sequence[Frame]) -> None:
        self.pieces(frames)
        try:
            # The driver takes several mappings at once, as long as each is whole and no hole is between them.
            self._driver.unmap(address, len(frames) * self.frame_bytes)
        except CudaCallError as error:
            raise MappingFailedError(f"unmapping {len(frames)} frames: {error}") from error

    def _export(self, frames: Sequence[Frame]) -> FrameExport:
        fds: list[int] = []
        pieces = self.pieces(frames)
        try:
            for piece in pieces:
                fds.append(self._driver.export_fd(self._handles[piece[0]]))
        except CudaCallError as error:
            for fd in fds:
                os.close(fd)
            raise OutOfMemoryError(f"exported {len(fds)} of {len(pieces)} pieces: {error}") from error
        runs = tuple(FrameRun(slot, 0, len(piece)) for slot, piece in enumerate(pieces))
        return FrameExport(self.name, self.frame_bytes, runs, tuple(fds))

    def _import(self, export: FrameExport) -> tuple[Frame, ...]:
        if sorted(run.fd_slot for run in export.runs) != list(range(len(export.fds))) or any(
            run.first for run in export.runs
        ):
            raise TransferError("a CUDA export has one file descriptor for each piece, which it gives as a whole")
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
            raise TransferError(f"imported {len(handles)} of {len(export.runs)} pieces: {error}") from error
        singles = new_arena()
        frames: list[Frame] = []
        for number, (run, handle) in enumerate(zip(export.runs, handles, strict=True)):
            if run.count == 1:
                piece = [Frame(singles, number)]
            else:
                arena = new_arena()
                piece = [Frame(arena, position) for position in range(run.count)]
                self._whole[arena] = tuple(piece)
            self._handles[piece[0]] = handle
            frames.extend(piece)
        return tuple(frames)

    @override
    def pieces(self, frames: Sequence[Frame]) -> list[tuple[Frame, ...]]:
        pieces: list[tuple[Frame, ...]] = []
        at = 0
        while at < len(frames):
            first = frames[at]
            piece = self._whole.get(first.arena, (first,))
            if len(piece) > 1 and piece != tuple(frames[at : at + len(piece)]):
                raise SplitPieceError(f"{first} is one of {len(piece)} frames that were created in one piece")
            pieces.append(piece)
            at += len(piece)
        return pieces

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
