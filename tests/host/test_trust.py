"""A server whose control goes over TCP, while others of the machine talk to its ports: none of that has an effect."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from _deployments import TCP, using
from _drop import Served
from _http import Json
from _questions import ask_all, make_questions
from _servers import LLAMA, RunningServer

from kunserve_sgl.control.messages import Hello, LoadReport, Order, OrderReply, Phase, Result, Waiting, Welcome
from kunserve_sgl.exchange.work import Answer, CopySlots, Turn, TurnKind, Work
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.plan import Plan, ReplicaFacts, Segment, normal_plan
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.framing import CONTROL, WORK
from kunserve_sgl.wire.rejections import COORDINATOR
from message_fuzz import fuzzed
from waiting import wait_until

pytestmark = [pytest.mark.server, using(TCP)]

MESSAGES = 2_000  # to the coordinator, and as many to each replica
IN_VAIN_S = 5  # so long a stranger tries
DELIVERY_S = 300
QUESTIONS = make_questions(8, seed=3)
FACTS = ReplicaFacts(0, 4096, 16, 4, 64, 8, (10,) * LLAMA.layers, (1,) * LLAMA.layers, 64)
PLAN = normal_plan([FACTS, replace(FACTS, replica=1)], 500)
MERGED = Plan(500, ((0, 0, 1, 1),) * 2, ((0, 1), (2, 3)), PLAN.extents)


@pytest.fixture
def served(server: RunningServer) -> Served:
    return Served(server, QUESTIONS)


def private(served: Served) -> Path:
    """The directory of the server's sockets and keys."""
    (found,) = (path.parent for path in served.process.temporary_directory.glob("kunserve-*/curve.keys"))
    return found


def to_coordinator(replica: int) -> list[msgspec.Struct]:
    reports: list[msgspec.Struct] = [Hello(replica, 0, "tcp://127.0.0.1:9", "/x", replace(FACTS, replica=replica))]
    reports += [OrderReply(n, phase, replica, 0, result) for n in (0, 1) for phase in Phase for result in Result]
    reports += [LoadReport(replica, ReplicaLoad(64, received_requests=2**62)), Waiting(replica, (1 - replica,), 1e9)]
    return [*reports, LoadReport(99, ReplicaLoad(64))]


def from_coordinator() -> list[msgspec.Struct]:
    orders: list[msgspec.Struct] = [Order(n, p, e, MERGED, 10.0) for n in (1, 7) for p in Phase for e in (0, 10**9)]
    nowhere = (("tcp://127.0.0.1:9",),) * 2
    return [*orders, Welcome(nowhere, nowhere, (0,) * len(nowhere), PLAN)]


def from_peer() -> list[msgspec.Struct]:
    """As of replica 1 to replica 0, about what is replica 0's."""
    work = Work(1, 0, 3, 0, (Segment(0, 0, 2),), 2, b"\1\0\0\0", b"\5\0\0\0", b"", b"\x20" + bytes(7), (), (), 0, None)
    copy = CopySlots(0, 3, 0, b"\x20" + bytes(7), b"\x21" + bytes(7))
    return [work, copy, Answer(1, 0, 10**6, (), "it failed"), Turn(TurnKind.SERVE, 1, 1)]


def flood(
    push: zmq.Socket[bytes], address: str, kind: bytes, messages: list[msgspec.Struct], seed: int, linger_s: int
) -> None:
    """What a socket has no room for is not waited for: then nobody takes it. What it has room for is sent within
    `linger_s`, if anybody takes it."""
    random = Random(seed)
    push.setsockopt(zmq.LINGER, 1000 * linger_s)
    push.setsockopt(zmq.SNDHWM, MESSAGES)
    push.connect(address)
    with push:
        for _ in range(MESSAGES):
            payload = fuzzed(random, messages)
            try:
                push.send(kind + payload, zmq.NOBLOCK)
            except zmq.Again:
                return


def ports(served: Served) -> list[Any]:
    """Sockets of the server's processes that are listened on."""
    found = []
    for pid in served.process.pids():
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(pid).net_connections("tcp")
    return [each for each in found if each.status == psutil.CONN_LISTEN]


