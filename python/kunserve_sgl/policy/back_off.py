"""How long to wait after one that failed before the next try."""

from __future__ import annotations

_MOST_DOUBLINGS = 60  # a larger power of two is of no use, and at some time no number


def back_off_s(first_s: float, longest_s: float, failures: int) -> float:
    """Returns `first_s` where nothing has failed before, twice that after each further one of `failures`, and never
    more than `longest_s`; seconds."""
    return min(longest_s, first_s * 2.0 ** min(failures, _MOST_DOUBLINGS))
