"""Empties a range of slots on a running replica: moves what requests and the radix cache keep there elsewhere.

Runs at a scheduler's safe point, between two batches. Every tensor-parallel rank of a replica has the same requests,
the same radix tree and the same free list, so each does the same by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.scheduler.known_requests import batches, known_requests
from kunserve_sgl.integration.scheduler.streams import wait_for_streams
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.engine import SlotsInUseError, Vacated


def check_tree_cache(tree_cache: Any) -> None:
    """Raises ConfigurationError for a prefix cache whose nodes this module cannot rewrite."""
    known = ("RadixCache", "ChunkCache")
    if type(tree_cache).__name__ not in known:
        raise ConfigurationError(
            f"KunServe does not support the prefix cache {type(tree_cache).__name__}; accepted: {', '.join(known)}"
        )


def vacate(scheduler: Any, slots: SlotRange) -> Vacated:
    """Makes every slot of `slots` free. Evicts from the radix cache only what has no room elsewhere, least recently
    used first; moves the rest. Cost: the bytes of the moved tokens in all layers, and a pass over the rows of running
    requests and the radix tree.

    Raises SlotsInUseError, with nothing changed.
    """
    allocator, tree_cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    page_size = allocator.page_size
    used_tokens = len(allocator.used_in(slots)) * page_size
    shortage = used_tokens - len(allocator.free_outside(slots)) * page_size
    evicted = 0
    if shortage > 0:
        if tree_cache.evictable_size() < shortage:
            raise SlotsInUseError(
                f"{used_tokens} tokens live in the slots to be taken, {used_tokens - shortage} are free elsewhere "
                f"and {tree_cache.evictable_size()} can be evicted from the radix cache"
            )
        before = allocator.available_size()
        tree_cache.evict(EvictParams(num_tokens=shortage))
        evicted = allocator.available_size() - before
    source = allocator.used_in(slots)
    room = allocator.free_outside(slots)
    if len(source) > len(room):
        raise SlotsInUseError(f"{len(source)} pages live in the slots to be taken, {len(room)} are free elsewhere")
    if len(source):
        _move(scheduler, source, torch.sort(room)[0][: len(source)], slots)
    return Vacated(evicted, len(source) * page_size)


def _move(scheduler: Any, source: torch.Tensor, target: torch.Tensor, slots: SlotRange) -> None:
    """Moves the used pages `source` to the free pages `target` and rewrites all that names their slots."""
    # A forward of the last batch may still be running, and writes to the slots it was given.
    wait_for_streams(scheduler)
    allocator = scheduler.token_to_kv_pool_allocator
    old, new = allocator.slots_of_pages(source), allocator.slots_of_pages(target)
    scheduler.copy_slots(new, old)
    allocator.exchange_pages(target, source)
    place = torch.arange(slots.first, slots.stop, dtype=torch.int64, device=old.device)
    place[old - slots.first] = new

    def moved(ids: torch.Tensor) -> torch.Tensor:
        inside = (ids >= slots.first) & (ids < slots.stop)
        return torch.where(inside, place[(ids - slots.first).clamp(0, slots.count - 1)].to(ids.dtype), ids)

    known = known_requests(scheduler)
    lengths = {r.req_pool_idx: r.kv.kv_allocated_len for r in known.running if r.req_pool_idx is not None and r.kv}
    scheduler.req_to_token_pool.replace_slots(moved, lengths)
    # All together: by itself each would take several kernels, and there are as many nodes as there are prefixes.
    nodes = list(_nodes(scheduler.tree_cache))
    for node, value in zip(nodes, _together(moved, [node.value for node in nodes]), strict=True):
        node.value = value
    requests = [each for each in known.all if each.prefix_indices is not None and len(each.prefix_indices)]
    for request, prefix in zip(requests, _together(moved, [each.prefix_indices for each in requests]), strict=True):
        request.prefix_indices = prefix
    for batch in batches(scheduler):
        if batch.out_cache_loc is not None:
            batch.out_cache_loc = moved(batch.out_cache_loc)


def _together(moved: Callable[[torch.Tensor], torch.Tensor], tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Returns what `moved` gives for each of `tensors`, one-dimensional and of one dtype. It is called once. No two
    share memory."""
    if not tensors:
        return ()
    parts = torch.split(moved(torch.cat(list(tensors))), [len(each) for each in tensors])
    return [part.clone() for part in parts]


def _nodes(tree_cache: Any) -> Iterator[Any]:
    """Yields all nodes of the radix tree that hold slots."""
    root = getattr(tree_cache, "root_node", None)
    stack = [] if root is None else list(root.children.values())
    while stack:
        node = stack.pop()
        if node.value is not None:
            yield node
        stack.extend(node.children.values())
