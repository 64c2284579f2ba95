"""Waits for what a test cannot be told of: a condition is looked at again and again, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable

_POLL_S = 0.02


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = 120.0) -> None:
    """Returns when `condition` holds; AssertionError names `what` when it does not hold within the deadline."""
    ends_at_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends_at_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(_POLL_S)
