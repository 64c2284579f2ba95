"""The gaps between the tokens of requests, as (begin, end) in seconds, and how tables say lengths of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def longest_gap(gaps: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """The longest of the gaps that overlap with [begin_s, end_s]; 0 where none does."""
    return max((end - begin for begin, end in gaps if begin < end_s and end > begin_s), default=0.0)


def gaps_within(gaps: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> list[float]:
    """Lengths of the gaps that lie in [begin_s, end_s]."""
    return [end - begin for begin, end in gaps if begin >= begin_s and end <= end_s]


def times_per_token(gaps: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> list[float]:
    """Lengths of the gaps that end in [begin_s, end_s]: the times of the tokens that came then."""
    return [end - begin for begin, end in gaps if begin_s <= end <= end_s]


def milliseconds(values: Sequence[float], percentile: float = 50) -> str:
    """A percentile of seconds, for a table; "-" where there are none."""
    return f"{1000 * float(np.percentile(values, percentile)):.1f}" if values else "-"
