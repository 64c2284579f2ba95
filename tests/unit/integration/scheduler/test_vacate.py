"""Emptying a range of slots rewrites everything that names them, looking at no more of it than there is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from kunserve_sgl.integration.scheduler.kv_resize import vacate
from kunserve_sgl.memory.slot_space import SlotRange


class Allocator:
    """Pages of one slot: `used` are somebody's, `free` nobody's."""

    page_size = 1

    def __init__(self, used: list[int], free: list[int]) -> None:
        self._used, self._free = used, free

    def used_in(self, slots: SlotRange) -> torch.Tensor:
        return torch.tensor([slot for slot in self._used if slots.first <= slot < slots.stop])

    def free_outside(self, slots: SlotRange) -> torch.Tensor:
        return torch.tensor([slot for slot in self._free if not slots.first <= slot < slots.stop])

    def slots_of_pages(self, pages: torch.Tensor) -> torch.Tensor:
        return pages

    def exchange_pages(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._used = sorted({*self._used, *target.tolist()} - {*source.tolist()})


class Node:
    def __init__(self, value: list[int] | None, *children: Node) -> None:
        self.value = None if value is None else torch.tensor(value)
        self.children = dict(enumerate(children))


def request(row: int | None, prefix: list[int], allocated: int = 0) -> Any:
    kv = SimpleNamespace(kv_allocated_len=allocated) if row is not None else None
    return SimpleNamespace(req_pool_idx=row, prefix_indices=torch.tensor(prefix, dtype=torch.int64), kv=kv)


def test_all_names_of_a_slot_change_together_and_in_one_go() -> None:
    first, second = Node([10, 20]), Node([21, 11])
    root = Node(None, Node([22], first), second)
    running, waiting = request(3, [22, 20], allocated=4), request(None, [])
    rewritten: list[tuple[torch.Tensor, dict[int, int]]] = []
    rows = torch.tensor([[22, 20, 12, 21]])
    moves: list[tuple[list[int], list[int]]] = []
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=Allocator([10, 11, 12, 20, 21, 22], [13, 14, 15, 23]),
        tree_cache=SimpleNamespace(root_node=root),
        device="cpu",
        copy_slots=lambda new, old: moves.append((new.tolist(), old.tolist())),
        req_to_token_pool=SimpleNamespace(
            replace_slots=lambda moved, lengths: rewritten.append((moved(rows), lengths)),
        ),
        waiting_queue=[waiting],
        grammar_manager=SimpleNamespace(grammar_queue=[]),
        running_batch=SimpleNamespace(reqs=[running], out_cache_loc=None),
        last_batch=SimpleNamespace(reqs=[], out_cache_loc=torch.tensor([12, 21])),
        chunked_req=None,
    )
    vacated = vacate(scheduler, SlotRange(20, 4))
    assert (vacated.moved_tokens, vacated.evicted_tokens) == (3, 0)
    assert moves == [([13, 14, 15], [20, 21, 22])]
    assert [node.value.tolist() for node in (first, second, root.children[0])] == [[10, 13], [14, 11], [15]]
    assert running.prefix_indices.tolist() == [15, 13]
    assert waiting.prefix_indices.tolist() == []
    assert scheduler.last_batch.out_cache_loc.tolist() == [12, 14]
    assert [(table.tolist(), lengths) for table, lengths in rewritten] == [([[15, 13, 12, 14]], {3: 4})]
    first.value[0] = 99
    assert second.value.tolist() == [14, 11], "no two nodes share memory"


def test_a_tree_without_prefixes_has_nothing_to_rewrite() -> None:
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=Allocator([10, 20], [11, 21]),
        tree_cache=SimpleNamespace(),
        device="cpu",
        copy_slots=lambda new, old: None,
        req_to_token_pool=SimpleNamespace(replace_slots=lambda moved, lengths: None),
        waiting_queue=[],
        grammar_manager=SimpleNamespace(grammar_queue=[]),
        running_batch=None,
        last_batch=None,
        chunked_req=None,
    )
    assert vacate(scheduler, SlotRange(20, 2)).moved_tokens == 1
