"""Attention over all of a batch's KV against attention over two parts of it and their merging, in one process and two.

    python bench/remote_attention.py [--batch 1 16] [--context 300 1024 4096] [--remote-share 0.5] [--dtype float32]

A decode step of a batch in which every request has so much of its context elsewhere, as after a drop. Per layer and
token: the undivided batch; the part of the layer host; the part of the other home; merging; and what is copied in and
out of messages, which are packed but not sent. The layer host attends to its own part while the other home does to its,
so a layer takes at least the longer of both, the copies and the merging ("time"); all of it together is what it costs
("work"). Beside it, once per step and shared by all layers: the division and the plans. "message" is what a layer takes
where the other home is another process that is asked as a server does.

Everything is timed in turn in each round, so that drift of the machine meets all alike; figures are medians. Each layer
has buffers of its own, so that keys and values come from memory as in serving. The results are compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TypeVar

# Before torch: one thread, as one replica of several on a machine has. Set it to measure with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from kunserve_sgl.cpu_attention.merging import MergePlan, State
from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan, PagedAttention, plan_decode, plan_part
from kunserve_sgl.exchange.attention_parts import AttentionPart, Int64s, PartSlots, divide_batch, slots_of_rows
from kunserve_sgl.exchange.attention_service import AttentionService, KvPart, PartAttention
from kunserve_sgl.exchange.attention_work import LSE, OUTPUT, QUERY, AttentionShape, order_tensors, slots_bytes
from kunserve_sgl.exchange.kv_homes import KvHomes
from kunserve_sgl.exchange.memory_reads import ReadService
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.remote_attention import Division, RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations, notes_of, pack, unpack
from kunserve_sgl.memory.slot_space import SlotRange

HOST, OTHER = 0, 1
WARM_UP_ROUNDS = 2
LONGEST_WAIT_S = 60.0
SEED = 0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Costs:
    """Medians, in microseconds: of one layer per token of the batch, and of what is done once per step."""

    dtype: str
    batch: int
    context: int
    undivided_us: float
    host_part_us: float
    other_part_us: float
    copies_us: float
    merging_us: float
    message_us: float  # 0 where nothing is elsewhere
    undivided_plan_step_us: float
    division_step_us: float
    order_bytes: int  # per layer, for the whole batch
    answer_bytes: int
    slots_bytes: int  # per step
    largest_difference: float

    @property
    def work_ratio(self) -> float:
        """What all that is computed takes, of the undivided batch's time."""
        parts = self.host_part_us + self.other_part_us
        return (parts + self.copies_us + self.merging_us) / self.undivided_us

    @property
    def time_ratio(self) -> float:
        """What a layer takes at least, where the parts are computed at the same time, of the undivided batch's time."""
        longer = max(self.host_part_us, self.other_part_us)
        return (longer + self.copies_us + self.merging_us) / self.undivided_us

    @property
    def message_ratio(self) -> float:
        """What a layer takes that asks another process, of the undivided batch's time."""
        return self.message_us / self.undivided_us


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
                call = partial(self.asked, remote, division, layer, plans[HOST], merging)
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
        self, remote: RemoteAttention, division: Division, layer: int, own: AttentionPlan, merging: MergePlan
    ) -> torch.Tensor:
        query = self.queries[layer]
        pending = remote.ask(division, layer, self.shape, query, None, None)
        states = {HOST: self.attend(own, layer, query, torch.float32)}
        answers = remote.collect(pending)
        assert answers is not None, "the other home has not answered"
        output, lse = answers[OTHER][OUTPUT], answers[OTHER][LSE]
        assert output is not None
        assert lse is not None
        states[OTHER] = output, lse
        return merging.merge([states[home] for home in division.parts], query.dtype)[0]


