"""Restores that leave a group merged: some layers come back, and the slots go that are in the way of their parameters.

A merge is remembered by the plan that it was made from. A partial restore goes a part of the way back to that plan, and
the merge stays remembered: what is left of it can be restored in further parts, or as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import capacity_tokens, restore_plan
from kunserve_sgl.policy.plan import Extent, Plan, ReplicaFacts
from kunserve_sgl.policy.plan_check import FrameBalance, frame_balance, lent_to_the_end

# The members of a merge, and the plan that they left for it.
Undone = tuple[Collection[int], Plan]


@dataclass(frozen=True, slots=True)
class RestoreWish:
    """Says what is wanted of a restore: groups to take apart, None for all that are merged.

    `layers` are those that come back, by replica, and no others do. With `tokens` so many layers come back that so many
    of the tokens which the last merge of each group has gained stay at least, in all groups together. With
    `is_forced` requests that have no room in what is left give up their slots at once; without, they are waited for.
    """

    groups: tuple[tuple[int, ...], ...] | None = None
    layers: Mapping[int, Collection[int]] | None = None
    tokens: int | None = None
    is_forced: bool = False

    @property
    def is_partial(self) -> bool:
        """Tells whether something is to stay merged."""
        return self.layers is not None or self.tokens is not None


def partial_plan(current: Plan, facts: Sequence[ReplicaFacts], undone: Sequence[Undone], wish: RestoreWish) -> Plan:
    """Makes the plan after a partial restore of `undone`, the merge of each wanted group that came last. Raises
    ConfigurationError where the wish makes no sense, TransientError where it cannot be done as things are."""
    if wish.layers is not None:
        return _with_layers(current, facts, undone, _checked(current, undone, wish.layers))
    best: Plan | None = None
    most = 0
    back: dict[int, set[int]] = {}
    for member, layer in _return_order(current, facts, undone):
        back.setdefault(member, set()).add(layer)
        try:
            plan = _with_layers(current, facts, undone, back)
        except ConfigurationError:
            continue  # with one layer more or less the groups hold together
        kept = sum(_gained(plan, facts, each) for each in undone)
        most = max(most, kept)
        if kept >= (wish.tokens or 0):
            best = plan
    if best is None:
        raise TransientError(f"tokens: {wish.tokens} cannot stay when a layer comes back; at most {most} can now")
    return best


def is_as_before(plan: Plan, undone: Undone) -> bool:
    """Tells whether the members of a merge are again as they were without it."""
    members, before = undone
    whole = restore_plan(plan, before, sorted(members))
    return (whole.hosts, whole.resident, set(whole.extents)) == (plan.hosts, plan.resident, set(plan.extents))


def first_step(current: Plan, target: Plan) -> Plan:
    """Returns the plan to go to first on the way to `target`, which may be that.

    Slots that go where parameters come back must not be lent (see `check_transition`). After a partial restore some
    are: their layers have come back to their replica, and their KV is still where it was. So its batches first take the
    route again that they had when the slots came. No memory comes or goes in that.
    """
    routes = {extent.replica: extent.homes for extent in lent_to_the_end(current, target)}
    if not routes:
        return target
    hosts = tuple(routes.get(replica, kept) for replica, kept in enumerate(current.hosts))
    return replace(current, epoch=current.epoch + 1, hosts=hosts)


def _place(extent: Extent) -> tuple[int, int]:
    return extent.replica, extent.first_granule


def _checked(current: Plan, undone: Sequence[Undone], layers: Mapping[int, Collection[int]]) -> dict[int, set[int]]:
    """Returns the layers that are to come back. Raises ConfigurationError."""
    dropped = {member: _dropped(current, before, member) for members, before in undone for member in members}
    for replica, wanted in layers.items():
        if replica not in dropped:
            raise ConfigurationError(
                f"layers: replica {replica} is in none of the groups to restore; accepted: {sorted(dropped)}"
            )
        if wrong := sorted(set(wanted) - set(dropped[replica])):
            raise ConfigurationError(
                f"layers: {wrong} of replica {replica}; accepted are those that the last merge dropped there and that "
                f"are not back: {dropped[replica]}"
            )
    return {replica: set(wanted) for replica, wanted in layers.items()}


def _dropped(current: Plan, before: Plan, member: int) -> list[int]:
    return sorted(set(before.resident[member]) - set(current.resident[member]))


def _return_order(current: Plan, facts: Sequence[ReplicaFacts], undone: Sequence[Undone]) -> Iterable[tuple[int, int]]:
    """Yields (member, layer) of every layer that a merge has dropped. The member that has got back least is next, with
    the layer nearest to those that it keeps, so that what it hosts stays in one run."""
    left = {member: _dropped(current, before, member) for members, before in undone for member in sorted(members)}
    kept = {member: set(current.resident[member]) for member in left}
    frames = dict.fromkeys(left, 0)
    while any(left.values()):
        member = min((m for m in left if left[m]), key=lambda m: (frames[m], m))
        layer = min(left[member], key=lambda each: (min((abs(each - k) for k in kept[member]), default=each), each))
        left[member].remove(layer)
        kept[member].add(layer)
        frames[member] += facts[member].layer_frames[layer]
        yield member, layer


def _with_layers(
    current: Plan, facts: Sequence[ReplicaFacts], undone: Sequence[Undone], back: Mapping[int, Collection[int]]
) -> Plan:
    """Changes `current` so that these layers are back and run at home again, and the extents are gone whose memory that
    takes: those that came last, of whoever has most slots of them. Raises TransientError where there are not enough,
    ConfigurationError where a group would fall apart, unless all of it is as before."""
    hosts, resident = list(current.hosts), list(current.resident)
    for member, layers in back.items():
        hosts[member] = tuple(member if layer in layers else host for layer, host in enumerate(current.hosts[member]))
        resident[member] = tuple(sorted({*current.resident[member], *layers}))
    new = replace(current, epoch=current.epoch + 1, hosts=tuple(hosts), resident=tuple(resident))
    spare = _spare_extents(current, undone)
    while short := _short_of_frames(current, new, facts):
        usable = [member for member, own in spare.items() if own and short & set(own[-1].homes)]
        if not usable:
            names = " and ".join(f"replica {member}" for member in sorted(short))
            raise TransientError(f"layers: {names} would not have the frames for them, whatever slots go")
        member = max(usable, key=lambda m: (sum(extent.granules for extent in spare[m]), -m))
        gone = spare[member].pop()
        new = replace(new, extents=tuple(extent for extent in new.extents if extent != gone))
    for members, before in undone:
        if apart := set(members) - set(new.group_of(min(members))):
            if is_as_before(new, (members, before)):
                continue
            raise ConfigurationError(
                f"layers: with these back, replicas {sorted(apart)} would share nothing with replica {min(members)}, "
                "and not all would be as before the merge; accepted: fewer layers, or a restore of the whole group"
            )
    return new


def _spare_extents(current: Plan, undone: Sequence[Undone]) -> dict[int, list[Extent]]:
    """Returns the slots of each member that its last merge has brought, in order."""
    return {
        member: [
            extent for extent in current.extents_of(member) if _place(extent) not in set(map(_place, before.extents))
        ]
        for members, before in undone
        for member in sorted(members)
    }


def _short_of_frames(current: Plan, new: Plan, facts: Sequence[ReplicaFacts]) -> set[int]:
    def balance(fact: ReplicaFacts) -> FrameBalance:
        return frame_balance(current, new, fact)

    return {fact.replica for fact in facts if balance(fact).after_load < 0}


def _gained(plan: Plan, facts: Sequence[ReplicaFacts], undone: Undone) -> int:
    """Counts the tokens that the members of a merge have more than without it."""
    members, before = undone
    return sum(capacity_tokens(plan, facts[m]) - capacity_tokens(before, facts[m]) for m in members)
