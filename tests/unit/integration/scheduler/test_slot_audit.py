"""Every page of a replica has one owner, and each way of having none or two is found."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kunserve_sgl.integration.runner.elastic_allocator import make_elastic_allocator
from kunserve_sgl.integration.scheduler.slot_audit import alike, slot_differences

FIRST, TOKENS = 32, 64


class Node:
    count = 0

    def __init__(self, value: torch.Tensor | None, lock_ref: int) -> None:
        Node.count += 1
        self.id, self.value, self.lock_ref = Node.count, value, lock_ref
        self.key = list(range(0 if value is None else len(value)))
        self.children: dict[int, Node] = {}
        self.parent: Node | None = None

    def add(self, child: Node) -> Node:
        self.children[len(self.children)] = child
        child.parent = self
        return child


class Tree:
    def __init__(self) -> None:
        self.root_node = Node(None, 1)
        self.books = [0, 0]

    def evictable_size(self) -> int:
        return self.books[0]

    def protected_size(self) -> int:
        return self.books[1]


class Scheduler:
    """Has a real allocator, and a request behind a cached prefix that it shares with nobody."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.token_to_kv_pool_allocator: Any = make_elastic_allocator(
            TOKENS, page_size, first_slot=FIRST, device="cpu", dtype=torch.float32, kvcache=None, need_sort=False
        )
        self.tree_cache = Tree()
        table = torch.zeros((5, 40), dtype=torch.int32)
        self.req_to_token_pool = SimpleNamespace(req_to_token=table, free_slots=[2, 3, 4], own_rows=range(1, 5), size=4)
        cached, own = self.take(2 * page_size), self.take(2 * page_size)
        self.locked = self.tree_cache.root_node.add(Node(cached, 2))  # by more than the root, which nobody locks
        self.evictable = self.locked.add(Node(self.take(page_size), 0))
        self.tree_cache.books = [page_size, 2 * page_size]
        length = 4 * page_size - page_size // 2
        table[1, : 4 * page_size] = torch.cat([cached, own]).int()
        table[1, length:] = 0
        self.request = SimpleNamespace(
            rid="r", req_pool_idx=1, cache_protected_len=2 * page_size, kv=SimpleNamespace(kv_allocated_len=length)
        )
        self.request.last_node = self.locked
        self.running_batch = SimpleNamespace(reqs=[self.request])
        self.last_batch = self.chunked_req = None
        self.waiting_queue: list[Any] = []
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.device = "cpu"
        self.leak = False
        self.invariant_checker = SimpleNamespace(
            pool_stats_observer=SimpleNamespace(get_pool_stats=lambda: None),
            _check_all_pools=lambda stats: (self.leak, ["available=3"]),
        )

    def take(self, tokens: int) -> torch.Tensor:
        taken: torch.Tensor = self.token_to_kv_pool_allocator.alloc(tokens)
        return taken

    def is_fully_idle(self) -> bool:
        return not self.running_batch.reqs

    @property
    def free(self) -> torch.Tensor:
        free: torch.Tensor = self.token_to_kv_pool_allocator.free_pages
        return free

    @free.setter
    def free(self, pages: torch.Tensor) -> None:
        self.token_to_kv_pool_allocator.free_pages = pages


@pytest.fixture(params=[1, 16])
def scheduler(request: pytest.FixtureRequest) -> Scheduler:
    made = Scheduler(request.param) if request.param == 1 else Scheduler(4)
    assert slot_differences(made) == []
    return made


def leak(scheduler: Scheduler) -> str:
    page = int(scheduler.take(scheduler.page_size)[0]) // scheduler.page_size
    return f"page {page} is nobody's"


def own_twice(scheduler: Scheduler) -> str:
    row = scheduler.req_to_token_pool.req_to_token[1]
    row[2 * scheduler.page_size] = row[0]
    return f"page {int(row[0]) // scheduler.page_size} is of the radix cache and of request r"


def change_a_cached_prefix(scheduler: Scheduler) -> str:
    scheduler.req_to_token_pool.req_to_token[1, 0] += 1
    return "request r: its row does not begin with the slots of the radix nodes that it holds"


