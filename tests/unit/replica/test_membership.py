"""A rank's end of the sockets: it reports, learns where the others are, and takes orders; rubbish stops nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import zmq
from transition_world import LAYERS, Rank

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import curve_of, make_keys, publish_coordinator
from kunserve_sgl.control.messages import (
    FromCoordinator,
    Hello,
    Order,
    OrderReply,
    Phase,
    Result,
    ToCoordinator,
    Welcome,
)
from kunserve_sgl.integration.membership import Member
from kunserve_sgl.policy.plan import Plan, ReplicaFacts, normal_plan
from kunserve_sgl.wire.framing import control_message
from kunserve_sgl.wire.rejections import COORDINATOR, UNREADABLE
from message_fuzz import fuzzed

ARRIVAL_S = 20.0


class Coordinator:
    """The sockets of a coordinator."""

    def __init__(self, options: KunserveOptions) -> None:
        make_keys(options, 2, 1)
        self.curve = curve_of(options, COORDINATOR)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance() if self.curve is None else self.curve.context
        self.inbox = context.socket(zmq.PULL)
        if self.curve is not None:
            self.curve.listen(self.inbox)
        self.inbox.bind("tcp://127.0.0.1:*")
        self.address = self.inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self.outbox = context.socket(zmq.PUSH)
        self.outbox.setsockopt(zmq.LINGER, 0)
        if self.curve is not None:
            self.curve.call(self.outbox, (1, 0))

    def take(self) -> ToCoordinator:
        assert self.inbox.poll(int(1000 * ARRIVAL_S)), "nothing has arrived"
        return msgspec.msgpack.decode(self.inbox.recv(), type=ToCoordinator)

    def send(self, message: Any) -> None:
        payload = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        self.outbox.send_multipart(control_message(payload))

    def close(self) -> None:
        self.inbox.close(0)
        self.outbox.close(0)
        if self.curve is not None:
            self.curve.close()


@pytest.fixture(params=["ipc", "tcp"])
def coordinator(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(KunserveOptions(kunserve_control=request.param, kunserve_directory=str(tmp_path)))
    yield made
    made.close()


@pytest.fixture
def member(tmp_path: Path, coordinator: Coordinator) -> Iterator[Member]:
    parts = tmp_path / "parts"
    parts.mkdir()
    rank = Rank(parts, replica=1, rank=0, replicas=2, reserve_frames=8)
    arguments = SimpleNamespace(
        kunserve_control="ipc" if coordinator.curve is None else "tcp",
        dp_size=2,
        enable_metrics=False,
        kunserve_directory=str(tmp_path),
        kunserve_frame_bytes=4096,
        kunserve_order_timeout=5.0,
        kunserve_activations="auto",
        kunserve_transition_timeout=ARRIVAL_S,
        chunked_prefill_size=64,
    )
    publish_coordinator(arguments, coordinator.address)
    runner = SimpleNamespace(
        kunserve_memory=rank.memory,
        device="cpu",
        gpu_id=0,
        dtype=torch.float32,
        model_config=SimpleNamespace(hidden_size=32, num_hidden_layers=LAYERS),
        run_layers=None,
        req_to_token_pool=rank.req_to_token_pool,
    )
    rank.tp_worker = SimpleNamespace(model_runner=runner)  # type: ignore[attr-defined]
    rank.server_args = arguments  # type: ignore[attr-defined]
    rank.ps = SimpleNamespace(dp_rank=1, tp_rank=0, tp_size=1)
    rank.max_running_requests = 4  # type: ignore[attr-defined]
    made = Member(rank)
    coordinator.outbox.connect(made.link.address)
    yield made
    made.link.close()
    made._coordinator.close(0)
    made._channel.close()
    if (curve := made.link._curve) is not None:
        curve.close()
    rank.close()


def taken_by(member: Member, done: Callable[[list[FromCoordinator]], bool]) -> list[FromCoordinator]:
    """What it has taken until then; and it acts on that, as the scheduler makes it do."""
    taken: list[FromCoordinator] = []
    deadline_s = time.monotonic() + ARRIVAL_S
    while not done(taken):
        assert time.monotonic() < deadline_s
        member.link.poll(50)
        new = member.take_orders()
        for message in new:
            member.on_message(message)
        taken += new
    return taken


def welcome_for(hello: Hello) -> Welcome:
    other = hello.address.replace("inbox-1-0", "inbox-0-0") if hello.address[0] == "i" else "tcp://127.0.0.1:9"
    other_frames = hello.frame_address.replace("frames-1-0", "frames-0-0")
    addresses = ((other,), (hello.address,)), ((other_frames,), (hello.frame_address,))
    return Welcome(*addresses, plan_of(hello.facts, epoch=1))


def plan_of(facts: ReplicaFacts, epoch: int) -> Plan:
    """That of two replicas alike."""
    return normal_plan([replace(facts, replica=0), facts], epoch)


def test_a_rank_says_who_it_is_and_what_it_has(member: Member, coordinator: Coordinator) -> None:
    member.report()
    hello = coordinator.take()
    assert isinstance(hello, Hello)
    assert (hello.replica, hello.rank, hello.address) == (1, 0, member.link.address)
    assert Path(hello.frame_address).is_socket()
    assert hello.facts.layer_count == len(hello.checksums) == LAYERS
    assert len(set(hello.checksums)) == LAYERS
    assert hello.facts.free_frames == member._memory.frames.free_frames > 0
    assert [source.getsockopt(zmq.TYPE) for source in member.wake_up_sources()] == [zmq.PULL]


@pytest.fixture
def hello(member: Member, coordinator: Coordinator) -> Hello:
    """What the rank has reported."""
    member.report()
    said = coordinator.take()
    assert isinstance(said, Hello)
    return said


def test_welcome_then_orders_and_rubbish_between(member: Member, coordinator: Coordinator, hello: Hello) -> None:
    welcome = welcome_for(hello)
    order = Order(5, Phase.PREPARE, 9, plan_of(hello.facts, epoch=10), 10.0)
    for message in (welcome, b"\xc1", b"", msgspec.msgpack.encode({"type": "order"}), order):
        coordinator.send(message)
    assert taken_by(member, lambda taken: len(taken) == 2) == [welcome, order]
    assert member.rejections.counts == {UNREADABLE: 3}
    assert not member.is_merged
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.replica, reply.rank, reply.result) == (1, 0, Result.REFUSED)
    assert reply.reason == "the plan here has epoch 1, not 9"
    assert not member.is_in_transition
    assert member.longest_sleep_ms is None


def test_a_later_welcome_brings_a_later_plan(member: Member, coordinator: Coordinator, hello: Hello) -> None:
    welcome = welcome_for(hello)
    later = msgspec.structs.replace(welcome, plan=plan_of(hello.facts, epoch=4))
    for message in (welcome, later, Order(5, Phase.PREPARE, 4, plan_of(hello.facts, epoch=5), 10.0)):
        coordinator.send(message)
    taken_by(member, lambda taken: len(taken) == 3)
    assert member.is_in_transition
    assert member.is_merged
    assert member.longest_sleep_ms == 1
    member.at_boundary(is_serving=False)
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.phase, reply.result) == (Phase.PREPARE, Result.APPLIED)


def test_an_order_before_any_welcome_is_refused_at_once(member: Member, coordinator: Coordinator, hello: Hello) -> None:
    coordinator.send(Order(1, Phase.PREPARE, 10**9, plan_of(hello.facts, epoch=10**9 + 1), 10.0))
    taken_by(member, bool)
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.result, reply.reason) == (Result.REFUSED, "there is no plan here yet")


def test_what_is_not_believed(member: Member, coordinator: Coordinator, hello: Hello) -> None:
    welcome = welcome_for(hello)
    member.on_message(welcome)
    order = Order(5, Phase.PREPARE, 1, plan_of(hello.facts, epoch=2), 10.0)
    replaced = msgspec.structs.replace
    two = replace(order.plan, hosts=((1,) * LAYERS,) * 2)
    bad = (
        replaced(order, plan=plan_of(hello.facts, epoch=500)),
        replaced(order, transition=-1),
        replaced(order, timeout_s=float("nan")),
        replaced(order, timeout_s=1e300),
        replaced(order, plan=replace(two, resident=(tuple(range(LAYERS)), ()))),
        replaced(order, plan=replace(order.plan, extents=order.plan.extents[:1])),
        replaced(order, plan=replace(order.plan, extents=tuple(replace(e, granules=1) for e in order.plan.extents))),
        replaced(welcome, plan=replace(welcome.plan, epoch=-1)),
        replaced(welcome, plan=replace(welcome.plan, hosts=welcome.plan.hosts * 2)),
        replaced(welcome, inboxes=welcome.inboxes[:1]),
        replaced(welcome, inboxes=(welcome.inboxes[0], ("tcp://10.0.0.1:80",))),
        replaced(welcome, frame_addresses=(("/elsewhere",), welcome.frame_addresses[1])),
    )
    for message in bad:
        assert member._read(msgspec.msgpack.encode(message), None) is None, message
    for sender in ((0, 0), (1, 0)):  # it is not from the coordinator
        assert member._read(msgspec.msgpack.encode(order), sender) is None
    assert member.rejections.counts == {"Order": 9, "Welcome": 5}
    assert member._read(msgspec.msgpack.encode(order), COORDINATOR) == order
    assert member._read(msgspec.msgpack.encode(welcome), None) == welcome


def test_phases_come_in_order_and_to_one_plan(member: Member, coordinator: Coordinator, hello: Hello) -> None:
    member.on_message(welcome_for(hello))
    order = Order(5, Phase.PREPARE, 1, plan_of(hello.facts, epoch=2), 10.0)
    member.on_message(order)
    other = msgspec.structs.replace(order, phase=Phase.SWITCH, plan=replace(order.plan, epoch=3))
    for message in (other, *(msgspec.structs.replace(order, phase=p) for p in (Phase.RELEASE, Phase.UNDO))):
        member.on_message(message)
    assert member.rejections.counts == {"Order": 3}
    member.at_boundary(is_serving=False)
    for phase in (Phase.SWITCH, Phase.RELEASE):
        member.on_message(msgspec.structs.replace(order, phase=phase))
        member.at_boundary(is_serving=False)
    assert not member.is_in_transition
    replies = [coordinator.take() for _ in range(3)]
    assert [getattr(reply, "result", None) for reply in replies] == [Result.APPLIED] * 3


def test_fuzzed_messages(member: Member, hello: Hello) -> None:
    """10,000 of them, from whoever it is: none ends the rank or makes it wait, and the coordinator gets what it wants
    after."""
    member._send = lambda message: None  # type: ignore[method-assign]
    random = Random(5)
    welcome = welcome_for(hello)
    member.on_message(welcome)
    plan = plan_of(hello.facts, epoch=2)
    valid = [Order(5, phase, 1, plan, 10.0) for phase in Phase] + [welcome]
    for number in range(10_000):
        sender = random.choice([None, COORDINATOR, (0, 0), (1, 0)])
        message = member._read(fuzzed(random, valid), sender)
        if message is not None:
            assert sender in (None, COORDINATOR)
            member.on_message(message)
        member.at_boundary(is_serving=bool(number % 2))
    assert member.rejections.counts.total() > 5000
    if (active := member._agent._active) is not None:  # the way back or, after RELEASE, the end
        for phase in (Phase.REVERT, Phase.UNDO, Phase.REOPEN, Phase.RESUME):
            member.on_message(msgspec.structs.replace(active.order, phase=phase))
            member.at_boundary(is_serving=False)
    assert not member.is_in_transition
    latest = 100
    member.on_message(msgspec.structs.replace(welcome, plan=plan_of(hello.facts, epoch=latest)))
    order = Order(1000, Phase.PREPARE, latest, plan_of(hello.facts, epoch=latest + 1), 10.0)
    assert member._read(msgspec.msgpack.encode(order), COORDINATOR) == order
    member.on_message(order)
    assert member.is_in_transition


def test_fuzz_of_others_than_the_coordinator_leaves_the_plan(member: Member, hello: Hello) -> None:
    random = Random(6)
    member.on_message(welcome_for(hello))
    plan = member.plan.agreed
    valid = [Order(5, Phase.PREPARE, 1, plan_of(hello.facts, epoch=2), 10.0), welcome_for(hello)]
    for _ in range(2000):
        assert member._read(fuzzed(random, valid), random.choice([(0, 0), (1, 0)])) is None
    assert member.plan.agreed == plan
