"""The nouns of virtual memory: frame, range, span, and the tensors that were handed out over a range."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kunserve_sgl.memory.storage import StorageWatch

_arena_numbers = itertools.count()
_reserved: weakref.WeakSet[VirtualRange] = weakref.WeakSet()  # of all backends of this process


def new_arena() -> int:
    """Returns a number for frames that were created or imported together; it is never given out again in this
    process."""
    return next(_arena_numbers)


class Frame(NamedTuple):
    """Names one frame. Arena numbers are unique in a process, so frames of two backends never compare
    equal."""

    arena: int
    number: int


class Fence(Protocol):
    """Lets one wait for work in flight; `torch.cuda.Stream` and `torch.cuda.Event` are fences."""

    def synchronize(self) -> None:
        """Returns when the work is finished."""


@dataclass(frozen=True, slots=True)
class View:
    """Records a tensor that was handed out over bytes [start, stop) of a range, watched until its storage dies."""

    start_bytes: int
    stop_bytes: int
    pins_mapping: bool
    storage: StorageWatch


class VirtualRange:
    """Reserves address space of `frame_count` positions. It compares by identity, and only its backend changes it."""

    __slots__ = ("__weakref__", "_views", "address", "frame_bytes", "frame_count", "frames", "label")

    def __init__(self, address: int, frame_count: int, frame_bytes: int, label: str) -> None:
        self.address = address
        self.frame_count = frame_count
        self.frame_bytes = frame_bytes
        self.label = label
        # Position to frame. Sparse, so that a range of terabytes costs nothing until frames are mapped.
        self.frames: dict[int, Frame] = {}
        self._views: list[View] = []
        _reserved.add(self)

    def released(self) -> None:
        """Notes that the address space has been given back; only the backend calls this."""
        _reserved.discard(self)

    @property
    def size_bytes(self) -> int:
        """Gives the size of the address space, mapped or not."""
        return self.frame_count * self.frame_bytes

    def add_view(self, view: View) -> None:
        """Records a tensor that was handed out over the range; only the backend calls this."""
        self._views = [*self.live_views(), view]

    def live_views(self) -> list[View]:
        """Returns the tensors over this range that are still alive."""
        self._views = [view for view in self._views if not view.storage.is_dead]
        return self._views

    def __repr__(self) -> str:
        return f"VirtualRange({self.label!r}, {self.frame_count} frames, {len(self.frames)} mapped)"


def hole_at(address: int) -> str | None:
    """Says in which range an address lies that has no frame behind it; None for any other address.

    A kernel must get no tensor that begins at such an address, whatever it touches: Triton's launcher asks the CUDA
    driver about the first address of each. So a kernel gets a whole KV buffer, or all rows, which begin with memory.
    """
    for each in _reserved:
        offset = address - each.address
        if 0 <= offset < each.size_bytes:
            return None if offset // each.frame_bytes in each.frames else f"{each} at byte {offset}"
    return None


@dataclass(frozen=True, slots=True)
class Span:
    """Names `count` consecutive positions of a range, from `first` on."""

    virtual_range: VirtualRange
    first: int
    count: int

    @property
    def address(self) -> int:
        """Gives the address of the first byte."""
        return self.virtual_range.address + self.first * self.virtual_range.frame_bytes

    @property
    def positions(self) -> range:
        """Gives the positions within the range, ascending."""
        return range(self.first, self.first + self.count)

    @property
    def start_bytes(self) -> int:
        """Gives the offset of the first byte within the range."""
        return self.first * self.virtual_range.frame_bytes

    @property
    def stop_bytes(self) -> int:
        """Gives the offset after the last byte within the range."""
        return (self.first + self.count) * self.virtual_range.frame_bytes

    def __str__(self) -> str:
        return f"{self.virtual_range}[{self.first}:{self.first + self.count}]"


@dataclass(frozen=True, slots=True)
class LayerSpan:
    """Names a span of a buffer of one decoder layer."""

    layer: int
    span: Span
