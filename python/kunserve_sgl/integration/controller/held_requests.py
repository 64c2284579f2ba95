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
        self._held: deque[tuple[Any, float]] = deque()  # and since when each waits

    def __len__(self) -> int:
        return len(self._held)

    @property
    def next_deadline_s(self) -> float | None:
        """Says when `take_overdue` has something to return; None while nothing is held."""
        return self._held[0][1] + self.longest_s if self._held else None

    def add(self, request: Any, since_s: float) -> bool:
        """Keeps SGLang's tokenized request, which waits since then. Returns False where there are too many already."""
        if len(self._held) >= MOST_HELD:
            return False
        bisect.insort(self._held, (request, since_s), key=lambda entry: entry[1])
        return True

    def take_overdue(self, now_s: float) -> list[Any]:
        """Returns those that have waited for too long."""
        overdue = []
        while (deadline_s := self.next_deadline_s) is not None and deadline_s <= now_s:
            overdue.append(self._held.popleft()[0])
        return overdue

    def take_all(self) -> list[tuple[Any, float]]:
        """Returns all, in order, each with since when it has waited."""
        return self.take_where(lambda _: True)

    def take_aborted(self, abort: Any) -> list[Any]:
        """Returns those that SGLang's AbortReq is about: by the beginning of their name, as its schedulers see it."""
        taken = self.take_where(lambda request: bool(abort.abort_all or request.rid.startswith(abort.rid)))
        return [request for request, _ in taken]

    def take_where(self, is_meant: Callable[[Any], bool]) -> list[tuple[Any, float]]:
        """Returns those that it holds for, in order, each with since when it has waited."""
        gone = [entry for entry in self._held if is_meant(entry[0])]
        names = {request.rid for request, _ in gone}
        self._held = deque(entry for entry in self._held if entry[0].rid not in names)
        return gone
