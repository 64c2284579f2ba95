"""The clock by which the controller lets deadlines pass."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

# A wait that ends so much later than asked was no wait: the process was stopped, or its machine.
_LATE_S = 1.0


class ServingClock:
    """Is the monotonic clock less the time for which this process stood still. What others sent meanwhile has not been
    read when it wakes, so no deadline of theirs may have passed by then."""

    def __init__(self) -> None:
        self._stood_still_s = 0.0

    def __call__(self) -> float:
        """Returns the time in seconds."""
        return time.monotonic() - self._stood_still_s

    def on_waited(self, seconds: float, at_most_s: float) -> None:
        """Takes note of a wait that took `seconds`, and was to take `at_most_s` at most."""
        late_s = seconds - at_most_s
        if late_s > _LATE_S:
            self._stood_still_s += late_s
            logger.warning("KunServe: the controller stood still for %.1f s", late_s)
