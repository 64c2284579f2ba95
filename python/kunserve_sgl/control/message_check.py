"""What the coordinator believes: every field of every message of a rank is bounded, and checked against its sender.

A message that fails is ignored as a whole. What passes may still be untrue, but it can only be untrue about its sender,
and within what the sender's memory and the requests that it was sent allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Protocol

from kunserve_sgl.control.messages import (
    MOST_REASON,
    Device,
    Hello,
    HostFailed,
    LinkSpeed,
    LoadReport,
    OrderReply,
    ResizeRefused,
    ToCoordinator,
    Waiting,
    Wanting,
)
from kunserve_sgl.policy.demand import AttentionTime, ReplicaLoad
from kunserve_sgl.policy.plan import Plan, ReplicaFacts
from kunserve_sgl.wire.rejections import BadMessageError, Sender, require, require_count, require_range

# Far above what there is, and far below where sums or divisions of such numbers would be wrong.
MOST_TOKENS = 1 << 40
MOST_SECONDS = 1e6
MOST_LAYERS = 10_000
MOST_PID = 1 << 31
MOST_INCARNATIONS = 999_999  # of a replica; the names of sockets have room for so many
MOST_TEXT = 4096  # characters of an address or a checksum
MOST_UUID = 64  # characters of the name of a GPU
MOST_MACHINE = 128  # characters of the name of a machine
MOST_GPUS = 1024  # in one machine
MOST_SPEED = 1e15  # bytes per second
MOST_NOISE = 1e3  # of a measurement, as a share
# How often a request may count as arrived: again only if it was forgotten meanwhile.
REPEATS = 4
# Counters that go up with every batch. A step of the smallest model takes longer.
BATCHES_PER_S = 20_000.0


class Known(Protocol):
    """Says what the coordinator knows."""

    @property
    def plan(self) -> Plan | None:
        """Returns the plan that holds, None until all have reported."""

    @property
    def moving(self) -> Sequence[int]:
        """Returns the replicas that take part in the running transition."""


class MessageCheck:
    """Checks the messages of one deployment's ranks. `sent_requests(replica)` are those that the controller has sent
    there; `is_address` says whether the rank that a report names can be reached where the report says.

    What an incarnation of a replica sends is believed from its first report on, until another one is expected: what
    its processes had sent before their end may arrive later."""

    def __init__(
        self,
        replicas: int,
        ranks: int,
        known: Known,
        sent_requests: Callable[[int], int],
        is_address: Callable[[Hello | Wanting], bool],
        clock: Callable[[], float],
    ) -> None:
        self._replicas = replicas
        self._ranks = ranks
        self._known = known
        self._sent_requests = sent_requests
        self._is_address = is_address
        self._clock = clock
        self._first: dict[tuple[int, int], Hello] = {}
        self._last: dict[tuple[int, int], Hello] = {}
        self._reports: dict[int, tuple[float, LoadReport]] = {}
        self._incarnations = [0] * replicas

    def expect(self, replica: int, incarnation: int) -> None:
        """Ignores from now on all that comes of another incarnation of `replica`, and everything until this one has
        reported."""
        self._incarnations[replica] = incarnation
        self._reports.pop(replica, None)
        for rank in range(self._ranks):
            self._first.pop((replica, rank), None)
            self._last.pop((replica, rank), None)

    def check(self, message: ToCoordinator, sender: Sender) -> None:
        """Raises BadMessageError for a message to ignore. Others become part of what later ones are compared with."""
        rank = message.rank if isinstance(message, Hello | OrderReply | Wanting | HostFailed | LinkSpeed) else 0
        require_range("replica", message.replica, 0, self._replicas - 1)
        require_range("rank", rank, 0, self._ranks - 1)
        who = message.replica, rank
        require(sender in (None, who), "it came from {}, and speaks for {}", sender, who)
        if not isinstance(message, OrderReply):  # the number of the transition says so there
            expected = self._incarnations[message.replica]
            require(message.incarnation == expected, "incarnation {}, where {} is", message.incarnation, expected)
        if isinstance(message, Hello):
            self._check_hello(message, who)
            return
        if isinstance(message, Wanting):
            _check_device(message.device)
            require_count("characters", message.memory_address, MOST_TEXT)
            require(self._is_address(message), "address {}", message.memory_address)
            return
        first = self._first.get(who)
        if first is None:
            raise BadMessageError(f"replica {message.replica} rank {rank} has not reported yet")
        if isinstance(message, OrderReply):
            self._check_reply(message, first.facts)
        elif isinstance(message, LoadReport):
            self._check_report(message, first.facts)
        elif isinstance(message, ResizeRefused):
            require_count("characters of a reason", message.reason, MOST_REASON)
            require_range("number", message.number, 1, MOST_TOKENS)
        elif isinstance(message, HostFailed):
            require_count("characters of a reason", message.reason, MOST_REASON)
            # It may be no peer any more: who has lost it says so, perhaps after it has recovered.
            require_range("host", message.host, 0, self._replicas - 1)
            require(message.host != message.replica, "it speaks of itself")
        elif isinstance(message, LinkSpeed):
            require_range("peer", message.peer, 0, self._replicas - 1)
            require(message.peer != message.replica, "it speaks of itself")
            require_range("peer_incarnation", message.peer_incarnation, 0, MOST_INCARNATIONS)
            require_range("bytes per second", message.bytes_per_second, 1, MOST_SPEED)
        else:
            self._check_waiting(message)

    # A report for duty

    def _check_hello(self, hello: Hello, who: tuple[int, int]) -> None:
        facts = hello.facts
        require(facts.replica == hello.replica, "facts of replica {}", facts.replica)
        require(not facts.link_speeds, "{} links, where it is for the coordinator to say", len(facts.link_speeds))
        require(1 <= facts.layer_count <= MOST_LAYERS, "{} layers", facts.layer_count)
        require(len(facts.granule_frames) == facts.layer_count, "granules of {} layers", len(facts.granule_frames))
        require(len(hello.checksums) in (0, facts.layer_count), "{} checksums", len(hello.checksums))
        for text in (
            hello.address,
            hello.memory_address,
            hello.frame_address,
            facts.node,
            hello.rest_checksum,
            *hello.checksums,
        ):
            require_count("characters", text, MOST_TEXT)
        require_range("pid", hello.pid, 1, MOST_PID)
        for what, least in (("frame_bytes", 1), ("granule_slots", 1), ("max_granules", 1), ("row_count", 0)):
            require_range(what, getattr(facts, what), least, MOST_TOKENS)
        for frames in (*facts.layer_frames, *facts.granule_frames):
            require_range("frames", frames, 0, MOST_TOKENS)
        require_range("base_granules", facts.base_granules, 1, facts.max_granules)
        require_range("least_granules", facts.least_granules, 1, facts.max_granules)
        require_range("free_frames", facts.free_frames, 0, MOST_TOKENS)
        for what in ("most_requests", "most_tokens"):
            require_range(what, getattr(hello, what), 1, MOST_TOKENS)
        _check_device(hello.device)
        first = self._first.get(who)
        if first is None:
            found = hello.address, hello.frame_address, hello.memory_address
            require(self._is_address(hello), "addresses {}, {} and {}", *found)
            others = {(_host(other.address), other.pid) for other in self._first.values()}
            require((_host(hello.address), hello.pid) not in others, "pid {} is another rank's", hello.pid)
            self._first[who] = hello
            if hello.rank == 0:
                self._reports[hello.replica] = self._clock(), LoadReport(hello.replica, ReplicaLoad(0))
        else:
            self._check_again(hello, first, self._last[who])
        self._last[who] = hello

    def _check_again(self, hello: Hello, first: Hello, last: Hello) -> None:
        """Compares a report with earlier ones of the same rank. Frames move between what is free and the own slots, and
        between replicas that are merged; nothing else of a rank ever changes, but for the values of its parameters."""
        known = replace(first.facts, base_granules=hello.facts.base_granules, free_frames=hello.facts.free_frames)
        require(hello.facts == known, "other facts than in its first report")
        for what in ("pid", "address", "frame_address", "memory_address", "device", "most_requests", "most_tokens"):
            require(getattr(hello, what) == getattr(first, what), "another {} than in its first report", what)
        require(len(hello.checksums) == len(first.checksums), "{} checksums", len(hello.checksums))
        if _frames(hello.facts) == _frames(first.facts):
            return
        plan, replica = self._known.plan, hello.replica
        is_merged = replica in self._known.moving or (plan is not None and plan.is_merged(replica))
        most = _frames(first.facts) + sum(first.facts.layer_frames)
        is_lent = is_merged and hello.facts.base_granules == last.facts.base_granules
        require(is_lent and hello.facts.free_frames <= most, "frames that were not there")

    # Answers in a transition

    def _check_reply(self, reply: OrderReply, facts: ReplicaFacts) -> None:
        require_range("transition", reply.transition, 0, MOST_TOKENS)
        require_count("characters of a reason", reply.reason, MOST_REASON)
        require_range("pause_s", reply.pause_s, 0, MOST_SECONDS)
        require_range("longest_pause_s", reply.longest_pause_s, 0, MOST_SECONDS)
        require_range("freed_bytes", reply.freed_bytes, 0, sum(facts.layer_frames) * facts.frame_bytes)
        require_range("extension_slots", reply.extension_slots, 0, facts.max_granules * facts.granule_slots)
        require_count("resident layers", reply.resident, facts.layer_count)
        for layer in reply.resident:
            require_range("layer", layer, 0, facts.layer_count - 1)
        require_count("measurements", reply.reads, self._replicas)
        for speeds in reply.reads:
            require_range("owner", speeds.owner, 0, self._replicas - 1)
            require_range("bytes per second", speeds.own, 1, MOST_SPEED)
            require_range("bytes per second", speeds.borrowed, 1, MOST_SPEED)
            require_range("noise", speeds.noise, 0, MOST_NOISE)

    # Reports of the load

    def _check_report(self, report: LoadReport, facts: ReplicaFacts) -> None:
        load = report.load
        slots = facts.max_granules * facts.granule_slots
        require_range("capacity_tokens", load.capacity_tokens, 0, slots)
        require_range("used_tokens", load.used_tokens, 0, slots)
        require_range("remote_tokens", report.remote_tokens, 0, slots)
        for each in fields(load):
            if each.name != "attention":
                require_range(each.name, getattr(load, each.name), 0, MOST_TOKENS)
        self._check_attention(report.replica, load.attention)
        most = self._sent_requests(report.replica)
        require_range("received_requests", load.received_requests, 0, most)
        for what in ("running_requests", "queued_requests"):
            require_range(what, getattr(load, what), 0, most)
        require_range("arrived_tokens", load.arrived_tokens, 0, REPEATS * slots * (1 + most))
        require_range("finished_tokens", load.finished_tokens, 0, load.arrived_tokens)
        now_s = self._clock()
        then_s, before = self._reports[report.replica]
        _check_counters(report, before, now_s - then_s, facts.layer_count * self._replicas)
        self._reports[report.replica] = now_s, report

    def _check_attention(self, replica: int, times: Sequence[AttentionTime]) -> None:
        homes = {each.home for each in times}
        require(len(homes) == len(times), "a home twice")
        require(replica not in homes, "it speaks of itself")
        for each in times:
            require_range("home", each.home, 0, self._replicas - 1)
            for value in (each.orders, each.spent_ms, each.attending_ms):
                require_range("a number of attention", value, 0, MOST_TOKENS)

    def _check_waiting(self, waiting: Waiting) -> None:
        require_range("waited_s", waiting.waited_s, 0, MOST_SECONDS)
        require_count("hosts", waiting.hosts, self._replicas - 1)
        self._require_peers(waiting.replica, waiting.hosts)

    def _require_peers(self, replica: int, hosts: Sequence[int]) -> None:
        group = set(self._known.moving)
        if (plan := self._known.plan) is not None:
            group.update(plan.group_of(replica))
        for host in hosts:
            require(host != replica and host in group, "it speaks of replica {}, which is no peer", host)


def _check_device(device: Device) -> None:
    require_count("GPUs", device.reaches, MOST_GPUS)
    require_count("characters of a machine's name", device.machine, MOST_MACHINE)
    for gpu in (device.gpu, *device.reaches):
        require_count("characters of a GPU's name", gpu, MOST_UUID)
    require(device.gpu not in device.reaches and "" not in device.reaches, "a GPU {!r} beside others", device.gpu)
    require(device.gpu != "" or not device.reaches, "a CPU that reaches {} GPUs", len(device.reaches))


def _frames(facts: ReplicaFacts) -> int:
    """Counts the frames that are free or behind own slots."""
    return facts.free_frames + facts.base_granules * sum(facts.granule_frames)


def _check_counters(report: LoadReport, before: LoadReport, passed_s: float, orders: int) -> None:
    """Bounds what a replica says that it has executed, which goes up with time. A batch takes so many `orders` about KV
    at most. Where too much was said once, what is said next holds again."""
    more = BATCHES_PER_S * (1.0 + max(0.0, passed_s))
    for what, now, then in (
        ("batches", report.load.batches, before.load.batches),
        ("batches_sent", report.batches_sent, before.batches_sent),
        ("batches_served", report.batches_served, before.batches_served),
    ):
        require_range(what, now, 0, then + more)
    asked = {each.home: each.orders for each in before.load.attention}
    for each in report.load.attention:
        require_range("orders", each.orders, 0, asked.get(each.home, 0) + more * orders)


def _host(address: str) -> str:
    """Returns what says the machine in the address of an inbox; Unix sockets are all on this one."""
    return address.rpartition(":")[0] if address.startswith("tcp:") else ""
