"""Whether what the processes of a server hold grows as things happen to it: by the slope over all rests, not by two of
them.

The first quarter of the events is the warm-up: pools and caches fill, and pages that processes share since the fork are
written to. Of the rests after it, the slope is the median of those between all pairs (Theil-Sen), so that a rest after
which a replica had just been started does not count more than others. What grows by that over all events after the
warm-up must be less than the bound.

A share of memory (PSS) that grows while what is mapped (RSS) does not is no leak: there are fewer others to share pages
with, or pages were written to that had been shared since the fork, and there is an end to that. What leaks shows in
both. So the memory of a process, or of those of one title, grows by the smaller of the two slopes.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

from long_run.report import Bounds
from long_run.watch import Holdings
from servers.streams import table

WARM_UP = 0.25
_LEAST_RESTS = 2

Held = tuple[int, Mapping[str, Holdings]]
"""After how many events, and what the processes held then, by title."""


def settled(rests: Sequence[Held]) -> Sequence[Held]:
    """Those after the warm-up; the last two at least, if there are so many."""
    if not rests:
        return rests
    last = rests[-1][0]
    return [rest for rest in rests[:-_LEAST_RESTS] if rest[0] >= WARM_UP * last] + [*rests[-_LEAST_RESTS:]]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median slope between all pairs of points with x and y; 0 for less than two."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2) if x1 != x2]
    return statistics.median(slopes) if slopes else 0.0


def _total(held: Mapping[str, Holdings]) -> Holdings:
    return sum(held.values(), Holdings(0, 0))


def _slope_of(rests: Sequence[Held], value: Callable[[Mapping[str, Holdings]], float]) -> float:
    return slope([(number, value(held)) for number, held in rests])


def _names(rests: Sequence[Held]) -> list[str]:
    return sorted({*rests[0][1], *rests[-1][1]})


def _growth(rests: Sequence[Held], name: str) -> float:
    """Bytes per event that the processes of a title take more."""
    nothing = Holdings(0, 0)
    return min(
        _slope_of(rests, lambda held: held.get(name, nothing).pss_bytes),
        _slope_of(rests, lambda held: held.get(name, nothing).rss_bytes),
    )


def flatness_failures(rests: Sequence[Held], bounds: Bounds) -> list[str]:
    """What grows by more than is allowed, in words."""
    found, after = [], settled(rests)
    if len(after) < _LEAST_RESTS:
        return found
    events = after[-1][0] - after[0][0]
    more_bytes = events * sum(max(0.0, _growth(after, name)) for name in _names(after))
    more_files = events * _slope_of(after, lambda held: _total(held).descriptors)
    over = f"over the {events} events after event {after[0][0]}"
    if more_bytes > bounds.pss_bytes:
        allowed = bounds.pss_bytes / 2**20
        found.append(f"memory grows by {more_bytes / 2**20:.1f} MiB {over}, and {allowed:.0f} are allowed")
    if more_files > bounds.descriptors:
        found.append(f"open files grow by {more_files:.0f} {over}, and {bounds.descriptors} are allowed")
    return found


def flatness_table(rests: Sequence[Held]) -> str:
    """What the processes hold at the first and the last rest after the warm-up, and the slopes."""
    after = settled(rests)
    (first_number, first), (_, last) = after[0], after[-1]
    nothing = Holdings(0, 0)
    rows: list[list[object]] = []
    for name in [*_names(after), None]:

        def of(held: Mapping[str, Holdings], name: str | None = name) -> Holdings:
            return _total(held) if name is None else held.get(name, nothing)

        ends = [of(first), of(last)]
        rows.append(
            [
                "all" if name is None else name,
                *(f"{each.pss_bytes / 2**20:.1f}" for each in ends),
                f"{_slope_of(after, lambda held, of=of: of(held).pss_bytes) / 2**10:+.1f}",
                *(f"{each.rss_bytes / 2**20:.1f}" for each in ends),
                f"{_slope_of(after, lambda held, of=of: of(held).rss_bytes) / 2**10:+.1f}",
                *(f"{each.private_bytes / 2**20:.1f}" for each in ends),
                *(each.descriptors for each in ends),
                f"{100 * _slope_of(after, lambda held, of=of: of(held).descriptors):+.1f}",
            ]
        )
    titles = [
        *(
            "process",
            f"PSS MiB after {first_number}",
            "at the end",
            "KiB per event",
            "RSS MiB",
            "at the end",
            "KiB per event",
        ),
        *("private MiB", "at the end", "files", "at the end", "per 100 events"),
    ]
    return table(titles, rows)