def hold_another_node(scheduler: Scheduler) -> str:
    scheduler.request.last_node = scheduler.evictable
    return "request r: its row does not begin with the slots of the radix nodes that it holds"


def free_what_is_used(scheduler: Scheduler) -> str:
    page = int(scheduler.evictable.value[0]) // scheduler.page_size  # type: ignore[index]
    scheduler.free = torch.cat([scheduler.free, torch.tensor([page])])
    return f"page {page} is of the free list and of the radix cache"


def free_twice(scheduler: Scheduler) -> str:
    scheduler.free = torch.cat([scheduler.free, scheduler.free[:1]])
    return f"page {int(scheduler.free[0])} is of the free list and of the free list"


def use_another_s(scheduler: Scheduler) -> str:
    scheduler.evictable.value[:] = 8000 + torch.arange(scheduler.page_size)  # type: ignore[index]
    return f"page {8000 // scheduler.page_size} of the radix cache is not the replica's"


def free_a_row_in_use(scheduler: Scheduler) -> str:
    scheduler.req_to_token_pool.free_slots.append(1)
    return "request row 1 is of request r, and free"


def free_a_row_twice(scheduler: Scheduler) -> str:
    scheduler.req_to_token_pool.free_slots.append(3)
    return "request row 3 is free 2 times"


def free_a_foreign_row(scheduler: Scheduler) -> str:
    scheduler.req_to_token_pool.free_slots.append(9)
    return "request row 9 is free and not the replica's"


def share_a_row(scheduler: Scheduler) -> str:
    other = SimpleNamespace(rid="s", req_pool_idx=1, kv=None)
    scheduler.running_batch.reqs.append(other)
    return "request row 1 is of request s and of request r"


def lose_a_row(scheduler: Scheduler) -> str:
    scheduler.running_batch.reqs.clear()
    return "3 of 4 request rows are free, and no request is there"


def shorten_a_key(scheduler: Scheduler) -> str:
    del scheduler.evictable.key[0]
    return f"radix node {scheduler.evictable.id} has {scheduler.page_size} slots for {scheduler.page_size - 1} tokens"


def change_a_parent(scheduler: Scheduler) -> str:
    scheduler.evictable.parent = scheduler.tree_cache.root_node
    return f"radix node {scheduler.evictable.id} has another parent"


def lock_a_child_only(scheduler: Scheduler) -> str:
    scheduler.evictable.lock_ref = 3
    return f"radix node {scheduler.evictable.id} is locked 3 times, its parent 2 times"


def miscount_the_tree(scheduler: Scheduler) -> str:
    scheduler.tree_cache.books[0] += 1
    size = scheduler.page_size
    return f"the radix cache has {size} tokens to evict and {2 * size} locked; its books say ({size + 1}, {2 * size})"


def leak_by_sglang_s_count(scheduler: Scheduler) -> str:
    scheduler.running_batch.reqs.clear()
    scheduler.leak = True
    return "SGLang's own check: available=3"


SPOILING = (
    *(leak, own_twice, free_what_is_used, free_twice, use_another_s, change_a_cached_prefix, hold_another_node),
    *(free_a_row_in_use, free_a_row_twice),
    *(free_a_foreign_row, share_a_row, lose_a_row, shorten_a_key, change_a_parent, lock_a_child_only),
    *(miscount_the_tree, leak_by_sglang_s_count),
)


@pytest.mark.parametrize("spoil", SPOILING, ids=lambda spoil: str(spoil.__name__))
def test_what_is_wrong_is_found(scheduler: Scheduler, spoil: Callable[[Scheduler], str]) -> None:
    before = alike(scheduler)
    expected = spoil(scheduler)
    found = slot_differences(scheduler)
    assert any(expected in each for each in found), found
    if spoil in (leak, free_twice):
        assert alike(scheduler)["free pages"] != before["free pages"]


def test_many_are_counted_and_not_all_named(scheduler: Scheduler) -> None:
    scheduler.free = scheduler.free[:0]
    found = slot_differences(scheduler)
    assert len(found) < 12
    assert any("more of the kind" in each for each in found) or scheduler.page_size > 1
