"""Connections to peers that are being made while batches run.

A peer joins in when it comes to a batch boundary, and for that it may have to get answers from this replica: to wait
for it here would be a circle of waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future


class Connecting:
    """Runs one attempt to connect, in a thread of its own that ends with the deadline of `connect`, or soon after it is
    cancelled."""

    def __init__(
        self,
        peers: Iterable[int],
        connect: Callable[[Iterable[int], Callable[[], bool]], None],
        disconnect: Callable[[Iterable[int]], None],
        one_at_a_time: threading.Lock,
    ) -> None:
        """Starts the attempt. `connect` gets the peers, and what tells whether it has been cancelled; `disconnect`
        takes back what it has made, also a part of it. Attempts that share `one_at_a_time` follow each other."""
        self.peers = frozenset(peers)
        self._connect = connect
        self._disconnect = disconnect
        self._one_at_a_time = one_at_a_time
        self._state = threading.Lock()
        self._cancelled = threading.Event()
        self._done: Future[None] = Future()
        threading.Thread(target=self._run, name="kunserve-connect", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Tells whether the attempt is over: what it has made stays, or has been taken back."""
        return self._done.done()

    def is_done(self) -> bool:
        """Tells whether all peers are connected. Raises what `connect` has raised."""
        if not self.has_ended:
            return False
        self._done.result()
        return True

    def cancel(self) -> None:
        """Tells the attempt to end and does not wait: where it still runs, it takes back itself what it makes."""
        with self._state:
            self._cancelled.set()
            if self.has_ended:
                self._disconnect(self.peers)

    def _run(self) -> None:
        with self._one_at_a_time:
            error: BaseException | None = None
            try:
                self._connect(self.peers, self._cancelled.is_set)
            except BaseException as raised:  # noqa: BLE001 - it is raised where the result is asked for
                error = raised
            with self._state:
                if self._cancelled.is_set():
                    self._disconnect(self.peers)
                if error is None:
                    self._done.set_result(None)
                else:
                    self._done.set_exception(error)


class Connected:
    """Stands in for an attempt where there is nothing to connect."""

    def is_done(self) -> bool:
        """Is true from the beginning."""
        return True

    def cancel(self) -> None:
        """Does nothing: there is nothing to take back."""
