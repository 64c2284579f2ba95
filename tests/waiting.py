"""Waits for what a test cannot be told of: a condition is looked at again and again, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

# A look may be a call that takes a server milliseconds: who has waited for long looks less often.
_POLL_S, _LONGEST_POLL_S = 0.02, 0.2
_SHARE_OF_WAIT = 0.1


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = 600.0) -> None:
    """Returns when `condition` holds; AssertionError names `what` when it does not hold within the deadline."""
    began_s = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - began_s
        assert waited_s < deadline_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(min(max(_POLL_S, _SHARE_OF_WAIT * waited_s), _LONGEST_POLL_S))
