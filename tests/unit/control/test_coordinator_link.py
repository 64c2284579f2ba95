"""The coordinator's sockets with a real peer link at the other end."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import coordinator_address, curve_of, inbox_bind_address, make_keys
from kunserve_sgl.control.coordinator_link import CoordinatorLink
from kunserve_sgl.control.messages import FromCoordinator, Hello, Order, OrderReply, Phase, Result, ToCoordinator
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.policy.plan import ReplicaFacts, normal_plan
from kunserve_sgl.wire.rejections import COORDINATOR, UNREADABLE, BadMessageError, Rejections, Sender

DEADLINE_S = 120.0
FACTS = ReplicaFacts(0, 4096, 16, 4, 100, 0, (10, 10), (1, 1))


@pytest.fixture(params=["ipc", "tcp"])
def options(request: pytest.FixtureRequest) -> Iterator[KunserveOptions]:
    with tempfile.TemporaryDirectory() as directory:
        made = KunserveOptions(kunserve_control=request.param, kunserve_directory=directory)
        make_keys(made, 1, 2)
        yield made


@contextlib.contextmanager
def speaker(options: KunserveOptions) -> Iterator[zmq.Socket[bytes]]:
    """How rank 0 talks to the coordinator."""
    curve = curve_of(options, (0, 0))
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        if curve is not None:
            curve.call(push, COORDINATOR)
        push.connect(coordinator_address(options))
        yield push
    if curve is not None:
        curve.close()


@pytest.fixture
def link(options: KunserveOptions) -> Iterator[CoordinatorLink]:
    made = CoordinatorLink(options, Rejections())
    yield made
    made.close()


@pytest.fixture
def rank(options: KunserveOptions) -> Iterator[PeerLink]:
    curve = curve_of(options, (0, 0))
    made = PeerLink(0, 0, inbox_bind_address(options, 0, 0, 0), curve=curve)
    yield made
    made.close()
    if curve is not None:
        curve.close()


def until(take: Callable[[], list[object]]) -> list[object]:
    end_s = time.monotonic() + DEADLINE_S
    while not (taken := take()):
        assert time.monotonic() < end_s
    return taken


def received(link: CoordinatorLink, senders: list[Sender] | None = None) -> list[ToCoordinator]:
    link.inbox.poll(100)
    return list(link.receive(lambda message, sender: None if senders is None else senders.append(sender)))


def test_messages_there_and_back(options: KunserveOptions, link: CoordinatorLink, rank: PeerLink) -> None:
    senders: list[Sender] = []
    with speaker(options) as push:
        said: list[ToCoordinator] = [
            Hello(0, 0, rank.address, "frames", FACTS),
            OrderReply(1, Phase.LOAD, 0, 1, Result.REFUSED, "no frames", 0.5),
        ]
        for message in said:
            push.send(msgspec.msgpack.encode(message))
            assert until(lambda: received(link, senders)) == [message]  # type: ignore[arg-type, return-value]
    assert senders == [None if options.kunserve_control == "ipc" else (0, 0)] * 2
    assert link.rank_of(os.getpid()) == (0, 0)
    assert link.rank_of(os.getpid() + 1) is None
    order = Order(1, Phase.SWITCH, 0, normal_plan([FACTS], 1), 2.5)
    link.send(0, 0, order)

    def taken() -> list[object]:
        rank.poll(100)
        return list(rank.take_control())

    ((payload, sender),) = until(taken)  # type: ignore[misc]
    assert sender == (None if options.kunserve_control == "ipc" else COORDINATOR)
    assert msgspec.msgpack.decode(payload, type=FromCoordinator) == order  # type: ignore[arg-type]


def test_what_cannot_be_read_is_left_out(
    options: KunserveOptions, link: CoordinatorLink, caplog: pytest.LogCaptureFixture
) -> None:
    reply = OrderReply(1, Phase.LOAD, 0, 0, Result.APPLIED)
    with speaker(options) as push:
        nested = b"\x82\xa4type\xa4load\xa1x" + b"\x91" * 100_000
        other = msgspec.msgpack.encode({"type": "other"})
        for payload in (b"", b"\xc1", nested, other, msgspec.msgpack.encode(reply)):
            push.send(payload)
        taken: list[object] = []
        while not taken:
            taken = until(lambda: received(link))  # type: ignore[arg-type, return-value]
    assert taken == [reply]
    assert link.rejections.counts == {UNREADABLE: 4}
    assert caplog.text.count("ignored a message") == 1, "the log was flooded"


def test_what_fails_the_check_is_counted_and_nobody_is_connected(link: CoordinatorLink) -> None:
    def check(message: ToCoordinator, sender: object) -> None:
        raise BadMessageError("it is a stranger")

    hello = Hello(0, 0, "no address", "frames", FACTS)
    assert link.read(msgspec.msgpack.encode(hello), None, check) is None
    assert link.rejections.counts == {"Hello": 1}
    assert link.rank_of(os.getpid()) is None


def test_rank_that_takes_nothing_does_not_block(
    options: KunserveOptions, link: CoordinatorLink, caplog: pytest.LogCaptureFixture
) -> None:
    with speaker(options) as push:
        nobody = "ipc://" + options.kunserve_directory + "/nobody"
        push.send(msgspec.msgpack.encode(Hello(0, 0, nobody, "frames", FACTS)))
        assert until(lambda: received(link))  # type: ignore[arg-type, return-value]
    for _ in range(1001):
        link.send(0, 0, Order(1, Phase.SWITCH, 0, normal_plan([FACTS], 1), 2.5))
    assert "replica 0 rank 0 takes no messages" in caplog.text
