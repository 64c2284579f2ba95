"""A rank's end of the sockets: it reports, learns where the others are, and takes orders; rubbish stops nobody."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import zmq
from transition_world import LAYERS, Rank

from kunserve_sgl.control.addresses import publish_coordinator
from kunserve_sgl.control.messages import Hello, Order, OrderReply, Phase, Result, ToCoordinator, Welcome
from kunserve_sgl.errors import TransientError
from kunserve_sgl.execution.peer_link import control_message
from kunserve_sgl.integration.membership import Member
from kunserve_sgl.policy.plan import Plan, ReplicaFacts, normal_plan

ARRIVAL_S = 20.0


class Coordinator:
    """The sockets of a coordinator."""

    def __init__(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self.inbox = context.socket(zmq.PULL)
        self.inbox.bind("tcp://127.0.0.1:*")
        self.address = self.inbox.getsockopt_string(zmq.LAST_ENDPOINT)
        self.outbox = context.socket(zmq.PUSH)
        self.outbox.setsockopt(zmq.LINGER, 0)

    def take(self) -> ToCoordinator:
        assert self.inbox.poll(int(1000 * ARRIVAL_S)), "nothing has arrived"
        return msgspec.msgpack.decode(self.inbox.recv(), type=ToCoordinator)

    def send(self, message: Any) -> None:
        payload = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
        self.outbox.send_multipart(control_message(payload))

    def close(self) -> None:
        self.inbox.close(0)
        self.outbox.close(0)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    yield made
    made.close()


@pytest.fixture(params=["ipc", "tcp"])
def member(request: pytest.FixtureRequest, tmp_path: Path, coordinator: Coordinator) -> Iterator[Member]:
    parts = tmp_path / "parts"
    parts.mkdir()
    rank = Rank(parts, replica=1, rank=0, replicas=2, reserve_frames=8)
    arguments = SimpleNamespace(
        kunserve_control=request.param,
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
    rank.close()


def orders_of(member: Member, done: Callable[[list[Order]], bool]) -> list[Order]:
    taken: list[Order] = []
    deadline_s = time.monotonic() + ARRIVAL_S
    while not done(taken):
        assert time.monotonic() < deadline_s
        member.link.poll(50)
        taken += member.take_orders()
    return taken


def welcome_for(hello: Hello) -> Welcome:
    addresses = (("ipc://nowhere",), (hello.address,)), (("/nowhere",), (hello.frame_address,))
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


def test_welcome_then_orders_and_rubbish_between(
    member: Member, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    member.report()
    hello = coordinator.take()
    assert isinstance(hello, Hello)
    welcome = welcome_for(hello)
    order = Order(5, Phase.PREPARE, 9, welcome.plan, 10.0)
    with caplog.at_level(logging.ERROR):
        for message in (welcome, b"\xc1", b"", msgspec.msgpack.encode({"type": "order"}), order):
            coordinator.send(message)
        assert orders_of(member, bool) == [order]
    assert len(caplog.records) == 3
    assert not member.is_merged
    member.on_order(order)
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.replica, reply.rank, reply.result) == (1, 0, Result.REFUSED)
    assert reply.reason == "the plan here has epoch 1, not 9"
    assert not member.is_in_transition
    assert member.longest_sleep_ms is None


def test_a_later_welcome_brings_a_later_plan(member: Member, coordinator: Coordinator) -> None:
    member.report()
    hello = coordinator.take()
    assert isinstance(hello, Hello)
    welcome = welcome_for(hello)
    coordinator.send(welcome)
    later = msgspec.structs.replace(welcome, plan=plan_of(hello.facts, epoch=4))
    coordinator.send(later)
    order = Order(5, Phase.PREPARE, 4, plan_of(hello.facts, epoch=5), 10.0)
    member.on_order(order)  # both are on their way: it waits for them
    assert member.is_in_transition
    assert member.is_merged
    assert member.longest_sleep_ms == 1
    member.at_boundary(is_serving=False)
    reply = coordinator.take()
    assert isinstance(reply, OrderReply)
    assert (reply.phase, reply.result) == (Phase.PREPARE, Result.APPLIED)


def test_an_order_before_any_welcome_does_not_wait_for_ever(member: Member) -> None:
    plan = plan_of(member._scheduler.facts, epoch=0)
    member._scheduler.server_args.kunserve_transition_timeout = 0.2
    with pytest.raises(TransientError, match="replica 1 rank 0 has no answer from the coordinator"):
        member.on_order(Order(1, Phase.PREPARE, 0, plan, 10.0))
