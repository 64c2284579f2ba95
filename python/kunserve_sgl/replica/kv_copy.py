"""Copies the KV of one layer of an extent between two batches, a little at a time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.batch_shape import Int64s
from kunserve_sgl.replica.kv_writes import KvWrites

# Of the time of a replica that runs batches; a token of it may wait for two that copy.
COPYING_SHARE = 0.05
_LONGEST_CHUNK_S = 0.005
_SHORTEST_CHUNK_S = 0.0003
_FIRST_CHUNK_BYTES = 256 << 10
_RATE_WEIGHT = 0.3


class CopyPace:
    """Says how much of a rank's KV may be copied now. A chunk takes a share of the time since the last one, which is
    mostly that of a batch; the rate is measured."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._ended_s = clock()
        self._last_s = 0.0  # that a part of a chunk took, which is not all there
        self._bytes_per_s: float | None = None
        self.copied_bytes = 0  # since the start of the rank
        self.copying_s = 0.0

    def chunk_bytes(self, is_serving: bool) -> int:
        """Returns how many bytes to copy now; 0 where batches come first."""
        since_s = self._clock() - self._ended_s
        if is_serving and since_s * COPYING_SHARE < self._last_s:
            return 0
        chunk_s = min(_LONGEST_CHUNK_S, since_s * COPYING_SHARE) if is_serving else _LONGEST_CHUNK_S
        if chunk_s < _SHORTEST_CHUNK_S:
            return 0
        return _FIRST_CHUNK_BYTES if self._bytes_per_s is None else max(1, int(chunk_s * self._bytes_per_s))

    def rest(self, seconds: float) -> None:
        """Takes note that a part of a chunk has just been copied, or looked for."""
        self._ended_s = self._clock()
        self._last_s = min(seconds, _LONGEST_CHUNK_S)

    def account(self, size_bytes: int, seconds: float) -> None:
        """Takes note of a chunk that has just been copied."""
        self._ended_s, self._last_s = self._clock(), 0.0
        self.copied_bytes += size_bytes
        self.copying_s += seconds
        rate = size_bytes / max(seconds, 1e-9)
        before = rate if self._bytes_per_s is None else self._bytes_per_s
        self._bytes_per_s = before + _RATE_WEIGHT * (rate - before)


class KvTransfer(ABC):
    """Is a way in which the KV of one layer of some slots gets from one home to another. Slots are counted from 0."""

    slot_bytes: int  # of one slot in all buffers of the layer
    least_bytes = 1  # to copy at a time
    waits = True  # for a moment, where something else has to happen first

    @abstractmethod
    def copy(self, first: int, count: int) -> Iterator[None]:
        """Copies `count` slots from `first` on. Yields now and then where it takes longer, so that the caller may do
        other things meanwhile. On a GPU it is given to the current stream. Raises TransferError."""

    @abstractmethod
    def copy_slots(self, ids: Int64s) -> Iterator[None]:
        """Copies some slots, int64[n], ascending and each once. It is as `copy`."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what is under way."""


class KvCopy:
    """Copies KV to its new home. What has been written since is copied again, once when all has been copied, and a last
    time in `finish`, when nothing is written any more."""

    def __init__(
        self,
        transfer: KvTransfer,
        slots: SlotRange,
        layer: int,
        writes: KvWrites,
        pace: CopyPace,
        wait_for_device: Callable[[], None],
        wait_for_copy: Callable[[], None],
    ) -> None:
        """`wait_for_device` waits for all that the device was given, `wait_for_copy` for what this thread gave it."""
        self._transfer = transfer
        self._slots = slots
        self._layer = layer
        self._writes = writes
        self._pace = pace
        self._wait_for_device = wait_for_device
        self._wait_for_copy = wait_for_copy
        self._copied_slots = 0
        self._under_way: Iterator[None] | None = None
        self._under_way_slots = 0
        self._under_way_s = 0.0
        self._is_last = False  # what is under way has been written meanwhile
        self.is_done = False

    @property
    def progress(self) -> str:
        """Says how far it is, for people."""
        return f"copied the KV of {self._copied_slots} of {self._slots.count} slots in layer {self._layer}"

    def advance(self, is_serving: bool) -> bool:
        """Copies the next chunk, or a part of it. Returns False where it is not time yet."""
        chunk_bytes = self._pace.chunk_bytes(is_serving)
        if not chunk_bytes:
            return False
        if self._under_way is None:
            self._begin(max(chunk_bytes, self._transfer.least_bytes))
        self._transfer.waits = not is_serving
        if self._go_on():
            self.is_done = self._is_last
            if not self._is_last:
                self._copied_slots += self._under_way_slots
        return True

    def finish(self) -> None:
        """Copies what has been written and is not copied yet. No batch runs, and none does until the KV is used at its
        new home. Raises TransferError."""
        self._begin_written()
        self._transfer.waits = True
        while not self._go_on():
            pass

    def close(self) -> None:
        """Gives up what is under way."""
        self._transfer.close()

    def _begin(self, chunk_bytes: int) -> None:
        if self._copied_slots == self._slots.count:
            self._begin_written()
            return
        if not self._copied_slots:
            self._wait_for_device()  # what was given to it before anything was noted
        left = self._slots.count - self._copied_slots
        self._under_way_slots = max(1, min(chunk_bytes // self._transfer.slot_bytes, left))
        self._under_way = self._transfer.copy(self._copied_slots, self._under_way_slots)

    def _begin_written(self) -> None:
        self._wait_for_device()  # what was noted may not have been written
        written = self._writes.take(self._slots, self._layer)
        self._is_last, self._under_way_slots = True, len(written)
        self._under_way = self._transfer.copy_slots(written - self._slots.first) if len(written) else iter(())

    def _go_on(self) -> bool:
        """Does a part of what is under way. Returns whether that was the last one."""
        assert self._under_way is not None
        started_s = time.perf_counter()
        is_over = next(self._under_way, self) is self
        if is_over:
            self._wait_for_copy()
            self._under_way = None
        taken_s = time.perf_counter() - started_s
        self._under_way_s += taken_s
        self._pace.rest(taken_s)
        if is_over:
            if self._under_way_slots:
                self._pace.account(self._under_way_slots * self._transfer.slot_bytes, self._under_way_s)
            self._under_way_s = 0.0
        return is_over
