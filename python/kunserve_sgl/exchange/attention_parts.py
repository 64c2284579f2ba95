"""The division of a batch by the homes of its KV: who attends to what, so that each home is asked once per layer.

Remote attention by message (KunServe, arXiv 2412.18169v2; DistAttention in Infinite-LLM, arXiv 2401.02669): where a
layer host cannot map the KV of a batch, it sends the queries to the KV's homes, and these attend to what they have.
What the layer host's own memory has is one of the parts.

A part has every slot of its home, those of the batch's new tokens included. So a home first stores the new keys and
values that belong there, and then attends. The causal rule is one of positions, and the same at each home; where a home
has none of the new tokens, all of its part lies before all queries, and the rule hides nothing.

The layer host makes the division once per batch and pattern of homes (`KvHomes.pattern`), and uses it in all layers
with that pattern. A batch that is all at one home is one part, which takes the place of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kunserve_sgl.exchange.device_copies import on_device

Int64s = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class PartSlots:
    """Says what a home attends to, as it needs to know it. Slot numbers hold in every replica. Its requests are those
    of the batch that have KV there and new tokens, in the order of the batch.

    `query_counts`, `first_positions`, `slot_counts`: int64 (requests,), new tokens of each request, the position of the
    first of them, and the slots at this home. `slots`, `positions`: int32 (entries,), request by request and in each by
    ascending position.
    """

    query_counts: Int64s
    first_positions: Int64s
    slot_counts: Int64s
    slots: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]

    @property
    def arrays(self) -> tuple[Integers, Integers, Integers, Integers, Integers]:
        """Gives all five, as `cpu_attention.paged_attention.plan_part` takes them: slots, positions, slot_counts,
        query_counts, first_positions."""
        return self.slots, self.positions, self.slot_counts, self.query_counts, self.first_positions

    @property
    def queries(self) -> int:
        """Counts the query tokens."""
        return int(self.query_counts.sum())

    @property
    def new_slots(self) -> npt.NDArray[np.int32]:
        """Gives the slots of new tokens, in the order of their keys and values: the home writes them before it
        attends."""
        return self.slots[self.positions >= np.repeat(self.first_positions, self.slot_counts)]


@dataclass(frozen=True, eq=False)
class AttentionPart:
    """Holds what one home does for a batch, and which of the batch's tokens that is about: `tokens` are the queries,
    `new_tokens` those whose keys and values are stored there, as indices into the batch's new tokens, int64 (n,),
    ascending."""

    slots: PartSlots
    tokens: Int64s
    new_tokens: Int64s
    _indices: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives `tokens` and `new_tokens` on a device, where they go once for all layers."""
        found = self._indices.get(device)
        if found is None:
            tokens, new_tokens = on_device(device, self.tokens, self.new_tokens)
            found = self._indices[device] = tokens, new_tokens
        return found


def slots_of_rows(table: Integers, rows: Integers, lengths: Integers) -> npt.NDArray[np.int32]:
    """Reads the slots of a batch off the request rows: int32 (sum of lengths,), request by request. `table` is (rows,
    positions), `rows` and `lengths` are (requests,)."""
    lengths = lengths.astype(np.int64)
    starts = rows.astype(np.int64) * table.shape[1] - (np.cumsum(lengths) - lengths)
    flat = np.repeat(starts, lengths)
    flat += np.arange(len(flat))
    slots: npt.NDArray[np.int32] = table.reshape(-1)[flat].astype(np.int32)
    return slots


def divide_batch(
    slots: Integers, homes: Int64s, lengths: Integers, query_counts: Integers
) -> Mapping[int, AttentionPart]:
    """Divides a batch in which request i has `lengths[i]` tokens, of which the last `query_counts[i]` are new.

    Args:
        slots: integers (sum of lengths,), the slots of all tokens, request by request (`slots_of_rows`).
        homes: int64 (sum of lengths,), the home of each slot in the layers that this is for (`KvHomes.of`).
        lengths: integers (requests,).
        query_counts: integers (requests,); 0 leaves the request out, all of `lengths` is a prefill without prefix.

    Returns:
        the part of each home that has any, by home, ascending. Every new token is among the tokens of as many parts as
        its request has homes, and among the new tokens of one.

    Raises:
        ValueError: the arrays do not fit together.
    """
    lengths, counts = lengths.astype(np.int64), query_counts.astype(np.int64)
    if len(lengths) != len(counts) or ((counts < 0) | (counts > lengths)).any():
        raise ValueError(f"{counts.tolist()} new tokens of requests of {lengths.tolist()} tokens")
    total = int(lengths.sum())
    if slots.shape != (total,) or homes.shape != (total,):
        raise ValueError(f"requests of {total} tokens with {slots.shape} slots and {homes.shape} homes")
    offsets = np.cumsum(lengths) - lengths
    requests = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(total) - offsets[requests]
    firsts = lengths - counts  # of new tokens
    starts = np.cumsum(counts) - counts
    has_queries = (counts > 0)[requests]
    return {
        int(home): _part(
            np.flatnonzero((homes == home) & has_queries), requests, positions, slots, counts, firsts, starts
        )
        for home in np.flatnonzero(np.bincount(homes[has_queries]))
    }


def _part(
    entries: Int64s,
    requests: Int64s,
    positions: Int64s,
    slots: Integers,
    counts: Int64s,
    firsts: Int64s,
    starts: Int64s,
) -> AttentionPart:
    owners, places = requests[entries], positions[entries]
    per_request = np.bincount(owners, minlength=len(counts))
    asked = np.flatnonzero(per_request)
    tokens = np.repeat(starts[asked] - (np.cumsum(counts[asked]) - counts[asked]), counts[asked])
    tokens += np.arange(len(tokens))
    after_prefix = places - firsts[owners]
    is_new = after_prefix >= 0
    return AttentionPart(
        PartSlots(
            counts[asked],
            firsts[asked],
            per_request[asked],
            slots[entries].astype(np.int32),
            places.astype(np.int32),
        ),
        tokens,
        (starts[owners] + after_prefix)[is_new],
    )
