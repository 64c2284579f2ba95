"""The way of a restore from plan to plan: which merges it undoes, wholly or in part, one transition after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kunserve_sgl.control.commands import Leg, RunningCommand, groups_to_restore, latest_merges, merges_of
from kunserve_sgl.control.deployment import Deployment
from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.partial_restore import RestoreWish, first_step
from kunserve_sgl.policy.plan import Plan

Groups = tuple[tuple[int, ...], ...]


def restorable_groups(deployment: Deployment, wish: RestoreWish) -> Groups:
    """Returns the groups that a restore is about, which could begin now. Raises ConfigurationError, TransientError."""
    groups = groups_to_restore(deployment.known_plan(), wish.groups)
    deployment.require_healthy(sorted(_members(groups)))
    return groups


def plan_after(deployment: Deployment, groups: Groups, wish: RestoreWish) -> Plan:
    """Returns the plan that a restore of `groups` leads to in the end. Raises ConfigurationError, TransientError."""
    members = _members(groups)
    if wish.is_partial:
        return deployment.partly_without(latest_merges(deployment.merges, members), wish).plan
    return deployment.without(merges_of(deployment.merges, members))


def next_leg(deployment: Deployment, command: RunningCommand) -> Leg | None:
    """Returns where the next transition of a restore leads, None where there is nothing left to undo. What has to come
    after it is in `command.then`. Raises ConfigurationError, TransientError."""
    plan = deployment.known_plan()
    if command.then is not None:
        leg, command.then = command.then, None
        leg = replace(leg, plan=replace(leg.plan, epoch=plan.epoch + 1))
    else:
        latest = latest_merges(deployment.merges, command.members)
        if not latest:
            return None
        # Also before a part is restored: what comes back would need frames that this KV has left.
        if (nearer := _homeward(deployment, command, deployment.without(latest))) is not None:
            return Leg(nearer, (), is_homeward=True)
        if command.wish.is_partial:
            leg = deployment.partly_without(latest, command.wish)
        else:
            leg = Leg(deployment.without(latest), tuple(latest))
        if (first := first_step(plan, leg.plan)) is not leg.plan:
            leg, command.then = Leg(first, ()), leg
    deployment.require_possible(leg.plan)
    return leg


def _homeward(deployment: Deployment, command: RunningCommand, new: Plan) -> Plan | None:
    """Returns a plan in which some more KV is where it is in `new`; None where all is."""
    if not command.retraces:
        try:
            return deployment.homeward(new, command.members, retraces=False)
        except TransientError:
            command.retraces = True
    return deployment.homeward(new, command.members, retraces=True)


def _members(groups: Iterable[Sequence[int]]) -> set[int]:
    return {member for group in groups for member in group}
