"""Replicas of a model at real size, one rank each, in one process over the modelled driver.

Everything that moves memory is the real part: planner, steps, agents, loans, sockets, pools, parameters, KV cache and
the rows' memory. A frame holds 4 KiB in place of 2 MiB, and weights, KV and rows are smaller by as much, so all counts
are those of the real size. Of a server the batches are missing, and nothing lives in the slots.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cuda_model.costs import CallCosts
from cuda_model.driver import FakeBindings, FakeDriver
from cuda_model.shapes import FRAME_BYTES, Shape
from kunserve_sgl.control.messages import Order, OrderReply
from kunserve_sgl.control.transition import End, Timeouts, Transition, members_of
from kunserve_sgl.exchange.connecting import Connected
from kunserve_sgl.exchange.offers import OfferAddress
from kunserve_sgl.memory.row_memory import BLOCK_BYTES, RowMemory, plan_row_space
from kunserve_sgl.memory.slot_space import KvBuffer, SlotRange
from kunserve_sgl.memory.virtual_range import Frame, Span
from kunserve_sgl.memory.vmm_cuda import CudaVmm
from kunserve_sgl.policy.plan import Plan, ReplicaFacts, normal_plan
from kunserve_sgl.replica import transition_agent
from kunserve_sgl.replica.capacity import CapacityManager
from kunserve_sgl.replica.frame_channel import FrameChannel
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.mapped_memory import MappedMemory
from kunserve_sgl.replica.peer_memory import WaysToPeers
from kunserve_sgl.replica.replica_memory import MemoryOptions, ReplicaMemory
from kunserve_sgl.replica.transition_agent import TransitionAgent

MODEL_FRAME_BYTES = 4096
SCALE = FRAME_BYTES // MODEL_FRAME_BYTES
_TIMEOUT_S = 60.0


class _Layers(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ParameterList(
                nn.Parameter(torch.randint(255, (-(-size // SCALE),), dtype=torch.uint8), requires_grad=False)
                for size in shape.weight_bytes
            )
            for _ in range(shape.layers)
        )


class _Vmm(CudaVmm):
    """The CUDA backend over CPU memory; fills are counted, as they are kernels there."""

    def __init__(self, bindings: FakeBindings) -> None:
        super().__init__(0, MODEL_FRAME_BYTES, driver=FakeDriver(bindings))
        self.device = torch.device("cpu")
        self._log = bindings.log

    def _zero(self, span: Span, frames: Sequence[Frame]) -> None:
        self._log.append(("fill", span.address, len(frames) * self.frame_bytes))
        super()._zero(span, frames)


class _Slots:
    """An allocator whose slots nobody has taken."""

    page_size = 1
    withheld = 0

    def __init__(self, base: SlotRange) -> None:
        self._ranges = [base]

    @property
    def slot_ranges(self) -> tuple[SlotRange, ...]:
        return tuple(self._ranges)

    @property
    def size(self) -> int:
        return sum(each.count for each in self._ranges)

    def available_size(self) -> int:
        return self.size

    def add_slots(self, slots: SlotRange) -> None:
        self._ranges.append(slots)

    def remove_slots(self, slots: SlotRange) -> None:
        self._ranges.remove(slots)

    def count_in(self, slots: SlotRange) -> int:
        return sum(each.count for each in self._ranges if slots.first <= each.first and each.stop <= slots.stop)

    def used_in(self, slots: SlotRange) -> torch.Tensor:
        return torch.empty(0, dtype=torch.int64)

    free_in = used_in

    def prefer(self, slots: SlotRange | None) -> None:
        pass


class _Rows:
    """The memory of the request rows, without rows."""

    def __init__(self, vmm: _Vmm, shape: Shape, replica: int, replicas: int) -> None:
        space = plan_row_space(shape.rows, replicas)
        self.row_count = space.row_count
        self.memory = RowMemory(vmm, space, shape.context // SCALE, BLOCK_BYTES // SCALE)
        self.memory.map_replica(replica)
        self.map_rows_of = partial(self.memory.map_replica, rows=1)
        self.unmap_rows_of = self.memory.unmap_replica

    def forget_hosts(self) -> None:
        pass


class _Hosting:
    def connect(self, peers: Iterable[int], timeout_s: float) -> Connected:
        return Connected()

    def looks_waited_for(self) -> bool:
        return False

    def forget_all_but(self, owners: Iterable[int]) -> None:
        pass


def _engine(slots: _Slots, rows: _Rows, log: list[tuple[Any, ...]]) -> Any:
    """The scheduler of a replica without requests."""
    nothing = lambda *_: None  # noqa: E731
    return SimpleNamespace(
        allocator=slots,
        rows=rows,
        limits=SimpleNamespace(expect_capacity=nothing, refusal=nothing, cut_to=nothing),
        evictable_tokens=lambda: 0,
        prefill_room_tokens=lambda: 0,
        vacate=nothing,
        capacity_changed=nothing,
        synchronize=lambda: log.append(("synchronize", 0)),
    )


class Rank:
    """One rank of a replica with all that a transition touches."""

    def __init__(self, directory: Path, shape: Shape, replica: int, replicas: int) -> None:
        self.bindings = FakeBindings(memory_frames=1 << 24, granularity_bytes=MODEL_FRAME_BYTES)
        options = MemoryOptions(MODEL_FRAME_BYTES, 0, replicas, None)
        self.memory = ReplicaMemory(options, "cpu", 0, replica, f"replica {replica}", _Vmm(self.bindings))
        torch.manual_seed(0)
        self.model = _Layers(shape)
        self.memory.adopt_parameters(self.model, list(self.model.layers))
        row_bytes = max(1, shape.row_bytes // SCALE)
        buffers = [KvBuffer(layer, name, row_bytes) for name in "kv" for layer in range(shape.layers)]
        kv = self.memory.create_kv(buffers, 1, shape.base_tokens)
        self.rows = _Rows(_Vmm(self.bindings), shape, replica, replicas)
        self.engine = _engine(_Slots(kv.slots), self.rows, self.bindings.log)
        self.channel = FrameChannel(str(directory / f"frames-{replica}"), _TIMEOUT_S)
        self.plan = HeldPlan(replica, shape.layers)
        ways = WaysToPeers(MappedMemory(self.memory))
        self.loans = Loans(self.memory, self.channel, ways, _Vmm(self.bindings), lambda owner, buffer: None, _TIMEOUT_S)
        self.replies: deque[OrderReply] = deque()
        self.agent = TransitionAgent(
            0,
            self.plan,
            self.engine,
            CapacityManager(self.engine, self.memory),
            self.memory,
            self.loans,
            _Hosting(),
            KvWrites(),
            self.replies.append,
        )

    @property
    def facts(self) -> ReplicaFacts:
        return self.memory.facts(self.rows.row_count)


@dataclass
class PhaseCost:
    """What one phase takes at one rank."""

    calls: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)
    predicted_s: float = 0.0
    longest_step_s: float = 0.0
    longest_step: str = ""


class Deployment:
    """Replicas that drop and restore, step by step, each step with what it costs."""

    def __init__(self, directory: Path, shape: Shape, costs: CallCosts, replicas: int = 2) -> None:
        self.costs = costs
        self.ranks = [Rank(directory, shape, replica, replicas) for replica in range(replicas)]
        self.plan = normal_plan(self.facts, epoch=1)
        for rank in self.ranks:
            rank.plan.enter(self.plan)
            rank.loans.connect([OfferAddress(other.channel.path, maps=True) for other in self.ranks].__getitem__)
            rank.bindings.log.clear()
        self._orders: list[deque[Order]] = [deque() for _ in self.ranks]
        self._transitions = 0

    @property
    def facts(self) -> tuple[ReplicaFacts, ...]:
        return tuple(rank.facts for rank in self.ranks)

    def run(self, new: Plan) -> dict[str, PhaseCost]:
        """Leads all to `new` and returns what each phase cost. Raises RuntimeError where it does not succeed."""
        self._transitions += 1
        transition = Transition(
            self._transitions,
            self.plan,
            new,
            members_of(self.plan, new),
            1,
            Timeouts(_TIMEOUT_S, _TIMEOUT_S),
            lambda replica, _, order: self._orders[replica].append(order),
            time.monotonic,
        )
        costs: dict[tuple[str, int], PhaseCost] = {}
        transition.start()
        with _one_step_at_a_time():
            while transition.end is None:
                for rank in self.ranks:
                    self._boundary(rank, transition, costs)
        if transition.end is not End.SUCCEEDED:
            raise RuntimeError(transition.summary)
        self.plan = new
        phases = dict.fromkeys(phase for phase, _ in costs)
        return {
            phase: max((costs[key] for key in costs if key[0] == phase), key=lambda cost: cost.predicted_s)
            for phase in phases
        }

    def _boundary(self, rank: Rank, transition: Transition, costs: dict[tuple[str, int], PhaseCost]) -> None:
        orders = self._orders[rank.memory.replica]
        phase = transition.phase.value
        cost = costs.setdefault((phase, rank.memory.replica), PhaseCost())
        while orders:
            self._counted(cost, rank, lambda: rank.agent.on_order(orders.popleft()), "what begins the phase")
        self._counted(cost, rank, lambda: rank.agent.advance(True), None)
        while rank.replies:
            transition.on_reply(rank.replies.popleft())

    def _counted(self, cost: PhaseCost, rank: Rank, step: Callable[[], None], what: str | None) -> None:
        log = rank.bindings.log
        log.clear()
        step()
        seconds = 0.0
        for name, *arguments in log:
            frames = self.costs.frames(name, arguments, MODEL_FRAME_BYTES)
            cost.calls[name] += 1
            cost.frames[name] += frames
            seconds += self.costs.seconds(name, frames)
        cost.predicted_s += seconds
        if seconds > cost.longest_step_s:
            cost.longest_step_s = seconds
            cost.longest_step = what or rank.agent.progress.partition(": ")[2] or "the last step"
        log.clear()

    def close(self) -> None:
        for rank in self.ranks:
            rank.channel.close()


@contextlib.contextmanager
def _one_step_at_a_time() -> Iterator[None]:
    """A step at each boundary, without the time that goes to batches between those that load."""
    before = transition_agent.BOUNDARY_BUDGET_S, transition_agent.LOAD_SHARE
    transition_agent.BOUNDARY_BUDGET_S, transition_agent.LOAD_SHARE = 0.0, 1e9
    try:
        yield
    finally:
        transition_agent.BOUNDARY_BUDGET_S, transition_agent.LOAD_SHARE = before
