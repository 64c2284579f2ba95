"""Who may talk over TCP: every process of a deployment has a key pair, and a socket that is listened on takes
connections of those whose public keys it knows, and says of each message who sent it. ZMQ's CURVE.

The keys are made for one deployment, in its private directory, before anything listens. Whoever can read that directory
is this user, and can do anything to these processes anyway.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq
from zmq.utils import z85

from kunserve_sgl.errors import TransientError
from kunserve_sgl.threads import await_end
from kunserve_sgl.wire.rejections import COORDINATOR, Sender

logger = logging.getLogger(__name__)

Name = tuple[int, int]  # (replica, rank), or COORDINATOR

_DOMAIN = b"kunserve"
_GATE_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks
_GATE_VERSION = b"1.0"
_GRANTED, _REFUSED = b"200", b"400"
# A machine that is gone ends no connection, and who only listens would keep its own for ever. One over which nothing
# comes for a quarter of an hour, nor any answer to a probe then, is closed: no sooner than the system gives up one over
# which something was sent (tcp_retries2), which may still come when the network is mended.
_IDLE_S, _PROBE_INTERVAL_S, _PROBES = 900, 15, 6


def make_keys(path: Path, replicas: int, ranks: int) -> None:
    """Writes a key pair for the coordinator and for each rank of each replica."""
    everybody = [COORDINATOR, *((replica, rank) for replica in range(replicas) for rank in range(ranks))]
    pairs = {_text(name): tuple(key.decode() for key in zmq.curve_keypair()) for name in everybody}
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(pairs))


class Curve:
    """Holds the keys of one process. Its sockets are made in `context`, so that nobody else's depend on its gate; those
    that SGLang makes are in SGLang's contexts."""

    def __init__(self, path: Path, me: Name) -> None:
        """Reads the keys from `path`. Raises TransientError where there are none, or none for `me`."""
        try:
            pairs = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[str, str]])
            self._public, self._secret = (key.encode() for key in pairs[_text(me)])
        except (OSError, KeyError) as error:
            raise TransientError(f"no keys of {_text(me)} in {path}: {error}") from error
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gates: dict[int, _Gate] = {}  # by the addresses of contexts in which something listens
        self._ending: threading.Thread | None = None
        self._public_of = {_name(text): public.encode() for text, (public, _) in pairs.items()}
        self._names = {text: _name(text) for text in pairs}
        # By the 32 bytes that libzmq shows the gate; z85 is the text of a key.
        self._known = {z85.decode(public): text for text, (public, _) in pairs.items()}

    def listen(self, socket: zmq.Socket[bytes], only: Name | None = None) -> None:
        """Lets `socket` take only connections of those who are known, or of `only` one. Its context may be another one,
        as long as that lives as long as this process. Call it before the socket is bound."""
        where = socket.context.underlying
        if where not in self._gates:
            self._gates[where] = _Gate(zmq.Context.shadow(where), self._known)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN if only is None else _domain_of(_text(only)))
        _notice_end(socket)

    def call(self, socket: zmq.Socket[bytes], whom: Name) -> None:
        """Lets `socket` talk to nobody but `whom`. Call it before the socket is connected."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self._public_of[whom])
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        _notice_end(socket)

    def sender_of(self, frame: Any) -> Sender:
        """Says who sent a frame that came through a socket which listens."""
        return self._names[frame.get("User-Id")]

    def close(self) -> None:
        """Ends the gate and the context. Call it when all sockets are closed. Raises TransientError where one is not;
        it may be called again then."""
        gate = self._gates.get(self.context.underlying)
        if self._ending is None:
            self._ending = threading.Thread(target=self.context.term, name="kunserve-keys", daemon=True)
            self._ending.start()
        await_end(self._ending)
        if gate is not None:
            await_end(gate)


class _Gate(threading.Thread):
    """Answers libzmq, which asks for every connection to a socket of the context (RFC 27, ZAP)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], known: Mapping[bytes, str]) -> None:
        super().__init__(name="kunserve-gate", daemon=True)
        self._known = known
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_GATE_ADDRESS)
        self.start()

    def run(self) -> None:
        try:
            while True:
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        except zmq.ContextTerminated:
            pass  # this is how it ends
        finally:
            self._socket.close()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        _, number, domain, address, _, mechanism, *credentials = request
        who = self._known.get(credentials[0]) if mechanism == b"CURVE" else None
        if who is None or domain not in (_DOMAIN, _domain_of(who)):
            logger.warning("KunServe: refused a connection from %s", address.decode(errors="replace"))
            return [_GATE_VERSION, number, _REFUSED, b"unknown", b"", b""]
        return [_GATE_VERSION, number, _GRANTED, b"OK", who.encode(), b""]


def _notice_end(socket: zmq.Socket[bytes]) -> None:
    """Lets the connections of a socket end some time after the other end's machine is gone, or the way there."""
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _IDLE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _PROBE_INTERVAL_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, _PROBES)


def _domain_of(text: str) -> bytes:
    """Returns what a socket says to the gate that is for one only."""
    return _DOMAIN + b"/" + text.encode()


def _text(name: Name) -> str:
    return "coordinator" if name == COORDINATOR else f"{name[0]}-{name[1]}"


def _name(text: str) -> Name:
    if text == "coordinator":
        return COORDINATOR
    replica, rank = map(int, text.split("-"))
    return replica, rank
