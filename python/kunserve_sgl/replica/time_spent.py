"""Where a rank's time goes, by what it is spent on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class TimeSpent:
    """Adds up the wall-clock seconds that one thread spends on each kind of work."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts what the block takes, also if it fails."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[what] += time.perf_counter() - started_s

    def report(self) -> dict[str, float]:
        """Returns the seconds since the start, rounded to microseconds."""
        return {what: round(seconds, 6) for what, seconds in self._seconds.items()}
