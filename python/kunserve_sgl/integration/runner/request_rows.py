"""The request rows of all replicas: SGLang's pool of rows over global row numbers, with memory behind those in use."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.row_ledger import RowLedger, apply_update, entries
from kunserve_sgl.memory.row_memory import BLOCK_BYTES, RowMemory, plan_row_space
from kunserve_sgl.memory.vmm import VmmBackend


class KunserveReqToTokenPool(ReqToTokenPool):  # type: ignore[misc]
    """SGLang's pool of one replica's rows. `size` and what is free count own rows only; row numbers are global. The
    lowest free row is given out first, so that those in use stay together: a layer host has memory behind the first
    rows of others only, as far as it has seen batches with them.

    It also keeps the ledger of what layer hosts know of the own rows. Where a known entry can change:
    - A row gets a new request: `alloc`.
    - A request that keeps its row is extended (chunked prefill, session): SGLang writes `prefix_indices`, which equal
      what the row holds already, and new slots behind them. On CUDA a kernel writes them, past `write`; so what
      is known is cut to the prefix in `alloc`, which comes before. This also covers a session that was cut back.
    - A decode step does not: it writes behind everything that was ever sent. A host learns only of lengths that a batch
      had, and within one stay of a request in its row allocation only appends.
    - The radix cache, after a prefill, replaces slots by those of an equal prefix: `write` with a row and a slice. On
      a CPU the entries are compared, because most often nothing changes. On CUDA the comparison would wait for the
      device, so the slice counts as changed, and is sent once more.
    - Slots are moved: `replace_slots`.
    """

    def __init__(
        self,
        size: int,
        max_context_len: int,
        device: str,
        vmm: VmmBackend,
        replica: int,
        replicas: int,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """`block_bytes` is as in `RowMemory`."""
        # Upstream would fill a table with zeros; with no rows of its own it only sets what else it keeps.
        super().__init__(0, max_context_len, device, enable_memory_saver=False)
        self.size = size
        self.replica = replica
        self.space = plan_row_space(size, replicas)
        self.own_rows = self.space.rows_of(replica)[:size]
        self.memory = RowMemory(vmm, self.space, max_context_len, block_bytes)
        self.memory.map_replica(replica)
        self._alloc_size = self.space.row_count
        self.req_to_token = self.memory.table
        self._table = self.req_to_token.numpy() if self.req_to_token.device.type == "cpu" else None
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

    def free(self, req: Any) -> None:
        """Takes the request's row back, as SGLang's."""
        super().free(req)
        insort(self.free_slots, self.free_slots.pop())

    def write(self, indices: tuple[Any, Any], values: torch.Tensor) -> None:
        """Writes slots, int32, at `indices` (rows, positions), as SGLang's. Notes what layer hosts do not know any
        more."""
        if not self.ledger.is_empty:
            self._note_write(indices, values)
        super().write(indices, values)

    def _note_write(self, indices: tuple[Any, Any], values: torch.Tensor) -> None:
        rows, positions = indices
        if isinstance(rows, int) and isinstance(positions, slice):
            start = positions.start or 0
            known = self.ledger.longest_known(rows) - start
            if known <= 0:
                return
            if self._table is not None:
                same = self._table[rows, positions][:known] == values[:known].numpy()
                if same.all():
                    return
                start += int(np.argmin(same))
            self.ledger.rewritten(rows, start)
        elif not (isinstance(rows, torch.Tensor) and isinstance(positions, torch.Tensor)):
            self.ledger.clear()

    def replace_slots(self, moved: Callable[[torch.Tensor], torch.Tensor], lengths: Mapping[int, int]) -> None:
        """Replaces every slot in the own rows that are in use by what `moved` gives for it. `lengths` are the tokens of
        the rows as far as they are known, which says how wide a part of the table is looked at."""
        free = set(self.free_slots)
        rows = [row for row in self.own_rows if row not in free]
        if not rows:
            return
        width = max(lengths.get(row, self.row_width) for row in rows)
        before = self.req_to_token[:, :width][rows]
        after = moved(before)
        self.req_to_token[:, :width][rows] = after
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
        self,
        host: int,
        rows: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        prefixes: npt.NDArray[np.int32],
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
        """Returns what layer host `host` lacks of the first `lengths[i]` entries of the own rows `rows[i]`, as
        `RowLedger.update_for`; None where it has the first `prefixes[i]` of each, so that a step reads nothing off the
        table, which is on the device."""
        if self.ledger.appends(host, rows, lengths, prefixes):
            return None
        starts = self.ledger.advance(host, rows, lengths)
        if self._table is not None:
            return starts, self._table[entries(rows, starts, lengths)]
        values: npt.NDArray[np.int32] = self.req_to_token[self._places(rows, starts, lengths)].cpu().numpy()
        return starts, values

    def reach(self, rows: npt.NDArray[np.int32]) -> None:
        """Puts memory behind these rows of another replica, where there is none. Raises TransientError, with nothing
        changed, and InvariantError where `map_rows_of` has not been called."""
        self.memory.extend_to(int(np.maximum.reduce(rows)))

    def enter(self, rows: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes `slots`, int64[n], into rows of another replica, at (rows[i], positions[i]), int64[n] each, all on the
        table's device; the ledger is about own rows."""
        if self._table is not None:
            self.enter_here(rows.numpy(), positions.numpy(), slots.numpy())  # a third of torch's time
            return
        self.req_to_token[rows, positions] = slots.to(torch.int32)

    def enter_here(
        self, rows: npt.NDArray[np.integer], positions: npt.NDArray[np.integer], slots: npt.NDArray[np.integer]
    ) -> None:
        """Does as `enter`, where the table is in the CPU's memory too."""
        assert self._table is not None
        self._table[rows, positions] = slots

    def apply_update(
        self, rows: npt.NDArray[np.int32], starts: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], values: Any
    ) -> None:
        """Writes what the owner of these rows sent; `values` int32."""
        if self._table is not None:
            apply_update(self._table, rows, starts, lengths, values)
            return
        at = self._places(rows, starts, lengths)
        self.req_to_token[at] = torch.from_numpy(values.copy()).to(self.req_to_token.device)

    def _places(self, *rows_starts_lengths: npt.NDArray[np.integer]) -> tuple[torch.Tensor, ...]:
        """Returns where `entries` are, as indices on the table's device."""
        index = entries(*rows_starts_lengths)
        return tuple(torch.from_numpy(np.asarray(ids, np.int64)).to(self.req_to_token.device) for ids in index)

    def map_rows_of(self, replica: int) -> None:
        """Puts memory behind another replica's first rows, before this one hosts layers for it; that behind others
        follows when a batch has them. Raises TransientError, with nothing changed. Nothing happens where they have
        memory."""
        self.memory.map_replica(replica, rows=1)

    def unmap_rows_of(self, replica: int) -> None:
        """Gives the memory behind another replica's rows back, once this replica hosts no layers for it any more. What
        that owner believes to be known here is gone: it has to `forget` this layer host. Nothing happens where there is
        none."""
        if replica == self.replica:
            raise InvariantError(f"the rows of replica {replica} are its own and stay")
        self.memory.unmap_replica(replica)
