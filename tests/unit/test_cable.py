"""The cable between two namespaces does what tests rely on: it is slow, loses frames, is cut, and says when it ends."""

from __future__ import annotations

import os
import resource
import secrets
import select
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from cable import Cable
from namespaces import Namespace, Network, two_namespaces
from waiting import wait_until

DEADLINE_S = 120.0
PORT = 7000  # nobody else is there
BYTES = 1 << 20


@pytest.fixture
def network() -> Iterator[Network]:
    with two_namespaces() as network:
        yield network


def at(namespace: Namespace, kind: socket.SocketKind) -> socket.socket:
    with namespace.inside():
        made = socket.socket(socket.AF_INET, kind)
    made.bind((namespace.address, PORT))
    made.settimeout(DEADLINE_S)
    return made


@pytest.fixture
def ends(network: Network) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Sockets for datagrams, each of which is connected to the other. Each knows where the other one is."""
    with (
        closing(at(network.first, socket.SOCK_DGRAM)) as one,
        closing(at(network.second, socket.SOCK_DGRAM)) as other,
    ):
        one.connect(other.getsockname())
        other.connect(one.getsockname())
        wait_until(lambda: comes(one, other, 0.1), "they find each other", DEADLINE_S)
        yield one, other


def comes(sender: socket.socket, receiver: socket.socket, wait_s: float) -> bool:
    """Whether something comes within so long; then all that was sent before has, too."""
    sent = secrets.token_bytes(8)
    sender.send(sent)
    while select.select([receiver], [], [], wait_s)[0]:
        if receiver.recv(len(sent)) == sent:
            return True
    return False


def test_a_frame_is_held_both_ways(network: Network, ends: tuple[socket.socket, socket.socket]) -> None:
    network.cable.set(delay_s=0.05)
    began_s = time.monotonic()
    assert comes(*ends, DEADLINE_S)
    assert comes(*ends[::-1], DEADLINE_S)
    assert time.monotonic() - began_s >= 0.1


def test_what_is_lost_is_counted_and_does_not_come(network: Network, ends: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = ends
    before = network.cable.set(loss=0.25)
    for number in range(400):
        sender.send(number.to_bytes(2, "big"))
        wait_until(lambda n=number: sum(network.cable.frames()) > sum(before) + n, "it is through", DEADLINE_S)
    network.cable.set()
    sender.send(b"end")
    come = []
    while (datagram := receiver.recv(3)) != b"end":
        come.append(int.from_bytes(datagram, "big"))
    assert come == sorted(set(come))
    lost = network.cable.frames().lost - before.lost
    assert 400 - len(come) <= lost  # the system's own are among them
    assert 50 < 400 - len(come) < 150


def test_a_connection_makes_good_what_is_lost(network: Network) -> None:
    data = os.urandom(BYTES)
    with closing(at(network.first, socket.SOCK_STREAM)) as listens, ThreadPoolExecutor(1) as threads:
        listens.listen()
        network.cable.set(delay_s=0.005, loss=0.02)

        def send() -> None:
            with closing(at(network.second, socket.SOCK_STREAM)) as sends:
                sends.connect(listens.getsockname())
                sends.sendall(data)

        sending = threads.submit(send)
        with closing(listens.accept()[0]) as takes:
            come = bytearray()
            while some := takes.recv(1 << 16):
                come += some
        sending.result()
    assert come == data
    assert network.cable.frames().lost > 0


def test_nothing_comes_while_it_is_cut(network: Network, ends: tuple[socket.socket, socket.socket]) -> None:
    before = network.cable.set(loss=1.0)
    assert not comes(*ends, 0.2)
    assert network.cable.frames().lost > before.lost
    network.cable.set()
    assert comes(*ends, DEADLINE_S)


def test_its_end_is_a_failure() -> None:
    def asks_on(cable: Cable) -> None:
        os.kill(cable.pid, signal.SIGKILL)
        while True:
            cable.frames()

    with (
        pytest.raises(AssertionError, match="the cable has failed"),
        two_namespaces() as network,
        pytest.raises(AssertionError, match="the cable has ended"),
    ):
        asks_on(network.cable)


def test_a_process_with_many_files_open_can_have_one() -> None:
    """select() takes no descriptor above 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"no process may have more than {hard} files open here")
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
        for _ in range(1024):
            stack.enter_context(open(os.devnull))
        network = stack.enter_context(two_namespaces())
        receiver = stack.enter_context(at(network.second, socket.SOCK_DGRAM))
        sender = stack.enter_context(at(network.first, socket.SOCK_DGRAM))
        sender.sendto(b"through", (network.second.address, PORT))
        assert receiver.recv(100) == b"through"
