"""KV that changes its home: what moves next, what that takes, and what has to be back before a restore."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.exchange import MovesMade, after_moves, exchange_round, moves_before, remote_kv, why_no_round
from kunserve_sgl.policy.plan import Plan, kv_loans, kv_moves, normal_plan, steps_of
from kunserve_sgl.policy.plan_check import check_transition, frame_balance
from unit.policy.plan_worlds import make_facts

# A layer of the base slots takes 4 frames, and dropping 2 layers frees 20.
FACTS = make_facts(2, 4, granule=1, base=4)
NORMAL = normal_plan(FACTS)


def merged(spare: bool = True) -> tuple[Plan, list[int]]:
    plan = drop_plan(NORMAL, FACTS, DropWish(((0, 1),), leaves_spare=spare))
    return plan, [frame_balance(NORMAL, plan, fact).at_end for fact in FACTS]


def with_free(free: list[int]) -> list:
    return [replace(fact, free_frames=frames) for fact, frames in zip(FACTS, free, strict=True)]


def test_the_drop_leaves_frames_to_begin_with() -> None:
    assert merged(spare=False)[1] == [0, 0]
    plan, free = merged()
    assert min(free) >= 4
    assert len(plan.extents) > 2


def test_where_the_spare_would_take_most_the_drop_is_made_without() -> None:
    facts = make_facts(2, 4, granule=1, base=18)
    plan = drop_plan(normal_plan(facts), facts, DropWish(((0, 1),), leaves_spare=True))
    assert sum(e.granules for e in plan.extents if e.first_granule) == 10


def test_each_home_takes_what_it_has_frames_for() -> None:
    plan, free = merged()
    remote = remote_kv(plan)
    assert {(m.extent.replica, m.layer) for m in remote} == {
        (r, layer) for r in (0, 1) for layer in range(4) if plan.hosts[r][layer] != r
    }
    assert all(m.host == m.target != m.source == m.extent.replica for m in remote)
    new = exchange_round(plan, with_free(free), remote)
    assert new is not None
    made = kv_moves(plan, new)
    assert sorted(m.target for m in made) == [0, 1]
    check_transition(plan, new, with_free(free))
    one = exchange_round(plan, with_free([4, 3]), remote)
    assert one is not None
    assert [m.target for m in kv_moves(plan, one)] == [0]
    assert exchange_round(plan, with_free([3, 3]), remote) is None
    assert [
        f"takes 4 frames at replica {home}, of which 3 are free" in why_no_round(plan, with_free([3, 3]), remote)
        for home in (0, 1)
    ] == [True, True]
    assert why_no_round(plan, with_free([3, 3]), remote, without=[1]) == ""
    assert exchange_round(plan, with_free(free), remote, without=[1]) is None


def test_steps_of_a_move_there_and_back() -> None:
    plan, _ = merged()
    move = next(m for m in remote_kv(plan) if m.target == 1)
    new = after_moves(plan, [move])
    owner, host = steps_of(plan, new, 0), steps_of(plan, new, 1)
    assert owner.moves == host.moves == kv_moves(plan, new)
    assert [p.layers for loan in host.return_kv for p in loan.parts] == [(move.layer,)]
    assert [p.layers for loan in owner.end_kv for p in loan.parts] == [(move.layer,)]
    nothing = ("close", "lend_kv", "borrow_kv", "unmap_kv", "load", "drop", "map_kv", "open", "lend_parameters")
    assert not any(getattr(steps, name) for steps in (owner, host) for name in nothing)
    assert len(kv_loans(new)) == len(kv_loans(plan)) - 1
    back = replace(plan, epoch=new.epoch + 1)
    owner, host = steps_of(new, back, 0), steps_of(new, back, 1)
    assert [p.layers for loan in owner.lend_kv for p in loan.parts] == [(move.layer,)]
    assert [p.layers for loan in host.borrow_kv for p in loan.parts] == [(move.layer,)]
    assert (host.moves[0].source, host.moves[0].target, host.moves[0].host) == (1, 0, 1)
    assert not host.return_kv
    assert not owner.end_kv


def test_what_is_refused() -> None:
    plan, free = merged()
    facts = with_free(free)
    move = next(m for m in remote_kv(plan) if m.target == 1)
    new = after_moves(plan, [move])
    with pytest.raises(TransientError, match=r"replica 1 needs 4 frames for KV that comes home, .*; free: 3"):
        check_transition(plan, new, with_free([9, 3]))
    home = restore_plan(new, NORMAL, (0, 1))
    with pytest.raises(ConfigurationError, match="KV cannot move while layers do"):
        check_transition(new, home, facts)
    assert [(m.layer, m.source, m.target) for m in moves_before(new, home)] == [(move.layer, 1, 0)]
    grown = replace(new, extents=tuple(e for e in new.extents if e.first_granule == 0))
    with pytest.raises(ConfigurationError, match="KV cannot move while slots come or go"):
        check_transition(plan, grown, facts)
    facts = make_facts(3, 4, granule=1, base=4, free=9)
    three = drop_plan(normal_plan(facts), facts, DropWish(((0, 1, 2),), leaves_spare=True))
    stray = next(m for m in remote_kv(three) if m.target == 1)
    wrong = after_moves(three, [replace(stray, target=({0, 1, 2} - {stray.source, 1}).pop())])
    with pytest.raises(ConfigurationError, match="which has neither memory mapped to copy it"):
        check_transition(three, wrong, facts)


def test_the_way_back_is_the_way_that_was_taken() -> None:
    plan, _ = merged()
    first, second = remote_kv(plan)[:2]
    made = MovesMade()
    made.add(replace(plan, epoch=5), [first])
    made.add(replace(plan, epoch=6), [second])
    back = made.last_undone([0, 1])
    assert back == replace(second, source=second.target, target=second.source)
    made.add(replace(plan, epoch=7), [back])
    assert made.last_undone([0, 1]) == replace(first, source=first.target, target=first.source)
    assert made.last_undone([7]) is None
    made.forget([0, 1], since=5)
    assert made.last_undone([0, 1]) is not None
    made.forget([0, 1], since=4)
    assert made.last_undone([0, 1]) is None
