"""Waits for threads to end, none of them for ever."""

from __future__ import annotations

import threading

from kunserve_sgl.errors import TransientError

END_DEADLINE_S = 10.0  # they have been told to end, and do so when they have done what they are at


def await_end(thread: threading.Thread) -> None:
    """Waits for the end of `thread`. Raises TransientError where it does not come in time."""
    thread.join(END_DEADLINE_S)
    if thread.is_alive():
        raise TransientError(f"thread {thread.name} has not ended within {END_DEADLINE_S:g} s")
