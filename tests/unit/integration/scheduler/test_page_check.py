"""SGLang's check of every page with our patch: which pages it finds in two places, and what it lets pass."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _patching import patched_module

MODULE = "sglang.srt.managers.scheduler_components.invariant_checker"
PAGE_TOKENS = 4
IN_USE = [1, 2, 9]  # pages of the one request


@pytest.fixture(scope="module")
def check() -> Iterator[Any]:
    """The patched method, for a checker of any kind."""
    with patched_module(MODULE) as made:
        yield made.SchedulerInvariantChecker._check_kv_page_invariants


def checker(free: list[int], released: list[int]) -> SimpleNamespace:
    """Of SGLang's checker, what the method asks for: one request with `IN_USE`, and the free pages."""
    slots = torch.tensor([page * PAGE_TOKENS + i for page in IN_USE for i in range(PAGE_TOKENS)], dtype=torch.int32)
    table = torch.zeros(2, 32, dtype=torch.int32)
    table[1, : len(slots)] = slots
    kv = SimpleNamespace(kv_allocated_len=len(slots))
    request = SimpleNamespace(rid="r", kv=kv, req_pool_idx=1, kv_committed_len=len(slots) - 1)
    pages = {"free_pages": torch.tensor(free, dtype=torch.int64), "release_pages": torch.tensor(released).long()}
    return SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        get_last_batch=lambda: SimpleNamespace(reqs=[request]),
        tree_cache=SimpleNamespace(),
        token_to_kv_pool_allocator=SimpleNamespace(**pages),
        page_size=PAGE_TOKENS,
    )


@pytest.mark.parametrize(
    ("free", "released"),
    [([3, 4, 5], []), ([20, 3], [4]), ([], []), ([], [7])],
    ids=["few", "more", "none", "released"],
)
def test_pages_that_are_in_one_place_pass(check: Any, free: list[int], released: list[int]) -> None:
    check(checker(free, released))


@pytest.mark.parametrize(
    ("free", "released", "message"),
    [
        ([3, 4, 3, 3, 5, 5], [], "sub-pool 0 has 3 duplicate pages"),
        ([3, 4], [4], "sub-pool 0 has 1 duplicate pages"),
        ([3, 9, 30], [], "KV page use-after-free: 4 owner page refs are in the free pool, sample pages=[9]"),
        ([3], [2, 1], "KV page use-after-free: 8 owner page refs are in the free pool, sample pages=[1, 2]"),
    ],
)
def test_a_page_in_two_places_is_found(check: Any, free: list[int], released: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=r"^KV ") as error:
        check(checker(free, released))
    assert message in str(error.value)
