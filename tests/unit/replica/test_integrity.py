"""A check finds nothing while all is well, in any plan, and each thing that can differ when it does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transition_world import Rank, World, one_step_per_boundary

from kunserve_sgl.control.transition import End
from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.plan import Plan
from kunserve_sgl.replica.integrity import Findings, Held, IntegrityCheck, joined


@pytest.fixture
def parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    one_step_per_boundary(monkeypatch)
    world = World(tmp_path, 3)
    yield world
    world.close()


@pytest.fixture
def normal(parted: World) -> Plan:
    return parted.plan


@pytest.fixture(params=["normal", "merged"])
def world(request: pytest.FixtureRequest, parted: World, normal: Plan) -> World:
    if request.param == "merged":
        assert parted.run(following(parted, normal), random.Random(3)).end is End.SUCCEEDED
    return parted


def following(world: World, normal: Plan) -> Plan:
    if world.plan == normal:
        return drop_plan(world.plan, world.facts, DropWish(((0, 1),)))
    return restore_plan(world.plan, normal, (0, 1))


def check_of(rank: Rank) -> IntegrityCheck:
    return IntegrityCheck(rank.memory, rank.engine, Held(rank.plan, rank.loans, lambda: rank.agent.is_busy))


def differences(rank: Rank) -> list[str]:
    check, told, given_up = check_of(rank), [], []
    check.begin(told.append, given_up.append)
    boundaries = 0
    while check.is_busy:
        check.advance()
        boundaries += 1
    assert boundaries > rank.memory.layer_count  # never more than a layer in one go
    assert not given_up
    (found,) = told
    return list(found)


def spoil_parameters(rank: Rank) -> str:
    layer = rank.plan.agreed.resident[rank.replica][-1]  # type: ignore[union-attr]
    with torch.no_grad():
        rank.model.layers[layer].weight.view(-1)[5] += 1
    return f"layer {layer} in memory has checksum"


def lose_parameters(rank: Rank) -> str:
    layer = rank.plan.agreed.resident[rank.replica][0]  # type: ignore[union-attr]
    rank.memory.drop_layer(layer)
    return f"layer {layer} is dropped; by the plan it is resident"


def lose_a_frame(rank: Rank) -> str:
    rank.pool.vmm.create_frames(1)
    return "frames exist"


def open_foreign_slots(rank: Rank) -> str:
    own = rank.allocator.slot_ranges[-1]
    rank.allocator.add_slots(type(own)(own.stop + 10 * own.count, 1))
    return "which are not all the replica's"


def forget_the_capacity(rank: Rank) -> str:
    rank.allocator.size += 1
    return f"the capacity is {rank.allocator.size}"


def resize_behind_the_plan(rank: Rank) -> str:
    granules = rank.kv.granules
    rank.kv._granules -= 1
    return f"the KV cache has {granules - 1} granules; by the plan it has {granules}"


def map_what_nobody_wants(rank: Rank) -> str:
    other = (rank.replica + 1) % 3
    slots = rank.kv.space.slots_of(other, rank.kv.space.replica_granules - 1, 1)
    rank.kv.map_hosted(slots, [1])
    return "kv/1/k: nobody wants the memory at"


def confuse_requests(rank: Rank) -> str:
    rank.engine.wrong_slots = ["page 7 is nobody's"]
    return "page 7 is nobody's"


SPOILING = (
    *(spoil_parameters, lose_parameters, lose_a_frame, open_foreign_slots, forget_the_capacity),
    *(resize_behind_the_plan, map_what_nobody_wants, confuse_requests),
)


def test_nothing_differs(world: World) -> None:
    assert [differences(rank) for rank in world.everybody] == [[], [], []]


@pytest.mark.parametrize("spoil", SPOILING, ids=lambda spoil: str(spoil.__name__))
def test_what_differs_is_found(world: World, spoil: Callable[[Rank], str]) -> None:
    rank = world.ranks[1][0]
    expected = spoil(rank)
    assert any(expected in found for found in differences(rank)), differences(rank)
    assert differences(world.ranks[2][0]) == []


def test_a_plan_that_is_on_its_way_is_waited_for(world: World) -> None:
    rank, plan = world.ranks[2][0], world.plan
    rank.memory.frames.add_frames(2 * rank.kv.frames_per_granule)
    added = rank.kv.grow(1)
    rank.allocator.add_slots(added)
    check, told = check_of(rank), []
    check.begin(told.append, lambda reason: None)
    for _ in range(100):
        check.advance()
    extents = tuple(replace(e, granules=e.granules + 1) if e.replica == 2 else e for e in plan.extents)
    rank.plan.enter(replace(plan, epoch=plan.epoch + 1, extents=extents))
    while check.is_busy:
        check.advance()
    assert told == [[]]


@pytest.mark.parametrize("books", ["_lent", "_borrowed"])
def test_a_loan_that_is_not_booked_is_found(world: World, books: str) -> None:
    for rank in (rank for rank in world.everybody if getattr(rank.loans, books)):
        (other, replica, _, layer), loan = getattr(rank.loans, books).popitem()
        found = differences(rank)
        word = {"_lent": "is not lent to", "_borrowed": "is not borrowed from"}[books]
        assert any(f"of replica {replica}" in each and f"{word} replica {other}" in each for each in found)
        getattr(rank.loans, books)[other, replica, 77, layer] = loan
        assert any("granule 77" in each and "against the plan" in each for each in differences(rank))


def test_memory_that_is_missing_behind_new_slots_is_found(world: World) -> None:
    rank = world.ranks[0][0]
    extents = world.plan.extents_of(0)
    if len(extents) > 1:
        layer = extents[1].homes.index(0)
        rank.kv.unmap_hosted(rank.memory.slots(extents[1]), [layer])
        assert any(f"kv/{layer}/k: there is no memory at" in each for each in differences(rank))
        rank.allocator.remove_slots(rank.memory.slots(extents[1]))
        assert any("no request may have all of them" in each for each in differences(rank))


def test_nothing_differs_after_a_transition(world: World, normal: Plan) -> None:
    assert world.run(following(world, normal), random.Random(1)).end is End.SUCCEEDED
    assert [differences(rank) for rank in world.everybody] == [[], [], []]


def test_a_rank_whose_transition_is_over_begins_no_check_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = world.ranks[0][0]
    check = check_of(rank)
    monkeypatch.setattr(check._engine, "all_ranks", lambda _: False)
    with pytest.raises(TransientError, match="a transition is under way"):
        check.begin(lambda found: None, lambda reason: None)
    assert not check.is_busy


def test_a_transition_comes_first(world: World, normal: Plan) -> None:
    rank = world.ranks[0][0]
    check = check_of(rank)
    given_up: list[str] = []
    check.begin(lambda found: pytest.fail(str(found)), given_up.append)
    with pytest.raises(TransientError, match="another check is under way"):
        check.begin(lambda found: None, lambda reason: None)
    check.advance()
    world.begin(following(world, normal))
    world.boundary(0, is_serving=True)
    check.advance()
    assert given_up == ["a transition has begun"]
    assert not check.is_busy
    with pytest.raises(TransientError, match="a transition is under way"):
        check.begin(lambda found: None, lambda reason: None)


def test_ranks_that_differ_are_named() -> None:
    first = Findings((), {"requests": "[a]", "slots": "10"})
    second = Findings(("page 3 is nobody's",), {"requests": "[b]", "slots": "10"})
    assert joined([first]) == []
    assert joined([first, second]) == [
        "rank 1: page 3 is nobody's",
        "rank 1: requests: [b]; at rank 0: [a]",
    ]
