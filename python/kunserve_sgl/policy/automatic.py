"""When to lend, to drop and to restore: from forecasts and the plan to a decision, with the reason in words.

Pure: time comes in as data. The state between two decisions is `PastDecisions`, which is a value as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from kunserve_sgl.policy.auto_drop import drop
from kunserve_sgl.policy.auto_lending import borrows_of_idle, lend, reuse, still_freed, take_back
from kunserve_sgl.policy.decision import (
    Act,
    Decision,
    DeploymentView,
    Experience,
    Group,
    PastDecisions,
    Thresholds,
    fits,
    missing_of,
)
from kunserve_sgl.policy.demand import Forecast

_STAY_FACTOR_LIMIT = 16


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
        base_tokens=still_freed(view, past.base_tokens),
    )
    is_cooling = now_s < past.restored_at_s + limits.cool_down_s
    now_only = {replica for replica in forecasts if is_cooling or borrows_of_idle(view, forecasts, limits, replica)}
    shortages = _shortages(view, forecasts, limits, now_only)
    otherwise = Decision(Act.NOTHING, "demand fits")
    if shortages:
        if (own := reuse(view, past, shortages)) is not None:
            return own, past
        otherwise = lend(view, forecasts, shortages, limits, experience) if may_lend else otherwise
        if otherwise.act is Act.NOTHING:
            if (back := take_back(view, forecasts, shortages, limits)) is not None:
                return back, replace(past, restored_at_s=now_s)
            otherwise = drop(view, forecasts, shortages, limits, experience)
        if otherwise.act in (Act.DROP, Act.LEND):
            factor = min(_STAY_FACTOR_LIMIT, 2 * past.stay_factor) if is_cooling else 1
            return otherwise, replace(past, stay_factor=factor)
        if otherwise.act is Act.FREE:
            (lender,) = otherwise.groups[0]
            base = {lender: view.memory[lender].base_tokens} | dict(past.base_tokens)
            return otherwise, replace(past, base_tokens=base, freed_at_s=now_s)
    if now_s >= past.freed_at_s + limits.min_stay_s and (own := reuse(view, past, past.base_tokens)) is not None:
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


def _needed_at(
    view: DeploymentView, forecasts: Mapping[int, Forecast], limits: Thresholds, past: PastDecisions, now_s: float
) -> dict[Group, float]:
    """Notes when each merged group was last in need of its gain. This is hysteresis, minimum stay and trend in one: the
    stay counts from the last moment at which the demand, now or ahead, was above the lower threshold."""
    needed = {}
    for group, before in view.before.items():
        if view.unavailable & set(group):
            continue
        is_needed = not fits(forecasts, before, limits.restore_at)
        needed[group] = now_s if is_needed else past.needed_at_s.get(group, now_s)
    return needed


def _shortages(
    view: DeploymentView, forecasts: Mapping[int, Forecast], limits: Thresholds, now_only: Collection[int]
) -> dict[int, int]:
    """Counts the tokens by which replicas are short, now or at the horizon; of those in `now_only` only now: for a
    while after a restore, and of who has been lent memory by idle ones."""
    found = {}
    for replica, forecast in forecasts.items():
        # It has all the memory that it will ever ask for. One arrival is no trend, however long its prompt.
        if forecast.is_one_request and forecast.demand_tokens <= forecast.capacity_tokens:
            continue
        need = forecast.demand_tokens if replica in now_only else forecast.peak_tokens
        missing = missing_of(need, forecast, limits)
        if missing > 0 and replica not in view.unavailable:
            found[replica] = missing
    return found
