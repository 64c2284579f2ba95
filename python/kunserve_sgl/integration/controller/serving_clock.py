"""The clock by which the controller lets deadlines pass."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

# Between two looks at the clock nothing takes so long but waits, of which it is told.
_LATE_S = 1.0


class ServingClock:
    """Is the monotonic clock less the time for which this process stood still: it or its machine was stopped, or it was
    held up. What others sent meanwhile has not been read when it goes on, so no deadline of theirs may have passed by
    then. It is for one thread, which looks at it more often than once a second."""

    def __init__(self) -> None:
        self._stood_still_s = 0.0
        self._looked_s = time.monotonic()

    def __call__(self) -> float:
        """Returns the time in seconds."""
        return self.after_wait(0.0)

    def after_wait(self, at_most_s: float) -> float:
        """Returns the time after a wait that began with the last look, and was to take `at_most_s` at most."""
        now_s = time.monotonic()
        late_s = now_s - self._looked_s - at_most_s
        self._looked_s = now_s
        if late_s > _LATE_S:
            self._stood_still_s += late_s
            logger.warning("KunServe: the controller stood still for %.1f s", late_s)
        return now_s - self._stood_still_s
