"""The request rows of all replicas: SGLang's pool of rows over global row numbers, with memory behind those in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from kunserve_sgl.errors import ConfigurationError, InvariantError, TransientError
from kunserve_sgl.exchange.row_ledger import Integers, RowLedger, apply_update, entries
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


class KunserveReqToTokenPool(ReqToTokenPool):  # type: ignore[misc]
    """SGLang's pool of one replica's rows. `size` and what is free count own rows only; row numbers are global.

    It also keeps the ledger of what layer hosts know of the own rows. Where a known entry can change:
    - A row gets a new request: `alloc`.
    - A request that keeps its row is extended (chunked prefill, session): SGLang writes `prefix_indices`, which equal
      what the row holds already, and new slots behind them. On CUDA a kernel writes them, past `write`; so what
      is known is cut to the prefix in `alloc`, which comes before. This also covers a session that was cut back.
    - A decode step writes behind everything that was ever sent: a host learns only of lengths that a batch had, and
      within one stay of a request in its row allocation only appends. On a CPU this is cut by position all
      the same, which costs next to nothing; on CUDA positions are on the device, and reading them would wait for it.
    - The radix cache, after a prefill, replaces slots by those of an equal prefix: `write` with a row and a slice. On
      a CPU the entries are compared, because most often nothing changes. On CUDA the comparison would wait for the
      device, so the slice counts as changed, and is sent once more.
    - Slots are moved: `replace_slots`.
    """

    def __init__(self, size: int, max_context_len: int, device: str, vmm: VmmBackend, replica: int, replicas: int):
        # Upstream would fill a table with zeros; with no rows of its own it only sets what else it keeps.
        super().__init__(0, max_context_len, device, enable_memory_saver=False)
        self.size = size
        self.replica = replica
        self.space = plan_row_space(size, replicas)
        self.own_rows = self.space.rows_of(replica)[:size]
        self.memory = RowMemory(vmm, self.space, max_context_len)
        self.memory.map_replica(replica)
        self._alloc_size = self.space.row_count
        self.req_to_token = self.memory.table
        self.req_generation = torch.zeros(self._alloc_size, dtype=torch.int64)
        self.ledger = RowLedger(self._alloc_size)
        self.clear()

    @property
    def row_count(self) -> int:
        """Counts the rows of all replicas together, and the padding row."""
        return self.space.row_count

    @property
    def row_width(self) -> int:
        """Gives the most tokens of a request."""
        return int(self.req_to_token.shape[1])

    def rows_of(self, replica: int) -> range:
        """Returns the rows of a replica, as many as the space has for it."""
        return self.space.rows_of(replica)

    def clear(self) -> None:
        """Frees all own rows, and takes every layer host to know nothing of them."""
        self.free_slots = list(self.own_rows)
        self.req_generation.zero_()
        self.ledger.clear()

    def alloc(self, reqs: list[Any]) -> list[int] | None:
        """Gives each request a row, where it has none, and returns the rows, as SGLang's; None where there are not
        enough. Notes what layer hosts do not know any more."""
        kept = [(req.req_pool_idx, len(req.prefix_indices)) for req in reqs if req.req_pool_idx is not None]
        given: list[int] | None = super().alloc(reqs)
        if given is not None and not self.ledger.is_empty:
            kept_rows = {row for row, _ in kept}
            self.ledger.forget_rows(row for row in given if row not in kept_rows)
            for row, prefix in kept:
                self.ledger.rewritten(row, prefix)
        return given

    def write(self, indices: tuple[Any, Any], values: torch.Tensor) -> None:
        """Writes slots, int32, at `indices` (rows, positions), as SGLang's. Notes what layer hosts do not know any
        more."""
        if not self.ledger.is_empty:
            self._note_write(indices, values)
        super().write(indices, values)

    def _note_write(self, indices: tuple[Any, Any], values: torch.Tensor) -> None:
        rows, positions = indices
        on_cpu = self.req_to_token.device.type == "cpu"
        if isinstance(rows, int) and isinstance(positions, slice):
            start = positions.start or 0
            known = self.ledger.longest_known(rows) - start
            if known <= 0:
                return
            if on_cpu:
                same = self.req_to_token[rows, positions][:known].numpy() == values[:known].numpy()
                if same.all():
                    return
                start += int(np.argmin(same))
            self.ledger.rewritten(rows, start)
        elif isinstance(rows, torch.Tensor) and isinstance(positions, torch.Tensor):
            if on_cpu:
                self.ledger.rewritten_from(rows.numpy(), positions.numpy())
        else:
            self.ledger.clear()

    def replace_slots(self, moved: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every slot in the own rows that are in use by what `moved` gives for it."""
        free = set(self.free_slots)
        rows = [row for row in self.own_rows if row not in free]
        if not rows:
            return
        before = self.req_to_token[rows]
        after = moved(before)
        self.req_to_token[rows] = after
        if self.ledger.is_empty:
            return
        changed = (before != after).cpu()
        where = changed.any(dim=1).nonzero().flatten()
        first = changed[where].int().argmax(dim=1)
        self.ledger.rewritten_from(np.array(rows)[where.numpy()], first.numpy())

    def forget_hosts(self) -> None:
        """Takes every layer host to know nothing of the own rows: what it is sent next is whole."""
        self.ledger.clear()

    def update_for(
        self, host: int, rows: Integers, lengths: Integers
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Returns what layer host `host` lacks of these own rows; see `RowLedger.update_for`."""
        if self.req_to_token.device.type == "cpu":
            return self.ledger.update_for(host, rows, lengths, self.req_to_token.numpy())
        starts = self.ledger.advance(host, rows, lengths)
        values: npt.NDArray[np.int32] = self.req_to_token[self._places(rows, starts, lengths)].cpu().numpy()
        return starts, values

    def apply_update(
        self, rows: npt.NDArray[np.int32], starts: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], values: Any
    ) -> None:
        """Writes what the owner of these rows sent; `values` int32."""
        table = self.req_to_token
        if table.device.type == "cpu":
            apply_update(table.numpy(), rows, starts, lengths, values)
            return
        at = self._places(rows, starts, lengths)
        table[at] = torch.from_numpy(values.copy()).to(table.device)

    def _places(self, *rows_starts_lengths: npt.NDArray[np.integer]) -> tuple[torch.Tensor, ...]:
        """Returns where `entries` are, as indices on the table's device."""
        index = entries(*rows_starts_lengths)
        return tuple(torch.from_numpy(np.asarray(ids, np.int64)).to(self.req_to_token.device) for ids in index)

    def map_rows_of(self, replica: int) -> None:
        """Puts memory behind another replica's rows, before this one hosts layers for it. Raises TransientError, with
        nothing changed. Nothing happens where they have memory."""
        self.memory.map_replica(replica)

    def unmap_rows_of(self, replica: int) -> None:
        """Gives the memory behind another replica's rows back, once this replica hosts no layers for it any more. What
        that owner believes to be known here is gone: it has to `forget` this layer host. Nothing happens where there is
        none."""
        if replica == self.replica:
            raise InvariantError(f"the rows of replica {replica} are its own and stay")
        self.memory.unmap_replica(replica)
