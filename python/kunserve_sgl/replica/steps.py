"""What a rank does for a transition, as values: small steps, each with its way back."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from kunserve_sgl.policy.plan import Extent

Action = Callable[[], object]
# Parameters that are copied and proven in one go: a few milliseconds of a CPU, less than one of a GPU.
LOAD_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Step:
    """Describes one thing that happens between two batches, in one go: entirely, or not at all where `do` raises.

    `what` says it to people. The way back has two phases, because others may still use what a rank has lent: `undo`
    takes back what concerns this rank's memory alone, and `reopen` the rest, when all members have undone theirs; where
    it `frees_lent`, when what was lent has ended.
    """

    what: str
    do: Action
    undo: Action | None = None
    reopen: Action | None = None
    frees_lent: bool = False


@dataclass(frozen=True, slots=True)
class LongStep:
    """Describes one thing that takes too long for one go. `parts` does a part of it for each `next`; closed before its
    end, it takes back what it has done. `undo` and `reopen` are as in `Step`, for all of it."""

    what: str
    parts: Callable[[], Generator[None, None, object]]
    undo: Action | None = None
    reopen: Action | None = None


def named(extent: Extent) -> str:
    """Says to people which slots `extent` is."""
    end = extent.first_granule + extent.granules
    return f"granules {extent.first_granule} to {end} of replica {extent.replica}"
