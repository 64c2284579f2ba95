"""The coordinator's sockets: one inbox for everybody, and one way to each rank's inbox. Nothing here blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import msgspec
import zmq

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import coordinator_bind_address, curve_of, publish_coordinator
from kunserve_sgl.control.messages import FromCoordinator, Hello, ToCoordinator
from kunserve_sgl.wire.framing import MOST_CONTROL_BYTES, control_message
from kunserve_sgl.wire.rejections import COORDINATOR, Rejections, Sender

logger = logging.getLogger(__name__)

# A rank that takes nothing from its inbox misses its deadlines long before this many messages have gathered.
_SEND_LIMIT_MESSAGES = 1000


class CoordinatorLink:
    """Holds the coordinator's sockets. It must be made before the schedulers start, which read its address; after the
    keys, with tcp."""

    def __init__(self, options: KunserveOptions, rejections: Rejections) -> None:
        self.curve = curve_of(options, COORDINATOR)
        self.rejections = rejections
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context() if self.curve is None else self.curve.context
        self.inbox = self._context.socket(zmq.PULL)
        self.inbox.setsockopt(zmq.MAXMSGSIZE, MOST_CONTROL_BYTES)
        if self.curve is not None:
            self.curve.listen(self.inbox)
        self.inbox.bind(coordinator_bind_address(options))
        publish_coordinator(options, self.inbox.getsockopt_string(zmq.LAST_ENDPOINT))
        self._outboxes: dict[tuple[int, int], zmq.Socket[bytes]] = {}
        self._processes: dict[int, tuple[int, int]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToCoordinator] = msgspec.msgpack.Decoder(ToCoordinator)

    def receive(self, check: Callable[[ToCoordinator, Sender], None]) -> Iterator[ToCoordinator]:
        """Returns what has arrived. A message that cannot be read, or for which `check` raises BadMessageError, is
        counted and left out: it may come from anybody."""
        while True:
            try:
                frame = self.inbox.recv_multipart(flags=zmq.NOBLOCK, copy=False)[-1]
            except zmq.Again:
                return
            sender = None if self.curve is None else self.curve.sender_of(frame)
            message = self.read(frame.bytes, sender, check)
            if message is not None:
                yield message

    def read(
        self, payload: bytes, sender: Sender, check: Callable[[ToCoordinator, Sender], None]
    ) -> ToCoordinator | None:
        """Returns the message, or None for one to ignore."""
        message = self.rejections.read(self._decoder, payload, lambda message: check(message, sender))
        if isinstance(message, Hello):
            self._connect(message)
        return message

    def send(self, replica: int, rank: int, message: FromCoordinator) -> None:
        """Drops the message, with a line in the log, for a rank that has not taken any for long; its deadline will
        tell."""
        try:
            self._outboxes[replica, rank].send(control_message(self._encoder.encode(message)), zmq.NOBLOCK)
        except zmq.Again:
            logger.error("KunServe: replica %d rank %d takes no messages", replica, rank)

    def rank_of(self, pid: int) -> tuple[int, int] | None:
        """Returns (replica, rank) of a process that has reported."""
        return self._processes.get(pid)

    def knows(self, replica: int, rank: int) -> bool:
        """Tells whether a rank has reported."""
        return (replica, rank) in self._outboxes

    def forget(self, replica: int) -> None:
        """Closes the ways to a replica whose processes have ended, and forgets those."""
        self._processes = {pid: who for pid, who in self._processes.items() if who[0] != replica}
        for who in [who for who in self._outboxes if who[0] == replica]:
            self._outboxes.pop(who).close(linger=0)

    def close(self) -> None:
        """Closes all sockets at once; what was not sent yet is dropped."""
        for socket in (self.inbox, *self._outboxes.values()):
            socket.close(linger=0)
        self._context.term()

    def _connect(self, hello: Hello) -> None:
        self._processes[hello.pid] = (hello.replica, hello.rank)
        if (hello.replica, hello.rank) in self._outboxes:
            return
        outbox = self._context.socket(zmq.PUSH)
        outbox.setsockopt(zmq.LINGER, 0)
        outbox.setsockopt(zmq.SNDHWM, _SEND_LIMIT_MESSAGES)
        if self.curve is not None:
            self.curve.call(outbox, (hello.replica, hello.rank))
        outbox.connect(hello.address)
        self._outboxes[hello.replica, hello.rank] = outbox
