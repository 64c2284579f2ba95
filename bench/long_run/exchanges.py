"""KV that changes its home in a soak: how far that has come by the status, and whether it has come as far as it can."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_TAKES_PART = ("normal", "lending", "merged")
_POLL_S = 0.005


@dataclass(frozen=True)
class Progress:
    """What a status says of the exchange. A part is a layer of the slots of a replica; bytes are since the start."""

    running: bool
    parts: int
    parts_done: int
    moved_bytes: int
    returned_bytes: int
    last_failure: str = ""

    def __str__(self) -> str:
        failure = f", last failure: {self.last_failure}" if self.last_failure else ""
        return f"{self.parts_done} of {self.parts} parts{failure}"


@dataclass(frozen=True)
class Course:
    """The exchange in the course of an event. `met` is how far one was when the event came upon it, None where the
    event is not of this kind; `after` is when nothing went on any more."""

    before: Progress
    after: Progress
    met: Progress | None = None

    @property
    def interrupted(self) -> int:
        """How many the event has come upon while they were under way."""
        return int(self.met is not None and self.met.running)

    @property
    def ended(self) -> int:
        """How many have come to their end, with KV in a new home."""
        if self.met is None:
            return int(self.after.moved_bytes > self.before.moved_bytes)
        was_over = not self.met.running and self.met.moved_bytes > self.before.moved_bytes
        return int(was_over) + int(self.after.moved_bytes > self.met.moved_bytes and self.after.parts > 0)

    @property
    def begun(self) -> int:
        """How many have begun; one that goes on after it was interrupted counts again."""
        return self.interrupted + self.ended

    def __str__(self) -> str:
        met = "" if self.met is None or not self.met.running else f"met at {self.met}, then "
        return f"exchange {met}{self.after}"


def progress_of(status: Json) -> Progress:
    """How far the exchange is by GET /kunserve/status."""
    said = status["exchange"]
    names = ("running", "parts", "parts_done", "moved_bytes", "returned_bytes", "last_failure")
    return Progress(**{name: said[name] for name in names})


def contradictions(status: Json) -> list[str]:
    """Where a status says of the exchange what its homes and layer hosts do not."""
    remote = {replica["id"]: 0 for replica in status["replicas"]}
    away = dict(remote)
    for extent in status["homes"]:
        owner = extent["replica"]
        for home, host in zip(extent["homes"], status["hosts"][owner], strict=True):
            if home != host:
                remote[owner] += 1
            elif home != owner and extent["first_granule"] == 0:
                away[owner] += 1
    expected = {"parts": sum(remote.values()) + sum(away.values()), "parts_done": sum(away.values())}
    said = status["exchange"]
    found = [f"{name} is {said[name]}, and {count} by homes" for name, count in expected.items() if said[name] != count]
    for owner in remote:
        mine = said["replicas"][str(owner)]
        for name, count in (("remote_layers", remote[owner]), ("away_layers", away[owner])):
            if mine[name] != count:
                found.append(f"{name} of replica {owner} is {mine[name]}, and {count} by homes")
    return [f"the status says of the exchange: {each}" for each in found]


def left_behind(status: Json) -> list[str]:
    """Which KV of base slots is not where it is read, though who reads it has the frames for it. Layers are taken to be
    alike. A group with somebody who takes no part is left out."""
    replicas = {replica["id"]: replica for replica in status["replicas"]}
    found = []
    for extent in status["homes"]:
        owner = extent["replica"]
        members = [replicas[member] for member in replicas[owner]["group"]]
        if extent["first_granule"] or any(each["state"] not in _TAKES_PART or "frames" not in each for each in members):
            continue
        hosts = status["hosts"][owner]
        for layer, (home, host) in enumerate(zip(extent["homes"], hosts, strict=True)):
            frames = replicas[host]["frames"]
            # Counted for a granule of slots in all layers.
            needed = extent["granules"] * frames["per_granule"] // len(hosts)
            if home != host and needed <= frames["free"]:
                found.append(
                    f"KV of layer {layer} of replica {owner} is at replica {home}; replica {host}, which reads it, has "
                    f"{frames['free']} free frames for {needed}"
                )
    return found


def wait_for_end(ask: Callable[[], Json], deadline_s: float) -> tuple[Json, list[str]]:
    """Until no KV goes on to a new home; the last status, and what is wrong, in words."""
    ends_s = time.monotonic() + deadline_s
    while True:
        status = ask()
        left = left_behind(status)
        if not status["exchange"]["running"] and not left:
            return status, contradictions(status)
        if time.monotonic() > ends_s:
            return status, [f"the exchange has not ended within {deadline_s:g} s: {progress_of(status)}", *left]
        time.sleep(_POLL_S)


def wait_for_progress(ask: Callable[[], Json], before: Progress, share: float, deadline_s: float) -> Json:
    """Until this share of the parts have come to a new home while others are on their way, or none is any more; the
    last status."""
    ends_s = time.monotonic() + deadline_s
    while True:
        status = ask()
        now = progress_of(status)
        is_over = not now.running and (now.moved_bytes > before.moved_bytes or not left_behind(status))
        is_there = now.running and now.parts_done >= int(share * now.parts)
        if is_over or is_there or time.monotonic() > ends_s:
            return status
        time.sleep(_POLL_S)


def unreturned(course: Course) -> list[str]:
    """What is wrong with the bytes that have moved and come back, where nobody has died and all is at home."""
    moved_bytes = course.after.moved_bytes - course.before.moved_bytes
    returned_bytes = course.after.returned_bytes - course.before.returned_bytes
    if course.before.parts or course.after.parts or moved_bytes == returned_bytes:
        return []
    return [f"all KV is at home; {moved_bytes} bytes have moved, and {returned_bytes} have returned"]
