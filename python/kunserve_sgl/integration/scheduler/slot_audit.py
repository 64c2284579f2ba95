"""Who has which slot of a running replica: every page is free, or one owner's, and the radix tree is a tree."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kunserve_sgl.integration.scheduler.known_requests import known_requests
from kunserve_sgl.integration.scheduler.streams import wait_for_streams

# A page that is nobody's or of two owners is most often one of many.
_MOST_NAMED = 8
_Pages = npt.NDArray[np.int64]


def slot_differences(scheduler: Any) -> list[str]:
    """Returns what is wrong with the owners of slots, between two batches. It takes a pass over the free list, the rows
    of running requests and the radix tree."""
    wait_for_streams(scheduler)  # what writes rows may still run
    tree = list(_tree(scheduler.tree_cache))
    found = [*_wrong_rows(scheduler), *_wrong_owners(scheduler, tree), *_wrong_prefixes(scheduler)]
    found += _wrong_tree(scheduler.tree_cache, tree)
    if scheduler.is_fully_idle():
        checker = scheduler.invariant_checker
        leaks, messages = checker._check_all_pools(checker.pool_stats_observer.get_pool_stats())
        if leaks:
            found.append(f"SGLang's own check: {'; '.join(messages)}")
    return found


def alike(scheduler: Any) -> dict[str, str]:
    """Returns what all ranks of a replica must have alike, by name."""
    allocator, known = scheduler.token_to_kv_pool_allocator, known_requests(scheduler)
    free = torch.cat([allocator.free_pages, allocator.release_pages]).sort()[0].cpu().numpy()
    return {
        "slots": str(allocator.slot_ranges),
        "free pages": f"{len(free)}, checksum {zlib.crc32(free.tobytes()):08x}",
        "requests": str(sorted((str(each.rid), each.req_pool_idx) for each in known.all)),
    }


def _wrong_owners(scheduler: Any, tree: list[tuple[Any, Any]]) -> Iterator[str]:
    allocator = scheduler.token_to_kv_pool_allocator
    size = allocator.page_size
    owners: list[tuple[str, _Pages]] = [
        ("the free list", torch.cat([allocator.free_pages, allocator.release_pages]).cpu().numpy()),
        ("the radix cache", _pages_of([node.value for node, _ in tree], size)),
    ]
    rows = scheduler.req_to_token_pool.req_to_token
    for request in _with_slots(scheduler):
        # What is cached is the tree's, and ends with a page.
        own = rows[request.req_pool_idx, request.cache_protected_len : request.kv.kv_allocated_len]
        owners.append((f"request {request.rid}", _pages_of([own], size)))
    pages = np.concatenate([each for _, each in owners])
    owner_of = np.repeat(np.arange(len(owners)), [len(each) for _, each in owners])
    order = np.argsort(pages, kind="stable")
    pages, owner_of = pages[order], owner_of[order]
    twice = np.flatnonzero(pages[1:] == pages[:-1])
    yield from _limited(
        f"page {pages[at]} is of {owners[owner_of[at]][0]} and of {owners[owner_of[at + 1]][0]}" for at in twice
    )
    ranges = [np.arange(each.first // size, each.stop // size) for each in allocator.slot_ranges]
    right = np.concatenate(ranges) if ranges else np.empty(0, np.int64)
    yield from _limited(
        f"page {pages[at]} of {owners[owner_of[at]][0]} is not the replica's"
        for at in np.flatnonzero(~np.isin(pages, right))
    )
    yield from _limited(f"page {page} is nobody's" for page in np.setdiff1d(right, pages))


def _wrong_prefixes(scheduler: Any) -> Iterator[str]:
    """Yields requests whose cached prefix in their row is not what the radix nodes that they hold have."""
    rows = scheduler.req_to_token_pool.req_to_token
    for request in _with_slots(scheduler):
        row = rows[request.req_pool_idx, : request.cache_protected_len]
        if not len(row):
            continue
        values, node = [], request.last_node
        while node.parent is not None:
            values.append(node.value)
            node = node.parent
        held = torch.cat(values[::-1]) if values else row[:0]
        if len(held) != len(row) or not torch.equal(held.to(row.dtype), row):
            yield f"request {request.rid}: its row does not begin with the slots of the radix nodes that it holds"


def _wrong_rows(scheduler: Any) -> Iterator[str]:
    pool = scheduler.req_to_token_pool
    free = Counter(pool.free_slots)
    yield from _limited(f"request row {row} is free {count} times" for row, count in free.items() if count > 1)
    yield from _limited(f"request row {row} is free and not the replica's" for row in free if row not in pool.own_rows)
    holders: dict[int, Any] = {}
    for request in known_requests(scheduler).running:
        row = request.req_pool_idx
        if row is None:
            continue
        if row in free:
            yield f"request row {row} is of request {request.rid}, and free"
        if row in holders:
            yield f"request row {row} is of request {request.rid} and of request {holders[row].rid}"
        holders[row] = request
    if scheduler.is_fully_idle() and len(free) != pool.size:
        yield f"{len(free)} of {pool.size} request rows are free, and no request is there"


def _wrong_tree(tree_cache: Any, tree: list[tuple[Any, Any]]) -> Iterator[str]:
    cached = locked = 0
    for node, parent in tree:
        cached += len(node.value)
        locked += len(node.value) if node.lock_ref > 0 else 0
        if node.parent is not parent:
            yield f"radix node {node.id} has another parent than the node that it is a child of"
        if len(node.value) != len(node.key):
            yield f"radix node {node.id} has {len(node.value)} slots for {len(node.key)} tokens"
        # Whoever locks a node locks all above it, but for the root.
        if node.lock_ref < 0 or (parent is not tree_cache.root_node and node.lock_ref > parent.lock_ref):
            yield f"radix node {node.id} is locked {node.lock_ref} times, its parent {parent.lock_ref} times"
    books = tree_cache.evictable_size(), tree_cache.protected_size()
    if tree and books != (cached - locked, locked):
        yield f"the radix cache has {cached - locked} tokens to evict and {locked} locked; its books say {books}"


def _with_slots(scheduler: Any) -> list[Any]:
    running = known_requests(scheduler).running
    return [each for each in running if each.kv is not None and each.req_pool_idx is not None]


def _tree(tree_cache: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the nodes of the radix tree that hold slots, each with the node that it is a child of."""
    root = getattr(tree_cache, "root_node", None)
    stack = [] if root is None else [(child, root) for child in root.children.values()]
    while stack:
        node, parent = stack.pop()
        if node.value is not None:
            yield node, parent
        stack.extend((child, node) for child in node.children.values())


def _pages_of(slots: list[torch.Tensor], page_size: int) -> _Pages:
    """Returns the pages of slots, the first of each tensor being the first of a page."""
    pages = [each[::page_size] // page_size for each in slots]
    return torch.cat(pages).cpu().numpy().astype(np.int64) if pages else np.empty(0, np.int64)


def _limited(differences: Iterable[str]) -> Iterator[str]:
    """Yields the first few, and how many more there are."""
    more = 0
    for number, difference in enumerate(differences):
        if number < _MOST_NAMED:
            yield difference
        else:
            more += 1
    if more:
        yield f"and {more} more of the kind"
