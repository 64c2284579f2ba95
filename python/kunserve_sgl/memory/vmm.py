"""The contract of virtual memory: ranges, frames, mapping, export; with the checks that every backend shares.

A range is reserved address space. A frame is a unit of physical memory. Memory exists where a frame is mapped
at a position of a range, and only there. Positions and counts are in frames, addresses and sizes in bytes.

Two ways to a tensor:
- `tensor` gives only mapped memory, and pins it: while any tensor over the same storage lives, `unmap` of
  that memory is refused. So a tensor from `tensor` can never touch unmapped memory.
- `virtual_tensor` gives any part of a range, mapped or not, and pins nothing but the address space. A KV
  buffer needs this: its addresses stay fixed while frames come and go behind it. Its user must touch mapped
  positions only, which the KV pool ensures by handing out no slot that is not mapped. A stray access faults;
  it never reads other memory, because the address space stays reserved while the tensor lives.

One thread uses a backend at a time.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch

from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.memory.errors import (
    AlreadyMappedError,
    ClosedError,
    ForeignFrameError,
    ForeignRangeError,
    FrameInUseError,
    FrameSizeError,
    NotMappedError,
    OutOfRangeError,
    TransferError,
    ViewInUseError,
)
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.storage import StorageWatch, tensor_at
from kunserve_sgl.memory.virtual_range import Fence, Frame, Span, View, VirtualRange, new_arena


class VmmBackend(abc.ABC):
    """Reserves ranges, creates frames and maps them. Every public operation happens entirely or not at
    all."""

    name: ClassVar[str]
    keeps_pieces_whole: ClassVar[bool]

    def __init__(self, frame_bytes: int, granularity_bytes: int, device: torch.device) -> None:
        """`granularity_bytes` is the smallest unit the machine maps. Raises FrameSizeError."""
        if frame_bytes <= 0 or frame_bytes % granularity_bytes:
            raise FrameSizeError(
                f"frame_bytes is {frame_bytes}; it must be a positive multiple of {granularity_bytes} bytes, "
                "the smallest unit that can be mapped"
            )
        self.frame_bytes = frame_bytes
        self.device = device
        self._ranges: set[VirtualRange] = set()
        self._frames: set[Frame] = set()
        self._imported: set[Frame] = set()
        self._position: dict[Frame, tuple[VirtualRange, int]] = {}
        self._closed_because: str | None = None

    # Ranges

    def reserve(self, frame_count: int, label: str) -> VirtualRange:
        """Reserves address space for `frame_count` frames. Costs no memory. Raises OutOfMemoryError."""
        self._check_open()
        if frame_count <= 0:
            raise OutOfRangeError(f"range {label!r}: frame_count is {frame_count}; it must be positive")
        address = self._reserve(frame_count * self.frame_bytes)
        reserved = VirtualRange(address, frame_count, self.frame_bytes, label)
        self._ranges.add(reserved)
        return reserved

    def release(self, virtual_range: VirtualRange) -> None:
        """Gives the address space back. Raises FrameInUseError while frames are mapped in it, and
        ViewInUseError while any tensor over it lives: the addresses may belong to something else
        afterwards."""
        self._check_open()
        self._check_range(virtual_range)
        if virtual_range.frames:
            raise FrameInUseError(f"{virtual_range}: cannot be released while frames are mapped in it")
        self._check_views(Span(virtual_range, 0, virtual_range.frame_count), only_pinning=False)
        self._release(virtual_range.address, virtual_range.size_bytes)
        self._ranges.discard(virtual_range)
        virtual_range.released()

    # Frames

    def create_frames(self, count: int, *, in_one_piece: bool = False) -> tuple[Frame, ...]:
        """Creates `count` frames of undefined content. Raises OutOfMemoryError.

        Frames that come `in_one_piece` cost as many calls of the machine, and descriptors, as one. Where
        `keeps_pieces_whole`, they are from then on mapped, unmapped, exported and destroyed all together and in order
        only: whatever else is tried raises SplitPieceError, with nothing changed.
        """
        self._check_open()
        if count <= 0:
            raise OutOfRangeError(f"count is {count}; it must be positive")
        arena = new_arena()
        frames = tuple(Frame(arena, number) for number in range(count))
        self._create(frames, in_one_piece)
        self._frames.update(frames)
        return frames

    def destroy_frames(self, frames: Sequence[Frame]) -> None:
        """Gives the memory of unmapped frames back to the machine, or forgets imported ones. Raises
        FrameInUseError where one is mapped."""
        self._check_open()
        self._check_frames(frames)
        for frame in frames:
            if frame in self._position:
                raise FrameInUseError(f"{frame} is mapped in {self._position[frame][0]}; unmap it first")
        self._destroy(frames)
        self._frames.difference_update(frames)
        self._imported.difference_update(frames)

    def map(self, span: Span, frames: Sequence[Frame]) -> None:
        """Maps `frames` at the positions of `span`, in order. A frame can be mapped in one place only.

        Raises OutOfRangeError, AlreadyMappedError, ForeignFrameError, and MappingFailedError when the machine
        refuses; then nothing is mapped.
        """
        self._check_open()
        self._check_span(span)
        if len(frames) != span.count:
            raise OutOfRangeError(f"{len(frames)} frames were given for a span of {span.count}")
        self._check_frames(frames)
        mapped = span.virtual_range.frames
        for position, frame in zip(span.positions, frames, strict=True):
            if position in mapped:
                raise AlreadyMappedError(f"{span.virtual_range}: position {position} has a frame already")
            if frame in self._position:
                raise AlreadyMappedError(f"{frame} is mapped already, in {self._position[frame][0]}")
        if not frames:
            return
        self._map(span.address, frames)
        for position, frame in zip(span.positions, frames, strict=True):
            mapped[position] = frame
            self._position[frame] = (span.virtual_range, position)

    def unmap(self, span: Span, after: Iterable[Fence] | None = None) -> tuple[Frame, ...]:
        """Takes the frames away from the positions of `span` and returns them, in order.

        First waits for `after`, the streams or events of all work that may touch the span; None waits for
        everything the device is doing. Raises NotMappedError, ViewInUseError, and MappingFailedError when the
        machine refuses; then everything is still mapped.
        """
        self._check_open()
        frames = self.frames_at(span)
        self._check_views(span, only_pinning=True)
        if not frames:
            return ()
        if after is None:
            self._synchronize()
        else:
            for fence in after:
                fence.synchronize()
        self._unmap(span.address, frames)
        for position, frame in zip(span.positions, frames, strict=True):
            del span.virtual_range.frames[position]
            del self._position[frame]
        return frames

    def check_map(self, spans: Sequence[Span]) -> None:
        """Raises what mapping frames behind all of `spans` would raise because of the spans. So a caller that
        maps several learns of a mistake before the machine is touched, and has nothing to undo."""
        self._check_open()
        for span in spans:
            self._check_span(span)
            for position in span.positions:
                if position in span.virtual_range.frames:
                    raise AlreadyMappedError(f"{span.virtual_range}: position {position} has a frame already")
        if _overlap(spans):
            raise AlreadyMappedError("a position is named twice in one call")

    def check_unmap(self, spans: Sequence[Span]) -> list[tuple[Frame, ...]]:
        """Returns the frames behind each of `spans`, in order, and raises what unmapping all of them would raise
        because of the spans: NotMappedError, ViewInUseError. The machine is not touched."""
        self._check_open()
        frames = [self.frames_at(span) for span in spans]
        for span in spans:
            self._check_views(span, only_pinning=True)
        if _overlap(spans):
            raise NotMappedError("a position is named twice in one call")
        return frames

    def frames_at(self, span: Span) -> tuple[Frame, ...]:
        """Returns the frames behind `span`, in order. Raises NotMappedError where one is missing."""
        self._check_span(span)
        mapped = span.virtual_range.frames
        try:
            return tuple(mapped[position] for position in span.positions)
        except KeyError as error:
            raise NotMappedError(f"{span.virtual_range}: position {error.args[0]} has no frame") from None

    @property
    def places(self) -> Mapping[Frame, tuple[VirtualRange, int]]:
        """Maps every mapped frame to its range and position. It changes as frames are mapped and unmapped."""
        return self._position

    @property
    def own_frame_count(self) -> int:
        """Counts the frames that this backend created and has not destroyed."""
        return len(self._frames) - len(self._imported)

    # Between processes

    def export_frames(self, frames: Sequence[Frame]) -> FrameExport:
        """Makes what another process needs to import these frames; the caller closes it. Imported frames cannot be
        passed on: their owner would not know who holds them. Raises ForeignFrameError."""
        self._check_open()
        self._check_frames(frames)
        for frame in frames:
            if frame in self._imported:
                raise ForeignFrameError(f"{frame} was imported; only the process that created it can export it")
        return self._export(frames)

    def pieces(self, frames: Sequence[Frame]) -> list[tuple[Frame, ...]]:
        """Returns `frames`, in order, as the pieces that `create_frames` made. Raises SplitPieceError where they are
        not whole pieces. Called only where `keeps_pieces_whole`."""
        return [(frame,) for frame in frames]

    def import_frames(self, export: FrameExport) -> tuple[Frame, ...]:
        """Makes another process's frames mappable here, in the order they were exported. The export stays the
        caller's to close. Raises TransferError and PeerAccessError."""
        self._check_open()
        if export.backend != self.name or export.frame_bytes != self.frame_bytes:
            raise TransferError(
                f"cannot import {export.backend} frames of {export.frame_bytes} bytes; "
                f"this process has {self.name} frames of {self.frame_bytes} bytes"
            )
        frames = self._import(export)
        self._frames.update(frames)
        self._imported.update(frames)
        return frames

    # Tensors

    def tensor(self, virtual_range: VirtualRange, start_bytes: int, size_bytes: int) -> torch.Tensor:
        """Makes a uint8 tensor (size_bytes,) over mapped bytes, with a storage of its own that starts at `start_bytes`.

        It pins the mapping while it, or any view of its storage, lives. Raises NotMappedError and OutOfRangeError.
        """
        self.frames_at(self._covering(virtual_range, start_bytes, size_bytes))
        return self._view(virtual_range, start_bytes, size_bytes, pins_mapping=True)

    def virtual_tensor(self, virtual_range: VirtualRange, start_bytes: int, size_bytes: int) -> torch.Tensor:
        """Makes a uint8 tensor (size_bytes,) over bytes that may be unmapped, now or later: touching those faults. It
        keeps the address space reserved while it lives. Raises OutOfRangeError."""
        self._check_span(self._covering(virtual_range, start_bytes, size_bytes))
        return self._view(virtual_range, start_bytes, size_bytes, pins_mapping=False)

    def zero(self, span: Span) -> None:
        """Makes every byte of a mapped span zero, on a GPU in the order of the current stream. On a CPU
        this gives the memory back until it is written again, and costs next to nothing for frames that never
        were. Raises NotMappedError."""
        self._check_open()
        frames = self.frames_at(span)
        if frames:
            self._zero(span, frames)

    def close(self) -> None:
        """Unmaps and releases everything. Raises ViewInUseError, with nothing changed, while any tensor
        lives. Closing twice is allowed. A process that ends without closing leaves nothing behind."""
        if self._closed_because is not None:
            return
        for virtual_range in self._ranges:
            self._check_views(Span(virtual_range, 0, virtual_range.frame_count), only_pinning=False)
        self._synchronize()
        for virtual_range in list(self._ranges):
            for first, count in _runs_of(sorted(virtual_range.frames)):
                self.unmap(Span(virtual_range, first, count), after=())
            self.release(virtual_range)
        self.destroy_frames(tuple(self._frames))
        self._closed_because = "it was closed"

    def _zero(self, span: Span, frames: Sequence[Frame]) -> None:
        """Zeroes with the device's own means; a backend with something better replaces this."""
        tensor_at(span.address, span.stop_bytes - span.start_bytes, self.device).zero_()

    # What a backend supplies. Each is called with checked arguments and happens entirely or not at all.

    @abc.abstractmethod
    def _reserve(self, size_bytes: int) -> int: ...

    @abc.abstractmethod
    def _release(self, address: int, size_bytes: int) -> None: ...

    @abc.abstractmethod
    def _create(self, frames: Sequence[Frame], in_one_piece: bool) -> None: ...

    @abc.abstractmethod
    def _destroy(self, frames: Sequence[Frame]) -> None: ...

    @abc.abstractmethod
    def _map(self, address: int, frames: Sequence[Frame]) -> None: ...

    @abc.abstractmethod
    def _unmap(self, address: int, frames: Sequence[Frame]) -> None: ...

    @abc.abstractmethod
    def _export(self, frames: Sequence[Frame]) -> FrameExport: ...

    @abc.abstractmethod
    def _import(self, export: FrameExport) -> tuple[Frame, ...]: ...

    @abc.abstractmethod
    def _synchronize(self) -> None: ...

    # Checks

    def _undo(self, undo: Callable[[], None]) -> None:
        """Takes back the first part of an operation that failed. If that fails too, the record and the
        machine disagree, and no further operation is safe."""
        try:
            undo()
        except (OSError, TransientError) as error:
            self._closed_because = f"a failed operation could not be undone: {error}"
            raise InvariantError(self._closed_because) from error

    def _check_open(self) -> None:
        if self._closed_because is not None:
            raise ClosedError(f"the backend cannot be used: {self._closed_because}")

    def _check_range(self, virtual_range: VirtualRange) -> None:
        if virtual_range not in self._ranges:
            raise ForeignRangeError(f"{virtual_range} was released or belongs to another backend")

    def _check_span(self, span: Span) -> None:
        self._check_range(span.virtual_range)
        if span.first < 0 or span.count < 0 or span.first + span.count > span.virtual_range.frame_count:
            raise OutOfRangeError(f"{span.virtual_range}: no span of {span.count} frames at position {span.first}")

    def _check_frames(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            if frame not in self._frames:
                raise ForeignFrameError(f"{frame} was destroyed or belongs to another backend")
        if len(set(frames)) != len(frames):
            raise AlreadyMappedError("a frame is named twice in one call")

    def _check_views(self, span: Span, *, only_pinning: bool) -> None:
        for view in span.virtual_range.live_views():
            overlaps = view.start_bytes < span.stop_bytes and span.start_bytes < view.stop_bytes
            if overlaps and (view.pins_mapping or not only_pinning):
                raise ViewInUseError(
                    f"{span}: a tensor over bytes [{view.start_bytes}, {view.stop_bytes}) is still alive"
                )

    def _covering(self, virtual_range: VirtualRange, start_bytes: int, size_bytes: int) -> Span:
        self._check_open()
        self._check_range(virtual_range)
        if start_bytes < 0 or size_bytes <= 0 or start_bytes + size_bytes > virtual_range.size_bytes:
            raise OutOfRangeError(f"{virtual_range}: no {size_bytes} bytes at byte {start_bytes}")
        first = start_bytes // self.frame_bytes
        last = (start_bytes + size_bytes - 1) // self.frame_bytes
        return Span(virtual_range, first, last - first + 1)

    def _view(
        self, virtual_range: VirtualRange, start_bytes: int, size_bytes: int, *, pins_mapping: bool
    ) -> torch.Tensor:
        tensor = tensor_at(virtual_range.address + start_bytes, size_bytes, self.device)
        virtual_range.add_view(View(start_bytes, start_bytes + size_bytes, pins_mapping, StorageWatch(tensor)))
        return tensor


def _runs_of(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Joins ascending positions that follow each other, to (first, count)."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and sum(runs[-1]) == position:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((position, 1))
    return runs


def _overlap(spans: Sequence[Span]) -> bool:
    """Tells whether two spans share a position."""
    ordered = sorted((id(span.virtual_range), span.first, span.count) for span in spans if span.count)
    return any(
        before[0] == after[0] and before[1] + before[2] > after[1] for before, after in itertools.pairwise(ordered)
    )
