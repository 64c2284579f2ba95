"""Drops for what replicas need: who gets the new slots, and how many layers are dropped for it."""

from __future__ import annotations

import random

import pytest

from kunserve_sgl.policy.drop_plan import DropWish, capacity_tokens, drop_plan, plan_cost
from kunserve_sgl.policy.plan import normal_plan
from unit.policy.plan_worlds import Memory, make_facts

PAIR = ((0, 1),)


def gains(replicas: int, needs: dict[int, int], groups: tuple[tuple[int, ...], ...]) -> tuple[list[int], int]:
    """Tokens that each replica gains, and layers that are dropped."""
    facts = make_facts(replicas, 8)
    old = normal_plan(facts)
    new = drop_plan(old, facts, DropWish(groups, needs=needs))
    gained = [capacity_tokens(new, fact) - capacity_tokens(old, fact) for fact in facts]
    return gained, plan_cost(old, new, facts).dropped_bytes // (10 * 4096)


def test_gain_goes_where_it_is_needed() -> None:
    gained, dropped = gains(2, {1: 160}, PAIR)
    assert gained == [0, 160]  # all that a pair can gain, see test_drop_plan
    assert dropped == 8
    gained, dropped = gains(2, {1: 96}, PAIR)
    assert gained[1] >= 96
    assert dropped < 8


def test_what_is_left_over_is_shared_evenly() -> None:
    needed, _ = gains(2, {0: 1, 1: 1}, PAIR)
    assert needed[0] == needed[1]
    nothing, dropped = gains(2, {}, PAIR)
    assert dropped == 2
    assert nothing == needed


def test_more_than_there_is_drops_all_and_shares_in_proportion() -> None:
    gained, dropped = gains(2, {0: 3000, 1: 1000}, PAIR)
    assert dropped == 8
    assert sum(gained) == 160
    assert gained[0] > 2 * gained[1] > 0


@pytest.mark.parametrize("seed", range(60))
def test_random_needs(seed: int) -> None:
    """Every group gains what it needs or drops all it can, and the transition can be carried out."""
    chance = random.Random(seed)
    facts = make_facts(
        4,
        [chance.randrange(5, 30) for _ in range(chance.randrange(2, 9))],
        granule=chance.choice((1, 2)),
        free=chance.choice((0, 0, 7)),
    )
    groups = chance.choice((((0, 1), (2, 3)), ((0, 1, 2, 3),), ((1, 3),)))
    members = [member for group in groups for member in group]
    needs = {member: chance.randrange(0, 400) for member in members if chance.random() < 0.7}
    old = normal_plan(facts)
    whole = drop_plan(old, facts, DropWish(groups))
    new = drop_plan(old, facts, DropWish(groups, needs=needs))
    for group in groups:
        gained = {m: capacity_tokens(new, facts[m]) - capacity_tokens(old, facts[m]) for m in group}
        enough = all(gained[m] >= needs.get(m, 0) for m in group)
        assert enough or [new.resident[m] for m in group] == [whole.resident[m] for m in group]
    memory = Memory(old, facts)
    memory.run(old, new, chance)
    if new.resident == whole.resident:
        spare = facts[0].granule_slots * len(members)
        assert plan_cost(old, new, facts).gained_tokens >= plan_cost(old, whole, facts).gained_tokens - spare
