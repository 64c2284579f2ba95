"""KV pool and allocator classes of the CPU platform: SGLang's own, without what only runs on an accelerator."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from typing_extensions import override


class CpuMLATokenToKVPool(MLATokenToKVPool):  # type: ignore[misc]
    """SGLang's MLA pool. The platform hook passes `index_head_dim`, which only sparse (DSA) models have."""

    def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any) -> None:
        if index_head_dim is not None:
            raise NotImplementedError("sparse attention (DSA) models do not run on the CPU platform")
        super().__init__(*args, **kwargs)


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """SGLang's paged allocator, whose two allocation kernels are Triton, in torch.

    A request's slots fill its last page first and then whole pages in the order of the free list, so the slots of
    one page always hold consecutive tokens of one request.
    """

    free_pages: torch.Tensor

    @override
    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Returns slots for tokens [prefix, seq) of each request, int64[extend_num_tokens]; None if there are too few
        pages."""
        own_pages = _pages(prefix_lens, self.page_size)
        new_pages = _pages(seq_lens, self.page_size) - own_pages
        first_new_page = torch.cumsum(new_pages, 0) - new_pages
        taken = int(new_pages.sum())
        if taken > len(self.free_pages) and self.need_sort:
            self.merge_and_sort_free()
        if taken > len(self.free_pages):
            return None
        lengths = seq_lens - prefix_lens
        request = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        first_token = torch.cumsum(lengths, 0) - lengths
        position = torch.arange(extend_num_tokens) - first_token[request] + prefix_lens[request]
        page = position // self.page_size - own_pages[request]
        on_own_page = page < 0
        free_page = self.free_pages[(page + first_new_page[request]).clamp(min=0)] if taken else torch.zeros_like(page)
        slots = torch.where(
            on_own_page,
            last_loc[request] + 1 + position - prefix_lens[request],
            free_page * self.page_size + position % self.page_size,
        )
        self.free_pages = self.free_pages[taken:]
        return slots

    @override
    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """Returns a slot for the last of `seq_lens` tokens of each request, int64[requests]; None without enough
        pages."""
        return self.alloc_extend(seq_lens - 1, seq_lens_cpu - 1, seq_lens, seq_lens_cpu, last_loc, len(seq_lens))


def _pages(tokens: torch.Tensor, page_size: int) -> torch.Tensor:
    return (tokens + page_size - 1) // page_size


def make_allocator(size: int, page_size: int, **kwargs: Any) -> Any:
    """Makes the allocator that SGLang itself would choose for `page_size`; `size` in tokens."""
    if page_size == 1:
        return TokenToKVPoolAllocator(size, **kwargs)
    return CpuPagedAllocator(size, page_size=page_size, **kwargs)
