"""Random drops and restores: at every moment of every transition, all memory that a batch may touch is there."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import astuple, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sgl.control.transition import members_of
from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import drop_plan, plan_cost, restore_plan
from kunserve_sgl.policy.exchange import MovesMade, after_moves, exchange_round, moves_before, remote_kv
from kunserve_sgl.policy.lending import LendWish, lend_plan
from kunserve_sgl.policy.partial_restore import is_as_before, partial_plan
from kunserve_sgl.policy.plan import Extent, Plan, ReplicaFacts, kv_moves, normal_plan, steps_of
from kunserve_sgl.policy.plan_check import check_plan, check_transition, frame_balance
from unit.policy.plan_worlds import (
    Memory,
    facts_after,
    last_merges,
    make_facts,
    random_restore,
    random_wish,
    way_to,
)

Seed = st.integers(0, 2**32 - 1)


def random_facts(rng: random.Random) -> tuple[ReplicaFacts, ...]:
    layers = rng.randint(2, 9)
    return make_facts(
        rng.randint(2, 6),
        [rng.randint(1, 30) for _ in range(layers)],
        granule=[rng.randint(1, 3)] * layers if rng.random() < 0.7 else [rng.randint(1, 3) for _ in range(layers)],
        base=rng.randint(1, 9),
        room=rng.choice([12, 1000]),
        free=[rng.choice([0, 0, rng.randint(0, 40)]) for _ in range(6)],
    )


@settings(max_examples=300, deadline=None)
@given(Seed)
def test_memory_is_there_at_every_moment(seed: int) -> None:
    rng = random.Random(seed)
    facts = random_facts(rng)
    plan = normal_plan(facts)
    start = [fact.free_frames for fact in facts]
    made = MovesMade()
    history: list[tuple[tuple[int, ...], Plan]] = []
    for _ in range(rng.randint(1, 6)):
        if history and rng.random() < 0.5:
            place = rng.choice(last_merges(history))
            members, before = history[place]
            plan, facts = bring_home(plan, restore_plan(plan, before, members), facts, made, members, rng)
            made.forget(members, before.epoch)
            if rng.random() < 0.5:
                target = restore_plan(plan, before, members)
            else:
                try:
                    target = partial_plan(plan, facts, [history[place]], random_restore(rng, plan, history[place]))
                except (ConfigurationError, TransientError):
                    continue
            if is_as_before(target, history[place]):
                del history[place]
            *detour, new = way_to(plan, target)
            for first in detour:
                facts = step(plan, first, facts, rng)
                plan = first
        elif rng.random() < 0.3:
            lender, borrower = rng.sample(range(plan.replica_count), 2)
            try:
                new = lend_plan(plan, facts, LendWish(lender, borrower, rng.randint(1, 100)))
            except (ConfigurationError, TransientError):
                continue
            history.append((new.group_of(borrower), plan))
        else:
            wish = random_wish(rng, plan)
            try:
                new = drop_plan(plan, facts, wish)
            except (ConfigurationError, TransientError):
                continue
            history += [(tuple(group), plan) for group in wish.groups]
            assert plan_cost(plan, new, facts).gained_tokens >= max(1, wish.tokens or 0)
        facts = step(plan, new, facts, rng)
        plan = new
        for _ in range(rng.choice([0, 0, 1, 3, 100])):
            moves = list(remote_kv(plan))
            rng.shuffle(moves)
            moved = exchange_round(plan, facts, moves)
            if moved is None:
                break
            made.add(moved, kv_moves(plan, moved))
            facts, plan = step(plan, moved, facts, rng), moved
    for members, before in reversed(history):
        target = restore_plan(plan, before, members)
        plan, facts = bring_home(plan, target, facts, made, members, rng)
        made.forget(members, before.epoch)
        for new in way_to(plan, replace(target, epoch=plan.epoch + 1)):
            facts = step(plan, new, facts, rng)
            plan = new
    normal = normal_plan(facts)
    assert (plan.hosts, plan.resident, set(plan.extents)) == (normal.hosts, normal.resident, set(normal.extents))
    assert [fact.free_frames for fact in facts] == start


def bring_home(
    plan: Plan,
    new: Plan,
    facts: tuple[ReplicaFacts, ...],
    made: MovesMade,
    members: Collection[int],
    rng: random.Random,
) -> tuple[Plan, tuple[ReplicaFacts, ...]]:
    """All KV that has to be elsewhere before `new`: in any order, and back over the way that was taken where that does
    not go on."""
    goes_back = False
    while moves := list(moves_before(plan, new)):
        rng.shuffle(moves)
        moved = None if goes_back else exchange_round(plan, facts, moves)
        if moved is None:
            goes_back = True
            last = made.last_undone(members)
            assert last is not None
            moved = after_moves(plan, [last])
        made.add(moved, kv_moves(plan, moved))
        facts, plan = step(plan, moved, facts, rng), moved
    return plan, facts


def step(old: Plan, new: Plan, facts: tuple[ReplicaFacts, ...], rng: random.Random) -> tuple[ReplicaFacts, ...]:
    check_plan(new, facts)
    check_transition(old, new, facts)
    for outsider in set(range(new.replica_count)) - set(members_of(old, new)):
        assert not any(astuple(steps_of(old, new, outsider))), "nobody would tell it"
    memory = Memory(old, facts)
    memory.run(old, new, rng)
    assert memory.free == [frame_balance(old, new, fact).at_end for fact in facts]
    # what is left is what a server would find that had started with the new plan
    expected = Memory(new, facts_after(memory))
    assert (memory.home, memory.borrowed, memory.resident) == (expected.home, expected.borrowed, expected.resident)
    assert [+lent for lent in memory.lent] == [+lent for lent in expected.lent]
    assert memory.open == expected.open
    return facts_after(memory)


@settings(max_examples=300, deadline=None)
@given(Seed)
def test_whatever_passes_the_check_works(seed: int) -> None:
    """Plans that no planner made: random hosts, residents and extents on both sides."""
    rng = random.Random(seed)
    facts = make_facts(rng.randint(2, 4), [rng.randint(1, 5) for _ in range(3)], base=2, free=rng.randint(0, 30))
    old, new = random_plan(rng, facts, 1), random_plan(rng, facts, 2)
    if rng.random() < 0.5:
        old = replace(old, extents=with_random_homes(rng, old, 0.2))
        new = replace(old, epoch=2, extents=with_random_homes(rng, old, 0.1))
    try:
        check_plan(old, facts)
        check_transition(old, new, facts)
    except (ConfigurationError, TransientError):
        return
    step(old, new, facts, rng)


def with_random_homes(rng: random.Random, plan: Plan, share: float) -> tuple[Extent, ...]:
    def home(now: int) -> int:
        return rng.randrange(plan.replica_count) if rng.random() < share else now

    return tuple(replace(extent, homes=tuple(map(home, extent.homes))) for extent in plan.extents)


def random_plan(rng: random.Random, facts: tuple[ReplicaFacts, ...], epoch: int) -> Plan:
    replicas, layers = len(facts), facts[0].layer_count
    normal = normal_plan(facts, epoch)
    hosts = tuple(
        tuple(rng.randrange(replicas) if rng.random() < 0.3 else r for _ in range(layers)) for r in range(replicas)
    )
    resident = tuple(
        tuple(i for i in range(layers) if rng.random() < 0.6 or any(row[i] == r for row in hosts))
        for r in range(replicas)
    )
    added = tuple(
        Extent(r, 2, rng.randint(1, 2), hosts[r] if rng.random() < 0.8 else (r,) * layers)
        for r in range(replicas)
        if rng.random() < 0.5
    )
    return Plan(epoch, hosts, resident, normal.extents + added)
