"""A decode step whose KV is in two places: attended to at once, in two parts, and by messages, each of them timed."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from kunserve_sgl.cpu_attention.merging import MergePlan, State
from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan, PagedAttention, plan_decode, plan_part
from kunserve_sgl.exchange.attention_parts import AttentionPart, Int64s, divide_batch, slots_of_rows
from kunserve_sgl.exchange.attention_work import LSE, OUTPUT, AttentionShape, order_tensors
from kunserve_sgl.exchange.remote_attention import Division, RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations, notes_of, pack, unpack

HOST, OTHER = 0, 1
WARM_UP_ROUNDS = 2
SEED = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_T = TypeVar("_T")


class Clock:
    """Adds up what each step of a round takes."""

    def __init__(self) -> None:
        self.rounds: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = defaultdict(float)

    def timed(self, what: str, call: Callable[[], _T]) -> _T:
        started_s = time.perf_counter()
        result = call()
        self._now[what] += time.perf_counter() - started_s
        return result

    def add(self, what: str, seconds: float) -> None:
        self._now[what] += seconds

    def end_round(self) -> None:
        for what, elapsed_s in self._now.items():
            self.rounds[what].append(elapsed_s)
        self._now.clear()

    def median_us(self, what: str, share: float = 1.0) -> float:
        return 1e6 * share * statistics.median(self.rounds[what][WARM_UP_ROUNDS:])


class Step:
    """A decode step over KV of random numbers. Slots of a request lie anywhere, as in a pool in use for a while."""

    def __init__(self, shape: AttentionShape, layers: int, batch: int, context: int, remote_share: float) -> None:
        torch.manual_seed(SEED)  # the other home has the same
        self.shape = shape
        self.attention = PagedAttention()
        dtype = DTYPES[shape.dtype]
        total = batch * context
        self.table = torch.randperm(total).to(torch.int32).view(batch, context)
        self.rows, self.ends = torch.arange(batch), torch.full((batch,), context)
        self.homes: Int64s = np.full((batch, context), HOST)
        self.homes[:, : int(remote_share * (context - 1))] = OTHER  # the new token is at the layer host
        self.homes = self.homes.reshape(-1)
        key_shape, value_shape = (total, shape.kv_heads, shape.head_dim), (total, shape.kv_heads, shape.v_head_dim)
        self.keys = [torch.randn(key_shape).to(dtype) for _ in range(layers)]
        self.values = [torch.randn(value_shape).to(dtype) for _ in range(layers)]
        self.queries = [torch.randn(batch, shape.q_heads, shape.head_dim).to(dtype) for _ in range(layers)]

    @property
    def slot_bytes(self) -> int:
        """What a token takes in a layer."""
        return sum(part[0].numel() * part[0].element_size() for part in (self.keys[0][:1], self.values[0][:1]))

    def divide(self) -> tuple[dict[int, AttentionPart], dict[int, AttentionPlan], MergePlan]:
        """What the layer host and the other home do once per step, without finding the homes."""
        slots = slots_of_rows(self.table.numpy(), self.rows.numpy(), self.ends.numpy())
        parts = divide_batch(slots, self.homes, self.ends.numpy(), np.ones(len(self.rows), np.int64))
        plans = {home: plan_part(*each.slots.arrays) for home, each in parts.items()}
        return dict(parts), plans, MergePlan(len(self.rows), [each.tokens for each in parts.values()])

    def attend(self, plan: AttentionPlan, layer: int, query: torch.Tensor, output_dtype: torch.dtype) -> State:
        scale = self.shape.head_dim**-0.5
        return self.attention.attend(
            plan, query, self.keys[layer], self.values[layer], scale=scale, output_dtype=output_dtype
        )

    def run(self, clock: Clock, memory: torch.Tensor, undivided_first: bool, remote: RemoteAttention | None) -> float:
        """One round of all layers; returns the largest difference between the results, by the largest of them."""
        difference = 0.0
        whole_plan = clock.timed("plan", lambda: plan_decode(self.table, self.rows, self.ends))
        parts, plans, merging = clock.timed("division", self.divide)
        division = Division(len(clock.rounds["plan"]), parts)
        for layer, query in enumerate(self.queries):
            results: dict[bool, torch.Tensor] = {}
            for undivided in (undivided_first, not undivided_first):
                if undivided:
                    call = partial(self.attend, whole_plan, layer, query, query.dtype)
                    results[True], _ = clock.timed("undivided", call)
                else:
                    results[False] = self.divided(clock, layer, parts, plans, merging, memory)
            found = [results[False]]
            if remote is not None and OTHER in parts:
                call = partial(self.asked, clock, remote, division, layer, plans[HOST], merging)
                found.append(clock.timed("message", call))
            largest = results[True].abs().max().item()
            for each in found:
                difference = max(difference, (results[True] - each).abs().max().item() / largest)
        clock.end_round()
        return difference

    def divided(
        self,
        clock: Clock,
        layer: int,
        parts: dict[int, AttentionPart],
        plans: dict[int, AttentionPlan],
        merging: MergePlan,
        memory: torch.Tensor,
    ) -> torch.Tensor:
        query = self.queries[layer]
        states: dict[int, State] = {}
        if OTHER in parts:
            asked = clock.timed("copies", lambda: through(order_tensors(parts[OTHER], query, None, None), memory))
            of_other = asked["query"]
            assert of_other is not None
            output, lse = clock.timed("other", lambda: self.attend(plans[OTHER], layer, of_other, torch.float32))
            found = clock.timed("copies", lambda: through({OUTPUT: output, LSE: lse}, memory))
            assert found[OUTPUT] is not None
            assert found[LSE] is not None
            states[OTHER] = found[OUTPUT], found[LSE]
        states[HOST] = clock.timed("host", lambda: self.attend(plans[HOST], layer, query, torch.float32))
        return clock.timed("merging", lambda: merging.merge([states[home] for home in parts], query.dtype)[0])

    def asked(
        self,
        clock: Clock,
        remote: RemoteAttention,
        division: Division,
        layer: int,
        own: AttentionPlan,
        merging: MergePlan,
    ) -> torch.Tensor:
        query = self.queries[layer]
        pending = remote.ask(division, layer, self.shape, query, None, None)
        states = {HOST: clock.timed("message own", lambda: self.attend(own, layer, query, torch.float32))}
        answers = remote.collect(pending)
        assert answers is not None, "the other home has not answered"
        clock.add("attending", pending.attending_us[OTHER] / 1e6)
        output, lse = answers[OTHER][OUTPUT], answers[OTHER][LSE]
        assert output is not None
        assert lse is not None
        states[OTHER] = output, lse
        return merging.merge([states[home] for home in division.parts], query.dtype)[0]


def through(tensors: Activations, memory: torch.Tensor) -> Activations:
    """Packs tensors as they are sent, and unpacks them."""
    notes = notes_of(tensors, None)
    pack(tensors, None, memory)
    return unpack(notes, memory)
