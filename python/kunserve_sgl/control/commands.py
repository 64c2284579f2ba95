"""A command to the coordinator while it runs, and the merges that commands have made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from kunserve_sgl.control.answers import CommandAnswer, State
from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.partial_restore import RestoreWish
from kunserve_sgl.policy.plan import Plan

Done = Callable[[CommandAnswer], None]


@dataclass(frozen=True, slots=True)
class Merge:
    """Says of a merge that holds who took part in it, and which plan they left for it."""

    members: frozenset[int]
    before: Plan


def latest_merges(merges: Sequence[Merge], members: Collection[int]) -> list[Merge]:
    """Lists the merges among `members` that came last, one of each group: those that can be undone. `merges` are in the
    order in which they were made."""
    latest: list[Merge] = []
    for merge in merges_of(merges, members):
        if not any(merge.members & later.members for later in latest):
            latest.append(merge)
    return latest


def merges_of(merges: Sequence[Merge], members: Collection[int]) -> list[Merge]:
    """Lists the merges among `members`, the one that came last first."""
    return [merge for merge in reversed(merges) if merge.members <= set(members)]


@dataclass(frozen=True, slots=True)
class Leg:
    """Says of a transition to which plan it leads, and which merges hold no longer, or from then on, when it has.
    `is_homeward` says that it brings KV home only."""

    plan: Plan
    merges: tuple[Merge, ...]
    is_homeward: bool = False


@dataclass(slots=True)
class RunningCommand:
    """Keeps what is known of the command that runs. A restore takes one transition per merge that it undoes, or two:
    see `policy.partial_restore.first_step`. `then` is the second of those."""

    state: State
    groups: tuple[tuple[int, ...], ...]
    done: Done
    started_s: float
    wish: RestoreWish = field(default_factory=RestoreWish)
    only_last: bool = False
    drain_s: float | None = None
    then: Leg | None = None
    pause_s: float = 0.0
    freed_bytes: int = 0
    extension_slots: int = 0
    merges: tuple[Merge, ...] = ()  # that the running transition makes, or undoes
    is_homeward: bool = False  # whether it brings KV home only, before anything is restored
    retraces: bool = False  # whether that goes over the way that the KV went
    is_background: bool = False  # an exchange: other commands go before it
    is_interrupted: bool = False  # it is taken back for one of these

    @property
    def members(self) -> set[int]:
        """Returns the replicas of all groups that the command is about."""
        return {member for group in self.groups for member in group}


def groups_to_restore(plan: Plan, groups: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    """Returns the merged groups that a restore of `groups`, None for all, is about. Raises ConfigurationError for one
    that is not merged, TransientError where none is."""
    merged = tuple(group for group in plan.groups if len(group) > 1)
    if not merged:
        raise TransientError("no replicas are merged")
    if groups is None:
        return merged
    wanted = tuple(tuple(sorted(group)) for group in groups)
    for group in wanted:
        if group not in merged:
            raise ConfigurationError(
                f"groups: {list(group)} is not merged; accepted: {[list(each) for each in merged]}"
            )
    return tuple(dict.fromkeys(wanted))
