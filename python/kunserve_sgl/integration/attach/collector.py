"""Python's garbage collector, kept from stopping a process that serves."""

from __future__ import annotations

import gc


def leave_startup_alone() -> None:
    """Keeps what has been made up to now out of later collections, since it lives as long as the process: some 800,000
    objects. A full collection, which the books of a transition may set off, would look at all of them, and a replica
    stood still for half a second."""
    gc.collect()
    gc.freeze()
