"""Memory for the KV of one layer of some slots, at addresses of its own, until it takes its place behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.virtual_range import Fence, LayerSpan, Span

_WORD_BYTES = 8


class KvStaging:
    """Holds this replica's frames, or those of a loan, beside the buffers of a layer; KV is copied there while batches
    use the slots.

    `spans` are those of the slots, one for each buffer of the layer, as `ElasticKv` gives them. The addresses are given
    back by `close`, which every staging ends with.
    """

    def __init__(self, pool: FramePool, spans: Sequence[LayerSpan], slot_count: int) -> None:
        """Reserves the addresses. Raises OutOfMemoryError."""
        self._pool = pool
        self._spans = tuple(spans)
        self._slot_count = slot_count
        self._loan: tuple[str, int] | None = None
        self._is_filled = False
        self._places: list[LayerSpan] = []
        try:
            for each in spans:
                label = f"{each.span.virtual_range.label} aside"
                place = pool.vmm.reserve(each.span.count, label)
                self._places.append(LayerSpan(each.layer, Span(place, 0, each.span.count)))
        except BaseException:
            self._release()
            raise

    def take_own(self) -> None:
        """Puts free frames there, in one piece for each buffer. Raises PoolFullError, OutOfMemoryError,
        MappingFailedError; then nothing has changed."""
        self._pool.map_kv(self._places, in_one_piece=True)
        self._is_filled = True

    def borrow(self, owner: str, loan_id: int, export: FrameExport) -> None:
        """Maps another replica's frames there, in the order of `ElasticKv.frames_behind`. Raises as
        `FrameLoans.borrow`."""
        self._pool.loans.borrow(owner, loan_id, export, self._places)
        self._loan = owner, loan_id
        self._is_filled = True

    @property
    def loan(self) -> tuple[str, int] | None:
        """Says whose frames these are, and by which loan; None where they are this replica's."""
        return self._loan

    @property
    def slot_count(self) -> int:
        """Counts the slots."""
        return self._slot_count

    @property
    def slot_bytes(self) -> int:
        """Counts the bytes of one slot in all buffers of the layer."""
        return sum(each.span.count for each in self._spans) * self._pool.vmm.frame_bytes // self._slot_count

    def copy(self, first: int, count: int) -> None:
        """Copies the KV of `count` slots, from the slot `first` of these on, counted from 0. On a GPU it is given to
        the current stream."""
        for source, target in zip(self._spans, self._places, strict=True):
            row_bytes = self._row_bytes(source)
            start = source.span.start_bytes + first * row_bytes
            self._view(target, first * row_bytes, count * row_bytes).copy_(self._view(source, start, count * row_bytes))

    def copy_slots(self, ids: torch.Tensor) -> None:
        """Copies the KV of some slots, int64[n], counted from 0, none of them twice. On a GPU it is given to the
        current stream."""
        ids = ids.to(self._pool.vmm.device)
        for source, target in zip(self._spans, self._places, strict=True):
            row_bytes = self._row_bytes(source)
            size_bytes = self._slot_count * row_bytes
            word = torch.int64 if row_bytes % _WORD_BYTES == 0 else torch.uint8
            rows = self._view(source, source.span.start_bytes, size_bytes).view(word).view(self._slot_count, -1)
            self._view(target, 0, size_bytes).view(word).view(self._slot_count, -1)[ids] = rows[ids]

    def take_place(self, after: Iterable[Fence] | None = None) -> None:
        """Maps what is there behind the slots, where nothing is any more. `after` is as in `VmmBackend.unmap`. Raises
        AlreadyMappedError, MappingFailedError; then nothing has changed."""
        if self._loan is None:
            self._pool.move_kv(self._places, self._spans, after)
        else:
            self._pool.loans.move_loan(*self._loan, self._spans, after)
        self._is_filled = False
        self._loan = None

    def close(self, after: Iterable[Fence] | None = None) -> None:
        """Frees the frames that are there, or returns the loan, and gives the addresses back. `after` is as in
        `VmmBackend.unmap`. Closing twice is allowed. Raises LedgerError, MappingFailedError, with nothing changed."""
        if self._is_filled:
            if self._loan is None:
                self._pool.unmap_kv(self._places, after)
            else:
                self._pool.loans.return_loan(*self._loan, after)
            self._is_filled = False
        self._release()

    def _release(self) -> None:
        while self._places:
            self._pool.vmm.release(self._places.pop().span.virtual_range)

    def _row_bytes(self, each: LayerSpan) -> int:
        size_bytes = each.span.count * self._pool.vmm.frame_bytes
        if size_bytes % self._slot_count:
            raise InvariantError(f"{each.span} has no whole rows of {self._slot_count} slots")
        return size_bytes // self._slot_count

    def _view(self, each: LayerSpan, start_bytes: int, size_bytes: int) -> torch.Tensor:
        return self._pool.vmm.virtual_tensor(each.span.virtual_range, start_bytes, size_bytes)
