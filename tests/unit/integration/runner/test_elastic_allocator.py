"""The elastic allocators: ranges come and go, nothing is handed out twice, and capacity is always what it says."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.integration.runner.elastic_allocator import make_elastic_allocator
from kunserve_sgl.memory.slot_space import SlotRange

FIRST = 128
BASE = 96


def allocator(page_size: int) -> Any:
    return make_elastic_allocator(
        BASE, page_size, first_slot=FIRST, device="cpu", dtype=torch.float32, kvcache=None, need_sort=False
    )


def take(pool: Any, tokens: int) -> list[int]:
    slots = pool.alloc(tokens)
    assert slots is not None
    return slots.tolist()


@pytest.mark.parametrize("page_size", [1, 16])
def test_slots_come_from_the_base_range(page_size: int) -> None:
    pool = allocator(page_size)
    assert pool.size == pool.available_size() == BASE
    assert sorted(take(pool, BASE)) == list(range(FIRST, FIRST + BASE))
    assert pool.alloc(page_size) is None
    pool.clear()
    assert pool.available_size() == BASE


@pytest.mark.parametrize("page_size", [1, 16])
def test_range_is_added_and_removed_again(page_size: int) -> None:
    pool = allocator(page_size)
    extension = SlotRange(512, 64)
    base = take(pool, BASE)
    pool.add_slots(extension)
    assert pool.size == BASE + 64
    assert sorted(take(pool, 64)) == list(range(512, 576))
    with pytest.raises(InvariantError, match="in use"):
        pool.remove_slots(extension)
    pool.free(torch.arange(512, 576))
    pool.free(torch.tensor(base))
    pool.remove_slots(extension)
    assert pool.size == pool.available_size() == BASE
    assert pool.slot_ranges == (SlotRange(FIRST, BASE),)
    pool.clear()
    assert sorted(take(pool, BASE)) == list(range(FIRST, FIRST + BASE))


def test_overlapping_range_is_refused() -> None:
    pool = allocator(1)
    with pytest.raises(InvariantError, match="overlaps"):
        pool.add_slots(SlotRange(FIRST + BASE - 1, 10))
    assert pool.size == BASE


def test_part_of_a_range_can_go_and_come_back() -> None:
    pool = allocator(16)
    pool.remove_slots(SlotRange(FIRST + 32, 32))
    assert pool.slot_ranges == (SlotRange(FIRST, 32), SlotRange(FIRST + 64, 32))
    assert pool.size == pool.available_size() == 64
    pool.add_slots(SlotRange(FIRST + 32, 32))
    assert sorted(take(pool, BASE)) == list(range(FIRST, FIRST + BASE))


@pytest.mark.parametrize("page_size", [1, 16])
def test_preference_decides_where_slots_come_from(page_size: int) -> None:
    pool = allocator(page_size)
    extension = SlotRange(512, 64)
    pool.add_slots(extension)
    pool.prefer(extension)
    assert all(slot in extension for slot in take(pool, 32))
    pool.prefer(SlotRange(FIRST, BASE))
    assert all(slot not in extension for slot in take(pool, 32))
    pool.prefer(None)
    assert len(take(pool, BASE + 64 - 64)) == BASE
    assert pool.available_size() == 0


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("seed", range(10))
def test_random_requests_and_ranges(page_size: int, seed: int) -> None:
    """Thousands of steps: no slot has two owners, none lies outside the ranges, the books balance."""
    chance = random.Random(seed)
    pool = allocator(page_size)
    granule = 32
    owned: list[list[int]] = []
    extensions: list[SlotRange] = []
    for step in range(600):
        action = chance.random()
        if action < 0.4:
            slots = pool.alloc(page_size * chance.randrange(1, 5))
            if slots is not None:
                owned.append(slots.tolist())
        elif action < 0.75 and owned:
            pool.free(torch.tensor(owned.pop(chance.randrange(len(owned)))))
        elif action < 0.85:
            added = SlotRange(1024 + step * granule, granule)
            pool.add_slots(added)
            extensions.append(added)
        elif extensions:
            gone = extensions[chance.randrange(len(extensions))]
            used = pool.slots_of_pages(pool.used_in(gone)).tolist()
            assert sorted(used) == sorted(slot for slots in owned for slot in slots if slot in gone)
            if used:
                with pytest.raises(InvariantError):
                    pool.remove_slots(gone)
            else:
                pool.remove_slots(gone)
                extensions.remove(gone)
        flat = [slot for slots in owned for slot in slots]
        assert len(set(flat)) == len(flat)
        allowed = [SlotRange(FIRST, BASE), *extensions]
        assert all(any(slot in slots for slots in allowed) for slot in flat)
        assert pool.size == sum(slots.count for slots in allowed)
        assert pool.available_size() == pool.size - len(flat)


@pytest.mark.parametrize("page_size", [1, 16])
def test_exchange_moves_ownership(page_size: int) -> None:
    pool = allocator(page_size)
    extension = SlotRange(512, 64)
    pool.add_slots(extension)
    pool.prefer(extension)
    take(pool, 32)
    source, room = pool.used_in(extension), pool.free_outside(extension)
    target = room[: len(source)]
    pool.exchange_pages(target, source)
    assert len(pool.used_in(extension)) == 0
    assert pool.available_size() == pool.size - 32
    pool.remove_slots(extension)
    assert sorted(pool.used_in(SlotRange(FIRST, BASE)).tolist()) == sorted(target.tolist())


@pytest.mark.parametrize("page_size", [1, 16])
def test_withheld_tokens_count_as_no_capacity_and_can_still_be_given(page_size: int) -> None:
    pool = allocator(page_size)
    extension = SlotRange(512, 64)
    pool.add_slots(extension)
    held = pool.alloc(BASE + 32)
    pool.withhold(extension.count)
    assert (pool.size, pool.available_size()) == (BASE, -32)
    assert pool.alloc(page_size) is not None, "a prompt in the middle of its prefill gets to its end"
    pool.free(held)
    assert pool.available_size() == BASE - page_size
    pool.withhold(0)
    assert (pool.size, pool.available_size()) == (BASE + 64, BASE + 64 - page_size)
    pool.clear()
    pool.withhold(extension.count)
    pool.remove_slots(extension)
    assert (pool.withheld, pool.size, pool.available_size()) == (0, BASE, BASE)
