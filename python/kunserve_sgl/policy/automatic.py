"""When to lend, to drop and to restore: from forecasts and the plan to a decision, with the reason in words.

Pure: time comes in as data. The state between two decisions is `PastDecisions`, which is a value as well.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kunserve_sgl.policy.demand import Forecast
from kunserve_sgl.policy.drop_plan import capacity_tokens
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.loan_choice import Loan, Memory, choose_loan, memory_of
from kunserve_sgl.policy.merges import GroupNeed, choose_merges
from kunserve_sgl.policy.plan import Plan, ReplicaFacts

_STAY_FACTOR_LIMIT = 16

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
    """Says what transitions and merging cost here, by what has been measured: the seconds of a transition, and what a
    batch takes longer while replicas are merged, as a share of its time at home."""

    transition_s: float
    slow_down: float


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """Says what a decision has to know of the plan that holds.

    `reserve_tokens` of a group are still to be gained in it, `copy_tokens` by each merge. `before` has, for each merged
    group, the capacity of those members that have less without the merge that came last. Nothing is decided for groups
    with a member of `unavailable`. Replicas are merged, and lend, within one of `islands` only; where there are none,
    any with any. `memory` is that of the replicas that share no layers with others, `capacity_tokens` are the slots of
    all.
    """

    groups: tuple[Group, ...]
    reserve_tokens: Mapping[Group, int]
    copy_tokens: int
    before: Mapping[Group, Mapping[int, int]]
    unavailable: frozenset[int] = frozenset()
    islands: tuple[frozenset[int], ...] = ()
    memory: Mapping[int, Memory] = field(default_factory=dict)
    capacity_tokens: Mapping[int, int] = field(default_factory=dict)

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


def decide(
    view: DeploymentView,
    forecasts: Mapping[int, Forecast],
    limits: Thresholds,
    experience: Experience,
    past: PastDecisions,
    now_s: float,
    may_lend: bool = True,
) -> tuple[Decision, PastDecisions]:
    """Decides what to do now, and returns what the next decision has to remember. The capacity is that of the plan:
    reports that were under way when it changed do not know it yet. Without `may_lend` nothing is lent,
    and no frames are freed for it: that has failed a moment ago."""
    forecasts = {
        replica: replace(forecast, capacity_tokens=view.capacity_tokens.get(replica, forecast.capacity_tokens))
        for replica, forecast in forecasts.items()
    }
    past = replace(
        past,
        needed_at_s=_needed_at(view, forecasts, limits, past, now_s),
        base_tokens=_still_freed(view, past.base_tokens),
    )
    is_cooling = now_s < past.restored_at_s + limits.cool_down_s
    shortages = _shortages(view, forecasts, limits, is_cooling)
    otherwise = Decision(Act.NOTHING, "demand fits")
    if shortages:
        if (own := _reuse(view, past, shortages)) is not None:
            return own, past
        otherwise = _lend(view, forecasts, shortages, limits, experience) if may_lend else otherwise
        if otherwise.act is Act.NOTHING:
            if (back := _taken_back(view, forecasts, shortages, limits)) is not None:
                return back, replace(past, restored_at_s=now_s)
            otherwise = _drop(view, forecasts, shortages, limits, experience)
        if otherwise.act in (Act.DROP, Act.LEND):
            factor = min(_STAY_FACTOR_LIMIT, 2 * past.stay_factor) if is_cooling else 1
            return otherwise, replace(past, stay_factor=factor)
        if otherwise.act is Act.FREE:
            (lender,) = otherwise.groups[0]
            base = {lender: view.memory[lender].base_tokens} | dict(past.base_tokens)
            return otherwise, replace(past, base_tokens=base, freed_at_s=now_s)
    if now_s >= past.freed_at_s + limits.min_stay_s and (own := _reuse(view, past, past.base_tokens)) is not None:
        return own, past
    stay_s = limits.min_stay_s * past.stay_factor
    ready = [
        group
        for group, needed_s in past.needed_at_s.items()
        if now_s >= needed_s + stay_s and not shortages.keys() & set(group)
    ]
    if not ready:
        return otherwise, past
    # One at a time: each brings load of its own while parameters are copied.
    group = min(ready)
    peak = {member: forecasts[member].peak_tokens for member in group if member in forecasts}
    reason = (
        f"for {now_s - past.needed_at_s[group]:.1f} s the demand of replicas {list(group)} has stayed below "
        f"{limits.restore_at:.0%} of {list(view.before[group].values())} tokens; now {list(peak.values())}"
    )
    return Decision(Act.RESTORE, reason, (group,)), replace(past, restored_at_s=now_s)


def _still_freed(view: DeploymentView, base_tokens: Mapping[int, int]) -> dict[int, int]:
    """Leaves out who has its slots again, or has been started anew with them."""
    return {
        replica: tokens
        for replica, tokens in base_tokens.items()
        if replica not in view.memory or view.memory[replica].base_tokens < tokens
    }


def _reuse(view: DeploymentView, past: PastDecisions, of: Collection[int]) -> Decision | None:
    """Lets a replica out of `of` use frames again that it was to lend, where nobody has them any more."""
    for replica in sorted(past.base_tokens.keys() & set(of)):
        memory = view.memory.get(replica)
        if memory is None or memory.shares or replica in view.unavailable:
            continue
        tokens = min(past.base_tokens[replica] - memory.base_tokens, memory.free_tokens)
        if tokens > 0:
            reason = f"replica {replica} has {memory.base_tokens} tokens, and lends none of the {tokens} that it freed"
            return Decision(Act.REUSE, reason, ((replica,),), tokens=tokens)
    return None


def _lend(
    view: DeploymentView,
    forecasts: Mapping[int, Forecast],
    shortages: Mapping[int, int],
    limits: Thresholds,
    experience: Experience,
) -> Decision:
    """Lends to the one that is most short and can get all that it is short of, or frees frames for that. It costs no
    pipeline, so less than a drop."""
    worth = {
        replica: missing
        for replica, missing in shortages.items()
        if _wait_s(forecasts[replica], missing) > experience.transition_s
    }
    stay_s = experience.transition_s + limits.min_stay_s
    wanted = {
        replica: max(
            missing,
            forecasts[replica].most_tokens_within(stay_s) - round(limits.drop_at * forecasts[replica].capacity_tokens),
        )
        for replica, missing in worth.items()
    }
    # Who lends keeps what it needs, far from being short itself.
    needs = {replica: math.ceil(forecast.peak_tokens / limits.restore_at) for replica, forecast in forecasts.items()}
    may_lend = view.memory.keys() - shortages.keys() - view.unavailable
    loan = choose_loan(
        view.memory,
        worth,
        wanted,
        needs,
        lambda one: may_lend & _partners(view, one),
        view.group_of,
        limits.largest_group,
    )
    if loan is None:
        return Decision(Act.NOTHING, "nobody can lend")
    return _as_decision(loan, forecasts, limits)


def _partners(view: DeploymentView, replica: int) -> set[int]:
    return {
        other for other in view.memory if other != replica and view.island_of((other,)) == view.island_of((replica,))
    }


def _as_decision(loan: Loan, forecasts: Mapping[int, Forecast], limits: Thresholds) -> Decision:
    idle = forecasts.get(loan.lender)
    reason = (
        f"{_short(loan.borrower, forecasts, limits)}; replica {loan.lender} needs "
        f"{0 if idle is None else idle.peak_tokens} of its own"
    )
    if loan.frees_tokens:
        return Decision(Act.FREE, reason, ((loan.lender,),), tokens=loan.frees_tokens)
    group = tuple(sorted((loan.lender, loan.borrower)))
    reason = f"{loan.tokens} tokens from replica {loan.lender} to {loan.borrower}: {reason}"
    return Decision(Act.LEND, reason, (group,), lends=LendWish(loan.lender, loan.borrower, loan.tokens))


def _taken_back(
    view: DeploymentView, forecasts: Mapping[int, Forecast], shortages: Mapping[int, int], limits: Thresholds
) -> Decision | None:
    """Takes back at once what was lent last in a group in which a lender is short, where the others can do without."""
    for replica in sorted(shortages):
        group = view.group_of(replica)
        memory = view.memory.get(replica)
        if memory is None or not memory.lends or group not in view.before or view.unavailable & set(group):
            continue
        if _fits(forecasts, view.before[group], limits.drop_at):
            reason = f"{_short(replica, forecasts, limits)}; what it lends is not needed"
            return Decision(Act.RESTORE, reason, (group,))
    return None


def _short(replica: int, forecasts: Mapping[int, Forecast], limits: Thresholds) -> str:
    forecast = forecasts[replica]
    return (
        f"replica {replica} needs {forecast.demand_tokens} tokens now and {forecast.ahead_tokens} in "
        f"{limits.horizon_s:g} s, has {forecast.capacity_tokens}"
    )


def _wait_s(forecast: Forecast, missing_tokens: int) -> float:
    """Returns how long it would take until requests that end have left so many tokens."""
    if forecast.never_fits or forecast.finish_tokens_per_s <= 0:
        return float("inf")
    return missing_tokens / forecast.finish_tokens_per_s


def _needed_at(
    view: DeploymentView, forecasts: Mapping[int, Forecast], limits: Thresholds, past: PastDecisions, now_s: float
) -> dict[Group, float]:
    """Notes when each merged group was last in need of its gain. This is hysteresis, minimum stay and trend in one: the
    stay counts from the last moment at which the demand, now or ahead, was above the lower threshold."""
    needed = {}
    for group, before in view.before.items():
        if view.unavailable & set(group):
            continue
        fits = _fits(forecasts, before, limits.restore_at)
        needed[group] = past.needed_at_s.get(group, now_s) if fits else now_s
    return needed


def _fits(forecasts: Mapping[int, Forecast], capacities: Mapping[int, int], share: float) -> bool:
    """Tells whether replicas can do with less: with that share of such capacities, and for each of their requests."""
    return all(
        forecasts[member].peak_tokens <= share * capacity
        # One that may grow beyond the smaller capacity would keep the restore waiting until it ends.
        and forecasts[member].longest_request_tokens < capacity
        for member, capacity in capacities.items()
        if member in forecasts
    )


def _shortages(
    view: DeploymentView, forecasts: Mapping[int, Forecast], limits: Thresholds, is_cooling: bool
) -> dict[int, int]:
    """Counts the tokens by which replicas are short, now or at the horizon; for a while after a restore only now."""
    found = {}
    for replica, forecast in forecasts.items():
        # It has all the memory that it will ever ask for. One arrival is no trend, however long its prompt.
        if forecast.is_one_request and forecast.demand_tokens <= forecast.capacity_tokens:
            continue
        need = forecast.demand_tokens if is_cooling else forecast.peak_tokens
        missing = round(need - limits.drop_at * forecast.capacity_tokens)
        if missing > 0 and replica not in view.unavailable:
            found[replica] = missing
    return found


def _drop(
    view: DeploymentView,
    forecasts: Mapping[int, Forecast],
    shortages: Mapping[int, int],
    limits: Thresholds,
    experience: Experience,
) -> Decision:
    cost_s = experience.transition_s + experience.slow_down * limits.min_stay_s
    waits_s = {replica: _wait_s(forecasts[replica], missing) for replica, missing in shortages.items()}
    short = ", ".join(_short(replica, forecasts, limits) for replica in sorted(shortages)[:4])
    short += f", and {len(shortages) - 4} more" if len(shortages) > 4 else ""
    worth = {replica for replica, wait_s in waits_s.items() if wait_s > cost_s}
    longest_s = max(waits_s.values())
    comparison = f"waiting would take {longest_s:.2f} s, the pipeline costs {cost_s:.2f} s"
    if not worth:
        return Decision(Act.WAIT, f"{short}; {comparison}")
    groups = _needs(view, shortages, worth)
    # Groups of one size gain a whole copy. Of different sizes they gain less: what the larger one has freed is in use.
    chosen = _gaining(view, limits, *_classes(groups, lambda group: (view.island_of(group), len(group))))
    if not chosen:
        chosen = _gaining(view, limits, *_classes(groups, view.island_of))
    if not chosen:
        return Decision(Act.WAIT, f"{short}; there is nothing left to drop within groups of {limits.largest_group}")
    stay_s = experience.transition_s + limits.min_stay_s
    needs: dict[int, int] = {}
    for group in chosen:
        needs |= _lasting(group, forecasts, limits, stay_s)
    return Decision(Act.DROP, f"{short}; {comparison}", tuple(group.members for group in chosen), needs)


def _lasting(
    group: GroupNeed, forecasts: Mapping[int, Forecast], limits: Thresholds, stay_s: float
) -> Mapping[int, int]:
    """Says what each member is to gain, for the time that they stay merged at least: a further drop would be one more
    transition, while the group is a pipeline already. How many replicas are merged follows from the horizon alone."""
    missing = {
        member: max(0, round(forecast.most_tokens_within(stay_s) - limits.drop_at * forecast.capacity_tokens))
        for member in group.members
        if (forecast := forecasts.get(member)) is not None
    }
    # Nobody is left out: what one replica has reported, others may be about to report.
    share = max(group.shortage_tokens, sum(missing.values())) // len(group.members)
    return {member: max(missing.get(member, 0), share) for member in group.members}


def _gaining(view: DeploymentView, limits: Thresholds, *classes: Sequence[GroupNeed]) -> list[GroupNeed]:
    """Finds what can be done for those that are short, if nobody is merged with one of another class."""
    found = [group for each in classes for group in choose_merges(each, view.copy_tokens, limits.largest_group)]
    return [group for group in found if group.merges or group.reserve_tokens]


def _classes(groups: Sequence[GroupNeed], key: Callable[[Group], Any]) -> list[list[GroupNeed]]:
    """Puts together the groups for which `key` is the same, in the order of what it is."""
    classes: dict[Any, list[GroupNeed]] = {}
    for group in groups:
        classes.setdefault(key(group.members), []).append(group)
    return [classes[each] for each in sorted(classes)]


def _needs(view: DeploymentView, shortages: Mapping[int, int], worth: set[int]) -> Sequence[GroupNeed]:
    """Says what each group is short of. A group that has somebody for whom a drop is worth its cost drops for all that
    are short."""
    return [
        GroupNeed(
            members=group,
            shortage_tokens=sum(shortages.get(member, 0) for member in group) if worth & set(group) else 0,
            reserve_tokens=view.reserve_tokens.get(group, 0),
        )
        for group in view.groups
        if not view.unavailable & set(group)
    ]


def view_of(
    plan: Plan,
    facts: Sequence[ReplicaFacts],
    merges: Sequence[tuple[frozenset[int], Plan]],
    unavailable: frozenset[int],
    islands: tuple[frozenset[int], ...] = (),
) -> DeploymentView:
    """Makes the view of a plan. `merges` are those that hold, oldest first, each with its members and the plan that it
    was made from. `islands` are sets of replicas that can be merged with each other."""
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
    )
