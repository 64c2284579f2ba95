"""The CPU platform's paged allocator: upstream's contract, checked against a token-by-token reference."""

from __future__ import annotations

import random

import pytest
import torch

from kunserve_sgl.integration.cpu_platform.pools import CpuPagedAllocator, make_allocator

PAGES = 64


def allocator(page_size: int) -> CpuPagedAllocator:
    return CpuPagedAllocator(
        PAGES * page_size, page_size=page_size, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
    )


@pytest.mark.parametrize("page_size", [2, 16])
@pytest.mark.parametrize("seed", range(20))
def test_random_requests_get_disjoint_page_aligned_slots(page_size: int, seed: int) -> None:
    chance = random.Random(seed)
    pool = allocator(page_size)
    rows: list[list[int]] = []
    while True:
        batch = [chance.randrange(len(rows))] if rows and chance.random() < 0.5 else []
        for _ in range(chance.randrange(1, 4)):
            rows.append([])
            batch.append(len(rows) - 1)
        prefix = torch.tensor([len(rows[r]) for r in batch])
        new = torch.tensor([chance.randrange(1, 3 * page_size) for _ in batch])
        last = torch.tensor([rows[r][-1] if rows[r] else -1 for r in batch])
        before = pool.available_size()
        decode = bool((prefix > 0).all()) and chance.random() < 0.5
        if decode:
            new = torch.ones_like(new)
            slots = pool.alloc_decode(prefix + 1, prefix + 1, last)
        else:
            slots = pool.alloc_extend(prefix, prefix, prefix + new, prefix + new, last, int(new.sum()))
        needed = sum(
            -(-(p + n) // page_size) - -(-p // page_size) for p, n in zip(prefix.tolist(), new.tolist(), strict=True)
        )
        if slots is None:
            assert needed * page_size > before
            assert pool.available_size() == before
            break
        assert needed * page_size == before - pool.available_size()
        for row, part in zip(batch, slots.split(new.tolist()), strict=True):
            rows[row] += part.tolist()
    used = [slot for row in rows for slot in row]
    assert len(set(used)) == len(used)
    assert min(used) >= page_size, "page 0 is the padding page"
    for row in rows:
        for position, slot in enumerate(row):
            assert slot % page_size == position % page_size
            if position % page_size:
                assert slot == row[position - 1] + 1
    for row in rows:
        if row:
            pool.free(torch.tensor(row))
    assert pool.available_size() == PAGES * page_size


def test_page_size_1_uses_sglangs_allocator() -> None:
    pool = make_allocator(10, 1, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False)
    assert pool.alloc(10).tolist() == list(range(1, 11))
    assert pool.alloc(1) is None
