"""Drop plans: who drops what, what that makes room for, what it costs, and what is refused with which reason."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, plan_cost, restore_plan
from kunserve_sgl.policy.layer_placement import place_layers
from kunserve_sgl.policy.plan import Extent, normal_plan
from kunserve_sgl.policy.plan_check import check_transition, frame_balance
from unit.policy.plan_worlds import make_facts

PAIR = ((0, 1),)


def test_pair_splits_the_layers_in_halves_and_shares_the_gain() -> None:
    facts = make_facts(2, 8)
    old = normal_plan(facts)
    new = drop_plan(old, facts, DropWish(PAIR))
    assert new.epoch == 1
    assert new.hosts == ((0, 0, 0, 0, 1, 1, 1, 1),) * 2
    assert new.resident == ((0, 1, 2, 3), (4, 5, 6, 7))
    # each frees 4 layers of 10 frames, and a granule takes 4 frames at each home: 10 granules in all
    assert new.extents[2:] == (Extent(0, 4, 5, new.hosts[0]), Extent(1, 4, 5, new.hosts[1]))
    cost = plan_cost(old, new, facts)
    assert cost.gained_tokens_of == (5 * 16, 5 * 16)
    assert cost.gained_tokens == 10 * 16
    assert cost.dropped_bytes == 8 * 10 * 4096
    assert cost.loaded_bytes == 0
    assert cost.lent_bytes == 2 * 4 * 4 * 4096  # half of the layers of 4 base granules each
    assert cost.hops == (2, 2)


def test_odd_granule_goes_to_one_member() -> None:
    facts = make_facts(2, 2, granule=4, free=2)
    new = drop_plan(normal_plan(facts), facts, DropWish(PAIR))
    assert [extent.granules for extent in new.extents[2:]] == [2, 1]  # 12 frames each, 4 per granule and home


def test_layers_are_placed_by_bytes() -> None:
    facts = make_facts(2, [60, 10, 10, 10, 10, 20])
    new = drop_plan(normal_plan(facts), facts, DropWish(PAIR))
    assert new.resident == ((0,), (1, 2, 3, 4, 5))


@pytest.mark.parametrize("members", range(1, 7))
def test_every_member_keeps_its_share_in_one_run(members: int) -> None:
    keepers = place_layers([7] * 9, {m: range(9) for m in range(members)})
    runs = sum(here != there for here, there in itertools.pairwise(keepers)) + 1
    assert runs == members
    counts = Counter(keepers).values()
    assert max(counts) - min(counts) <= 1


def test_placement_finds_a_keeper_where_no_runs_exist() -> None:
    keepers = place_layers([1, 1, 1, 1], {0: (0, 2), 1: (1, 3), 2: (0, 1, 2, 3)})
    assert all(layer in {0: (0, 2), 1: (1, 3), 2: (0, 1, 2, 3)}[m] for layer, m in enumerate(keepers))
    assert max(Counter(keepers).values()) == 2


def test_tokens_drop_no_more_layers_than_needed() -> None:
    facts = make_facts(2, 8)
    old = normal_plan(facts)
    dropped, gain_of = [], {}
    for tokens in range(1, 161):
        cost = plan_cost(old, drop_plan(old, facts, DropWish(PAIR, tokens=tokens)), facts)
        dropped.append(cost.dropped_bytes // (10 * 4096))
        gain_of[dropped[-1]] = cost.gained_tokens
    assert dropped == [min(d for d, gain in gain_of.items() if gain >= tokens) for tokens in range(1, 161)]
    assert dropped == sorted(dropped)
    assert dropped[0] == 2  # a single drop gives memory at one home only
    assert dropped[-1] == 8
    with pytest.raises(TransientError, match=r"tokens: 161 cannot be gained by groups \[\[0, 1\]\]; at most 160 now"):
        drop_plan(old, facts, DropWish(PAIR, tokens=161))


def test_partial_drop_leaves_one_run_per_host() -> None:
    facts = make_facts(2, 8)
    new = drop_plan(normal_plan(facts), facts, DropWish(PAIR, tokens=60))
    assert new.hosts == ((0, 0, 0, 0, 0, 0, 1, 1), (0, 0, 1, 1, 1, 1, 1, 1))
    assert new.resident == ((0, 1, 2, 3, 4, 5), (2, 3, 4, 5, 6, 7))


def test_only_one_member_drops_where_the_other_has_free_memory() -> None:
    facts = make_facts(2, 4, free=(12, 0))
    old = normal_plan(facts)
    new = drop_plan(old, facts, DropWish(PAIR, layers={1: (0, 0, 1, 1)}))
    assert new.resident == ((0, 1, 2, 3), (2, 3))
    assert plan_cost(old, new, facts).hops == (0, 2)
    assert [extent.granules for extent in new.extents[2:]] == [2, 2]  # 4 + 2 frames of one granule each, at home 0


def test_no_gain_is_refused_with_the_numbers() -> None:
    facts = make_facts(2, 4)
    with pytest.raises(TransientError) as raised:
        drop_plan(normal_plan(facts), facts, DropWish(PAIR, layers={1: (0, 0, 1, 1)}))
    assert str(raised.value) == (
        "no slots would be gained: replica 0 would have 0 free frames, and a granule of 16 slots takes 4 (of replica "
        "0) or 2 (of replica 1) frames there; replica 1 would have 20 free frames, and a granule of 16 slots takes "
        "0 (of replica 0) or 2 (of replica 1) frames there"
    )
    facts = make_facts(2, 4, base=4, room=4)
    with pytest.raises(TransientError, match="the address space of replica 0 is full: --kunserve-max-slots"):
        drop_plan(normal_plan(facts), facts, DropWish(PAIR))


def test_address_space_limits_the_gain() -> None:
    facts = make_facts(2, 8, base=4, room=6)
    new = drop_plan(normal_plan(facts), facts, DropWish(PAIR))
    assert [extent.granules for extent in new.extents[2:]] == [2, 2]


def test_merged_groups_merge_and_come_back_in_order() -> None:
    facts = make_facts(4, 8)
    normal = normal_plan(facts)
    pairs = drop_plan(normal, facts, DropWish(((0, 1), (2, 3))))
    assert pairs.groups == ((0, 1), (2, 3))
    four = drop_plan(pairs, facts, DropWish(((3, 0, 1, 2),)))
    assert four.groups == ((0, 1, 2, 3),)
    assert sorted(four.resident) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert all(set(after) <= set(before) for after, before in zip(four.resident, pairs.resident, strict=True))
    assert set(pairs.extents) < set(four.extents)
    with pytest.raises(ConfigurationError, match="what was dropped last must be restored first"):
        check_transition(four, restore_plan(four, normal, range(4)), facts)
    back = restore_plan(four, pairs, range(4))
    check_transition(four, back, facts)
    assert (back.hosts, set(back.extents)) == (pairs.hosts, set(pairs.extents))
    half = restore_plan(back, normal, (2, 3))
    assert half.groups == ((0, 1), (2,), (3,))
    assert half.hosts[:2] == pairs.hosts[:2]


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (DropWish(()), "groups: none; accepted: lists of two or more"),
        (DropWish(((0,),)), r"groups: \[0\]; accepted: two or more replicas"),
        (DropWish(((0, 4),)), "groups: there is no replica 4; accepted: 0 to 3"),
        (DropWish(((0, 1), (1, 2))), "groups: replica 1 is named twice"),
        (DropWish(PAIR, layers=(0, 1)), "layers: 2 hosts for replica 0; accepted: 4, one for each layer"),
        (DropWish(PAIR, layers=(0, 0, 1, 2)), r"layers: replica 2 for layer 3 of replica 0; accepted: its group, \[0"),
        (DropWish(PAIR, layers={2: (0, 0, 1, 1)}), r"layers: replica 2 is in none of the groups \[\[0, 1\]\]"),
        (DropWish(((0, 1), (2, 3)), layers=(0, 0, 1, 1)), "layers: a list is for one group"),
        (
            DropWish(PAIR, layers={0: (0, 0, 0, 0)}),
            r"layers: with these hosts, replicas \[1\] share nothing with replica 0",
        ),
    ],
)
def test_nonsense_is_refused(wish: DropWish, reason: str) -> None:
    facts = make_facts(4, 4)
    with pytest.raises(ConfigurationError, match=reason):
        drop_plan(normal_plan(facts), facts, wish)


def test_merged_replicas_are_named_together_and_drop_once() -> None:
    facts = make_facts(3, 4)
    merged = drop_plan(normal_plan(facts), facts, DropWish(PAIR))
    with pytest.raises(ConfigurationError, match=r"groups: replica 1 is merged with \[0\]"):
        drop_plan(merged, facts, DropWish(((1, 2),)))
    with pytest.raises(TransientError, match=r"groups \[\[0, 1\]\] keep each layer once already"):
        drop_plan(merged, facts, DropWish(PAIR))
    with pytest.raises(ConfigurationError, match=r"replica 1 has dropped layer 0 already.*restore first"):
        drop_plan(merged, facts, DropWish(PAIR, layers=(1, 0, 1, 1)))


def test_merging_with_replicas_that_are_on_their_own_uses_the_memory_of_all() -> None:
    """Those that hold a part keep some of it, in an order in which the others' runs fit between."""
    facts = make_facts(4, 4)
    pair = drop_plan(normal_plan(facts), facts, DropWish(((2, 3),)))
    facts = tuple(replace(f, free_frames=frame_balance(normal_plan(facts), pair, f).after_release) for f in facts)
    merged = drop_plan(pair, facts, DropWish(((0, 1, 2, 3),)))
    assert all(merged.resident)
    assert plan_cost(pair, merged, facts).gained_tokens > 0
