"""From what is wanted to the next plan: who drops which layers, and the slots that this makes room for."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.layer_placement import place_layers
from kunserve_sgl.policy.plan import Extent, Plan, ReplicaFacts, steps_of
from kunserve_sgl.policy.plan_check import check_facts, check_transition, frame_balance, kv_frames

LayerHosts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DropWish:
    """Says what is wanted of a drop: groups to merge, and one of the layer hosts, the tokens to gain, or what replicas
    need, or nothing of these for all that can be gained.

    `layers` is one layer host per layer for the batches of every member (of the only group), or that for some members;
    the others keep the layer hosts they have. `tokens` drops no more layers than this gain needs.

    `needs` are tokens per replica. A group drops no more layers than these need, all it can where that is not enough,
    and shares out the new slots accordingly; what is left over is shared evenly, as it is without `needs`.

    `leaves_spare` keeps as many frames free at each member as KV needs to change its home, one layer of the base slots
    at a time, unless that would take more than half of the new slots.
    """

    groups: tuple[tuple[int, ...], ...]
    layers: LayerHosts | Mapping[int, LayerHosts] | None = None
    tokens: int | None = None
    needs: Mapping[int, int] | None = None
    leaves_spare: bool = False


@dataclass(frozen=True, slots=True)
class PlanCost:
    """Says what a transition gains and what it costs. Bytes are of one tensor-parallel rank each, over all replicas.

    `hops` is, per replica, how often the activations of one of its batches go from one replica to another.
    """

    gained_tokens: int
    gained_tokens_of: tuple[int, ...]
    dropped_bytes: int
    loaded_bytes: int
    lent_bytes: int
    hops: tuple[int, ...]


def drop_plan(current: Plan, facts: Sequence[ReplicaFacts], wish: DropWish) -> Plan:
    """Makes the plan after the drop. Raises ConfigurationError where the wish makes no sense for this deployment, and
    TransientError where it cannot be done as things are."""
    check_facts(facts)
    new = _drop_plan(current, facts, wish)
    if wish.leaves_spare:
        try:
            frugal = _drop_plan(current, _without_spare(facts), wish)
        except TransientError:
            frugal = new
        if 2 * plan_cost(current, frugal, facts).gained_tokens >= plan_cost(current, new, facts).gained_tokens:
            new = frugal
    check_transition(current, new, facts)
    return new


def _without_spare(facts: Sequence[ReplicaFacts]) -> tuple[ReplicaFacts, ...]:
    """Returns `facts` with so many free frames less as the base slots of the largest replica take in a layer. They may
    be fewer than none: parameters that go free some."""
    granules = max(fact.base_granules for fact in facts)
    return tuple(
        replace(fact, free_frames=fact.free_frames - granules * max(fact.granule_frames, default=0)) for fact in facts
    )


def _drop_plan(current: Plan, facts: Sequence[ReplicaFacts], wish: DropWish) -> Plan:
    groups = _check_groups(current, wish.groups)
    if wish.layers is not None:
        new = _with_hosts(current, facts, groups, _explicit_hosts(current, groups, wish.layers))
        for group in groups:
            if apart := set(group) - set(new.group_of(group[0])):
                raise ConfigurationError(
                    f"layers: with these hosts, replicas {sorted(apart)} share nothing with replica {group[0]}; leave "
                    "them out of the group"
                )
        if new.resident == current.resident:
            raise ConfigurationError("layers: with these hosts nothing would be dropped")
    elif wish.tokens is not None:
        new = _least_drop(current, facts, groups, wish.tokens)
    elif wish.needs is not None:
        new = _needed_drop(current, facts, groups, wish.needs)
    else:
        new = _with_hosts(current, facts, groups, _hosts_after(current, facts, groups, None))
        if new.resident == current.resident:
            raise TransientError(f"groups {_listed(groups)} keep each layer once already: nothing is left to drop")
    if new.extents == current.extents:
        raise TransientError(_why_no_gain(current, new, facts, groups))
    return new


def restore_plan(current: Plan, before: Plan, members: Sequence[int]) -> Plan:
    """Makes the plan in which `members` are again as they were under `before`, the plan that they were merged from
    last."""

    def rows(after: Sequence[LayerHosts], former: Sequence[LayerHosts]) -> tuple[LayerHosts, ...]:
        return tuple(former[r] if r in members else after[r] for r in range(current.replica_count))

    return Plan(
        epoch=current.epoch + 1,
        hosts=rows(current.hosts, before.hosts),
        resident=rows(current.resident, before.resident),
        extents=(
            *(e for e in before.extents if e.replica in members),
            *(e for e in current.extents if e.replica not in members),
        ),
    )


def plan_cost(old: Plan, new: Plan, facts: Sequence[ReplicaFacts]) -> PlanCost:
    """Computes gain and cost of the transition from `old` to `new`. It takes extents times layers steps."""
    steps = [steps_of(old, new, fact.replica) for fact in facts]
    balances = [frame_balance(old, new, fact) for fact in facts]
    gained = tuple(capacity_tokens(new, fact) - capacity_tokens(old, fact) for fact in facts)
    lent = sum(kv_frames(loan.parts, fact) for fact, step in zip(facts, steps, strict=True) for loan in step.lend_kv)
    return PlanCost(
        gained_tokens=sum(gained),
        gained_tokens_of=gained,
        dropped_bytes=sum(balance.dropped for balance in balances) * facts[0].frame_bytes,
        loaded_bytes=sum(balance.loaded for balance in balances) * facts[0].frame_bytes,
        lent_bytes=lent * facts[0].frame_bytes,
        hops=tuple(_hops(new, fact.replica) for fact in facts),
    )


def capacity_tokens(plan: Plan, fact: ReplicaFacts) -> int:
    """Counts the slots of the replica that `fact` describes, under `plan`."""
    return sum(extent.granules for extent in plan.extents_of(fact.replica)) * fact.granule_slots


def most_capacity(plan: Plan, living: Sequence[ReplicaFacts]) -> int:
    """Counts the slots that there would be in all memory of these replicas, but for one copy of the layers, at one that
    has addresses for so many."""
    first = living[0]
    frames = sum(fact.free_frames for fact in living)
    frames += sum(fact.layer_frames[layer] for fact in living for layer in plan.resident[fact.replica])
    frames -= sum(first.layer_frames)
    tokens = sum(capacity_tokens(plan, fact) for fact in living)
    more = max(0, frames) // sum(first.granule_frames) * first.granule_slots
    return min(tokens + more, first.max_granules * first.granule_slots)


def _hops(plan: Plan, replica: int) -> int:
    places = [replica, *(segment.host for segment in plan.route_of(replica)), replica]
    return sum(here != there for here, there in itertools.pairwise(places))


def _listed(groups: Sequence[Sequence[int]]) -> str:
    return str([list(group) for group in groups])


def _check_groups(current: Plan, wanted: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Returns the groups, ascending. A group takes whole groups of the current plan. Raises ConfigurationError."""
    last = current.replica_count - 1
    if not wanted:
        raise ConfigurationError("groups: none; accepted: lists of two or more replicas each")
    seen: set[int] = set()
    for group in wanted:
        for replica in group:
            if not 0 <= replica <= last:
                raise ConfigurationError(f"groups: there is no replica {replica}; accepted: 0 to {last}")
            if replica in seen:
                raise ConfigurationError(f"groups: replica {replica} is named twice")
            seen.add(replica)
        if len(group) < 2:
            raise ConfigurationError(f"groups: {list(group)}; accepted: two or more replicas in each group")
    for group in wanted:
        for replica in group:
            if missing := set(current.group_of(replica)) - set(group):
                raise ConfigurationError(
                    f"groups: replica {replica} is merged with {sorted(missing)}, so they must be in its group"
                )
    return tuple(tuple(sorted(group)) for group in wanted)


