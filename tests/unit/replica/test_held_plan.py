"""What follows from the plan that a rank holds, in each moment of a transition."""

from __future__ import annotations

from dataclasses import replace

from kunserve_sgl.policy.plan import Plan, Segment
from kunserve_sgl.replica.held_plan import HeldPlan

HOME = Plan(1, ((0, 0, 0), (1, 1, 1)), ((0, 1, 2), (0, 1, 2)), ())
MERGED = Plan(2, ((0, 1, 1), (0, 1, 1)), ((0,), (1, 2)), ())


def test_before_the_first_plan_everything_runs_at_home() -> None:
    held = HeldPlan(1, 3)
    assert held.agreed is None
    assert held.route == (Segment(1, 0, 3),)
    assert not held.is_pipelined
    assert not held.serves
    assert (held.layers_here(1), held.layers_here(0)) == ([0, 1, 2], [])


def test_a_drop_from_its_begin_to_its_end() -> None:
    """Others may send from the begin on, by either plan; own batches change over later."""
    held = HeldPlan(0, 3)
    held.enter(HOME)
    assert (held.agreed, held.epoch, held.serves) == (HOME, 1, False)
    held.begin(MERGED)
    assert (held.agreed, held.serves, held.is_pipelined) == (HOME, True, False)
    held.route_by(MERGED)
    assert held.route == (Segment(0, 0, 1), Segment(1, 1, 3))
    assert (held.epoch, held.is_pipelined) == (2, True)
    assert held.layers_here(0) == held.layers_here(1) == [0]
    held.settle(MERGED)
    assert (held.agreed, held.serves) == (HOME, True)
    held.end(MERGED)
    assert (held.agreed, held.serves) == (MERGED, True)


def test_a_restore_serves_until_all_have_changed_over() -> None:
    held = HeldPlan(0, 3)
    held.enter(MERGED)
    held.begin(HOME)
    held.route_by(HOME)
    assert (held.serves, held.is_pipelined) == (True, False)
    held.settle(HOME)
    assert not held.serves


def test_a_drop_that_failed_leaves_nothing() -> None:
    held = HeldPlan(0, 3)
    held.enter(HOME)
    held.begin(MERGED)
    held.route_by(MERGED)
    held.route_by(HOME)
    assert held.serves, "others may not have gone back yet"
    held.settle(HOME)
    held.end(HOME)
    assert (held.agreed, held.serves, held.route) == (HOME, False, (Segment(0, 0, 3),))


def test_after_a_recovery_nothing_comes_by_an_earlier_plan() -> None:
    held = HeldPlan(0, 3)
    held.enter(MERGED)
    assert held.least_epoch == 0, "others may not have heard of it"
    held.stand()
    assert (held.least_epoch, held.takes_orders) == (0, True), "it is taken in, and dropped"
    held.enter(replace(HOME, epoch=5))
    assert (held.least_epoch, held.takes_orders) == (5, False)
    held.enter(replace(HOME, epoch=6))
    assert held.least_epoch == 5
