"""Connections to peers that are being made while batches run.

A peer joins in when it comes to a batch boundary, and for that it may have to get answers from this replica: to wait
for it here would be a circle of waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future


class Connecting:
    """One attempt, in a thread of its own that ends with the deadline of `connect`."""

    def __init__(
        self, connect: Callable[[], None], disconnect: Callable[[], None], one_at_a_time: threading.Lock
    ) -> None:
        """`disconnect` takes back what `connect` has made, also a part of it. Attempts that share `one_at_a_time`
        follow each other."""
        self._connect = connect
        self._disconnect = disconnect
        self._one_at_a_time = one_at_a_time
        self._state = threading.Lock()
        self._is_cancelled = False
        self._done: Future[None] = Future()
        threading.Thread(target=self._run, name="kunserve-connect", daemon=True).start()

    def is_done(self) -> bool:
        """Raises what `connect` has raised."""
        if not self._done.done():
            return False
        self._done.result()
        return True

    def cancel(self) -> None:
        """Does not wait: where the attempt still runs, it takes back itself what it makes."""
        with self._state:
            self._is_cancelled = True
            if self._done.done():
                self._disconnect()

    def _run(self) -> None:
        with self._one_at_a_time:
            error: BaseException | None = None
            try:
                if not self._is_cancelled:
                    self._connect()
            except BaseException as raised:  # noqa: BLE001 - it is raised where the result is asked for
                error = raised
            with self._state:
                if self._is_cancelled:
                    self._disconnect()
                if error is None:
                    self._done.set_result(None)
                else:
                    self._done.set_exception(error)


class Connected:
    """In place of an attempt where there is nothing to connect."""

    def is_done(self) -> bool:
        return True

    def cancel(self) -> None:
        """There is nothing to take back."""


def connecting(
    connect: Callable[[Iterable[int]], None],
    disconnect: Callable[[Iterable[int]], None],
    peers: Iterable[int],
    one_at_a_time: threading.Lock,
) -> Connecting | Connected:
    """To `peers`; none is nothing to do."""
    wanted = tuple(peers)
    if not wanted:
        return Connected()
    return Connecting(lambda: connect(wanted), lambda: disconnect(wanted), one_at_a_time)
