"""What an endurance run has to say: whether all is as it should be, the tables, and the JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from long_run.answers import Outcome, Result
from long_run.watch import NORMAL, Holdings, Look, growth
from servers.streams import table

_EXAMPLES = 5
_BAD_LINE = re.compile(r"Traceback|leak|degraded|although nothing else runs", re.IGNORECASE)


@dataclass(frozen=True)
class Cycle:
    """A burst and the quiet time after it, in seconds since the start of the run. The quiet time begins with the last
    answer of the burst. `memory` is what of the status must not change, `held` what the processes hold at its end."""

    number: int
    burst_s: float
    quiet_s: float
    end_s: float
    memory: Mapping[str, Any]
    held: Mapping[str, Holdings]
    problem: str = ""  # why the server was not at rest at the end


@dataclass(frozen=True)
class CycleLooks:
    """What was seen of the state in a cycle. Times are None where it did not come to that."""

    most_capacity_tokens: int
    dropped_after_s: float | None
    restored_after_s: float | None
    transitions_in_quiet: int
    is_normal_at_end: bool

    @classmethod
    def of(cls, cycle: Cycle, looks: Sequence[Look]) -> CycleLooks:
        inside = [look for look in looks if cycle.burst_s <= look.t_s <= cycle.end_s]
        burst = [look for look in inside if look.t_s < cycle.quiet_s]
        quiet = [look for look in inside if look.t_s >= cycle.quiet_s]
        before = [look for look in looks if look.t_s < cycle.burst_s]
        epoch = before[-1].epoch if before else 0
        # A drop may be over and undone between two looks; its epoch stays.
        changed = [look for look in burst if look.state != NORMAL or look.epoch > epoch]
        # The last time at which it became normal: what was before did not hold.
        normal_since_s = None
        for look in quiet:
            if look.state != NORMAL:
                normal_since_s = None
            elif normal_since_s is None:
                normal_since_s = look.t_s - cycle.quiet_s
        return cls(
            most_capacity_tokens=max((look.capacity_tokens for look in inside), default=0),
            dropped_after_s=changed[0].t_s - cycle.burst_s if changed else None,
            restored_after_s=normal_since_s,
            transitions_in_quiet=quiet[-1].epoch - quiet[0].epoch if quiet else 0,
            is_normal_at_end=bool(quiet) and quiet[-1].state == NORMAL,
        )


@dataclass(frozen=True)
class Bounds:
    """How much more the processes of the server together may hold at the end than at rest after the first cycles."""

    pss_bytes: int
    descriptors: int


@dataclass
class Run:
    """All that was seen."""

    at_start: Mapping[str, Any]
    bounds: Bounds
    results: list[Result] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    missed_looks: list[str] = field(default_factory=list)
    log: str = ""
    problems: list[str] = field(default_factory=list)  # what else was not as it should be

    @property
    def settled(self) -> int:
        """The cycle whose end growth is measured from: the first ones fill pools and caches."""
        return len(self.cycles) // 5


def failures(run: Run) -> list[str]:
    """All that was not as it should be, in words."""
    found = list(run.problems)
    found += request_failures(run.results)
    if not run.cycles:
        found.append("no cycle has come to its end")
    for cycle in run.cycles:
        found += _cycle_failures(cycle, CycleLooks.of(cycle, run.looks), run.at_start)
    if run.missed_looks:
        found.append(f"{len(run.missed_looks)} times the status was not answered: {run.missed_looks[0]}")
    if run.cycles:
        first, last = run.cycles[run.settled].held, run.cycles[-1].held
        found += growth_failures(first, last, run.bounds, f"cycle {run.settled + 1}")
    bad_lines = [line for line in run.log.splitlines() if _BAD_LINE.search(line)]
    if bad_lines:
        found.append(f"{len(bad_lines)} lines of the log tell of errors:")
        found += [f"  {line[:200]}" for line in bad_lines[:_EXAMPLES]]
    return found


def _cycle_failures(cycle: Cycle, seen: CycleLooks, at_start: Mapping[str, Any]) -> Iterable[str]:
    name = f"cycle {cycle.number}"
    if seen.dropped_after_s is None:
        yield f"{name}: nothing was dropped in the burst"
    if not seen.is_normal_at_end:
        yield f"{name}: not restored within the {cycle.end_s - cycle.quiet_s:.0f} s of the quiet time"
    if seen.transitions_in_quiet > 2:  # one that the burst began, and the restore
        yield f"{name}: {seen.transitions_in_quiet} transitions in the quiet time"
    if cycle.problem:
        yield f"{name}: {cycle.problem}"
    elif seen.is_normal_at_end:
        for what, value in at_start.items():
            if cycle.memory.get(what) != value:
                yield f"{name}: {what} is {cycle.memory.get(what)}, and was {value} at the start"


def requests_table(results: Sequence[Result]) -> str:
    """How the requests ended, and how long they took, by kind."""
    kinds = []
    for name in sorted({result.kind for result in results}):
        kinds.append(_row(name, [result for result in results if result.kind == name]))
    kinds.append(_row("all", results))
    return table(["requests", "asked", *(outcome.value for outcome in Outcome), "P50 s", "P99 s"], kinds)


def _row(name: str, results: Sequence[Result]) -> list[object]:
    outcomes = Counter(result.outcome for result in results)
    seconds = sorted(result.seconds for result in results)
    counts = [outcomes[outcome] for outcome in Outcome]
    return [name, len(results), *counts, _share(seconds, 0.5), _share(seconds, 0.99)]


def request_failures(results: Sequence[Result]) -> list[str]:
    """How many requests did not end right, with examples."""
    found = []
    for outcome in (Outcome.WRONG, Outcome.LOST, Outcome.LATE):
        bad = [result for result in results if result.outcome is outcome]
        if bad:
            found.append(f"{len(bad)} of {len(results)} requests are {outcome.value}:")
            found += [f"  {each.kind}, cycle {each.cycle}, {each.phase}: {each.detail}" for each in bad[:_EXAMPLES]]
    return found


def holdings_table(first: Mapping[str, Holdings], last: Mapping[str, Holdings], after: str) -> str:
    """What the processes hold after `after`, and at the end."""
    rows: list[list[object]] = [
        [
            name,
            *(f"{each[name].pss_bytes / 2**20:.1f}" if name in each else "-" for each in (first, last)),
            *(each[name].descriptors if name in each else "-" for each in (first, last)),
        ]
        for name in sorted({*first, *last})
    ]
    more_bytes, more_descriptors = growth(first, last)
    rows.append(["more", "", f"{more_bytes / 2**20:+.1f}", "", f"{more_descriptors:+d}"])
    return table(["process", f"MiB after {after}", "at the end", f"files after {after}", "at the end"], rows)


def growth_failures(
    first: Mapping[str, Holdings], last: Mapping[str, Holdings], bounds: Bounds, after: str
) -> list[str]:
    """By how much more the processes hold at the end than after `after`, where that is too much."""
    found = []
    more_bytes, more_descriptors = growth(first, last)
    if more_bytes > bounds.pss_bytes:
        found.append(
            f"the processes hold {more_bytes / 2**20:.1f} MiB more than after {after}, and "
            f"{bounds.pss_bytes / 2**20:.0f} are allowed"
        )
    if more_descriptors > bounds.descriptors:
        found.append(
            f"the processes have {more_descriptors} more open files than after {after}, and "
            f"{bounds.descriptors} are allowed"
        )
    return found


def format_tables(run: Run) -> str:
    """Requests by kind, cycles, and what the processes hold."""
    cycles = []
    for cycle in run.cycles:
        seen = CycleLooks.of(cycle, run.looks)
        mine = [result for result in run.results if result.cycle == cycle.number]
        cycles.append(
            [
                cycle.number,
                f"{cycle.quiet_s - cycle.burst_s:.1f}",
                f"{cycle.end_s - cycle.quiet_s:.1f}",
                sum(result.phase == "burst" for result in mine),
                sum(result.phase == "quiet" for result in mine),
                _seconds(seen.dropped_after_s),
                seen.most_capacity_tokens,
                _seconds(seen.restored_after_s),
            ]
        )
    parts = [
        requests_table(run.results),
        table(
            ["cycle", "burst s", "quiet s", "asked", "in quiet", "dropped after s", "capacity", "restored after s"],
            cycles,
        ),
    ]
    if run.cycles:
        first, last = run.cycles[run.settled].held, run.cycles[-1].held
        parts.append(holdings_table(first, last, f"cycle {run.settled + 1}"))
    return "\n\n".join(parts)


def as_json(run: Run, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the log."""
    return {
        "about": dict(about),
        "failures": failures(run),
        "cycles": [asdict(cycle) | {"seen": asdict(CycleLooks.of(cycle, run.looks))} for cycle in run.cycles],
        "at_start": dict(run.at_start),
        "bounds": asdict(run.bounds),
        "looks": [asdict(look) for look in run.looks],
        "results": [asdict(result) | {"outcome": result.outcome.value} for result in run.results],
    }


def _share(ordered: Sequence[float], share: float) -> str:
    return f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.2f}" if ordered else "-"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"
