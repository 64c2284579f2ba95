"""Where a rank's time goes, by what it is spent on."""

from __future__ import annotations

import time
from collections import defaultdict
from types import TracebackType


class _Block:
    """Counts what one block takes. A class, because it is entered several times in a step, which a generator makes
    noticeable."""

    __slots__ = ("_seconds", "_started_s", "_what")

    def __init__(self, seconds: defaultdict[str, float], what: str) -> None:
        self._seconds = seconds
        self._what = what

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._seconds[self._what] += time.perf_counter() - self._started_s


class TimeSpent:
    """Adds up the wall-clock seconds that one thread spends on each kind of work."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def on(self, what: str) -> _Block:
        """Counts what the block that this opens takes, also if it fails."""
        return _Block(self._seconds, what)

    def report(self) -> dict[str, float]:
        """Returns the seconds since the start, rounded to microseconds."""
        return {what: round(seconds, 6) for what, seconds in self._seconds.items()}