def _explicit_hosts(
    current: Plan, groups: Sequence[Sequence[int]], layers: LayerHosts | Mapping[int, LayerHosts]
) -> dict[int, LayerHosts]:
    members = [replica for group in groups for replica in group]
    if not isinstance(layers, Mapping):
        if len(groups) > 1:
            raise ConfigurationError('layers: a list is for one group; for several, {"replica": [hosts], ...}')
        layers = dict.fromkeys(members, layers)
    for replica, hosts in layers.items():
        if replica not in members:
            raise ConfigurationError(f"layers: replica {replica} is in none of the groups {_listed(groups)}")
        if len(hosts) != current.layer_count:
            raise ConfigurationError(
                f"layers: {len(hosts)} hosts for replica {replica}; accepted: {current.layer_count}, one for each layer"
            )
        group = next(group for group in groups if replica in group)
        for layer, host in enumerate(hosts):
            if host not in group:
                raise ConfigurationError(
                    f"layers: replica {host} for layer {layer} of replica {replica}; accepted: its group, {list(group)}"
                )
            if layer not in current.resident[host]:
                raise ConfigurationError(
                    f"layers: replica {host} has dropped layer {layer} already, so it cannot host it for replica "
                    f"{replica}; restore first"
                )
    return {replica: layers.get(replica, current.hosts[replica]) for replica in members}


