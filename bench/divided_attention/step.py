"""A decode step whose KV is in two places: attended to as if in one, mapped, in parts and by messages; all timed."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from divided_attention.kv import StepKv, whole_frames
from kunserve_sgl.cpu_attention.merging import MergePlan, State
from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan, DecodePlanner, PagedAttention, plan_part
from kunserve_sgl.exchange.attention_parts import AttentionPart, Int64s, divide_batch, slots_of_rows
from kunserve_sgl.exchange.attention_work import LSE, OUTPUT, AttentionShape, order_tensors
from kunserve_sgl.exchange.remote_attention import Division, RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations, notes_of, pack, unpack
from kunserve_sgl.memory.frame_export import FrameExport

HOST, OTHER = 0, 1
WARM_UP_ROUNDS = 2
SEED = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Tensors = list[torch.Tensor]  # by layer
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
        elsewhere = int(remote_share * (context - 1))  # of each request; the new token is at the layer host
        slot_bytes = shape.kv_heads * math.lcm(shape.head_dim, shape.v_head_dim) * dtype.itemsize
        self.own_slots = whole_frames(batch * (context - elsewhere), slot_bytes)
        self.slots = self.own_slots + whole_frames(batch * elsewhere, slot_bytes)
        own = torch.randperm(self.own_slots)[: batch * (context - elsewhere)].view(batch, -1)
        others = self.own_slots + torch.randperm(self.slots - self.own_slots)[: batch * elsewhere].view(batch, -1)
        self.table = torch.cat((others, own), dim=1).to(torch.int32)
        self.rows, self.ends = torch.arange(batch), torch.full((batch,), context)
        self.planner = DecodePlanner(self.table)
        self.homes: Int64s = np.full((batch, context), HOST)
        self.homes[:, :elsewhere] = OTHER
        self.homes = self.homes.reshape(-1)
        self.kv = StepKv()
        self.keys, self.values = self.buffers(layers, dtype)
        for each in (*self.keys, *self.values):
            each.copy_(torch.randn(each.shape))
        self.queries = [torch.randn(batch, shape.q_heads, shape.head_dim).to(dtype) for _ in range(layers)]
        self.mapped: tuple[Tensors, Tensors] | None = None  # the keys and values, as far as they are elsewhere mapped

    @property
    def slot_bytes(self) -> int:
        """What a token takes in a layer."""
        return sum(part[0].numel() * part[0].element_size() for part in (self.keys[0][:1], self.values[0][:1]))

    def buffers(
        self, layers: int, dtype: torch.dtype, borrowed: Sequence[FrameExport | None] | None = None
    ) -> tuple[Tensors, Tensors]:
        """Undefined keys and values of all layers, in frames of which the last are `borrowed`, buffer by buffer."""
        shapes = [(self.slots, self.shape.kv_heads, dim) for dim in (self.shape.head_dim, self.shape.v_head_dim)]
        ends = [None] * (2 * layers) if borrowed is None else borrowed
        made = [
            self.kv.buffer(shape, dtype, end)
            for shape, end in zip([each for each in shapes for _ in range(layers)], ends, strict=True)
        ]
        return made[:layers], made[layers:]

    def map_elsewhere(self, exports: Sequence[FrameExport]) -> None:
        """Maps what another process has of the KV, which is at the end of each buffer, behind a copy of the rest."""
        self.mapped = self.buffers(len(self.keys), self.keys[0].dtype, exports)
        for own, copies in ((self.keys, self.mapped[0]), (self.values, self.mapped[1])):
            for source, copy in zip(own, copies, strict=True):
                copy[: self.own_slots].copy_(source[: self.own_slots])

    def close(self) -> None:
        """Gives the memory back; nothing is attended to any more."""
        self.keys, self.values, self.mapped = [], [], None
        self.kv.close()

    def divide(self) -> tuple[dict[int, AttentionPart], dict[int, AttentionPlan], MergePlan]:
        """What the layer host and the other home do once per step, without finding the homes."""
        slots = slots_of_rows(self.table.numpy(), self.rows.numpy(), self.ends.numpy())
        parts = divide_batch(slots, self.homes, self.ends.numpy(), np.ones(len(self.rows), np.int64))
        plans = {home: plan_part(*each.slots.arrays) for home, each in parts.items()}
        return dict(parts), plans, MergePlan(len(self.rows), [each.tokens for each in parts.values()])

    def attend(
        self,
        plan: AttentionPlan,
        layer: int,
        query: torch.Tensor,
        output_dtype: torch.dtype,
        kv: tuple[Tensors, Tensors] | None = None,
    ) -> State:
        keys, values = kv or (self.keys, self.values)
        scale = self.shape.head_dim**-0.5
        return self.attention.attend(plan, query, keys[layer], values[layer], scale=scale, output_dtype=output_dtype)

    def run(self, clock: Clock, memory: torch.Tensor, turn: int, remote: RemoteAttention | None) -> float:
        """One round of all layers; returns the largest difference between the results, by the largest of them. By
        `turn` something else comes first."""
        difference = 0.0
        whole_plan = clock.timed("plan", lambda: self.planner.plan(self.rows, self.ends))
        parts, plans, merging = clock.timed("division", self.divide)
        division = Division(len(clock.rounds["plan"]), parts)
        for layer in range(len(self.queries)):
            calls = [
                partial(self.whole, clock, "local", whole_plan, layer, (self.keys, self.values)),
                partial(self.divided, clock, layer, parts, plans, merging, memory),
            ]
            if self.mapped is not None:
                calls.append(partial(self.whole, clock, "map", whole_plan, layer, self.mapped))
            if remote is not None and OTHER in parts:
                call = partial(self.asked, clock, remote, division, layer, plans[HOST], merging)
                calls.append(partial(clock.timed, "message", call))
            first = turn % len(calls)
            results = {number: calls[number]() for number in (*range(first, len(calls)), *range(first))}
            largest = results[0].abs().max().item()
            for each in results.values():
                difference = max(difference, (results[0] - each).abs().max().item() / largest)
        clock.end_round()
        return difference

    def whole(
        self, clock: Clock, what: str, plan: AttentionPlan, layer: int, kv: tuple[Tensors, Tensors]
    ) -> torch.Tensor:
        query = self.queries[layer]
        return clock.timed(what, lambda: self.attend(plan, layer, query, query.dtype, kv))[0]

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
