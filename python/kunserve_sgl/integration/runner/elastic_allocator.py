"""SGLang's slot allocators over ranges of slots that are added and removed while requests run."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.integration.cpu_platform.pools import CpuPagedAllocator
from kunserve_sgl.memory.slot_space import SlotRange


class ElasticSlots:
    """Gives out slots of ranges that come and go. It is mixed in before one of SGLang's allocators; `size` is the
    capacity in tokens of all ranges together.

    Ranges consist of whole pages and never overlap. A page is free, or somebody's: a request's or the radix cache's.
    Tokens that are withheld count as none of the capacity, so fewer than none may be available: the scheduler then
    evicts and retracts, by its own rules, until what is left of the capacity is enough.
    """

    size: int
    page_size: int
    device: str
    free_pages: torch.Tensor
    release_pages: torch.Tensor
    is_not_in_free_group: bool

    def __init__(self, *args: Any, first_slot: int, **kwargs: Any) -> None:
        self._first_slot = first_slot
        self._ranges: list[SlotRange] = []
        self._preferred: SlotRange | None = None
        self._withheld = 0
        super().__init__(*args, **kwargs)

    @property
    def slot_ranges(self) -> tuple[SlotRange, ...]:
        """Lists what may be allocated from, the base range first."""
        return tuple(self._ranges)

    def clear(self) -> None:
        """Frees every slot of every range."""
        super().clear()  # type: ignore[misc]
        if not self._ranges:  # the constructor's call
            whole_pages = self.size // self.page_size * self.page_size
            self._ranges = [SlotRange(self._first_slot, whole_pages)]
        self.free_pages = torch.cat([self._pages(slots) for slots in self._ranges])

    def add_slots(self, slots: SlotRange) -> None:
        """Lets requests use `slots`, which have memory behind them."""
        if any(slots.first < other.stop and other.first < slots.stop for other in self._ranges):
            raise InvariantError(f"{slots} overlaps {self._ranges}")
        self._ranges.append(slots)
        self.free_pages = torch.cat([self.free_pages, self._pages(slots)])
        self._set_size()

    def remove_slots(self, slots: SlotRange) -> None:
        """Takes free slots out. Raises InvariantError where one is in use, with nothing changed."""
        inside = self.free_in(slots)
        if len(inside) * self.page_size != self.count_in(slots):
            raise InvariantError(f"slots of {slots} are in use, so they cannot be removed")
        self.merge_and_sort_free()  # type: ignore[attr-defined]
        self.free_pages = self.free_pages[~self._is_in(self.free_pages, slots)]
        self._withheld = max(0, self._withheld - self.count_in(slots))
        self._ranges = [part for old in self._ranges for part in _without(old, slots)]
        self._set_size()

    @property
    def withheld(self) -> int:
        """Counts the tokens that are withheld."""
        return self._withheld

    def withhold(self, tokens: int) -> None:
        """Withholds so many tokens, wherever they are, until as many slots are removed."""
        self._withheld = tokens
        self._set_size()

    def available_size(self) -> int:
        """Counts the tokens that may be allocated; below zero where more are in use than are not withheld."""
        return int(super().available_size()) - self._withheld  # type: ignore[misc]

    def count_in(self, slots: SlotRange) -> int:
        """Counts the tokens that may be allocated from `slots`, used or not."""
        return sum(max(0, min(r.stop, slots.stop) - max(r.first, slots.first)) for r in self._ranges)

    def free_in(self, slots: SlotRange) -> torch.Tensor:
        """Returns the ids of the free pages in `slots`, int64[pages]."""
        free = torch.cat([self.free_pages, self.release_pages])
        return free[self._is_in(free, slots)]

    def free_outside(self, slots: SlotRange) -> torch.Tensor:
        """Returns the ids of the free pages that are not in `slots`, int64[pages]."""
        free = torch.cat([self.free_pages, self.release_pages])
        return free[~self._is_in(free, slots)]

    def used_in(self, slots: SlotRange) -> torch.Tensor:
        """Returns the ids of the pages in `slots` that are somebody's, int64[pages], ascending."""
        parts = [
            self._pages(SlotRange(max(r.first, slots.first), min(r.stop, slots.stop) - max(r.first, slots.first)))
            for r in self._ranges
            if r.first < slots.stop and slots.first < r.stop
        ]
        if not parts:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        pages = torch.cat(parts)
        return pages[~torch.isin(pages, self.free_in(slots))]

    def exchange_pages(self, taken: torch.Tensor, given: torch.Tensor) -> None:
        """Books that the contents of the used pages `given` now live in the free pages `taken`."""
        self.merge_and_sort_free()  # type: ignore[attr-defined]
        self.free_pages = torch.cat([self.free_pages[~torch.isin(self.free_pages, taken)], given])

    def slots_of_pages(self, pages: torch.Tensor) -> torch.Tensor:
        """Returns all slots of `pages`, int64[pages * page_size]."""
        if self.page_size == 1:
            return pages
        offsets = torch.arange(self.page_size, dtype=pages.dtype, device=pages.device)
        return (pages[:, None] * self.page_size + offsets).reshape(-1)

    def prefer(self, slots: SlotRange | None) -> None:
        """Allocates from `slots` first from now on; None for no preference.

        Costs a pass over the free list per allocation while both kinds are free.
        """
        self._preferred = slots

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Allocates slots for `need_size` tokens, int64[need_size], the preferred ones first; None where there are not
        enough."""
        self._order_free()
        return super().alloc(need_size)  # type: ignore[misc,no-any-return]

    def alloc_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Allocates for a prefill with pages, as SGLang's: slots of the new tokens, int64[tokens]; None where they are
        too few."""
        self._order_free()
        return super().alloc_extend(*args, **kwargs)  # type: ignore[misc,no-any-return]

    def alloc_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Allocates for a decode step with pages, as SGLang's: one slot per request, int64[requests]; None where there
        are not enough."""
        self._order_free()
        return super().alloc_decode(*args, **kwargs)  # type: ignore[misc,no-any-return]

    def _order_free(self) -> None:
        if self._preferred is None:
            return
        inside = self._is_in(self.free_pages, self._preferred)
        self.free_pages = torch.cat([self.free_pages[inside], self.free_pages[~inside]])

    def _set_size(self) -> None:
        self.size = sum(slots.count for slots in self._ranges) - self._withheld
        if self.page_size > 1:
            self.num_pages = self.size // self.page_size

    def _pages(self, slots: SlotRange) -> torch.Tensor:
        if slots.first % self.page_size or slots.count % self.page_size:
            raise InvariantError(f"{slots} does not consist of whole pages of {self.page_size}")
        return torch.arange(
            slots.first // self.page_size, slots.stop // self.page_size, dtype=torch.int64, device=self.device
        )

    def _is_in(self, pages: torch.Tensor, slots: SlotRange) -> torch.Tensor:
        return (pages * self.page_size >= slots.first) & (pages * self.page_size < slots.stop)


class ElasticTokenAllocator(ElasticSlots, TokenToKVPoolAllocator):  # type: ignore[misc]
    """Allocates with page size 1."""


class ElasticPagedAllocator(ElasticSlots, PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """Allocates larger pages on CUDA, where allocation is a Triton kernel."""


class ElasticCpuPagedAllocator(ElasticSlots, CpuPagedAllocator):
    """Allocates larger pages on a CPU."""


def make_elastic_allocator(size: int, page_size: int, *, first_slot: int, device: str, **kwargs: Any) -> ElasticSlots:
    """Returns an allocator of `size` tokens whose slots begin at `first_slot`."""
    if page_size == 1:
        return ElasticTokenAllocator(size, first_slot=first_slot, device=device, **kwargs)
    cls = ElasticPagedAllocator if device == "cuda" else ElasticCpuPagedAllocator
    return cls(size, page_size=page_size, first_slot=first_slot, device=device, **kwargs)


def _without(slots: SlotRange, removed: SlotRange) -> list[SlotRange]:
    """Returns the parts of `slots` outside `removed`."""
    before = SlotRange(slots.first, max(0, min(slots.stop, removed.first) - slots.first))
    behind_first = max(slots.first, removed.stop)
    behind = SlotRange(behind_first, max(0, slots.stop - behind_first))
    return [part for part in (before, behind) if part.count]
