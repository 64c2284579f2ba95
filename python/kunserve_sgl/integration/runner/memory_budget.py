"""How much memory the KV cache of a rank may take: the part of a GPU that several replicas share, and what KunServe has
beside the slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Store

from kunserve_sgl.errors import TransientError
from kunserve_sgl.memory.slot_space import KvBuffer, granule_slots
from kunserve_sgl.replica.pieces import activation_bytes


def part_of_gpu(free_bytes: int, total_bytes: int, replicas: int, fraction: float) -> int:
    """Returns the bytes that the KV cache of each of `replicas` replicas on one GPU may take, negative where there are
    none. `free_bytes` are free when all have loaded the model and nobody has a KV cache. Each leaves free, for what
    comes later, what --mem-fraction-static `fraction` leaves of its part of the `total_bytes`."""
    return free_bytes // replicas - round(total_bytes / replicas * (1 - fraction))


def least_fraction(free_bytes: int, total_bytes: int) -> float:
    """Returns the share for which `part_of_gpu` is 0."""
    return 1 - free_bytes / total_bytes


def slots_that_fit(budget_bytes: int, buffers: Sequence[KvBuffer], frame_bytes: int, page_size: int) -> int:
    """Counts the slots whose memory fits into the budget, in whole granules, with the sink, which is one more."""
    slots = granule_slots(buffers, frame_bytes, page_size)
    return max(0, budget_bytes // (slots * sum(buffer.row_bytes for buffer in buffers)) - 1) * slots


def bytes_of_slots(slots: int, buffers: Sequence[KvBuffer], frame_bytes: int, page_size: int) -> int:
    """Counts the bytes of the smallest budget into which so many slots fit; see `slots_that_fit`."""
    in_granule = granule_slots(buffers, frame_bytes, page_size)
    granules = -(-slots // in_granule)
    return (granules + 1) * in_granule * sum(buffer.row_bytes for buffer in buffers)


def activation_buffer_bytes(
    prefill_tokens: int, requests: int, hidden_size: int, dtype: torch.dtype, frame_bytes: int
) -> int:
    """Counts the bytes of the frames of a replica's activation buffer, for batches of so many tokens of prompts and a
    token of each of `requests`."""
    return -(-activation_bytes(prefill_tokens + requests, hidden_size, dtype) // frame_bytes) * frame_bytes


def most_prefill_tokens(chunk_tokens: int | None, max_prefill_tokens: int, context_tokens: int) -> int:
    """Counts the tokens of prompts that a batch can have: a chunk, or without chunks a prompt as long as the context,
    which may come by itself."""
    if chunk_tokens is not None and chunk_tokens > 0:
        return chunk_tokens
    return max(max_prefill_tokens, context_tokens)


def measured_together(store: Store, members: int, me: int, measure: Callable[[], int], timeout_s: float) -> int:
    """Returns the least of what `members` processes measure, the same at all. Nobody measures before all have called
    this, and nobody returns before all have measured. `store` is theirs alone. Raises TransientError at the timeout."""
    for step in ("loaded", "free"):
        store.set(f"{step}/{me}", "" if step == "loaded" else str(measure()))
        keys = [f"{step}/{member}" for member in range(members)]
        try:
            store.wait(keys, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            missing = [member for member, key in enumerate(keys) if not store.check([key])]
            raise TransientError(
                f"of the {members} replicas that share this GPU, number {missing} has not loaded its model within "
                f"{timeout_s:g} s of this one"
            ) from error
    return min(int(store.get(f"free/{member}")) for member in range(members))