def _hosts_after(
    current: Plan, facts: Sequence[ReplicaFacts], groups: Sequence[Sequence[int]], drops: int | None
) -> dict[int, LayerHosts]:
    """Returns the layer hosts for all members after the first `drops` drops of each group in turn, None for all of
    them."""
    resident = {replica: set(current.resident[replica]) for group in groups for replica in group}
    hosts: dict[int, LayerHosts] = {}
    for group in groups:
        keepers = _keepers(current, facts, group)
        for member, layer in _drop_order(current, facts, group, keepers)[:drops]:
            resident[member].remove(layer)
        for member in group:
            hosts[member] = tuple(
                member if layer in resident[member] else keepers[layer] for layer in range(current.layer_count)
            )
    return hosts


def _keepers(current: Plan, facts: Sequence[ReplicaFacts], group: Sequence[int]) -> LayerHosts:
    return place_layers(facts[group[0]].layer_frames, {member: current.resident[member] for member in group})


def _drop_order(
    current: Plan, facts: Sequence[ReplicaFacts], group: Sequence[int], keepers: LayerHosts
) -> list[tuple[int, int]]:
    """Returns (member, layer) of every layer that a member need not keep. The member that has freed least is next, with
    the layer farthest from those it keeps for all, so that what it still hosts stays in one run."""

    def distance(member: int, layer: int) -> int:
        return min((abs(layer - kept) for kept, m in enumerate(keepers) if m == member), default=layer)

    left = {
        member: sorted(
            (layer for layer in current.resident[member] if keepers[layer] != member),
            key=lambda layer: (distance(member, layer), -layer),
        )
        for member in group
    }
    freed = dict.fromkeys(group, 0)
    order: list[tuple[int, int]] = []
    while any(left.values()):
        member = min((m for m in group if left[m]), key=lambda m: (freed[m], m))
        layer = left[member].pop()
        freed[member] += facts[member].layer_frames[layer]
        order.append((member, layer))
    return order


def _least_drop(current: Plan, facts: Sequence[ReplicaFacts], groups: Sequence[Sequence[int]], tokens: int) -> Plan:
    """Drops in turn until the gain is there, and returns the plan after it. It takes drops x members x layers steps."""
    longest = max(len(_drop_order(current, facts, group, _keepers(current, facts, group))) for group in groups)
    most = 0
    for drops in range(1, longest + 1):
        new = _with_hosts(current, facts, groups, _hosts_after(current, facts, groups, drops))
        if any(new.group_of(group[0]) != group for group in groups):
            continue  # not everybody has dropped something yet
        gain = plan_cost(current, new, facts).gained_tokens
        if gain >= tokens:
            return new
        most = max(most, gain)
    raise TransientError(f"tokens: {tokens} cannot be gained by groups {_listed(groups)}; at most {most} now")


def _needed_drop(
    current: Plan, facts: Sequence[ReplicaFacts], groups: Sequence[tuple[int, ...]], needs: Mapping[int, int]
) -> Plan:
    """Drops, group by group, the first in turn with which every member gains what it needs, and returns the plan after
    it. It takes drops x members x layers steps."""
    hosts: dict[int, LayerHosts] = {}
    for group in groups:
        for drops in range(1, len(_drop_order(current, facts, group, _keepers(current, facts, group))) + 1):
            found = _hosts_after(current, facts, [group], drops)
            new = _with_hosts(current, facts, [group], found, needs)
            gained = {m: capacity_tokens(new, facts[m]) - capacity_tokens(current, facts[m]) for m in group}
            is_enough = any(gained.values()) and all(gained[m] >= needs.get(m, 0) for m in group)
            if is_enough and new.group_of(group[0]) == group:
                break
        else:
            found = _hosts_after(current, facts, [group], None)
        hosts.update(found)
    return _with_hosts(current, facts, groups, hosts, needs)


