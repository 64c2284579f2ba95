"""What a soak has to say: whether all is as it should be, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests

from long_run.answers import Outcome, Result
from long_run.events import Event
from long_run.flatness import flatness_failures, flatness_table
from long_run.report import Bounds, request_failures, requests_table
from long_run.watch import Holdings
from servers.streams import table

_EXAMPLES = 10
# What README.md says of orders that want more than there is: of a drop, a partial restore, a resize.
_NOT_NOW = (
    *("cannot be gained by groups", "no slots would be gained", "keep each layer once already"),
    *("cannot stay when a layer comes back", "would not have the frames for them"),
    *("slots would stay", "slots would leave room for", "cannot be taken from the KV cache"),
)
# What docs/faults.md says cannot go on, by what is answered then.
NAMED_ENDS = (
    *("replicas when they ended, and is not tried again", "has no room in a KV cache of"),
    "no replica makes progress",
)


@dataclass(frozen=True)
class Rest:
    """The server at rest after event `number`: what of the status must not change, and what the processes hold."""

    number: int
    memory: Mapping[str, Any]
    held: Mapping[str, Holdings]
    answers: tuple[tuple[int, str], ...] = ()
    differences: tuple[str, ...] = ()
    problem: str = ""  # why it was not at rest


@dataclass
class Soak:
    """All that was seen."""

    at_start: Mapping[str, Any]
    bounds: Bounds
    results: list[Result] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # what else was not as it should be
    log: str | None = None  # of a server in automatic mode
    waited_s: float = 0.0  # for answers between events
    rested_s: float = 0.0  # at rest, with what it took to come to it


def failures(soak: Soak) -> list[str]:
    """All that was not as it should be, in words."""
    found = [*soak.problems, *request_failures([result for result in soak.results if not is_named(result)])]
    wrong = [f"event {event.number}, {event.kind}: {each}" for event in soak.events for each in _wrong_with(event)]
    wrong += [f"at rest after event {rest.number}: {each}" for rest in soak.rests for each in _wrong_at(rest, soak)]
    found += wrong[:_EXAMPLES]
    if len(wrong) > _EXAMPLES:
        found.append(f"and {len(wrong) - _EXAMPLES} more of these")
    found += [f"nothing was {what} by itself" for what, count in _by_itself(soak).items() if not count]
    if (exchanges := _exchanges(soak)) is not None and not exchanges["begun"]:
        found.append("no exchange has begun")
    if not soak.rests:
        found.append("the server has never come to rest")
    else:
        found += flatness_failures([(rest.number, rest.held) for rest in soak.rests], soak.bounds)
    return found


def _by_itself(soak: Soak) -> dict[str, int]:
    """How often a server in automatic mode has given itself an order; nothing for one in manual mode."""
    acts = {"dropped": "KunServe auto: drop ", "restored": "KunServe auto: restore "}
    return {} if soak.log is None else {what: soak.log.count(line) for what, line in acts.items()}


def _exchanges(soak: Soak) -> dict[str, int] | None:
    """How many exchanges have begun, have ended, and were met by an event; None where nothing was to be exchanged."""
    courses = [event.exchange for event in soak.events if event.exchange is not None]
    if not courses:
        return None
    return {name: sum(getattr(each, name) for each in courses) for name in ("begun", "ended", "interrupted")}


def is_named(result: Result) -> bool:
    """Whether a request ended as docs/faults.md says that such a one does."""
    return result.outcome is Outcome.LOST and any(words in result.detail for words in NAMED_ENDS)


def _wrong_with(event: Event) -> list[str]:
    found = list(event.differences)
    accepted = [requests.codes.ok]
    if event.may_be_refused:
        accepted.append(requests.codes.conflict)
    if event.is_disturbed:  # then it may come to nothing, and says so
        accepted += [requests.codes.conflict, requests.codes.service_unavailable]
    for status, text in event.answers:
        is_not_now = status == requests.codes.conflict and any(words in text for words in _NOT_NOW)
        if status not in accepted and not is_not_now:
            found.append(f"answered {status} {text}")
    return found


def _wrong_at(rest: Rest, soak: Soak) -> list[str]:
    found = list(rest.differences)
    if rest.problem:
        return [*found, rest.problem]
    found += [f"answered {status} {text}" for status, text in rest.answers if status != requests.codes.ok]
    for what, value in soak.at_start.items():
        if rest.memory.get(what) != value:
            found.append(f"{what} is {rest.memory.get(what)}, and was {value} at the start")
    return found


def format_tables(soak: Soak) -> str:
    """Requests by kind, events by kind, and what the processes hold."""
    parts = [requests_table(soak.results), _events_table(soak.events)]
    events_s = sum(max(event.seconds, event.whole_s or 0.0) for event in soak.events)
    checks_s = sum(event.check_s for event in soak.events)
    parts.append(
        f"{events_s:.0f} s of events, {checks_s:.0f} s of checks, {soak.waited_s:.0f} s for answers between events, "
        f"{soak.rested_s:.0f} s of rests"
    )
    if soak.log is not None:
        parts.append("by itself: " + ", ".join(f"{what} {count} times" for what, count in _by_itself(soak).items()))
    if (exchanges := _exchanges(soak)) is not None:
        parts.append("exchanges: " + ", ".join(f"{count} {what}" for what, count in exchanges.items()))
    if named := sum(is_named(result) for result in soak.results):
        parts.append(f"{named} requests ended as docs/faults.md says that they do")
    if soak.rests:
        parts.append(flatness_table([(rest.number, rest.held) for rest in soak.rests]))
    return "\n\n".join(parts)


def _events_table(events: Sequence[Event]) -> str:
    rows: list[list[object]] = []
    for kind in sorted({event.kind for event in events}):
        mine = [event for event in events if event.kind == kind]
        succeeded = sum(status == requests.codes.ok for event in mine for status, _ in event.answers)
        ordered = sum(len(event.answers) for event in mine)
        seconds = sorted(event.seconds for event in mine)
        whole = sorted(event.whole_s for event in mine if event.whole_s is not None)
        checks = sorted(event.check_s for event in mine)
        rows.append(
            [
                kind,
                len(mine),
                f"{succeeded} of {ordered}" if ordered else "-",
                f"{seconds[len(seconds) // 2]:.2f}",
                f"{seconds[-1]:.2f}",
                f"{whole[len(whole) // 2]:.1f}" if whole else "-",
                f"{whole[-1]:.1f}" if whole else "-",
                f"{checks[len(checks) // 2]:.2f}",
                f"{checks[-1]:.2f}",
            ]
        )
    titles = [
        *("event", "count", "orders succeeded", "P50 s", "max s", "whole after P50 s", "max s"),
        *("check P50 s", "max s"),
    ]
    return table(titles, rows)