class OtherHome(PartAttention):
    """Attends in the process of the other home, to the same KV, all of which is lent."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def shape(self, layer: int) -> AttentionShape:
        return self.step.shape

    def part(self, slots: PartSlots) -> KvPart:
        return OtherPart(self.step, slots)

    @contextmanager
    def held(self, borrower: int, layer: int, loans: Sequence[int]) -> Iterator[list[SlotRange]]:
        yield [SlotRange(0, self.step.table.numel())]

    @contextmanager
    def held_bytes(self, borrower: int, loan: int) -> Iterator[Sequence[torch.Tensor]]:
        yield ()


class OtherPart(KvPart):
    def __init__(self, step: Step, slots: PartSlots) -> None:
        self.step = step
        self.plan = plan_part(*slots.arrays)

    def attend(self, layer: int, tensors: Activations) -> Activations:
        query = tensors[QUERY]
        assert query is not None
        output, lse = self.step.attend(self.plan, layer, query, torch.float32)
        return {OUTPUT: output, LSE: lse}


def serve(address: str, started: Event, ended: Event, shape: AttentionShape, layers: int, *step: float) -> None:
    """The process of the other home."""
    batch, context, share = step
    home = OtherHome(Step(shape, layers, int(batch), int(context), share))
    attention = AttentionService(OTHER, 2, layers, home, home)
    service = MemoryService(address, 0, attention, ReadService(OTHER, 2, home), lambda offer: None)
    service.start()
    started.set()
    ended.wait()
    service.close()


@contextmanager
def other_home(*step: float | AttentionShape) -> Iterator[RemoteAttention]:
    """The way to another process that has the KV of a step, which the arguments of `Step` say."""
    context = multiprocessing.get_context("spawn")
    started, ended = context.Event(), context.Event()
    with tempfile.TemporaryDirectory() as directory:
        address = f"ipc://{directory}/home"
        process = context.Process(target=serve, args=(address, started, ended, *step), daemon=True)
        process.start()
        link = PeerLink(HOST, 0, f"ipc://{directory}/inbox")
        remote = RemoteAttention(link, lambda: KvHomes(HOST, []), lambda home: address, 1, LONGEST_WAIT_S)
        try:
            assert started.wait(LONGEST_WAIT_S), "the other home has not started"
            yield remote
        finally:
            ended.set()
            process.join(LONGEST_WAIT_S)
            remote.close()
            link.close()


def through(tensors: Activations, memory: torch.Tensor) -> Activations:
    """Packs tensors as they are sent, and unpacks them."""
    notes = notes_of(tensors, None)
    pack(tensors, None, memory)
    return unpack(notes, memory)


def measure(shape: AttentionShape, layers: int, batch: int, context: int, share: float, rounds: int) -> Costs:
    step = Step(shape, layers, batch, context, share)
    clock = Clock()
    memory = torch.empty(max(shape.order_bytes(batch, batch), shape.answer_bytes(batch)), dtype=torch.uint8)
    difference = 0.0
    with other_home(shape, layers, batch, context, share) if share else nullcontext() as remote:
        for number in range(WARM_UP_ROUNDS + rounds):
            difference = max(difference, step.run(clock, memory, number % 2 == 0, remote))
    parts, _, _ = step.divide()
    queries, entries = (len(parts[OTHER].tokens), len(parts[OTHER].slots.slots)) if OTHER in parts else (0, 0)
    has_other = OTHER in parts
    per_layer_token = 1 / (layers * batch)
    return Costs(
        shape.dtype,
        batch,
        context,
        clock.median_us("undivided", per_layer_token),
        clock.median_us("host", per_layer_token),
        clock.median_us("other", per_layer_token) if has_other else 0.0,
        clock.median_us("copies", per_layer_token) if has_other else 0.0,
        clock.median_us("merging", per_layer_token),
        clock.median_us("message", per_layer_token) if has_other else 0.0,
        clock.median_us("plan"),
        clock.median_us("division"),
        shape.order_bytes(queries, 0),
        shape.answer_bytes(queries),
        slots_bytes(queries, entries),
        difference,
    )


def report(costs: Sequence[Costs], arguments: argparse.Namespace) -> None:
    heads = f"{arguments.q_heads} query and {arguments.kv_heads} KV heads of {arguments.head_dim}"
    print(f"{heads}, {arguments.layers} layers, {arguments.remote_share:.0%} elsewhere, {arguments.rounds} rounds")
    print("us per layer and token, of a step of decoding; work, time and message (msg) as a multiple of undivided")
    names = ("dtype", "batch", "context", "undivided", "host", "other", "copies", "merging", "message")
    print(
        " ".join(
            f"{name:>9}"
            for name in (*names, "work", "time", "msg", "plan/step", "div./step", "B to", "B back", "B slots", "differ")
        )
    )
    for each in costs:
        times = (each.undivided_us, each.host_part_us, each.other_part_us, each.copies_us, each.merging_us)
        multiples = (each.work_ratio, each.time_ratio, each.message_ratio)
        print(
            f"{each.dtype:>9} {each.batch:>9} {each.context:>9} "
            + " ".join(f"{microseconds:>9.2f}" for microseconds in (*times, each.message_us))
            + "".join(f" {multiple:>9.3f}" for multiple in multiples)
            + f" {each.undivided_plan_step_us:>9.0f} {each.division_step_us:>9.0f}"
            + f" {each.order_bytes:>9} {each.answer_bytes:>9} {each.slots_bytes:>9} {each.largest_difference:>9.1e}"
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[300, 1024, 4096])
    parser.add_argument("--remote-share", type=float, default=0.5, help="of each context; 0 for none")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--q-heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per grid point")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.remote_share <= 1:
        parser.error(f"--remote-share {arguments.remote_share}: accepted: 0 to 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    dim = arguments.head_dim
    costs = [
        measure(
            AttentionShape(arguments.q_heads, arguments.kv_heads, dim, dim, dim, dtype),
            arguments.layers,
            batch,
            context,
            arguments.remote_share,
            arguments.rounds,
        )
        for dtype in arguments.dtype
        for batch in arguments.batch
        for context in arguments.context
    ]
    report(costs, arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(each) for each in costs], indent=2) + "\n")


if __name__ == "__main__":
    main()