def _with_hosts(
    current: Plan,
    facts: Sequence[ReplicaFacts],
    groups: Sequence[Sequence[int]],
    hosts: Mapping[int, LayerHosts],
    needs: Mapping[int, int] | None = None,
) -> Plan:
    """Changes `current` to these layer hosts for the members of `groups`, who keep only the layers they execute for
    somebody, and to as many new slots as fit then."""
    all_hosts = tuple(hosts.get(replica, kept) for replica, kept in enumerate(current.hosts))
    resident = list(current.resident)
    for replica in hosts:
        resident[replica] = tuple(
            layer for layer in range(current.layer_count) if any(row[layer] == replica for row in all_hosts)
        )
    new = replace(current, epoch=current.epoch + 1, hosts=all_hosts, resident=tuple(resident))
    added = tuple(extent for group in groups for extent in _new_extents(current, new, facts, group, needs or {}))
    return replace(new, extents=(*current.extents, *added))


def _new_extents(
    current: Plan, new: Plan, facts: Sequence[ReplicaFacts], group: Sequence[int], needs: Mapping[int, int]
) -> list[Extent]:
    """Gives each member as many granules as the memory of all homes has room for: what it needs, or its share of that,
    then as many as the others, then one more where it still fits."""
    room = {member: frame_balance(current, new, facts[member]).after_release for member in group}
    need = {member: _home_frames(new, facts, member, group) for member in group}
    ends = {member: max(e.first_granule + e.granules for e in current.extents_of(member)) for member in group}
    space = {member: facts[member].max_granules - ends[member] for member in group}
    granules = dict.fromkeys(group, 0)

    def fits(more: Mapping[int, int]) -> bool:
        return all(room[home] >= sum(count * need[m][home] for m, count in more.items()) for home in group) and all(
            count <= space[m] for m, count in more.items()
        )

    def give_most(parts: int, more: Callable[[int], Mapping[int, int]]) -> None:
        """Gives the most of `parts` parts that there is room for; `more` says what so many parts are."""
        found = bisect.bisect_left(range(1, parts + 1), True, key=lambda part: not fits(more(part)))
        for member, count in more(found).items():
            granules[member] += count
            space[member] -= count
            for home in group:
                room[home] -= count * need[member][home]

    wanted = {m: min(space[m], -(-max(0, needs.get(m, 0)) // facts[m].granule_slots)) for m in group}
    most = max(wanted.values())
    if most:
        give_most(most, lambda part: {m: count * part // most for m, count in wanted.items()})
    give_most(min(space.values()), lambda part: dict.fromkeys(group, part))
    for member in group:
        give_most(1, lambda part, member=member: {member: part})  # type: ignore[misc]
    return [Extent(member, ends[member], granules[member], new.hosts[member]) for member in group if granules[member]]


def _home_frames(new: Plan, facts: Sequence[ReplicaFacts], member: int, group: Sequence[int]) -> dict[int, int]:
    """Counts the frames that one new granule of `member` takes at each home."""
    frames = dict.fromkeys(group, 0)
    for layer, host in enumerate(new.hosts[member]):
        frames[host] += facts[host].granule_frames[layer]
    return frames


def _why_no_gain(current: Plan, new: Plan, facts: Sequence[ReplicaFacts], groups: Sequence[Sequence[int]]) -> str:
    reasons = []
    for group in groups:
        for home in group:
            need = {member: _home_frames(new, facts, member, group)[home] for member in group}
            room = frame_balance(current, new, facts[home]).after_release
            reasons.append(
                f"replica {home} would have {room} free frames, and a granule of {facts[home].granule_slots} slots "
                f"takes {_per_member(need)} frames there"
            )
        for member in group:
            if max(e.first_granule + e.granules for e in current.extents_of(member)) >= facts[member].max_granules:
                reasons.append(f"the address space of replica {member} is full: --kunserve-max-slots")
    return "no slots would be gained: " + "; ".join(reasons)


def _per_member(frames: Mapping[int, int]) -> str:
    return " or ".join(f"{count} (of replica {member})" for member, count in sorted(frames.items()))
