"""What ranks say to the controller, fuzzed: the plan stays, nothing ends, and who tells the truth is believed after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kunserve_sgl.args import Activations, KunserveOptions
from kunserve_sgl.control.answers import CommandAnswer, Verdict
from kunserve_sgl.control.autopilot import Autopilot
from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.control.coordinator_link import CoordinatorLink
from kunserve_sgl.control.message_check import MOST_TOKENS, MessageCheck
from kunserve_sgl.control.messages import (
    Device,
    FromCoordinator,
    Hello,
    HostFailed,
    LinkSpeed,
    LoadReport,
    Order,
    OrderReply,
    Phase,
    ResizeRefused,
    Result,
    ToCoordinator,
    Waiting,
    Wanting,
)
from kunserve_sgl.control.transition import Timeouts
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.controller.controller import KunserveDataParallelController
from kunserve_sgl.integration.controller.dispatch import RequestDispatch
from kunserve_sgl.integration.controller.open_requests import OpenRequests
from kunserve_sgl.policy.decision import Thresholds
from kunserve_sgl.policy.demand import AttentionTime, ReplicaLoad
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.partial_restore import RestoreWish
from kunserve_sgl.policy.plan import ReplicaFacts
from kunserve_sgl.policy.stalls import StallWatch
from kunserve_sgl.wire.rejections import BadMessageError, Rejections, Sender
from message_fuzz import fuzzed

MESSAGES = 10_000
REPLICAS, RANKS = 3, 2
SENT = 5  # requests to each replica


class World:
    """A controller without sockets and processes, and ranks that do what they are ordered."""

    def __init__(self, directory: str, activations: Activations = Activations.AUTO) -> None:
        self.now_s = 1000.0
        self.orders: list[tuple[int, Order]] = []
        self.answers: list[CommandAnswer] = []
        self.rejections = Rejections()
        self.link = CoordinatorLink(KunserveOptions(kunserve_directory=directory), self.rejections)
        self.link.send = self._take  # type: ignore[method-assign]
        self.coordinator = Coordinator(
            REPLICAS, RANKS, Timeouts(30.0, 300.0), self._take, self._clock, activations=activations
        )
        self.stalls = StallWatch(REPLICAS, 1e9)
        self.check = MessageCheck(
            REPLICAS, RANKS, self.coordinator, self.stalls.sent_requests, lambda hello: True, self._clock
        )
        made: Any = KunserveDataParallelController.__new__(KunserveDataParallelController)
        made._coordinator, made._stalls, made._metrics = self.coordinator, self.stalls, None
        made._open, made._clock = OpenRequests(REPLICAS), self._clock
        thresholds = Thresholds(0.9, 0.5, 5.0, 10.0, 10.0, REPLICAS)
        made._autopilot = Autopilot(self.coordinator, thresholds, 2.0, self._clock, orders=False)
        made._by_need = RequestDispatch(REPLICAS, self.coordinator)
        self.controller = made
        for replica in range(REPLICAS):
            for _ in range(SENT):
                made._by_need.dispatcher.record(replica, 10)
                self.stalls.on_sent(replica, self.now_s)

    def report_for_duty(self) -> None:
        for replica in range(REPLICAS):
            for rank in range(RANKS):
                assert self.say(hello(replica, rank), (replica, rank))

    def _clock(self) -> float:
        return self.now_s

    def _take(self, replica: int, rank: int, message: FromCoordinator) -> None:
        if isinstance(message, Order):
            self.orders.append((replica, message))

    def say(self, message: msgspec.Struct | bytes, sender: Sender) -> bool:
        """Whether it is believed."""
        payload = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        read = self.link.read(payload, sender, self.check.check)
        if read is not None:
            self.controller._on_message(read)
        self.now_s += 0.001
        return read is not None

    def obey(self) -> None:
        while self.orders:
            replica, order = self.orders.pop(0)
            for rank in range(RANKS):
                reply = OrderReply(order.transition, order.phase, replica, rank, Result.APPLIED)
                assert self.say(reply, (replica, rank))

    def drop(self) -> CommandAnswer:
        self.coordinator.drop(DropWish(((0, 1),)), self.answers.append)
        self.obey()
        return self.answers[-1]


def hello(replica: int, rank: int) -> Hello:
    facts = ReplicaFacts(replica, 4096, 16, 4, 100, 8, (10,) * 4, (1,) * 4, row_count=64)
    addresses = f"ipc://inbox-{replica}-{rank}", f"/frames-{replica}-{rank}"
    device = Device("gpu", ("other gpu",))
    return Hello(replica, rank, *addresses, facts, ("1",) * 4, device, 8, 100, pid=10 + 2 * replica + rank)


def load(replica: int, batches: int = 9) -> LoadReport:
    numbers = ReplicaLoad(64, 10, 5, 5, 1, 1, 100, 50, 30, 0, SENT, 20, batches)
    return LoadReport(replica, numbers, 3, 4, 2)


def asked(*times: AttentionTime, replica: int = 0) -> LoadReport:
    return msgspec.structs.replace(load(replica), load=replace(load(replica).load, attention=times))


def messages() -> list[ToCoordinator]:
    found: list[ToCoordinator] = []
    for replica in range(REPLICAS):
        other = (replica + 1) % REPLICAS
        found += [
            load(replica),
            asked(AttentionTime(other, 3, 40, 10), replica=replica),
            Waiting(replica, (other,), 3.0),
            HostFailed(replica, 0, other, "no kernel"),
        ]
        found.append(ResizeRefused(replica, 3, "slots are in use"))
        for rank in range(RANKS):
            found.append(hello(replica, rank))
            found.append(LinkSpeed(replica, rank, other, 0, 1e9))
            found.append(Wanting(replica, rank, Device("gpu", ("other gpu",)), is_done=bool(rank)))
            for number in (0, 1, 2):
                found.append(OrderReply(number, Phase.SWITCH, replica, rank, Result.REFUSED, "no", 0.5, 0.5, 10, 10))
                found.append(OrderReply(number, Phase.RELEASE, replica, rank, Result.APPLIED, "", 0.5, 0.5, 10, 10))
                found.append(OrderReply(number, Phase.ABANDON, replica, rank, Result.APPLIED, resident=(0, 1, 3)))
    return found


@pytest.fixture
def world(tmp_path: Any) -> Any:
    made = World(str(tmp_path))
    made.report_for_duty()
    yield made
    made.link.close()


@pytest.mark.parametrize("is_merged", [False, True], ids=["normal", "merged"])
@pytest.mark.parametrize("knows_senders", [False, True], ids=["ipc", "tcp"])
def test_fuzzed_messages_change_nothing(
    world: World, is_merged: bool, knows_senders: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    random = Random(is_merged)
    if is_merged:
        assert world.drop().verdict is Verdict.DONE
    plan = world.coordinator.plan
    # That a layer host of it has failed is for a member to say: the group recovers.
    valid = [each for each in messages() if not (is_merged and isinstance(each, HostFailed))]
    believed = 0
    for _ in range(MESSAGES):
        sender = (random.randrange(REPLICAS), random.randrange(RANKS)) if knows_senders else None
        believed += world.say(fuzzed(random, valid), sender)
    assert believed + world.rejections.counts.total() == MESSAGES
    assert world.rejections.counts.total() > MESSAGES / 2
    assert world.coordinator.plan == plan
    assert not world.orders
    for replica in range(REPLICAS):  # whatever was said of them before
        assert all(world.say(hello(replica, rank), (replica, rank)) for rank in range(RANKS))
        assert world.say(load(replica), (replica, 0))
        assert world.controller._by_need.dispatcher.on_the_way(replica) == 0
        assert world.controller._by_need.dispatcher.work_tokens(replica) == 10
    world.now_s += 20.0
    assert not world.stalls.stalled(world.now_s)
    if is_merged:
        world.coordinator.restore(RestoreWish(), world.answers.append)
        world.obey()
        assert world.answers[-1].verdict is Verdict.DONE
    else:
        assert world.drop().verdict is Verdict.DONE


def test_fuzzed_messages_in_a_transition_of_others_than_their_senders(world: World) -> None:
    """Replicas 0 and 1 merge; what replica 2 says can be neither their answer nor a reason to go back."""
    random = Random(3)
    valid = messages()
    world.coordinator.drop(DropWish(((0, 1),)), world.answers.append)
    for _ in range(1000):
        world.say(fuzzed(random, valid), (2, random.randrange(RANKS)))
    world.obey()
    assert world.answers[-1].verdict is Verdict.DONE


def test_a_failure_that_is_told_late_is_believed_and_changes_nothing(world: World) -> None:
    """Who has lost activations of a dead one may say so when it has recovered."""
    assert world.say(HostFailed(0, 0, 1, "connection closed by peer"), (0, 0))
    assert not world.say(HostFailed(0, 0, 0, "connection closed by peer"), (0, 0))
    assert not world.orders


def test_what_an_earlier_incarnation_had_sent_is_ignored(world: World) -> None:
    """It may arrive at any time: before its successor reports, and after that."""
    assert world.drop().verdict is Verdict.DONE
    late = [load(1), Waiting(1, (0,), 3.0), hello(1, 0), OrderReply(1, Phase.PREPARE, 1, 0, Result.APPLIED)]
    assert all(world.say(message, None) for message in late)
    world.check.expect(1, 1)
    assert not any(world.say(message, None) for message in late)
    world.coordinator.set_restarting(1, "it is started again")
    world.coordinator.on_member_lost(1, 0, "ended")
    again = [msgspec.structs.replace(hello(1, rank), incarnation=1, pid=900 + rank) for rank in range(RANKS)]
    assert not world.say(msgspec.structs.replace(again[0], incarnation=2), None), "there is none yet"
    assert all(world.say(each, None) for each in again)
    assert not any(world.say(message, None) for message in late[:3])
    for replica, order in world.orders:  # of the recovery of those who were merged with it
        for rank in range(RANKS):
            world.say(OrderReply(order.transition, order.phase, replica, rank, Result.APPLIED), None)
    assert world.coordinator.take_back(1)
    assert world.say(msgspec.structs.replace(load(1), incarnation=1), None)
    assert not world.say(load(1), None)


TRUTH = hello(0, 0)


@pytest.mark.parametrize(
    "message",
    [
        load(99),
        load(-1),
        msgspec.structs.replace(load(0), load=replace(load(0).load, received_requests=SENT + 1)),
        msgspec.structs.replace(load(0), load=replace(load(0).load, capacity_tokens=100 * 16 + 1)),
        msgspec.structs.replace(load(0), load=replace(load(0).load, used_tokens=-1)),
        msgspec.structs.replace(load(0), load=replace(load(0).load, finished_tokens=101)),
        load(0, batches=10**6),
        asked(AttentionTime(0, 1, 1, 1)),  # it asks itself
        asked(AttentionTime(REPLICAS, 1, 1, 1)),
        asked(AttentionTime(1, 1, -1, 1)),
        asked(AttentionTime(1, 1, 1, 1 << 50)),
        asked(AttentionTime(1, MOST_TOKENS, 1, 1)),  # more than can have been sent meanwhile
        asked(AttentionTime(1, 1, 1, 1), AttentionTime(1, 2, 2, 2)),
        Waiting(0, (0,), 1.0),
        Waiting(0, (1,), 1.0),  # it depends on nobody
        Waiting(0, (), float("nan")),
        Waiting(0, (), -1.0),
        LinkSpeed(0, 0, 0, 0, 1e9),
        LinkSpeed(0, 0, REPLICAS, 0, 1e9),
        LinkSpeed(0, RANKS, 1, 0, 1e9),
        LinkSpeed(0, 0, 1, -1, 1e9),
        LinkSpeed(0, 0, 1, 0, 0.0),
        LinkSpeed(0, 0, 1, 0, float("nan")),
        LinkSpeed(0, 0, 1, 0, 1e16),
        OrderReply(1, Phase.LOAD, 0, RANKS, Result.APPLIED),
        OrderReply(1, Phase.LOAD, 0, 0, Result.APPLIED, pause_s=float("inf")),
        OrderReply(1, Phase.LOAD, 0, 0, Result.APPLIED, freed_bytes=40 * 4096 + 1),
        OrderReply(1, Phase.LOAD, 0, 0, Result.APPLIED, extension_slots=-1),
        OrderReply(1, Phase.LOAD, 0, 0, Result.REFUSED, "no" * 5001),
        msgspec.structs.replace(TRUTH, pid=11),
        msgspec.structs.replace(TRUTH, address="ipc://elsewhere"),
        msgspec.structs.replace(TRUTH, frame_address="/elsewhere"),
        msgspec.structs.replace(TRUTH, checksums=("1",) * 3),
        msgspec.structs.replace(TRUTH, device=Device("gpu")),
        msgspec.structs.replace(TRUTH, most_requests=9),
        msgspec.structs.replace(TRUTH, most_tokens=0),
        msgspec.structs.replace(TRUTH, facts=replace(TRUTH.facts, base_granules=3)),
        msgspec.structs.replace(TRUTH, facts=replace(TRUTH.facts, free_frames=9)),
        msgspec.structs.replace(TRUTH, facts=replace(TRUTH.facts, max_granules=200)),
        msgspec.structs.replace(TRUTH, facts=replace(TRUTH.facts, replica=1)),
        msgspec.structs.replace(TRUTH, facts=replace(TRUTH.facts, link_speeds=(1e9,))),
    ],
)
def test_what_is_not_believed(world: World, message: Any) -> None:
    assert not world.say(message, None)
    assert world.rejections.counts == {type(message).__name__: 1}


def test_what_attention_elsewhere_takes_comes_as_it_was_sent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[ReplicaLoad] = []
    monkeypatch.setattr(world.coordinator, "on_load", lambda replica, load: taken.append(load))
    times = AttentionTime(1, 30, 400, 100), AttentionTime(2, 3, 40, 10)
    assert world.say(asked(*times), None)
    assert [load.attention for load in taken] == [times]


def test_a_rank_speaks_for_itself_only(world: World) -> None:
    others: Sequence[Sender] = [(0, 1), (1, 0), (2, 1)]
    for sender in others:
        assert not world.say(load(0), sender)
        assert not world.say(TRUTH, sender)
    assert world.say(load(0), (0, 0))
    assert world.say(TRUTH, (0, 0))


def test_frames_may_move_to_the_slots_and_back(world: World) -> None:
    for rank in range(RANKS):
        more = replace(hello(0, rank).facts, base_granules=6, free_frames=0)
        assert world.say(msgspec.structs.replace(hello(0, rank), facts=more), (0, rank))
    assert world.coordinator.plan is not None
    assert world.coordinator.plan.extents_of(0)[0].granules == 6


@pytest.mark.parametrize(
    "device",
    [
        Device("g" * 65),
        Device("gpu", ("g" * 65,)),
        Device("gpu", tuple(map(str, range(1025)))),
        Device("gpu", ("gpu",)),
        Device("gpu", ("",)),
        Device("", ("gpu",)),
        Device(machine="m" * 129),
    ],
)
def test_gpus_and_machines_that_cannot_be_are_not_believed(device: Device) -> None:
    known = SimpleNamespace(plan=None, moving=())
    check = MessageCheck(1, 1, known, lambda replica: 9, lambda hello: True, lambda: 0.0)
    with pytest.raises(BadMessageError, match=r"GPU|a machine's name"):
        check.check(msgspec.structs.replace(hello(0, 0), device=device), None)
    check.check(hello(0, 0), None)


def test_a_flag_that_cannot_work_for_these_gpus_ends_the_start(tmp_path: Any) -> None:
    made = World(str(tmp_path), Activations.COLLECTIVE)
    with pytest.raises(ConfigurationError, match="--kunserve-activations collective: replicas 0 and 1 are on the same"):
        made.report_for_duty()
    made.link.close()


def test_nobody_is_heard_before_the_report_for_duty(tmp_path: Any) -> None:
    known = SimpleNamespace(plan=None, moving=())
    check = MessageCheck(1, 1, known, lambda replica: 9, lambda hello: False, lambda: 0.0)
    with pytest.raises(BadMessageError, match="has not reported"):
        check.check(load(0), None)
    with pytest.raises(BadMessageError, match="addresses"):
        check.check(hello(0, 0), None)


def test_pids_are_numbers_of_one_machine(tmp_path: Any) -> None:
    world = World(str(tmp_path))

    def says(replica: int, rank: int, address: str) -> bool:
        return world.say(msgspec.structs.replace(hello(replica, rank), address=address, pid=7), (replica, rank))

    assert says(0, 0, "tcp://127.0.0.1:1")
    assert not says(0, 1, "tcp://127.0.0.1:2")
    assert says(1, 0, "tcp://127.0.0.2:1")
    assert world.link.knows(1, 0)
    assert not world.link.knows(0, 1)
    world.link.close()


def test_a_link_is_as_fast_as_its_slowest_rank_once_all_have_measured_it(world: World) -> None:
    def links() -> list[dict[str, float | None]]:
        return [member["link_bytes_per_second"] for member in world.coordinator.status()["members"]]

    assert links() == [{"1": None, "2": None}, {"0": None, "2": None}, {"0": None, "1": None}]
    assert world.say(LinkSpeed(0, 0, 1, 0, 3e9), (0, 0))
    assert links()[0] == {"1": None, "2": None}
    assert world.say(LinkSpeed(0, 1, 1, 0, 2e9), (0, 1))
    assert links() == [{"1": 2e9, "2": None}, {"0": 2e9, "2": None}, {"0": None, "1": None}]
    assert world.say(LinkSpeed(1, 0, 0, 0, 1e9), (1, 0)), "in the other direction"
    assert links()[0] == {"1": 1e9, "2": None}
    assert world.say(LinkSpeed(2, 0, 1, 1, 9e9), (2, 0)), "of one that has not come back"
    assert world.say(LinkSpeed(2, 1, 1, 1, 9e9), (2, 1))
    assert links()[2] == {"0": None, "1": None}
    view = world.coordinator.view()
    assert view is not None
    assert view.links.speeds == {(0, 1): 1e9}


def test_links_to_a_replica_that_comes_back_are_to_be_measured_again(world: World) -> None:
    for one, other in ((0, 1), (1, 2), (2, 0)):
        for rank in range(RANKS):
            assert world.say(LinkSpeed(one, rank, other, 0, 1e9 + one), (one, rank))
    world.check.expect(1, 1)
    world.coordinator.set_restarting(1, "it is started again")
    world.coordinator.on_member_lost(1, 0, "ended")
    for rank in range(RANKS):
        again = msgspec.structs.replace(hello(1, rank), incarnation=1, pid=900 + rank)
        assert world.say(again, (1, rank))
    assert world.coordinator.take_back(1)
    view = world.coordinator.view()
    assert view is not None
    assert view.links.speeds == {(0, 2): 1e9 + 2}
    for rank in range(RANKS):
        assert world.say(LinkSpeed(0, rank, 1, 0, 1e9), (0, rank)), "of the one before"
        assert world.say(LinkSpeed(2, rank, 1, 1, 3e9), (2, rank))
    view = world.coordinator.view()
    assert view is not None
    assert view.links.speeds == {(0, 2): 1e9 + 2, (1, 2): 3e9}
