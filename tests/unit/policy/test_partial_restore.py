"""Restores that leave a group merged: which layers come back, which slots go for them, and how the rest comes back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import DropWish, capacity_tokens, drop_plan, plan_cost, restore_plan
from kunserve_sgl.policy.partial_restore import RestoreWish, Undone, first_step, is_as_before, partial_plan
from kunserve_sgl.policy.plan import Plan, ReplicaFacts, kv_loans, normal_plan, steps_of
from kunserve_sgl.policy.plan_check import check_transition, frame_balance
from unit.policy.plan_worlds import Memory, facts_after, make_facts

PAIR = ((0, 1),)
Facts = tuple[ReplicaFacts, ...]


def after(old: Plan, new: Plan, facts: Facts) -> Facts:
    return tuple(replace(f, free_frames=frame_balance(old, new, f).after_release) for f in facts)


def merged() -> tuple[Plan, Plan, Facts]:
    """Before, after, and what is free then. Each gains 20 granules, of 4 frames each at both."""
    facts = make_facts(2, [40] * 8)
    normal = normal_plan(facts)
    plan = drop_plan(normal, facts, DropWish(PAIR))
    return normal, plan, after(normal, plan, facts)


def test_layers_come_back_and_slots_go_that_are_in_their_way() -> None:
    normal, plan, facts = merged()
    undone: Undone = ((0, 1), normal)
    new = partial_plan(plan, facts, [undone], RestoreWish(layers={0: (4, 5), 1: (2, 3)}))
    check_transition(plan, new, facts)
    assert new.hosts == ((0, 0, 0, 0, 0, 0, 1, 1), (0, 0, 1, 1, 1, 1, 1, 1))
    assert new.resident == ((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 6, 7))
    # Two layers of 40 frames each at both, which are behind what one of them has gained.
    lost = [capacity_tokens(plan, f) - capacity_tokens(new, f) for f in facts]
    assert lost == [20 * 16, 0]
    assert set(new.extents) < set(plan.extents)
    assert steps_of(plan, new, 0).load == (4, 5)
    assert not is_as_before(new, undone)
    assert new.groups == ((0, 1),)


def test_slots_stay_where_there_are_free_frames() -> None:
    normal, plan, facts = merged()
    facts = tuple(replace(f, free_frames=80) for f in facts)
    new = partial_plan(plan, facts, [((0, 1), normal)], RestoreWish(layers={0: (4, 5)}))
    assert set(new.extents) == set(plan.extents)
    assert new.resident == ((0, 1, 2, 3, 4, 5), plan.resident[1])
    check_transition(plan, new, facts)


def test_tokens_that_are_to_stay_bring_back_as_many_layers_as_they_leave_room_for() -> None:
    normal, plan, facts = merged()
    undone: Undone = ((0, 1), normal)
    gain = plan_cost(normal, plan, facts).gained_tokens
    assert gain == 2 * 20 * 16
    counts = []
    for tokens in (gain // 2, 1):
        new = partial_plan(plan, facts, [undone], RestoreWish(tokens=tokens))
        check_transition(plan, new, facts)
        assert sum(capacity_tokens(new, f) - capacity_tokens(normal, f) for f in facts) >= tokens
        counts.append(sum(map(len, new.resident)) - 8)
    # Two layers at each of both take what one of them has gained.
    assert counts == [4, 4]
    most = gain // 2
    with pytest.raises(TransientError, match=f"tokens: {most + 1} cannot stay when a layer comes back; at most {most}"):
        partial_plan(plan, facts, [undone], RestoreWish(tokens=most + 1))


def test_what_members_host_stays_in_one_run() -> None:
    normal, plan, facts = merged()
    new = partial_plan(plan, facts, [((0, 1), normal)], RestoreWish(tokens=320))
    assert plan_cost(plan, new, facts).hops == (2, 2)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ({2: (0,)}, r"layers: replica 2 is in none of the groups to restore; accepted: \[0, 1\]"),
        ({0: (0, 9)}, r"layers: \[0, 9\] of replica 0; accepted are those that the last merge dropped there .*\[4, 5"),
        ({0: (-1,)}, r"layers: \[-1\] of replica 0; accepted are"),
    ],
)
def test_nonsense_is_refused(layers: dict[int, tuple[int, ...]], reason: str) -> None:
    normal, plan, facts = merged()
    with pytest.raises(ConfigurationError, match=reason):
        partial_plan(plan, facts, [((0, 1), normal)], RestoreWish(layers=layers))


def test_all_layers_are_a_whole_restore() -> None:
    normal, plan, facts = merged()
    undone: Undone = ((0, 1), normal)
    new = partial_plan(plan, facts, [undone], RestoreWish(layers={0: (4, 5, 6, 7), 1: (0, 1, 2, 3)}))
    assert is_as_before(new, undone)
    check_transition(plan, new, facts)


def test_a_group_does_not_fall_apart_by_half() -> None:
    facts = make_facts(3, 6, free=100)
    normal = normal_plan(facts)
    plan = drop_plan(normal, facts, DropWish(((0, 1, 2),), layers={0: (0, 0, 1, 1, 1, 1), 2: (2, 2, 2, 2, 1, 1)}))
    facts = after(normal, plan, facts)
    facts = tuple(replace(f, free_frames=1000) for f in facts)
    plan = replace(plan, extents=normal.extents)
    with pytest.raises(ConfigurationError, match=r"replicas \[2\] would share nothing with replica 0"):
        partial_plan(plan, facts, [((0, 1, 2), normal)], RestoreWish(layers={2: (4, 5)}))


def test_the_rest_is_restored_by_way_of_the_route_that_the_slots_came_with() -> None:
    normal, plan, facts = merged()
    part = partial_plan(plan, facts, [((0, 1), normal)], RestoreWish(layers={0: (4, 5), 1: (2, 3)}))
    facts = after(plan, part, facts)
    whole = restore_plan(part, normal, (0, 1))
    with pytest.raises(ConfigurationError, match="while they are lent"):
        check_transition(part, whole, facts)
    first = first_step(part, whole)
    assert first.hosts == (part.hosts[0], plan.hosts[1])
    assert (first.resident, first.extents) == (part.resident, part.extents)
    check_transition(part, first, facts)
    whole = replace(whole, epoch=first.epoch + 1)
    check_transition(first, whole, after(part, first, facts))
    assert first_step(plan, restore_plan(plan, normal, (0, 1))) == restore_plan(plan, normal, (0, 1))
    assert kv_loans(whole) == ()


def test_layers_that_came_back_can_be_dropped_again_and_the_merges_come_back_in_order() -> None:
    normal, plan, facts = merged()
    part = partial_plan(plan, facts, [((0, 1), normal)], RestoreWish(layers={0: (4, 5), 1: (2, 3)}))
    facts = after(plan, part, facts)
    again = drop_plan(part, facts, DropWish(PAIR))
    assert sorted(map(len, again.resident)) == [4, 4]
    facts = after(part, again, facts)
    memory = Memory(again, facts)
    for target in (part, normal):
        leg = restore_plan(again, target, (0, 1))
        for step in dict.fromkeys((first_step(again, leg), leg)):
            step = replace(step, epoch=again.epoch + 1)
            check_transition(again, step, facts_after(memory))
            memory.run(again, step, random.Random(3))
            again = step
    assert (again.hosts, again.resident) == (normal.hosts, normal.resident)
