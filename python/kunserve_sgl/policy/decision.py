"""What automatic mode decides with, and what a decision is: limits, experience, the view of the deployment."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kunserve_sgl.policy.demand import Forecast
from kunserve_sgl.policy.drop_plan import capacity_tokens
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.links import Links, links_of
from kunserve_sgl.policy.loan_choice import Memory, memory_of
from kunserve_sgl.policy.plan import Plan, ReplicaFacts

Group = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Says when to act; each is a flag, see args.py. Shares are of capacity, `restore_at` of that without the drop."""

    drop_at: float
    restore_at: float
    horizon_s: float
    min_stay_s: float
    cool_down_s: float
    largest_group: int


@dataclass(frozen=True, slots=True)
class Experience:
    """Says what transitions and merging cost here, by what has been measured: the seconds of a drop or a loan, and what
    a batch takes longer while replicas are merged, as a share of its time at home."""

    transition_s: float
    slow_down: float


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """Says what a decision has to know of the plan that holds.

    `reserve_tokens` of a group are still to be gained in it, `copy_tokens` by each merge. `before` has, for each merged
    group, the capacity of those members that have less without the merge that came last. Nothing is decided for groups
    with a member of `unavailable`. Replicas are merged, and lend, within one of `islands` only; where there are none,
    any with any. Where `links` are fast merging and lending cost less. `memory` is that of the replicas that share no
    layers with others, `capacity_tokens` are the slots of all.
    """

    groups: tuple[Group, ...]
    reserve_tokens: Mapping[Group, int]
    copy_tokens: int
    before: Mapping[Group, Mapping[int, int]]
    unavailable: frozenset[int] = frozenset()
    islands: tuple[frozenset[int], ...] = ()
    memory: Mapping[int, Memory] = field(default_factory=dict)
    capacity_tokens: Mapping[int, int] = field(default_factory=dict)
    links: Links = field(default_factory=Links)

    def group_of(self, replica: int) -> Group:
        """Returns the group that `replica` is in."""
        return next(group for group in self.groups if replica in group)

    def island_of(self, group: Group) -> int:
        """Returns the number of the island that the group is in."""
        return next((number for number, island in enumerate(self.islands) if island.issuperset(group)), 0)


class Act(enum.Enum):
    """Names what a decision orders."""

    NOTHING = "nothing"
    WAIT = "wait"  # memory is short, and a drop would cost more than it saves, or is not possible
    FREE = "free"  # slots of a replica become free frames, which it can lend then
    LEND = "lend"
    REUSE = "reuse"  # frames that were freed become slots of the replica again
    DROP = "drop"
    RESTORE = "restore"


@dataclass(frozen=True, slots=True)
class Decision:
    """Says what is to be done: `groups` are what to merge or to take apart, or who frees frames and uses them again,
    `needs` the tokens that each replica is to gain by a drop, `lends` what is to be lent, and `tokens` the slots that
    become free frames or come back from them."""

    act: Act
    reason: str
    groups: tuple[Group, ...] = ()
    needs: Mapping[int, int] = field(default_factory=dict)
    lends: LendWish | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class PastDecisions:
    """Remembers what later decisions depend on. `needed_at_s` is when each merged group was last in need of its gain. A
    drop soon after a restore doubles the time that groups then stay merged at least: `stay_factor`. So does a loan.
    `base_tokens` are the slots that replicas had before some of them became free frames, the last time
    `freed_at_s`."""

    needed_at_s: Mapping[Group, float] = field(default_factory=dict)
    restored_at_s: float = float("-inf")
    stay_factor: int = 1
    base_tokens: Mapping[int, int] = field(default_factory=dict)
    freed_at_s: float = float("-inf")


def missing_of(needed_tokens: int, forecast: Forecast, limits: Thresholds) -> int:
    """Counts the tokens by which a replica is short where it needs so many; negative where there are some to spare."""
    return round(needed_tokens - limits.drop_at * forecast.capacity_tokens)


def shortage_of(replica: int, forecasts: Mapping[int, Forecast], limits: Thresholds) -> str:
    """Says in words what a replica needs and has."""
    forecast = forecasts[replica]
    return (
        f"replica {replica} needs {forecast.demand_tokens} tokens now and {forecast.ahead_tokens} in "
        f"{limits.horizon_s:g} s, has {forecast.capacity_tokens}"
    )


def fits(forecasts: Mapping[int, Forecast], capacities: Mapping[int, int], share: float) -> bool:
    """Tells whether replicas can do with less: with that share of such capacities, and for each of their requests."""
    return all(
        forecasts[member].peak_tokens <= share * capacity
        # One that may grow beyond the smaller capacity would keep the restore waiting until it ends.
        and forecasts[member].longest_request_tokens < capacity
        for member, capacity in capacities.items()
        if member in forecasts
    )


def view_of(
    plan: Plan,
    facts: Sequence[ReplicaFacts],
    merges: Sequence[tuple[frozenset[int], Plan]],
    unavailable: frozenset[int],
    islands: tuple[frozenset[int], ...] = (),
    maps: Sequence[Sequence[bool]] = (),
) -> DeploymentView:
    """Makes the view of a plan. `merges` are those that hold, oldest first, each with its members and the plan that it
    was made from. `islands` are sets of replicas that can be merged with each other, `maps` are as in `Links`."""
    groups = plan.groups
    copy = sum(facts[0].layer_frames)
    per_granule = sum(facts[0].granule_frames)

    def tokens(frames: int) -> int:
        return frames // per_granule * facts[0].granule_slots

    resident = {
        group: sum(facts[member].layer_frames[layer] for member in group for layer in plan.resident[member])
        for group in groups
    }
    before = {}
    for group in groups:
        last = next((was for members, was in reversed(merges) if members == set(group)), None)
        if last is not None:
            capacity = {member: capacity_tokens(last, facts[member]) for member in group}
            before[group] = {m: tokens for m, tokens in capacity.items() if tokens < capacity_tokens(plan, facts[m])}
    return DeploymentView(
        groups=groups,
        reserve_tokens={group: tokens(resident[group] - copy) if len(group) > 1 else 0 for group in groups},
        copy_tokens=tokens(copy),
        before=before,
        unavailable=unavailable,
        islands=islands,
        memory=memory_of(plan, facts),
        capacity_tokens={fact.replica: capacity_tokens(plan, fact) for fact in facts},
        links=links_of(facts, maps),
    )
