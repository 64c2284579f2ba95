"""Attention over all of a batch's KV against attention over two parts of it and their merging, in one process and two.

    python bench/remote_attention.py [--batch 1 16] [--context 300 1024 4096] [--remote-share 0.5] [--dtype float32]

A decode step of a batch in which every request has so much of its context elsewhere, as after a drop. Per layer and
token: "local" is attention over all of it in memory of one process, as without a drop; "map" the same where what is
elsewhere is memory of another process, which has been mapped; "message" where the other process is asked to attend to
its part, as a server does it.

What a message takes is also timed part by part in one process: the part of the layer host; the part of the other home;
merging; and what is copied in and out of messages, which are packed but not sent. The layer host attends to its own
part while the other home does to its, so a layer takes at least the longer of both, the copies and the merging
("time"); all of it together is what it costs ("work"). Beside it, once per step and shared by all layers: the division
and the plans.

What speaks for exchanging the KV is what "message" takes more: "lost/step", per layer and step, is that with its part
in the division, less both parts of attention, as a server counts it. "move ms" is what it takes to move the other
home's KV of a layer there and back, by how fast it is read by messages, and "even" after how many steps that is saved.
The server's policy begins to move KV when that saves `MARGIN` times what it takes
(`kunserve_sgl/policy/exchange_worth.py`).

Everything is timed in turn in each round, so that drift of the machine meets all alike; figures are medians. Each layer
has buffers of its own, so that keys and values come from memory as in serving. The results are compared.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

# Before torch: one thread, as one replica of several on a machine has. Set it to measure with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from divided_attention.other_home import other_home
from divided_attention.step import DTYPES, OTHER, WARM_UP_ROUNDS, Clock, Step
from kunserve_sgl.exchange.attention_work import AttentionShape, slots_bytes
from kunserve_sgl.policy.exchange_worth import Moves

# What batches lose, of what has been timed: all that a layer takes by message, less both parts of attention.
LOST = {"message": 1, "division": 1, "message own": -1, "attending": -1}
RATIOS = ("map/local", "msg/local", "work", "time")
MOVES = ("lost/step", "move ms", "even")


@dataclass(frozen=True)
class Costs:
    """Medians, in microseconds: of one layer per token of the batch, and of what is done once per step."""

    dtype: str
    batch: int
    context: int
    local_us: float
    map_us: float  # 0 where nothing is elsewhere
    host_part_us: float
    other_part_us: float
    copies_us: float
    merging_us: float
    message_us: float  # 0 where nothing is elsewhere
    local_plan_step_us: float
    division_step_us: float
    order_bytes: int  # per layer, for the whole batch
    answer_bytes: int
    slots_bytes: int  # per step
    other_kv_bytes: int  # per layer, at the other home
    lost_step_us: float  # per layer and step, by asking the other home and not attending to all at the layer host
    read_bytes_per_s: float  # by messages; 0 where nothing is elsewhere
    largest_difference: float

    @property
    def work_ratio(self) -> float:
        """What all that is computed takes, of local attention's time."""
        parts = self.host_part_us + self.other_part_us
        return (parts + self.copies_us + self.merging_us) / self.local_us

    @property
    def time_ratio(self) -> float:
        """What a layer takes at least, where the parts are computed at the same time, of local attention's time."""
        longer = max(self.host_part_us, self.other_part_us)
        return (longer + self.copies_us + self.merging_us) / self.local_us

    @property
    def map_ratio(self) -> float:
        """What a layer takes with memory of another process mapped, of local attention's time."""
        return self.map_us / self.local_us

    @property
    def message_ratio(self) -> float:
        """What a layer takes that asks another process, of local attention's time."""
        return self.message_us / self.local_us

    @property
    def move_s(self) -> float:
        """What it takes to move the other home's KV of a layer, there and back, by the policy of the server. Pauses of
        transitions come on top there, where they are measured."""
        if not self.read_bytes_per_s:
            return 0.0
        return Moves(1, self.other_kv_bytes, 0.0, 0.0).cost_s(1 / self.read_bytes_per_s)

    @property
    def even_steps(self) -> float:
        """After how many steps the move has saved what it takes; the server begins where `MARGIN` times as many are to
        be expected."""
        return 1e6 * self.move_s / self.lost_step_us if self.lost_step_us else float("inf")


def measure(shape: AttentionShape, layers: int, batch: int, context: int, share: float, rounds: int) -> Costs:
    step = Step(shape, layers, batch, context, share)
    clock = Clock()
    memory = torch.empty(max(shape.order_bytes(batch, batch), shape.answer_bytes(batch)), dtype=torch.uint8)
    difference = 0.0
    read_bytes_per_s = 0.0
    with other_home(shape, layers, batch, context, share) if share else nullcontext() as asked:
        remote = None if asked is None else asked.remote
        if asked is not None:
            step.map_elsewhere(asked.exports)
        for number in range(WARM_UP_ROUNDS + rounds):
            difference = max(difference, step.run(clock, memory, number, remote))
        if asked is not None:
            read_bytes_per_s = asked.speeds(step).borrowed
    parts, _, _ = step.divide()
    queries, entries = (len(parts[OTHER].tokens), len(parts[OTHER].slots.slots)) if OTHER in parts else (0, 0)
    has_other = OTHER in parts
    per_layer_token = 1 / (layers * batch)
    slot_bytes = step.slot_bytes
    step.close()
    return Costs(
        shape.dtype,
        batch,
        context,
        clock.median_us("local", per_layer_token),
        clock.median_us("map", per_layer_token) if has_other else 0.0,
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
        entries * slot_bytes,
        max(0.0, sum(sign * clock.median_us(what, 1 / layers) for what, sign in LOST.items())) if has_other else 0.0,
        read_bytes_per_s,
        difference,
    )


def report(costs: Sequence[Costs], arguments: argparse.Namespace) -> None:
    heads = f"{arguments.q_heads} query and {arguments.kv_heads} KV heads of {arguments.head_dim}"
    print(f"{heads}, {arguments.layers} layers, {arguments.remote_share:.0%} elsewhere, {arguments.rounds} rounds")
    print("us per layer and token, of a step of decoding; map, message (msg), work and time as a multiple of local")
    names = ("dtype", "batch", "context", "local", "map", "message", "host", "other", "copies", "merging")
    print(
        " ".join(
            f"{name:>9}"
            for name in (*names, *RATIOS, "plan/step", "div./step", "B to", "B back", "B slots", *MOVES, "differ")
        )
    )
    for each in costs:
        times = (each.local_us, each.map_us, each.message_us, each.host_part_us, each.other_part_us)
        multiples = (each.map_ratio, each.message_ratio, each.work_ratio, each.time_ratio)
        print(
            f"{each.dtype:>9} {each.batch:>9} {each.context:>9} "
            + " ".join(f"{microseconds:>9.2f}" for microseconds in (*times, each.copies_us, each.merging_us))
            + "".join(f" {multiple:>9.3f}" for multiple in multiples)
            + f" {each.local_plan_step_us:>9.0f} {each.division_step_us:>9.0f}"
            + f" {each.order_bytes:>9} {each.answer_bytes:>9} {each.slots_bytes:>9}"
            + f" {each.lost_step_us:>9.1f} {1000 * each.move_s:>9.2f} {each.even_steps:>9.1f}"
            + f" {each.largest_difference:>9.1e}"
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
