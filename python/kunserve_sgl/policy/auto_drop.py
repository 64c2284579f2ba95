"""What automatic mode drops: which groups are merged, and what each member is to gain by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kunserve_sgl.policy.decision import Act, Decision, DeploymentView, Experience, Group, Thresholds, shortage_of
from kunserve_sgl.policy.demand import Forecast
from kunserve_sgl.policy.merges import GroupNeed, choose_merges


def drop(
    view: DeploymentView,
    forecasts: Mapping[int, Forecast],
    shortages: Mapping[int, int],
    limits: Thresholds,
    experience: Experience,
) -> Decision:
    """Merges groups where waiting for those that run would take longer than the pipeline costs; else waits."""
    cost_s = experience.transition_s + experience.slow_down * limits.min_stay_s
    waits_s = {replica: forecasts[replica].wait_s(missing) for replica, missing in shortages.items()}
    short = ", ".join(shortage_of(replica, forecasts, limits) for replica in sorted(shortages)[:4])
    short += f", and {len(shortages) - 4} more" if len(shortages) > 4 else ""
    worth = {replica for replica, wait_s in waits_s.items() if wait_s > cost_s}
    longest_s = max(waits_s.values())
    comparison = f"waiting would take {longest_s:.2f} s, the pipeline costs {cost_s:.2f} s"
    if not worth:
        return Decision(Act.WAIT, f"{short}; {comparison}")
    groups = _needs(view, shortages, worth)
    # Groups of one size gain a whole copy. Of different sizes they gain less: what the larger one has freed is in use.
    # Where links are fast the pipeline costs less, if that is enough.
    near = view.links.neighbourhoods(member for group in groups for member in group.members)

    def is_alike(group: Group) -> tuple[int, Group, int]:
        return view.island_of(group), tuple(sorted({near[member] for member in group})), len(group)

    chosen = _gaining(view, limits, *_classes(groups, is_alike))
    if not _is_enough(groups, chosen):
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
    links = view.links.slowness_of if view.links.speeds or view.links.maps else None
    found = [group for each in classes for group in choose_merges(each, view.copy_tokens, limits.largest_group, links)]
    return [group for group in found if group.merges or group.reserve_tokens]


def _is_enough(groups: Sequence[GroupNeed], chosen: Sequence[GroupNeed]) -> bool:
    """Tells whether all that are short get what they miss."""
    served = {member for group in chosen if group.missing_tokens <= 0 for member in group.members}
    return all(served.issuperset(group.members) for group in groups if group.missing_tokens > 0)


def _classes(groups: Sequence[GroupNeed], key: Callable[[Group], Any]) -> list[list[GroupNeed]]:
    """Puts together the groups for which `key` is the same, in the order of what it is."""
    classes: dict[Any, list[GroupNeed]] = {}
    for group in groups:
        classes.setdefault(key(group.members), []).append(group)
    return [classes[each] for each in sorted(classes)]
