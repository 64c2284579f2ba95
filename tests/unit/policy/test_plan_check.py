"""What the checks of plans and transitions refuse, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.plan import Extent, Plan, normal_plan
from kunserve_sgl.policy.plan_check import check_facts, check_plan, check_transition, frame_balance
from unit.policy.plan_worlds import make_facts

FACTS = make_facts(2, 4)
NORMAL = normal_plan(FACTS)
MERGED = drop_plan(NORMAL, FACTS, DropWish(((0, 1),)))


def test_good_plans_pass() -> None:
    check_plan(NORMAL, FACTS)
    check_plan(MERGED, FACTS)
    check_transition(NORMAL, MERGED, FACTS)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (replace(NORMAL, hosts=NORMAL.hosts[:1]), "for 1 replicas; there are 2"),
        (replace(NORMAL, hosts=((0, 0), (1, 1))), "hosts of replica 0: 2; accepted: one for each of 4 layers"),
        (replace(NORMAL, hosts=((0, 0, 0, 2), NORMAL.hosts[1])), "layer 3 has no host for replica 0: there is no repl"),
        (replace(MERGED, hosts=((1, 0, 1, 1), MERGED.hosts[1])), "layer 0 has no host for replica 0: replica 1 does"),
        (replace(NORMAL, resident=((0, 1, 3, 2), NORMAL.resident[1])), "resident layers of replica 0"),
        (replace(NORMAL, extents=NORMAL.extents[:1]), "replica 1 would have no KV slots"),
        (replace(NORMAL, extents=(*NORMAL.extents, Extent(0, 3, 2, (0,) * 4))), "extents of replica 0 overlap"),
        (replace(NORMAL, extents=(*NORMAL.extents, Extent(0, 999, 2, (0,) * 4))), "room for 1000 granules"),
        (replace(NORMAL, extents=(*NORMAL.extents, Extent(0, 9, 0, (0,) * 4))), "is empty"),
        (replace(NORMAL, extents=(*NORMAL.extents, Extent(2, 9, 1, (0,) * 4))), "there is no replica 2"),
        (replace(NORMAL, extents=(*NORMAL.extents, Extent(0, 9, 1, (0, 0, 0, 7)))), "has homes"),
    ],
)
def test_impossible_plans(plan: Plan, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        check_plan(plan, FACTS)


def test_replicas_must_be_alike() -> None:
    with pytest.raises(ConfigurationError, match=r"replicas differ in granule_slots: \[16, 32\]"):
        check_facts((FACTS[0], replace(FACTS[1], granule_slots=32)))
    with pytest.raises(ConfigurationError, match=r"facts of replicas \[1, 0\]"):
        check_facts(FACTS[::-1])
    check_facts((FACTS[0], replace(FACTS[1], free_frames=3, base_granules=1)))


def after_merge(change: Callable[[Plan], Plan]) -> Plan:
    return change(restore_plan(MERGED, NORMAL, (0, 1)))


@pytest.mark.parametrize(
    ("old", "new", "error", "reason"),
    [
        (MERGED, NORMAL, ConfigurationError, "epoch 0 does not follow epoch 1"),
        (NORMAL, replace(MERGED, extents=(*NORMAL.extents, Extent(0, 4, 1, (0,) * 4))), TransientError,
         "replica 0 needs 2 frames for KV that comes home, or that others borrow; free: 0"),
        (NORMAL, replace(NORMAL, epoch=1, extents=(Extent(0, 4, 1, (0,) * 4), NORMAL.extents[1])), ConfigurationError,
         "the base slots of replica 0 must stay"),
        (NORMAL, replace(NORMAL, epoch=1, extents=(*NORMAL.extents, Extent(0, 4, 1, (0,) * 4))), TransientError,
         "replica 0 needs 4 frames for new slots; free: 0, and 0 behind the parameters that it drops"),
        (MERGED, after_merge(lambda plan: replace(plan, extents=MERGED.extents)), TransientError,
         "replica 0 needs 20 frames for the parameters that come back; free: 0, and 0 behind the slots"),
        (MERGED, replace(MERGED, epoch=2, hosts=((1, 1, 0, 0),) * 2, resident=((2, 3), (0, 1))), ConfigurationError,
         "replica 0 would need the parameters of layer 2, which no member keeps throughout"),
    ],
)  # fmt: skip
def test_impossible_transitions(old: Plan, new: Plan, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        check_transition(old, new, FACTS)


def test_balance_counts_what_comes_and_goes() -> None:
    there = frame_balance(NORMAL, MERGED, FACTS[0])
    assert (there.free, there.unmapped, there.loaded, there.dropped, there.mapped) == (0, 0, 0, 20, 20)
    back = frame_balance(MERGED, restore_plan(MERGED, NORMAL, (0, 1)), replace(FACTS[0], free_frames=1))
    assert (back.unmapped, back.loaded, back.dropped, back.mapped, back.after_release) == (20, 20, 0, 0, 1)
