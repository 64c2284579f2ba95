"""Copies the KV of one layer of an extent between two batches, a little at a time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kunserve_sgl.memory.kv_staging import KvStaging
from kunserve_sgl.memory.slot_space import SlotRange
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
        self._bytes_per_s: float | None = None
        self.copied_bytes = 0  # since the start of the rank
        self.copying_s = 0.0

    def chunk_bytes(self, is_serving: bool) -> int:
        """Returns how many bytes to copy now; 0 where batches come first."""
        since_s = self._clock() - self._ended_s
        chunk_s = min(_LONGEST_CHUNK_S, since_s * COPYING_SHARE) if is_serving else _LONGEST_CHUNK_S
        if chunk_s < _SHORTEST_CHUNK_S:
            return 0
        return _FIRST_CHUNK_BYTES if self._bytes_per_s is None else max(1, int(chunk_s * self._bytes_per_s))

    def account(self, size_bytes: int, seconds: float) -> None:
        """Takes note of a chunk that has just been copied."""
        self._ended_s = self._clock()
        self.copied_bytes += size_bytes
        self.copying_s += seconds
        rate = size_bytes / max(seconds, 1e-9)
        before = rate if self._bytes_per_s is None else self._bytes_per_s
        self._bytes_per_s = before + _RATE_WEIGHT * (rate - before)


class KvCopy:
    """Copies into a staging. What has been written since is copied again, once when all has been copied, and a last
    time in `finish`, when nothing is written any more."""

    def __init__(
        self,
        staging: KvStaging,
        slots: SlotRange,
        layer: int,
        writes: KvWrites,
        pace: CopyPace,
        wait_for_device: Callable[[], None],
        wait_for_copy: Callable[[], None],
    ) -> None:
        """`wait_for_device` waits for all that the device was given, `wait_for_copy` for what this thread gave it."""
        self._staging = staging
        self._slots = slots
        self._layer = layer
        self._writes = writes
        self._pace = pace
        self._wait_for_device = wait_for_device
        self._wait_for_copy = wait_for_copy
        self._copied_slots = 0
        self.is_done = False

    @property
    def progress(self) -> str:
        """Says how far it is, for people."""
        return f"copied the KV of {self._copied_slots} of {self._slots.count} slots in layer {self._layer}"

    def advance(self, is_serving: bool) -> bool:
        """Copies the next chunk. Returns False where it is not time yet."""
        chunk_bytes = self._pace.chunk_bytes(is_serving)
        if not chunk_bytes:
            return False
        if self._copied_slots == self._slots.count:
            self._copy_written()
            self.is_done = True
            return True
        if not self._copied_slots:
            self._wait_for_device()  # what was given to it before anything was noted
        count = max(1, min(chunk_bytes // self._staging.slot_bytes, self._slots.count - self._copied_slots))
        started_s = time.perf_counter()
        self._staging.copy(self._copied_slots, count)
        self._wait_for_copy()
        self._pace.account(count * self._staging.slot_bytes, time.perf_counter() - started_s)
        self._copied_slots += count
        return True

    def finish(self) -> None:
        """Copies what has been written and is not copied yet. No batch runs, and none does until the staging has taken
        its place."""
        self._copy_written()

    def _copy_written(self) -> None:
        self._wait_for_device()  # what was noted may not have been written
        written = self._writes.take(self._slots, self._layer)
        if not len(written):
            return
        started_s = time.perf_counter()
        self._staging.copy_slots(torch.from_numpy(written - self._slots.first))
        self._wait_for_copy()
        self._pace.account(len(written) * self._staging.slot_bytes, time.perf_counter() - started_s)
