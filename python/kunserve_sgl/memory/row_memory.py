"""The memory behind the request rows of all replicas, and whose row is whose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kunserve_sgl.errors import ConfigurationError, InvariantError
from kunserve_sgl.memory.virtual_range import Frame, Span
from kunserve_sgl.memory.vmm import VmmBackend

_ENTRY = torch.int32
BLOCK_BYTES = 32 << 20


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

    def owner_of(self, row: int) -> int:
        """Returns the replica that owns a row other than 0."""
        return (row - 1) // self.rows_per_replica


def plan_row_space(rows: int, replica_count: int) -> RowSpace:
    """Makes room for `rows` rows per replica, rounded up to a power of two: replicas whose free memory differs a little
    at start admit different numbers of requests, but must agree on whose row is whose."""
    return RowSpace(1 << (rows - 1).bit_length(), replica_count)


class RowMemory:
    """Holds the table of all rows, int32 (rows of everybody, width), with memory behind the first rows of some
    replicas.

    Memory comes and goes in blocks of frames. A row is as long as the model's context, so the rows of two replicas may
    share the block at their border: it stays as long as one of them needs it.
    """

    def __init__(self, vmm: VmmBackend, space: RowSpace, width: int, block_bytes: int = BLOCK_BYTES) -> None:
        """A block has `block_bytes`, or one frame where a frame is larger."""
        self._vmm = vmm
        self._space = space
        self._row_bytes = width * _ENTRY.itemsize
        size_bytes = space.row_count * self._row_bytes
        self._range = vmm.reserve(-(-size_bytes // vmm.frame_bytes), "request rows")
        self._block_frames = max(1, block_bytes // vmm.frame_bytes)
        self._blocks: dict[int, tuple[Frame, ...]] = {}
        self.table = vmm.virtual_tensor(self._range, 0, size_bytes).view(_ENTRY).view(space.row_count, width)
        self._ends: dict[int, int] = {}  # by replica, the row where memory ends
        self._map(self._blocks_behind(range(1)))

    @property
    def mapped_bytes(self) -> int:
        """Counts the physical memory behind the table."""
        return len(self._range.frames) * self._vmm.frame_bytes

    def is_mapped(self, replica: int) -> bool:
        """Tells whether there is memory behind a replica's first rows."""
        return replica in self._ends

    def map_replica(self, replica: int, rows: int | None = None) -> None:
        """Puts memory behind the first `rows` of a replica's rows, or all of them, zero where it is new. It may be
        behind more of them already. Raises TransientError, with nothing changed."""
        own = self._space.rows_of(replica)
        wanted = own if rows is None else own[:rows]
        if self._ends.get(replica, 0) < wanted.stop:
            self._map(self._blocks_behind(range(own.start, wanted.stop)))
            self._ends[replica] = wanted.stop

    def extend_to(self, row: int) -> None:
        """Sees to it that there is memory behind a row of a replica that has memory, and those before it. The padding
        row always has. Raises TransientError, with nothing changed, and InvariantError where the replica has none."""
        if row == 0:
            return
        replica = self._space.owner_of(row)
        end = self._ends.get(replica)
        if end is None:
            raise InvariantError(f"request row {row} is one of replica {replica}, whose rows have no memory here")
        if row >= end:
            self.map_replica(replica, row + 1 - self._space.rows_of(replica).start)

    def unmap_replica(self, replica: int) -> None:
        """Gives the memory of a replica's rows back."""
        end = self._ends.pop(replica, None)
        if end is None:
            return
        kept = {*self._blocks_behind(range(1))}
        for other, its_end in self._ends.items():
            kept.update(self._blocks_behind(range(self._space.rows_of(other).start, its_end)))
        gone = self._blocks_behind(range(self._space.rows_of(replica).start, end))
        self._unmap([block for block in gone if block not in kept])

    def _map(self, blocks: Iterable[int]) -> None:
        added: list[int] = []
        try:
            for block in blocks:
                if block not in self._blocks:
                    self._map_block(block)
                    added.append(block)
                    self._vmm.zero(self._span(block))
        except BaseException:
            self._unmap(added)
            raise

    def _map_block(self, block: int) -> None:
        span = self._span(block)
        frames = self._vmm.create_frames(span.count, in_one_piece=True)
        try:
            self._vmm.map(span, frames)
        except BaseException:
            self._vmm.destroy_frames(frames)
            raise
        self._blocks[block] = frames

    def _unmap(self, blocks: Iterable[int]) -> None:
        for number, block in enumerate(blocks):
            self._vmm.unmap(self._span(block), after=() if number else None)
            self._vmm.destroy_frames(self._blocks.pop(block))

    def _span(self, block: int) -> Span:
        first = block * self._block_frames
        return Span(self._range, first, min(self._block_frames, self._range.frame_count - first))

    def _blocks_behind(self, rows: range) -> range:
        block_bytes = self._block_frames * self._vmm.frame_bytes
        return range(rows.start * self._row_bytes // block_bytes, -(-rows.stop * self._row_bytes // block_bytes))
