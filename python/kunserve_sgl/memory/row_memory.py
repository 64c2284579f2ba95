"""The memory behind the request rows of all replicas, and whose row is whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kunserve_sgl.errors import ConfigurationError, InvariantError, TransientError
from kunserve_sgl.memory.virtual_range import Span
from kunserve_sgl.memory.vmm import VmmBackend

_ENTRY = torch.int32


@dataclass(frozen=True, slots=True)
class RowSpace:
    """Says which rows are whose, which is the same in every replica of a deployment: replica r owns the rows [1 + r *
    rows_per_replica, 1 + (r + 1) * rows_per_replica). Row 0 is the padding row, of which every replica has its own."""

    rows_per_replica: int
    replica_count: int

    @property
    def row_count(self) -> int:
        """Counts the rows of all replicas, and the padding row."""
        return 1 + self.replica_count * self.rows_per_replica

    def rows_of(self, replica: int) -> range:
        """Returns the rows that a replica owns. Raises ConfigurationError where there is no such replica."""
        if not 0 <= replica < self.replica_count:
            raise ConfigurationError(f"replica {replica} does not exist; accepted: 0 to {self.replica_count - 1}")
        first = 1 + replica * self.rows_per_replica
        return range(first, first + self.rows_per_replica)


def plan_row_space(rows: int, replica_count: int) -> RowSpace:
    """Makes room for `rows` rows per replica, rounded up to a power of two: replicas whose free memory differs a little
    at start admit different numbers of requests, but must agree on whose row is whose."""
    return RowSpace(1 << (rows - 1).bit_length(), replica_count)


class RowMemory:
    """Holds the table of all rows, int32 (rows of everybody, width), with frames behind the rows of some replicas.

    A row is as long as the model's context, not a multiple of a frame, so the rows of two replicas may share the frame
    at their border: it stays as long as one of them needs it.
    """

    def __init__(self, vmm: VmmBackend, space: RowSpace, width: int) -> None:
        self._vmm = vmm
        self._space = space
        self._row_bytes = width * _ENTRY.itemsize
        size_bytes = space.row_count * self._row_bytes
        self._range = vmm.reserve(-(-size_bytes // vmm.frame_bytes), "request rows")
        self.table = vmm.virtual_tensor(self._range, 0, size_bytes).view(_ENTRY).view(space.row_count, width)
        self._replicas: set[int] = set()
        self._map(self._positions(range(1)))

    @property
    def mapped_bytes(self) -> int:
        """Counts the physical memory behind the table."""
        return len(self._range.frames) * self._vmm.frame_bytes

    def is_mapped(self, replica: int) -> bool:
        """Tells whether there is memory behind a replica's rows."""
        return replica in self._replicas

    def map_replica(self, replica: int) -> None:
        """Puts memory behind a replica's rows, zero where it is new. Raises TransientError, with nothing changed."""
        self._map(self._positions(self._space.rows_of(replica)))
        self._replicas.add(replica)

    def unmap_replica(self, replica: int) -> None:
        """Gives the memory of a replica's rows back."""
        kept = {*self._positions(range(1))}
        for other in self._replicas - {replica}:
            kept.update(self._positions(self._space.rows_of(other)))
        gone = [at for at in self._positions(self._space.rows_of(replica)) if at not in kept]
        if replica in self._replicas and gone:
            self._vmm.destroy_frames(self._vmm.unmap(self._span(gone)))
        self._replicas.discard(replica)

    def _map(self, positions: range) -> None:
        missing = [at for at in positions if at not in self._range.frames]
        if not missing:
            return
        frames = self._vmm.create_frames(len(missing))
        try:
            self._vmm.map(self._span(missing), frames)
        except TransientError:
            self._vmm.destroy_frames(frames)
            raise
        self._vmm.zero(self._span(missing))

    def _span(self, positions: Sequence[int]) -> Span:
        # Others share only the frames at a replica's borders, so what is left between them is in one piece.
        if positions[-1] - positions[0] + 1 != len(positions):
            raise InvariantError(f"request rows: frames {positions[0]} to {positions[-1]} are not in one piece")
        return Span(self._range, positions[0], len(positions))

    def _positions(self, rows: range) -> range:
        """Returns the positions of the frames behind `rows`."""
        frame_bytes = self._vmm.frame_bytes
        return range(rows.start * self._row_bytes // frame_bytes, -(-rows.stop * self._row_bytes // frame_bytes))
