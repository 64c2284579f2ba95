"""Attention of batches part of whose KV is at other replicas, which are asked for theirs by messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kunserve_sgl.cpu_attention.merging import MergePlan
from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.attention_parts import Int64s, Integers, slots_of_rows
from kunserve_sgl.exchange.attention_service import BatchPart, PartAttention
from kunserve_sgl.exchange.attention_work import LSE, OUTPUT, order_tensors
from kunserve_sgl.exchange.device_copies import finish
from kunserve_sgl.exchange.kv_homes import Pattern
from kunserve_sgl.exchange.remote_attention import Division, RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations

Int32s = npt.NDArray[np.int32]

_ATTRIBUTE = "kunserve_divisions"  # on the forward batch: several may be in flight, each between two of its layers


@dataclass(frozen=True, slots=True)
class _Divided:
    """Is a batch divided for one pattern of homes: who is asked, what is here, and how that comes together."""

    division: Division
    own: BatchPart | None
    merging: MergePlan


class _Divisions:
    """Keeps what a batch has been divided into, by pattern; None where all of it is here after all."""

    def __init__(self, batch: Any, table: torch.Tensor) -> None:
        """Reads the batch's slots; it waits for the device, where they are."""
        is_decode = batch.forward_mode.is_decode()
        on_cpu = table.device.type == "cpu"
        self.lengths: Integers = batch.seq_lens.numpy() if on_cpu else batch.seq_lens_cpu.numpy()
        self.counts: Integers
        if is_decode:
            self.counts = np.ones(len(self.lengths), np.int64)
        else:
            self.counts = batch.extend_seq_lens.numpy() if on_cpu else np.asarray(batch.extend_seq_lens_cpu, np.int64)
        if on_cpu:
            self.slots = slots_of_rows(table.numpy(), batch.req_pool_indices.numpy(), self.lengths)
        else:
            self.slots = slots_on_device(table, batch.req_pool_indices, batch.seq_lens, int(self.lengths.sum()))
        self.by_pattern: dict[Pattern, _Divided | None] = {}


class DividedAttention:
    """Divides the batches of one rank, and runs their attention."""

    def __init__(
        self,
        remote: RemoteAttention,
        own: PartAttention,
        table: torch.Tensor,
        merge_plan: Callable[[int, Sequence[Int64s]], MergePlan],
    ) -> None:
        """`own` attends to what is here, in the thread that runs batches; `table` is SGLang's table of request rows.
        `merge_plan` makes a `MergePlan` for the device on which they are."""
        self._remote = remote
        self._own = own
        self._table = table
        self._merge_plan = merge_plan

    def forward(
        self, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, layer: Any, batch: Any
    ) -> torch.Tensor | None:
        """Returns output (tokens, q_heads * v_head_dim) of one layer, NaN where an answer is missing; None where all KV
        of the batch is here, and nothing has been done. Keys and values of new tokens are stored where their homes are.
        """
        began_s = time.perf_counter()
        pattern = self._remote.pattern(layer.layer_id)
        if not pattern:
            return None
        divided = self._divided(batch, layer.layer_id, pattern)
        if divided is None:
            return None
        if key is None or value is None:
            raise InvariantError(f"layer {layer.layer_id} stores no keys and values, and part of its KV is elsewhere")
        shape = self._own.shape(layer.layer_id)
        query = query.reshape(-1, shape.q_heads, shape.head_dim)
        key = key.reshape(-1, shape.kv_heads, shape.head_dim)
        # With a latent cache the value is a part of the key.
        value = value.reshape(-1, shape.kv_heads, shape.v_head_dim) if shape.value_dim else None
        division = divided.division
        pending = self._remote.ask(division, layer.layer_id, shape, query, key, value)
        found: dict[int, Activations] = {}
        own_s = 0.0
        if divided.own is not None:
            tensors = order_tensors(division.parts[self._remote.replica], query, key, value)
            own_began_s = time.perf_counter()
            found[self._remote.replica] = divided.own.attend(layer.layer_id, tensors)
            finish(query.device)  # else what is here would count as time of others, who are waited for anyway
            own_s = time.perf_counter() - own_began_s
        answers = self._remote.collect(pending)
        if answers is None:
            return query.new_full((len(query), shape.q_heads * shape.v_head_dim), torch.nan)
        output = _merged({**found, **answers}, divided, query.dtype)
        self._remote.account(pending, time.perf_counter() - began_s - own_s)
        return output.view(len(query), -1)

    def _divided(self, batch: Any, layer: int, pattern: Pattern) -> _Divided | None:
        divisions: _Divisions | None = getattr(batch, _ATTRIBUTE, None)
        if divisions is None:
            divisions = _Divisions(batch, self._table)
            setattr(batch, _ATTRIBUTE, divisions)
        if pattern not in divisions.by_pattern:
            division = self._remote.divide(layer, divisions.slots, divisions.lengths, divisions.counts)
            divisions.by_pattern[pattern] = (
                None if division is None else self._plan(division, int(divisions.counts.sum()))
            )
        return divisions.by_pattern[pattern]

    def _plan(self, division: Division, tokens: int) -> _Divided:
        own = division.parts.get(self._remote.replica)
        plan = self._merge_plan(tokens, [part.tokens for part in division.parts.values()])
        return _Divided(division, None if own is None else self._own.part(own.slots), plan)


def slots_on_device(table: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor, total: int) -> Int32s:
    """Reads the slots of a batch off the request rows as `slots_of_rows` does, where these are on a device; `total` is
    the sum of `lengths`. It waits for the current stream."""
    lengths = lengths.to(torch.int64)
    starts = rows.to(torch.int64) * table.stride(0) - (torch.cumsum(lengths, 0) - lengths)
    flat = torch.repeat_interleave(starts, lengths, output_size=total)
    flat += torch.arange(total, device=table.device)
    slots: Int32s = table.view(-1).index_select(0, flat).to(torch.int32).cpu().numpy()
    return slots


def _merged(found: Mapping[int, Activations], divided: _Divided, dtype: torch.dtype) -> torch.Tensor:
    states = []
    for home in divided.division.parts:
        output, lse = found[home][OUTPUT], found[home][LSE]
        assert output is not None
        assert lse is not None
        states.append((output, lse))
    return divided.merging.merge(states, dtype)[0]
