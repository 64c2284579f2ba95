"""What the controller sleeps on: sockets that stay, and files that come and go with processes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import zmq


class Polling:
    """Waits for the first of them that can be read."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._files: set[int] = set()

    def add(self, socket: zmq.Socket[bytes]) -> None:
        """Waits for `socket` too, from now on."""
        self._poller.register(socket, zmq.POLLIN)

    def poll(self, files: Collection[int], wait_ms: int) -> dict[Any, int]:
        """Waits for the sockets and for these `files`, for `wait_ms` at most. Returns what can be read."""
        wanted = set(files)
        for file in self._files - wanted:
            self._poller.unregister(file)
        for file in wanted - self._files:
            self._poller.register(file, zmq.POLLIN)
        self._files = wanted
        return dict(self._poller.poll(wait_ms))
