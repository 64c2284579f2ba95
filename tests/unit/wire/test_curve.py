"""Sockets over TCP with the keys of a deployment: who has none gets nowhere, and who has one is known by it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from kunserve_sgl import threads
from kunserve_sgl.errors import TransientError
from kunserve_sgl.wire import curve as curve_module
from kunserve_sgl.wire.curve import Curve, make_keys
from kunserve_sgl.wire.rejections import COORDINATOR
from namespaces import two_namespaces

ARRIVAL_MS = 120_000
FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_DISCONNECTED
)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "curve.keys"
    make_keys(path, 2, 2)
    return path


@pytest.fixture
def listener(keys: Path) -> Iterator[tuple[Curve, zmq.Socket[bytes]]]:
    curve = Curve(keys, (0, 1))
    socket = curve.context.socket(zmq.PULL)
    curve.listen(socket)
    socket.bind("tcp://127.0.0.1:*")
    yield curve, socket
    socket.close(0)
    curve.close()


def say(curve: Curve, address: str, text: bytes) -> zmq.Socket[bytes]:
    socket = curve.context.socket(zmq.PUSH)
    curve.call(socket, (0, 1))
    socket.connect(address)
    socket.send(text)
    return socket


def test_each_message_says_who_sent_it(listener: tuple[Curve, zmq.Socket[bytes]], keys: Path) -> None:
    curve, inbox = listener
    address = inbox.getsockopt_string(zmq.LAST_ENDPOINT)
    for me in (COORDINATOR, (0, 0), (1, 1)):
        other = Curve(keys, me)
        socket = say(other, address, b"it is I")
        assert inbox.poll(ARRIVAL_MS)
        (frame,) = inbox.recv_multipart(copy=False)
        assert (frame.bytes, curve.sender_of(frame)) == (b"it is I", me)
        socket.close(0)
        other.close()


@pytest.mark.parametrize("knows", ["nothing", "another key", "the public key of the listener"])
def test_strangers_get_nowhere(listener: tuple[Curve, zmq.Socket[bytes]], keys: Path, knows: str) -> None:
    curve, inbox = listener
    address = inbox.getsockopt_string(zmq.LAST_ENDPOINT)
    with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
        monitor = stranger.get_monitor_socket(FAILED)
        stranger.setsockopt(zmq.LINGER, 0)
        if knows != "nothing":
            public, secret = zmq.curve_keypair()
            stranger.setsockopt(zmq.CURVE_PUBLICKEY, public)
            stranger.setsockopt(zmq.CURVE_SECRETKEY, secret)
            whose = (0, 1) if knows == "the public key of the listener" else (0, 0)
            stranger.setsockopt(zmq.CURVE_SERVERKEY, curve._public_of[whose])
        stranger.connect(address)
        stranger.send(b"let me in")
        assert monitor.poll(ARRIVAL_MS), "the stranger was not turned away"
        assert recv_monitor_message(monitor)["event"] & FAILED
        known = Curve(keys, (1, 1))
        socket = say(known, address, b"it is I")
        assert inbox.poll(ARRIVAL_MS)
        assert inbox.recv() == b"it is I"
        assert not inbox.poll(0)
        stranger.disable_monitor()
        socket.close(0)
        known.close()


def test_what_was_recorded_on_the_way_is_refused(listener: tuple[Curve, zmq.Socket[bytes]], keys: Path) -> None:
    """Each connection has keys of its own, so what one of them carried says nothing on another."""
    _, inbox = listener
    place = "127.0.0.1", int(inbox.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    recorded = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as tap, ThreadPoolExecutor() as threads, ExitStack() as stack:
        known = Curve(keys, (1, 1))
        stack.callback(known.close)
        sender = say(known, f"tcp://127.0.0.1:{tap.getsockname()[1]}", b"it is I")
        stack.callback(sender.close, 0)
        near, _ = tap.accept()
        far = socket.create_connection(place)
        stack.callback(near.close)
        stack.callback(far.close)

        def pass_on(source: socket.socket, target: socket.socket, copy: bytearray) -> None:
            with suppress(OSError):  # the other end was closed
                while data := source.recv(65536):
                    copy += data
                    target.sendall(data)

        ways = [threads.submit(pass_on, near, far, recorded), threads.submit(pass_on, far, near, bytearray())]
        assert inbox.poll(ARRIVAL_MS)
        assert inbox.recv() == b"it is I"
        for end in (near, far):
            end.shutdown(socket.SHUT_RDWR)
        for way in ways:
            way.result()
    assert len(recorded) > 400  # greeting, HELLO, INITIATE and the message
    with socket.create_connection(place) as again:
        again.settimeout(ARRIVAL_MS / 1000)
        with suppress(ConnectionError):  # it may be closed before all is sent
            again.sendall(recorded)
            while again.recv(65536):
                pass  # until the listener closes it
    known = Curve(keys, (1, 1))
    sender = say(known, f"tcp://{place[0]}:{place[1]}", b"it is I again")
    assert inbox.poll(ARRIVAL_MS)
    assert inbox.recv() == b"it is I again"
    assert not inbox.poll(0)
    sender.close(0)
    known.close()


@pytest.mark.parametrize("calls", [False, True])
def test_who_only_receives_closes_a_connection_to_a_machine_that_is_gone(
    keys: Path, monkeypatch: pytest.MonkeyPatch, calls: bool
) -> None:
    for name in ("_IDLE_S", "_PROBE_INTERVAL_S", "_PROBES"):
        monkeypatch.setattr(curve_module, name, 1)
    me, other = (0, 1), (1, 1)
    with two_namespaces() as network, ExitStack() as stack:
        with network.first.inside():
            receiver = Curve(keys, me)
            stack.callback(receiver.close)
            takes = receiver.context.socket(zmq.PULL)
            stack.callback(takes.close, 0)
        with network.second.inside():
            sender = Curve(keys, other)
            stack.callback(sender.close)
            sends = sender.context.socket(zmq.PUSH)
            stack.callback(sends.close, 0)
        ends = [(receiver, takes, me, network.first), (sender, sends, other, network.second)]
        (listening, listens, listener, where), (calling, caller, _, _) = ends[::-1] if calls else ends
        listening.listen(listens)
        with where.inside():
            listens.bind(f"tcp://{where.address}:*")
        calling.call(caller, listener)
        caller.connect(listens.getsockopt_string(zmq.LAST_ENDPOINT))
        sends.setsockopt(zmq.SNDTIMEO, ARRIVAL_MS)
        sends.send(b"it is I")
        assert takes.poll(ARRIVAL_MS)
        monitor = takes.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        stack.callback(monitor.close, 0)
        stack.callback(takes.disable_monitor)
        network.cable.set(loss=1.0)
        assert monitor.poll(ARRIVAL_MS), "the connection is still there"


def test_only_this_user_reads_the_keys_and_they_are_made_once(keys: Path) -> None:
    assert keys.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        make_keys(keys, 2, 2)
    with pytest.raises(TransientError, match="no keys of 7-0"):
        Curve(keys, (7, 0))
    with pytest.raises(TransientError, match="no keys of coordinator in /missing"):
        Curve(Path("/missing"), COORDINATOR)


def test_keys_are_not_given_up_for_ever_while_a_socket_is_open(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = Curve(keys, (0, 0))
    socket = curve.context.socket(zmq.PUSH)
    with monkeypatch.context() as impatient:
        impatient.setattr(threads, "END_DEADLINE_S", 0.01)
        with pytest.raises(TransientError, match=r"thread kunserve-keys has not ended within 0\.01 s"):
            curve.close()
    socket.close(0)
    curve.close()


def test_a_socket_can_be_for_one_only(keys: Path) -> None:
    curve, whom = Curve(keys, COORDINATOR), (1, 0)
    with zmq.Context() as context, context.socket(zmq.PUSH) as listener:  # not its own context
        listener.setsockopt(zmq.LINGER, 0)
        curve.listen(listener, only=whom)
        listener.setsockopt(zmq.SNDTIMEO, ARRIVAL_MS)
        listener.bind("tcp://127.0.0.1:*")
        for me in ((0, 0), (1, 1), COORDINATOR, whom):
            other = Curve(keys, me)
            socket = other.context.socket(zmq.PULL)
            monitor = socket.get_monitor_socket(FAILED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
            other.call(socket, COORDINATOR)
            socket.connect(listener.getsockopt_string(zmq.LAST_ENDPOINT))
            assert monitor.poll(ARRIVAL_MS)
            assert bool(recv_monitor_message(monitor)["event"] & FAILED) is (me != whom)
            if me == whom:
                listener.send(b"for one")
                assert socket.poll(ARRIVAL_MS)
                assert socket.recv() == b"for one"
            else:
                with pytest.raises(zmq.Again):
                    listener.send(b"for one", zmq.NOBLOCK)
            socket.disable_monitor()
            monitor.close(0)
            socket.close(0)
            other.close()
    curve.close()
