"""Requests that replicas have been sent and that have not been answered, so that it is known which are lost with one.

That a request has been answered is said by the HTTP server, when it has the whole answer. Its replica would not do:
what a process has handed to its sockets is lost with it, and of two sockets one may have sent more than the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST_KEPT = 100_000  # per replica; far more than a server has open


class NotingWorkers(list[Any]):
    """Holds the sockets to the replicas. SGLang's dispatch methods take one of them by its number, which is noted."""

    _last: int | None = None

    def __getitem__(self, replica: Any) -> Any:
        self._last = replica
        return super().__getitem__(replica)

    def take_last(self) -> int | None:
        """Returns the number that was noted last, once; None where none was since."""
        last, self._last = self._last, None
        return last


class OpenRequests:
    """Keeps the names of the requests of each replica, in the order of sending."""

    def __init__(self, replicas: int) -> None:
        self._open: list[dict[str, None]] = [{} for _ in range(replicas)]

    def sent(self, replica: int, request: Any) -> None:
        """Takes note that SGLang's tokenized `request` is on its way to the replica."""
        kept = self._open[replica]
        kept[request.rid] = None
        if len(kept) > MOST_KEPT:
            del kept[next(iter(kept))]

    def ended(self, names: Iterable[str]) -> None:
        """Takes note that these have been answered."""
        for name in names:
            for kept in self._open:
                kept.pop(name, None)

    def count(self, replica: int) -> int:
        """Counts the requests of `replica` that have not been answered."""
        return len(self._open[replica])

    def take_lost(self, replica: int) -> list[str]:
        """Returns the names of the open requests of a replica that has ended, once, in the order of sending."""
        names, self._open[replica] = self._open[replica], {}
        return list(names)
