"""Watches the scheduler processes while they start: one that ends before it is ready ends the start.

SGLang's controller waits for what they report through a pipe whose other end it holds open itself, so that it would
wait for ever for one that was killed.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.controller.actor_process import how_ended
from kunserve_sgl.threads import await_end

logger = logging.getLogger(__name__)

_POLL_S = 0.2


class StartWatch:
    """Watches `processes`, which may grow, while the context lasts. `end` gets the reason."""

    def __init__(self, directory: str, processes: Sequence[Any], end: Callable[[str], None]) -> None:
        self._directory = directory
        self._processes = processes
        self._end = end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kunserve-start-watch", daemon=True)

    def __enter__(self) -> StartWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        await_end(self._thread)

    def _watch(self) -> None:
        while not self._over.wait(_POLL_S):
            for process in list(self._processes):
                if process.exitcode is not None:
                    self._end(reason_of_lost(self._directory, process))
                    return


def reason_of_lost(directory: str, process: Any) -> str:
    """Says why the start has failed, of which `process` has ended."""
    what = f"scheduler process {process.pid or 'on Ray'} {how_ended(process)} before it was ready"
    first = last_words.first_words(directory)
    return what if first is None else f"{first} ({what})"


def end_controller(reason: str) -> NoReturn:
    """Ends this process, from any thread. Its children end with it, and the launcher sees its end."""
    last_words.leave(reason)
    logger.error("KunServe: %s", reason)
    last_words.end_process()


def end_on_sigquit(directory: str, is_starting: Callable[[], bool]) -> None:
    """Ends the controller with a reason on SIGQUIT, which a scheduler sends when it fails where it cannot go on alone.
    Left to its default, the signal would end the controller without a word."""

    def end(signum: Any = None, frame: Any = None) -> None:
        first = last_words.first_words(directory) if is_starting() else None
        end_controller(first or "a scheduler process asked for the end of the server; its lines in the log say why")

    signal.signal(signal.SIGQUIT, end)
