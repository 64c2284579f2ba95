"""Looks at a server for as long as an endurance run goes: its state all the time, its processes at rest."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import requests

from servers.server import ServerError, ServerProcess

Json = dict[str, Any]

NORMAL = "normal"
_CALL_TIMEOUT_S = 60.0
_POLL_S = 0.1
_FLUSH_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Look:
    """The state of a server at one moment, in seconds since the start of the run."""

    t_s: float
    state: str
    epoch: int
    capacity_tokens: int


@dataclass(frozen=True)
class Holdings:
    """What processes hold: their memory, with their share of what they share, and their file descriptors. `rss_bytes`
    are all that is mapped and there, `private_bytes` what nobody else has mapped: a page that has been shared since the
    fork becomes private when it is written to, and the former stay the same."""

    pss_bytes: int
    descriptors: int
    rss_bytes: int = 0
    private_bytes: int = 0

    def __add__(self, other: Holdings) -> Holdings:
        return Holdings(
            self.pss_bytes + other.pss_bytes,
            self.descriptors + other.descriptors,
            self.rss_bytes + other.rss_bytes,
            self.private_bytes + other.private_bytes,
        )


class StateWatch:
    """Looks at the state of a server in a thread until the end of the block."""

    def __init__(self, base_url: str, clock: Callable[[], float], interval_s: float) -> None:
        self.looks: list[Look] = []
        self.missed: list[str] = []  # why a look failed
        self._base_url = base_url
        self._clock = clock
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> StateWatch:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(2 * _CALL_TIMEOUT_S)

    def _look(self) -> None:
        while not self._ended.is_set():
            t_s = self._clock()
            try:
                status = status_of(self._base_url)
                capacity = sum(replica["capacity_tokens"] for replica in status["replicas"])
                self.looks.append(Look(t_s, status["state"], status["epoch"], capacity))
            except (requests.RequestException, ValueError, KeyError) as error:
                self.missed.append(f"after {t_s:.0f} s: {type(error).__name__}: {error}"[:300])
            self._ended.wait(self._interval_s)


def status_of(base_url: str) -> Json:
    """What GET /kunserve/status says."""
    answer = requests.get(f"{base_url}/kunserve/status", timeout=_CALL_TIMEOUT_S)
    answer.raise_for_status()
    status: Json = answer.json()
    return status


def memory_of(status: Json) -> Json:
    """What of a status must be the same again whenever the server is at rest, by the names of what it is."""
    found = {name: status[name] for name in ("state", "hosts")}
    found["homes"] = sorted(status["homes"], key=lambda each: (each["replica"], each["first_granule"]))
    for replica in status["replicas"]:
        slots = {name: count for name, count in replica["slots"].items() if name != "cached"}
        found[f"replica {replica['id']}"] = {
            **{name: replica[name] for name in ("state", "group", "frames", "capacity_tokens")},
            "slots": slots,
        }
    return found


def flush(base_url: str) -> str:
    """Empty the caches of all replicas once they are idle; why that was not possible, empty if it was."""
    answer = requests.post(
        f"{base_url}/flush_cache", params={"timeout": _FLUSH_DEADLINE_S}, timeout=2 * _FLUSH_DEADLINE_S
    )
    return "" if answer.status_code == requests.codes.ok else f"/flush_cache: {answer.status_code} {answer.text[:200]}"


def holdings(server: ServerProcess) -> dict[str, Holdings]:
    """What each process of the server holds, by its title."""
    found: dict[str, Holdings] = {}
    for pid in server.pids():
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            process = psutil.Process(pid)
            title = title_of(process.cmdline())
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {name: int(value.split()[0]) << 10 for name, value in (line.split(":", 1) for line in lines)}
            private = sizes["Private_Clean"] + sizes["Private_Dirty"]
            held = Holdings(sizes["Pss"], process.num_fds(), sizes["Rss"], private)
            found[title] = found[title] + held if title in found else held
    return found


def title_of(command: Sequence[str]) -> str:
    """A short name of a process: the title it gave itself, or the module or function that it runs."""
    words = " ".join(command).split()
    if words and words[0].startswith("sglang::"):
        return words[0]
    for module in ("launch_server", "reaper", "resource_tracker", "forkserver"):
        if any(module in word for word in words):
            return module
    return Path(words[0]).name if words else "?"


def wait_reported(base_url: str, deadline_s: float) -> None:
    """Until all replicas have told the coordinator of themselves: a server is healthy a moment before.

    Raises:
        ServerError: that is not so within the deadline.
    """
    _wait(lambda: bool(status_of(base_url)["hosts"]), "not all replicas have reported", deadline_s)


def wait_normal(base_url: str, deadline_s: float) -> int:
    """Until no replicas are merged; the epoch of the plan.

    Raises:
        ServerError: that is not so within the deadline.
    """
    status: Json = {}

    def is_normal() -> bool:
        status.update(status_of(base_url))
        return bool(status["state"] == NORMAL)

    _wait(is_normal, "replicas are merged", deadline_s)
    return int(status["epoch"])


def _wait(condition: Callable[[], bool], what_not: str, deadline_s: float) -> None:
    ends_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > ends_s:
            raise ServerError(f"after {deadline_s:g} s {what_not}")
        time.sleep(_POLL_S)


def growth(before: Mapping[str, Holdings], after: Mapping[str, Holdings]) -> tuple[int, int]:
    """By how many bytes and descriptors all processes together hold more."""

    def totals(each: Mapping[str, Holdings]) -> tuple[int, int]:
        return sum(one.pss_bytes for one in each.values()), sum(one.descriptors for one in each.values())

    (bytes_before, files_before), (bytes_after, files_after) = totals(before), totals(after)
    return bytes_after - bytes_before, files_after - files_before
