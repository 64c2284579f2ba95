"""Requests that wait in the controller, as while no replica is there, but one is coming back."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable
from typing import Any

# More would wait for their turn longer than clients do, when a replica is back, and each has its prompt in memory.
MOST_HELD = 4096


class HeldRequests:
    """Keeps requests in the order in which they began to wait, each for `longest_s` at most."""

    def __init__(self, longest_s: float) -> None:
        self.longest_s = longest_s
        self._held: deque[tuple[float, Any]] = deque()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def next_deadline_s(self) -> float | None:
        """Says when `take_overdue` has something to return; None while nothing is held."""
        return self._held[0][0] if self._held else None

    def add(self, request: Any, since_s: float) -> bool:
        """Keeps SGLang's tokenized request, which waits since then. Returns False where there are too many already."""
        if len(self._held) >= MOST_HELD:
            return False
        bisect.insort(self._held, (since_s + self.longest_s, request), key=lambda entry: entry[0])
        return True

    def take_overdue(self, now_s: float) -> list[Any]:
        """Returns those that have waited for too long."""
        overdue = []
        while self._held and self._held[0][0] <= now_s:
            overdue.append(self._held.popleft()[1])
        return overdue

    def take_all(self) -> list[tuple[Any, float]]:
        """Returns all, in order, each with since when it has waited."""
        held = [(request, deadline_s - self.longest_s) for deadline_s, request in self._held]
        self._held.clear()
        return held

    def take_aborted(self, abort: Any) -> list[Any]:
        """Returns those that SGLang's AbortReq is about: by the beginning of their name, as its schedulers see it."""

        return self.take_where(lambda request: bool(abort.abort_all or request.rid.startswith(abort.rid)))

    def take_where(self, is_meant: Callable[[Any], bool]) -> list[Any]:
        """Returns those that it holds for, in order."""
        gone = [request for _, request in self._held if is_meant(request)]
        names = {request.rid for request in gone}
        self._held = deque(entry for entry in self._held if entry[1].rid not in names)
        return gone
