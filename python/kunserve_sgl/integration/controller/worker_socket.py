"""The way to the scheduler of one replica, on which the controller never waits for long."""

from __future__ import annotations

import logging
from typing import Any

import zmq

logger = logging.getLogger(__name__)

# SGLang binds these sockets, without a limit of messages. So a send waits only where nobody is connected: the process
# has just ended, and its end has not been seen yet. Without a limit it would wait for ever, and the controller with it.
SEND_DEADLINE_MS = 1000


class WorkerSocket:
    """Sends as SGLang's socket does. What nobody takes is dropped: it counts as sent, and goes the way of all that the
    replica had when its end is seen."""

    def __init__(self, socket: zmq.Socket[bytes], replica: int) -> None:
        """`socket` is SGLang's, for requests to `replica`."""
        socket.setsockopt(zmq.SNDTIMEO, SEND_DEADLINE_MS)
        self._socket = socket
        self._replica = replica

    def send(self, data: Any, **options: Any) -> None:
        """Sends one message."""
        try:
            self._socket.send(data, **options)
        except zmq.Again:
            self._drop()

    def send_pyobj(self, message: Any, **options: Any) -> None:
        """Sends an object, where SGLang is told to send objects so."""
        try:
            self._socket.send_pyobj(message, **options)
        except zmq.Again:
            self._drop()

    def close(self, linger: int) -> None:
        """Closes the socket; `linger` is in ms, as zmq's."""
        self._socket.close(linger=linger)

    def _drop(self) -> None:
        logger.warning("KunServe: replica %d is not there to take a message", self._replica)
