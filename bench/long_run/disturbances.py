"""What is done to the schedulers of a server in a soak: they are killed, one or two, or stand still, for a moment or
for longer than anybody waits for them."""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import time
from collections.abc import Callable
from random import Random

import psutil

from servers.server import ServerError, ServerProcess

_TITLE = "sglang::scheduler"
_END_DEADLINE_S = 60.0
_POLL_S = 0.02
_LEAST_STALL_S = 0.1
_MOST_BETWEEN_S = 1.0  # from one death to the next: the others recover meanwhile, or it is being started again


class Disturbance(enum.Enum):
    """What is done. A long stall lasts until nobody waits any more."""

    NONE = ""
    KILL = "kill"
    TWO_KILLS = "two kills"
    STALL = "stall"
    LONG_STALL = "long stall"


class Schedulers:
    """The scheduler processes of one server, by title, to be disturbed."""

    def __init__(self, server: ServerProcess, *, most_stall_s: float, long_stall_s: float) -> None:
        """A stall ends before `most_stall_s`; a long one lasts for `long_stall_s` at least, unless the server ends the
        process before."""
        self._server = server
        self._most_stall_s = most_stall_s
        self._long_stall_s = long_stall_s

    def disturb(self, how: Disturbance, chance: Random, is_over: Callable[[], bool]) -> tuple[str, set[int]]:
        """Does it to processes chosen by `chance`; a long stall ends when `is_over` says so, and not sooner. Returns
        what was done, and the replicas that have ended by it.

        Raises:
            ServerError: there is no scheduler to do it to, or one that was killed does not end.
        """
        title, process = self._choose(chance)
        if how in (Disturbance.STALL, Disturbance.LONG_STALL):
            seconds, has_ended = self._stop(process, how, chance, is_over)
            end = ", and was ended" if has_ended else ""
            return f"{title} stood still for {seconds:.1f} s{end}", {_replica(title)} if has_ended else set()
        titles = [title]
        _kill(process)
        if how is Disturbance.TWO_KILLS:
            pause_s = chance.choice((0.0, chance.uniform(0.0, _MOST_BETWEEN_S)))
            time.sleep(pause_s)
            with contextlib.suppress(ServerError):  # the first one was the last one
                title, process = self._choose(chance)
                _kill(process)
                titles.append(f"{pause_s:.1f} s later {title}")
        return f"{' and '.join(titles)} killed", {_replica(each) for each in titles}

    def _stop(
        self, process: psutil.Process, how: Disturbance, chance: Random, is_over: Callable[[], bool]
    ) -> tuple[float, bool]:
        """Returns for how long it stood still, in seconds, and whether that was its end."""
        is_long = how is Disturbance.LONG_STALL
        least_s = self._long_stall_s if is_long else chance.uniform(_LEAST_STALL_S, self._most_stall_s)
        began_s = time.monotonic()
        try:
            process.suspend()
            while time.monotonic() - began_s < least_s or (is_long and not is_over()):
                if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                    return time.monotonic() - began_s, True
                time.sleep(_POLL_S)
            process.resume()
        except psutil.NoSuchProcess:
            return time.monotonic() - began_s, True
        return time.monotonic() - began_s, False

    def _choose(self, chance: Random) -> tuple[str, psutil.Process]:
        found = {}
        for pid in self._server.pids():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                title = (process.cmdline() or [""])[0]
                if title.startswith(_TITLE) and process.status() != psutil.STATUS_ZOMBIE:
                    found[title] = process
        if not found:
            raise ServerError("the server has no scheduler")
        title = chance.choice(sorted(found))
        return title, found[title]


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        os.kill(process.pid, signal.SIGKILL)
        try:
            process.wait(_END_DEADLINE_S)
        except psutil.TimeoutExpired as error:
            raise ServerError(f"process {process.pid} was killed, and is there after {_END_DEADLINE_S:g} s") from error


def _replica(title: str) -> int:
    return int(title.split("_DP")[1].split("_")[0])
