"""The coordinator's sockets: one inbox for everybody, and one way to each rank's inbox. Nothing here blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import msgspec
import zmq

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import coordinator_bind_address, publish_coordinator
from kunserve_sgl.control.messages import FromCoordinator, Hello, ToCoordinator
from kunserve_sgl.execution.peer_link import control_message

logger = logging.getLogger(__name__)

# A rank that takes nothing from its inbox misses its deadlines long before this many messages have gathered.
_SEND_LIMIT_MESSAGES = 1000


class CoordinatorLink:
    """Must be made before the schedulers start, which read its address."""

    def __init__(self, options: KunserveOptions) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox = self._context.socket(zmq.PULL)
        self.inbox.bind(coordinator_bind_address(options))
        publish_coordinator(options, self.inbox.getsockopt_string(zmq.LAST_ENDPOINT))
        self._outboxes: dict[tuple[int, int], zmq.Socket[bytes]] = {}
        self._processes: dict[int, tuple[int, int]] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToCoordinator)

    def receive(self) -> Iterator[ToCoordinator]:
        """What has arrived. A message that cannot be read is logged and left out: it may come from anybody."""
        while True:
            try:
                payload = self.inbox.recv_multipart(flags=zmq.NOBLOCK)[-1]
            except zmq.Again:
                return
            try:
                message = self._decoder.decode(payload)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                logger.error("KunServe: ignored a message of %d bytes to the coordinator: %s", len(payload), error)
                continue
            if isinstance(message, Hello):
                self._connect(message)
            yield message

    def send(self, replica: int, rank: int, message: FromCoordinator) -> None:
        """Drops the message, with a line in the log, for a rank that has not taken any for long; its deadline will
        tell."""
        try:
            frames = control_message(self._encoder.encode(message))
            self._outboxes[replica, rank].send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.Again:
            logger.error("KunServe: replica %d rank %d takes no messages", replica, rank)

    def rank_of(self, pid: int) -> tuple[int, int] | None:
        """(replica, rank) of a process that has reported."""
        return self._processes.get(pid)

    def close(self) -> None:
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
        outbox.connect(hello.address)
        self._outboxes[hello.replica, hello.rank] = outbox
