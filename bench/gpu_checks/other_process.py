"""A second process that shares memory with this one over a socket, for checks and for tests on a GPU."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

TIMEOUT_S = 120.0


@contextmanager
def other_process(run: Callable[..., None], *arguments: Any) -> Iterator[tuple[socket.socket, BaseProcess]]:
    """Runs `run(its end of a socket, *arguments)` in a process of its own, and gives the other end, with a timeout. The
    process has ended behind the block: by itself, or killed where it does not."""
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(target=run, args=(theirs, *arguments))
    process.start()
    theirs.close()
    ours.settimeout(TIMEOUT_S)
    try:
        with ours:
            yield ours, process
        process.join(TIMEOUT_S)
    finally:
        process.kill()
        process.join(TIMEOUT_S)