def inbox_of(served: Served, keys: Curve, replica: int) -> str:
    """The port that answers to the key of that rank 0. Nothing is said to the others, which are SGLang's."""
    poller = zmq.Poller()
    asking: dict[zmq.Socket[bytes], tuple[zmq.Socket[bytes], str]] = {}
    for port in {each.laddr.port for each in ports(served)} - {served.process.port}:
        socket = keys.context.socket(zmq.PUSH)
        keys.call(socket, (replica, 0))
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        poller.register(monitor, zmq.POLLIN)
        asking[monitor] = socket, f"tcp://127.0.0.1:{port}"
        socket.connect(asking[monitor][1])
    ready = poller.poll(1000 * DELIVERY_S)
    for socket, _ in asking.values():
        socket.disable_monitor()
        socket.close(0)
    assert ready, f"no inbox of replica {replica} is listened on"
    return asking[ready[0][0]][1]


def plan_of(served: Served) -> Json:
    status = served.plan_and_memory()
    for replica in status["replicas"]:
        del replica["slots"]  # what is cached depends on who got which question
    return status


def check_unchanged(served: Served, before: object) -> None:
    assert plan_of(served) == before
    assert ask_all(served.endpoint, served.questions) == served.expected
    status = served.status()
    assert [replica["state"] for replica in status["replicas"]] == ["normal", "normal"]


def test_only_the_http_port_is_for_others(served: Served) -> None:
    found = {each.laddr.ip for each in ports(served)}
    assert found, "nothing is listened on"
    assert not found & {"0.0.0.0", "::"}


def test_a_stranger_gets_nowhere(served: Served) -> None:
    before = plan_of(served)
    keys = Curve(private(served) / "curve.keys", (1, 0))
    inboxes = [inbox_of(served, keys, replica) for replica in (0, 1)]
    keys.close()
    coordinator = (private(served) / "coordinator.address").read_text()
    with zmq.Context() as context, ThreadPoolExecutor() as clients:
        answers = clients.submit(ask_all, served.endpoint, served.questions)
        flood(context.socket(zmq.PUSH), coordinator, b"", to_coordinator(0), 0, IN_VAIN_S)
        for inbox in inboxes:
            for kind, messages in ((CONTROL, from_coordinator()), (WORK, from_peer())):
                flood(context.socket(zmq.PUSH), inbox, kind, messages, 2, IN_VAIN_S)
        assert answers.result() == served.expected
    check_unchanged(served, before)
    assert served.status()["rejected_messages"] == {}, "a message of a stranger was read"


def test_a_rank_cannot_speak_for_others(served: Served) -> None:
    """It has keys, of replica 1: what it says of replica 0, or as the coordinator, is ignored, and counted."""
    before = plan_of(served)
    keys = Curve(private(served) / "curve.keys", (1, 0))
    with ThreadPoolExecutor() as clients:
        answers = clients.submit(ask_all, served.endpoint, served.questions)
        push = keys.context.socket(zmq.PUSH)
        keys.call(push, COORDINATOR)
        address = (private(served) / "coordinator.address").read_text()
        flood(push, address, b"", to_coordinator(0), 1, DELIVERY_S)
        inbox = inbox_of(served, keys, 0)
        for kind, messages in ((CONTROL, from_coordinator()), (WORK, from_peer())):
            push = keys.context.socket(zmq.PUSH)
            keys.call(push, (0, 0))
            flood(push, inbox, kind, messages, 3, DELIVERY_S)
        assert answers.result() == served.expected
    keys.close()
    wait_until(lambda: sum(served.status()["rejected_messages"].values()) > MESSAGES / 2, "the coordinator has seen it")
    wait_until(lambda: sum(served.status()["replicas"][0]["rejected_messages"].values()) > MESSAGES, "replica 0 has")
    assert served.status()["replicas"][1]["rejected_messages"] == {}
    check_unchanged(served, before)


def test_replicas_still_merge_and_part(served: Served) -> None:
    served.drop({"groups": [[0, 1]]})
    assert ask_all(served.endpoint, served.questions) == served.expected
    served.restore()
    assert ask_all(served.endpoint, served.questions) == served.expected
