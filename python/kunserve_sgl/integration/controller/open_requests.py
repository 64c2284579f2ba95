"""Requests that replicas have been sent and have not ended, so that it is known which are lost with a replica."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Per replica. A replica says which requests have ended, but some it never queues, and those would add up.
MOST_KEPT = 100_000


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

    def ended(self, replica: int, names: Iterable[str]) -> None:
        """Takes note that these have ended, as the replica says."""
        for name in names:
            self._open[replica].pop(name, None)

    def count(self, replica: int) -> int:
        """Counts the requests of `replica` that have not ended."""
        return len(self._open[replica])

    def take_lost(self, replica: int) -> list[str]:
        """Returns the names of the open requests of a replica that has ended, once, in the order of sending."""
        names, self._open[replica] = self._open[replica], {}
        return list(names)
