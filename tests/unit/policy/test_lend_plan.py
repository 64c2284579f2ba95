"""KV slots in the memory of another replica, without a drop."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kunserve_sgl.control.transition import members_of
from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, plan_cost, restore_plan
from kunserve_sgl.policy.exchange import remote_kv
from kunserve_sgl.policy.lending import LendWish, lend_plan
from kunserve_sgl.policy.plan import Extent, kv_loans, normal_plan, steps_of
from kunserve_sgl.policy.plan_check import check_transition, frame_balance
from unit.policy.plan_worlds import make_facts

FACTS = make_facts(3, 4, granule=2, base=4, room=20, free=[0, 40, 80])
NORMAL = normal_plan(FACTS)


def test_the_lender_gives_frames_and_no_layer_moves() -> None:
    new = lend_plan(NORMAL, FACTS, LendWish(1, 0, 70))  # 16 slots per granule, of 8 frames
    assert new.extents == (*NORMAL.extents, Extent(0, 4, 5, (1, 1, 1, 1)))
    assert (new.hosts, new.resident) == (NORMAL.hosts, NORMAL.resident)
    assert (new.groups, members_of(NORMAL, new)) == (((0, 1), (2,)), (0, 1))
    assert new.pipelines == ((0,), (1,), (2,))
    assert plan_cost(NORMAL, new, FACTS).gained_tokens_of == (80, 0, 0)
    assert [frame_balance(NORMAL, new, fact).at_end for fact in FACTS] == [0, 0, 80]
    lender, borrower = steps_of(NORMAL, new, 1), steps_of(NORMAL, new, 0)
    assert [part.layers for part in lender.map_lent] == [(0, 1, 2, 3)]
    assert not lender.map_kv
    assert (borrower.map_lent, borrower.map_kv) == ((), ())
    assert [loan.parts for loan in borrower.borrow_kv] == [loan.parts for loan in lender.lend_kv]
    assert len(kv_loans(new)) == 4
    assert remote_kv(new) == ()  # an exchange leaves it where it is


def test_the_way_back_frees_the_frames_when_they_have_been_given_back() -> None:
    new = lend_plan(NORMAL, FACTS, LendWish(1, 0, 80))
    facts = tuple(replace(fact, free_frames=frame_balance(NORMAL, new, fact).at_end) for fact in FACTS)
    back = restore_plan(new, NORMAL, (0, 1))
    check_transition(new, back, facts)
    assert set(back.extents) == set(NORMAL.extents)
    steps = steps_of(new, back, 1)
    assert not steps.unmap_kv
    assert [part.layers for part in steps.unmap_lent] == [(0, 1, 2, 3)]
    assert frame_balance(new, back, facts[1]).at_end == 40


def test_several_may_lend_to_one_and_a_group_that_lends_may_drop() -> None:
    one = lend_plan(NORMAL, FACTS, LendWish(1, 0, 16))
    both = lend_plan(one, _after(NORMAL, one), LendWish(2, 0, 32))
    assert both.extents[-2:] == (Extent(0, 4, 1, (1,) * 4), Extent(0, 5, 2, (2,) * 4))
    facts = _after(one, both, _after(NORMAL, one))
    dropped = drop_plan(both, facts, DropWish(((0, 1, 2),)))
    assert dropped.pipelines == ((0, 1, 2),)
    assert set(both.extents) < set(dropped.extents)


def _after(old, new, facts=FACTS):  # type: ignore[no-untyped-def]
    return tuple(replace(fact, free_frames=frame_balance(old, new, fact).at_end) for fact in facts)


def test_what_is_refused() -> None:
    for wish, reason in (
        (LendWish(3, 0, 1), "from: there is no replica 3; accepted: 0 to 2"),
        (LendWish(0, -1, 1), "to: there is no replica -1; accepted: 0 to 2"),
        (LendWish(1, 1, 1), "from and to are both 1; accepted: two replicas"),
        (LendWish(1, 0, 0), "tokens: 0; accepted: 1 or more"),
        (LendWish(2, 0, 17 * 16), r"replica 0: the address space has room for 20 granules; .*--kunserve-max-slots"),
    ):
        facts = make_facts(3, 4, granule=2, base=4, room=20, free=1000)
        with pytest.raises(ConfigurationError, match=reason):
            lend_plan(NORMAL, facts, wish)
    with pytest.raises(TransientError, match="tokens: 81 take 48 frames, and replica 1 has 40 free; POST /kunserve/kv"):
        lend_plan(NORMAL, FACTS, LendWish(1, 0, 81))
    merged = drop_plan(NORMAL, FACTS, DropWish(((1, 2),)))
    with pytest.raises(TransientError, match=r"replica 1 depends on replicas \[1, 2\], whose layers run elsewhere"):
        lend_plan(merged, FACTS, LendWish(1, 0, 1))
