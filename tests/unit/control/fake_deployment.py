"""A coordinator with replicas that follow a script, and a clock that moves only when it is told to."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from kunserve_sgl.args import Exchange, RemoteAttentionBy
from kunserve_sgl.control.answers import CommandAnswer
from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.control.messages import (
    Device,
    FromCoordinator,
    Hello,
    LayerLoan,
    Lend,
    Order,
    OrderReply,
    Phase,
    ReadSpeeds,
    Resize,
    ResizeRefused,
    Result,
    ToCoordinator,
    Welcome,
)
from kunserve_sgl.control.recovery import RECOVERY_PHASES
from kunserve_sgl.control.transition import Timeouts
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.partial_restore import RestoreWish
from kunserve_sgl.policy.plan import Plan, ReplicaFacts

PHASE_S, DRAIN_S = 30.0, 300.0
_AUTO = RemoteAttentionBy.AUTO


def make_facts(replica: int, layers: int = 8, free: int = 0, base: int = 4, granule_slots: int = 16) -> ReplicaFacts:
    return ReplicaFacts(replica, 4096, granule_slots, base, 1000, free, (10,) * layers, (1,) * layers)


@dataclass
class FakeReplica:
    """What all ranks of one replica know, as a real one would."""

    plan_epoch: int = -1
    route_epoch: int = -1
    plan: Plan | None = None
    orders: list[Phase] = field(default_factory=list)
    resident: tuple[int, ...] | None = None  # None for what its plan says
    lends: dict[int, tuple[LayerLoan, ...]] = field(default_factory=dict)  # by number
    reload: Order | None = None


class FakeDeployment:
    """`script[phase, replica, rank]` is what that rank does instead of applying the phase: "refuse", "silent",
    "stale", "die" or "twice"."""

    def __init__(
        self,
        replicas: int = 2,
        ranks: int = 1,
        layers: int = 8,
        exchange: Exchange = Exchange.OFF,
        by_message: bool = False,
        machines: Sequence[str] = (),
    ) -> None:
        """`machines` are those of the replicas, where memory is mapped within one and used by messages between two."""
        self.machines = list(machines)
        self.now_s = 1000.0
        self.phase_s = 0.25  # that a replica takes for a phase
        self.pause_s = 0.02  # of which replica r runs no batches for r + 1 times as long
        self.ranks = ranks
        self.layers = layers
        self.script: dict[tuple[Phase, int, int], str] = {}
        self.replicas = [FakeReplica() for _ in range(replicas)]
        self.dead: set[int] = set()
        self.sent: list[tuple[int, int, FromCoordinator]] = []
        self.answers: list[CommandAnswer] = []
        self._inboxes: deque[tuple[int, int, FromCoordinator]] = deque()
        self.reads: dict[tuple[int, int], tuple[ReadSpeeds, ...]] = {}  # by rank, what it measures
        self.ended: dict[int, str] = {}  # replicas that the coordinator has ended
        self.ended_at_once: list[set[int]] = []
        self.lingering: set[int] = set()  # that are waited for when they are ended
        self.facts: dict[int, ReplicaFacts] = {}  # as last reported
        self.resizes: dict[int, str] = {}  # by replica, what it does instead of resizing: "refuse" or "silent"
        self.broken = 0  # merges, by a layer host that could not execute a batch
        self.coordinator = Coordinator(
            replicas,
            ranks,
            Timeouts(PHASE_S, DRAIN_S),
            self.take,
            clock=lambda: self.now_s,
            end_replicas=self.end_replicas,
            exchange=exchange,
            way=_AUTO if machines else RemoteAttentionBy.MESSAGE if by_message else RemoteAttentionBy.MAP,
            stay_s=10.0,
            on_broken=self.on_broken,
        )

    def on_broken(self) -> None:
        self.broken += 1

    def end_replicas(self, reasons: Mapping[int, str]) -> Collection[int]:
        self.dead.update(reasons)
        self.ended.update(reasons)
        self.ended_at_once.append(set(reasons))
        return reasons.keys() - self.lingering

    def take(self, replica: int, rank: int, message: FromCoordinator) -> None:
        wire = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromCoordinator)
        self.sent.append((replica, rank, wire))
        self._inboxes.append((replica, rank, wire))

    def say(self, message: ToCoordinator) -> None:
        self.coordinator.on_message(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToCoordinator))

    def hello(
        self,
        replica: int,
        rank: int,
        facts: ReplicaFacts | None = None,
        incarnation: int = 0,
        checksums: tuple[str, ...] = (),
        rest: str = "",
    ) -> None:
        facts = self.facts[replica] = facts or make_facts(replica, self.layers)
        again = f" {incarnation}" if incarnation else ""
        addresses = f"inbox {replica} {rank}{again}", f"frames {replica} {rank}{again}"
        memory = f"memory {replica} {rank}{again}"
        self.say(
            Hello(
                *(replica, rank, *addresses, facts, checksums),
                incarnation=incarnation,
                rest_checksum=rest,
                memory_address=memory,
                device=self.device(replica),
            )
        )

    def device(self, replica: int) -> Device:
        return Device(machine=self.machines[replica]) if self.machines else Device()

    def lose(self, replica: int) -> None:
        """A process of it ends, and it is to be started again."""
        self.dead.add(replica)
        self.coordinator.set_restarting(replica, "it is started again")
        self.coordinator.on_member_lost(replica, 0, "ended with exit code -9")

    def come_back(self, replica: int, incarnation: int = 1, **report: Any) -> bool:
        """Whether it is taken back, now that all of its ranks have reported."""
        self.dead.discard(replica)
        self.replicas[replica] = FakeReplica()
        for rank in range(self.ranks):
            self.hello(replica, rank, incarnation=incarnation, **report)
        return self.coordinator.take_back(replica)

    def start(self) -> FakeDeployment:
        for replica in range(len(self.replicas)):
            for rank in range(self.ranks):
                self.hello(replica, rank)
        self.deliver()
        return self

    def deliver(self) -> None:
        """Until no message is on its way."""
        while self._inboxes:
            self.deliver_one()

    def deliver_one(self) -> None:
        replica, rank, message = self._inboxes.popleft()
        if replica in self.dead:
            return
        if isinstance(message, Welcome):
            fake = self.replicas[replica]
            fake.plan, fake.plan_epoch, fake.route_epoch = message.plan, message.plan.epoch, message.plan.epoch
        elif isinstance(message, Lend):
            lends = self.replicas[replica].lends
            if message.loans:
                lends[message.number] = message.loans
            else:
                del lends[message.number]
        elif isinstance(message, Resize):
            self._resize(replica, message)
        else:
            assert rank == 0, "orders go to rank 0, which passes them on"
            self._carry_out(replica, message)

    def _resize(self, replica: int, message: Resize) -> None:
        """Only while it shares memory with nobody, so that all of it that is free is its own."""
        act = self.resizes.get(replica)
        if act == "refuse":
            self.say(ResizeRefused(replica, message.number, "slots are in use"))
        if act is not None:
            return
        facts = self.facts[replica]
        granules = facts.base_granules + message.frames // sum(facts.granule_frames)
        facts = replace(facts, base_granules=granules, free_frames=facts.free_frames - message.frames)
        for rank in range(self.ranks):
            self.hello(replica, rank, facts)

    def _carry_out(self, replica: int, order: Order) -> None:
        fake = self.replicas[replica]
        if order.phase not in (Phase.RESUME, *RECOVERY_PHASES):
            assert fake.plan_epoch == order.old_epoch, "ordered from a plan that this replica does not have"
        fake.orders.append(order.phase)
        self.now_s += self.phase_s
        for rank in range(self.ranks):
            act = self.script.get((order.phase, replica, rank), "apply")
            if act == "die":
                self.dead.add(replica)
                self.coordinator.on_member_lost(replica, rank, "ended with exit code -9")
                return
            if act == "silent":
                continue
            result = {"refuse": Result.REFUSED, "stale": Result.STALE}.get(act, Result.APPLIED)
            reply = self.reply(order, replica, rank, result)
            for _ in range(2 if act == "twice" else 1):
                self.say(reply)
        if order.phase is Phase.SWITCH:
            fake.route_epoch = order.plan.epoch
        elif order.phase is Phase.REVERT:
            fake.route_epoch = order.old_epoch
        elif order.phase is Phase.ABANDON:
            fake.route_epoch = -1
        elif order.phase is Phase.RELOAD:
            fake.reload = order
        elif order.phase is Phase.REVIVE:
            fake.plan, fake.plan_epoch, fake.route_epoch = order.plan, order.plan.epoch, order.plan.epoch
        elif order.phase is Phase.RELEASE:
            fake.plan, fake.plan_epoch = order.plan, order.plan.epoch

    def reply(self, order: Order, replica: int, rank: int, result: Result = Result.APPLIED) -> OrderReply:
        return OrderReply(
            order.transition,
            order.phase,
            replica,
            rank,
            result,
            reason="no frames" if result is Result.REFUSED else "",
            pause_s=self.pause_s * (replica + 1),
            longest_pause_s=0.01 * (replica + 1) if order.phase is Phase.RELEASE else 0.0,
            freed_bytes=1000 if order.phase is Phase.RELEASE else 0,
            extension_slots=80 if order.phase in (Phase.RESUME, Phase.REOPEN) else 0,
            resident=self._resident(replica) if order.phase is Phase.ABANDON else (),
            reads=self.reads.get((replica, rank), ()) if order.phase is Phase.PREPARE else (),
        )

    def _resident(self, replica: int) -> tuple[int, ...]:
        fake = self.replicas[replica]
        if fake.resident is None:
            assert fake.plan is not None
            return fake.plan.resident[replica]
        return fake.resident

    def run(self) -> CommandAnswer:
        """Delivers and lets time pass until the command has been answered."""
        before = len(self.answers)
        while True:
            self.deliver()
            if len(self.answers) > before:
                return self.answers[-1]
            deadline_s = self.coordinator.next_deadline_s()
            assert deadline_s is not None, "nothing is under way, and there is no answer"
            self.now_s = deadline_s
            self.coordinator.on_tick()

    def let_time_pass(self) -> None:
        """Delivers and lets time pass until nothing is under way."""
        self.deliver()
        while (deadline_s := self.coordinator.next_deadline_s()) is not None:
            self.now_s = deadline_s
            self.coordinator.on_tick()
            self.deliver()

    def drop(self, *groups: Sequence[int], **wish: object) -> CommandAnswer:
        self.order_drop(*groups, **wish)
        return self.answers.pop() if self.answers else self.run()

    def order_drop(self, *groups: Sequence[int], **wish: object) -> None:
        self.answers.clear()
        self.coordinator.drop(DropWish(tuple(map(tuple, groups)), **wish), self.answers.append)  # type: ignore[arg-type]

    def restore(self, groups: Sequence[Sequence[int]] | None = None, **wish: object) -> CommandAnswer:
        self.order_restore(groups, **wish)
        return self.answers.pop() if self.answers else self.run()

    def order_restore(self, groups: Sequence[Sequence[int]] | None = None, **wish: object) -> None:
        self.answers.clear()
        named = None if groups is None else tuple(map(tuple, groups))
        self.coordinator.restore(RestoreWish(named, **wish), self.answers.append)  # type: ignore[arg-type]

    def state(self) -> str:
        return str(self.coordinator.status()["state"])

    def phases(self, replica: int) -> list[str]:
        return [phase.value for phase in self.replicas[replica].orders]
