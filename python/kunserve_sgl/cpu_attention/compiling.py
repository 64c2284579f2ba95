"""Lets one of several processes compile, and the others take what it has left on disk: replicas start at once, and each
would compile the same, 5 s of CPU time for each combination of types."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LONGEST_S = 60.0  # then it compiles itself: who has the lock may have been stopped
_LOOK_S = 0.02  # between two looks at a lock: waiting for one in the kernel has no deadline


def compiled_once(dispatcher: Any) -> Any:
    """Returns numba's `dispatcher`, made with `cache=True`: its compilations keep each other waiting, in all processes
    that share its cache."""
    compile_or_load = dispatcher.compile

    def alone(signature: Any) -> Any:
        with _turn(Path(dispatcher.stats.cache_path) / f"{dispatcher.__name__}.lock"):
            return compile_or_load(signature)

    dispatcher.compile = alone
    return dispatcher


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Holds the lock of a file while this lasts, or nothing where it cannot be had: on some file systems, such as NFS
    without its lock service, there are no locks."""
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(path.open("a"))
            ends_s = time.monotonic() + LONGEST_S
            while not _has(file) and time.monotonic() < ends_s:
                time.sleep(_LOOK_S)
        except OSError as error:
            logger.debug("nobody is kept from compiling the same: %s", error)
        yield  # closing the file gives the lock back


def _has(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
