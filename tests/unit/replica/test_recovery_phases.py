"""Members of a group die at any moment, and the others go back to being replicas by themselves: with real memory and
sockets, as in `test_transition_agent`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transition_world import LAYERS, WAYS, World, one_step_per_boundary, worlds_with_copies

from kunserve_sgl.control.messages import LayerLoan, Lend, Order, Phase, Result
from kunserve_sgl.control.recovery import Recovery
from kunserve_sgl.control.transition import End, Transition
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.lending import LendWish, lend_plan
from kunserve_sgl.policy.plan import Plan
from kunserve_sgl.replica import transition_agent
from waiting import wait_until

MakeWorld = Callable[..., World]


@pytest.fixture(params=WAYS)
def make_world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    one_step_per_boundary(monkeypatch)
    with worlds_with_copies(tmp_path, 3, WAYS[request.param]) as make:
        yield make


def merge(world: World, *group: int) -> Plan:
    return drop_plan(world.plan, world.facts, DropWish((group,)))


def lend_to_the_first(world: World) -> Plan:
    """All others do."""
    plan = world.plan
    for lender in range(1, len(world.ranks)):
        plan = lend_plan(plan, world.facts, LendWish(lender, 0, 8 * lender))
    return plan


def by_replica(world: World) -> dict[tuple[int, int], dict[str, object]]:
    """The states of those who live, without the plan, whose epoch differs."""
    return {
        (rank.replica, rank.rank): {name: value for name, value in rank.state().items() if name != "plan"}
        for rank in world.everybody
    }


def require_as_at_start(world: World, at_start: dict[tuple[int, int], dict[str, object]]) -> None:
    now = by_replica(world)
    assert now == {who: at_start[who] for who in now}


def serve_on(world: World, rng: random.Random) -> None:
    """What is left is a deployment like any other: it drops, serves and restores."""
    alive = sorted({rank.replica for rank in world.everybody})
    world.write_all()
    world.check()
    if len(alive) > 1:
        before = world.plan
        assert world.run(merge(world, *alive), rng).end is End.SUCCEEDED
        assert world.run(restore_plan(world.plan, before, alive), rng).end is End.SUCCEEDED


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lost", range(3))
def test_others_serve_by_themselves_when_a_merged_one_dies(make_world: MakeWorld, lost: int, ranks: int) -> None:
    rng = random.Random(lost)
    world = make_world(3, ranks)
    at_start = by_replica(world)
    world.run(merge(world, 0, 1, 2), rng)
    recovery = world.lose(lost)
    assert recovery is not None
    assert recovery.members == tuple(sorted({0, 1, 2} - {lost}))
    world.recover(recovery, rng)
    assert [rank.engine.abandoned for rank in world.everybody] == [1] * 2 * ranks
    require_as_at_start(world, at_start)
    serve_on(world, rng)
    require_as_at_start(world, at_start)


def test_slots_that_came_and_went_by_hand_before_are_kept(make_world: MakeWorld) -> None:
    """They are the last ones of the base, but ranges of their own."""
    rng = random.Random(1)
    world = make_world(2)
    for rank in world.everybody:
        frames = rank.memory.kv.frames_per_granule
        rank.capacity.resize(-frames)
        rank.capacity.resize(frames)
        assert len(rank.engine.allocator.slot_ranges) == 2
    at_start = by_replica(world)
    world.run(merge(world, 0, 1), rng)
    recovery = world.lose(1)
    assert recovery is not None
    world.recover(recovery, rng)
    require_as_at_start(world, at_start)


@pytest.mark.parametrize("direction", ["drop", "restore", "lend", "take back"])
@pytest.mark.parametrize("way", ["on", "back"])
@pytest.mark.parametrize(
    ("make_world", "seed"),
    [
        *(("mapped", seed) for seed in range(12)),
        *((way, seed) for way in ("by message", "both ways") for seed in range(4)),
    ],
    indirect=["make_world"],
)
def test_a_death_at_any_moment_of_a_transition(make_world: MakeWorld, direction: str, way: str, seed: int) -> None:
    """Also on its way back, and of a second one while the others recover."""
    rng = random.Random(f"{direction} {way} {seed}")
    lends = direction in ("lend", "take back")
    world = make_world(rng.choice([2, 3, 4]), rng.choice([1, 1, 2]), 40 if lends else rng.choice([0, 8]))
    everybody = range(len(world.ranks))
    at_start = by_replica(world)
    before = world.plan
    new = lend_to_the_first(world) if lends else merge(world, *everybody)
    if direction in ("restore", "take back"):
        world.run(new, rng)
        new = restore_plan(world.plan, before, everybody)
    # Counted once, undisturbed, then chosen.
    lost, boundary, fails_at = rng.choice(everybody), rng.randrange(600), rng.randrange(60)
    count = 0
    begun: list[Recovery | None] = []

    def disturb(transition: Transition) -> None:
        nonlocal count
        count += 1
        if way == "back" and count == fails_at and transition.phase in (Phase.PREPARE, Phase.LOAD, Phase.SWITCH):
            world.time_out()
        if count == boundary:
            begun.append(world.lose(lost))

    transition = world.run(new, rng, after_boundary=disturb)
    if not begun:  # it had ended before
        begun.append(world.lose(lost))
    recovery = begun[0]
    second = rng.randrange(60) if len(world.ranks) > 2 else None

    def die_again(recovery: Recovery) -> None:
        nonlocal second
        if second is not None:
            second -= 1
            if second <= 0:
                second = None
                begun.append(world.lose(rng.choice([each for each in everybody if each not in world.dead])))

    while recovery is not None:
        world.recover(recovery, rng, die_again)
        if recovery.has_ended:
            break
        recovery = begun[-1]
    else:
        assert transition.end in (End.ROLLED_BACK, End.SUCCEEDED)
    require_as_at_start(world, at_start)
    serve_on(world, rng)
    require_as_at_start(world, at_start)


def without_other_sources(world: World) -> World:
    for rank in world.everybody:
        rank.memory.sources.clear()
    return world


def sources_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if " comes from " in record.getMessage()]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lost", range(3))
def test_peers_lend_what_the_dead_one_kept_where_there_is_no_other_source(
    make_world: MakeWorld, lost: int, ranks: int
) -> None:
    """Who is in the same group lends what it keeps, and one that is not, and serves on, the rest."""
    rng = random.Random(lost)
    world = without_other_sources(make_world(4, ranks))
    at_start = by_replica(world)
    plan = merge(world, 0, 1, 2)
    world.run(plan, rng)
    recovery = world.lose(lost)
    assert recovery is not None
    world.recover(recovery, rng)
    require_as_at_start(world, at_start)
    only_outside = set(plan.resident[lost]).difference(*(plan.resident[r] for r in {0, 1, 2} - {lost}))
    assert {(loan.owner == 3, layer in only_outside) for loan in world.lent for layer in loan.layers} == {
        (False, False),
        (True, True),
    }
    serve_on(world, rng)
    require_as_at_start(world, at_start)


@pytest.mark.parametrize("seed", range(8))
def test_lenders_and_borrowers_die_at_any_moment(
    make_world: MakeWorld, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as one lives who has not been merged, there is somebody who has every layer. Some have a layer in part
    when they begin again."""
    monkeypatch.setattr(transition_agent, "IDLE_BUDGET_S", 0.0)
    rng = random.Random(f"lenders {seed}")
    world = without_other_sources(make_world(5, rng.choice([1, 2])))
    at_start = by_replica(world)
    world.run(merge(world, 0, 1, 2), rng)
    deaths = [1, rng.choice([3, 4]), rng.choice([0, 2])]
    moments = sorted(rng.randrange(1, 60) for _ in deaths[1:])
    recovery = world.lose(deaths.pop(0))
    count = 0
    begun: list[Recovery] = []

    def die_again(recovery: Recovery) -> None:
        nonlocal count
        count += 1
        if moments and count >= moments[0]:
            moments.pop(0)
            again = world.lose(deaths.pop(0))
            if again is not None:
                begun.append(again)

    assert recovery is not None
    begun.append(recovery)
    while not begun[-1].has_ended:
        world.recover(begun[-1], rng, die_again)
    require_as_at_start(world, at_start)
    serve_on(world, rng)


@pytest.mark.parametrize("has_copy", [True, False])
def test_who_does_not_lend_in_time_is_passed_over(
    make_world: MakeWorld, has_copy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(1)
    world = make_world(3)
    at_start = by_replica(world)
    if not has_copy:
        without_other_sources(world)
    world.lend_s = 0.0
    world.deaf.add(2)
    world.run(merge(world, 0, 1), rng)
    recovery = world.lose(1)
    assert recovery is not None
    assert recovery.phase is Phase.ABANDON
    if has_copy:
        world.recover(recovery, rng)
        assert world.lent
        assert "are not lent in time" in caplog.text
        require_as_at_start(world, at_start)
        return
    while not recovery.failed:
        world.boundary(0, is_serving=False)
    assert "cannot be restored: no peer lends it, and there is no other source" in recovery.failed[0]


def test_bytes_that_a_lender_has_spoiled_come_from_elsewhere(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(1)
    world = make_world(3)
    at_start = by_replica(world)
    world.run(merge(world, 0, 1), rng)
    spoiled = next(layer for layer in range(LAYERS) if layer not in world.plan.resident[0])
    with torch.no_grad():
        world.ranks[2][0].model.layers[spoiled].weight[0, 0] += 1
    recovery = world.lose(1)
    assert recovery is not None
    with caplog.at_level("INFO"):
        world.recover(recovery, rng)
    assert f"layer {spoiled} does not come from parameters of layer {spoiled} at replica 2" in caplog.text
    assert sources_in(caplog) == [f"KunServe: layer {spoiled} comes from a copy"]
    world.ranks[0][0].parameters.verify(spoiled)
    require_as_at_start(world, at_start)


def test_a_lender_that_is_told_of_layers_that_it_lacks_lends_the_others(make_world: MakeWorld) -> None:
    world = make_world(3)
    rank = world.ranks[0][0]
    rank.parameters.drop(1)
    before = rank.pool.snapshot()
    rank.aside.on_lend(Lend(7, (LayerLoan(2, 0, (0, 1, 2)),)))
    rank.aside.advance(is_serving=True)
    assert rank.aside.is_busy  # one at a time, while requests run
    rank.aside.advance(is_serving=False)
    assert not rank.aside.is_busy
    assert rank.pool.snapshot() != before
    borrower = world.ranks[2][0].loans
    borrower.expect_layers([0])
    received: list[int | None] = []

    def is_there() -> bool:
        received.append(borrower.receive_layer(7))
        return received[-1] is not None

    wait_until(is_there, "the offer has come")  # by message it takes a moment
    assert received[-1] == 0
    assert borrower.receive_layer(7) is None  # what is not expected is dropped
    region = borrower.take_region(0)
    assert region is not None
    region.close()
    rank.aside.on_lend(Lend(7, ()))
    assert rank.pool.snapshot() == before


def test_a_rank_without_a_source_says_so(make_world: MakeWorld) -> None:
    rng = random.Random(3)
    world = make_world(2)
    world.run(merge(world, 0, 1), rng)
    world.ranks[0][0].memory.sources.clear()
    recovery = world.lose(1)
    assert recovery is not None
    while not recovery.failed:
        world.boundary(0, is_serving=False)
    assert recovery.phase is Phase.RELOAD
    assert recovery.failed.keys() == {0}
    assert "cannot be restored: no peer lends it, and there is no other source" in recovery.failed[0]


def test_who_does_not_answer_has_failed(make_world: MakeWorld) -> None:
    rng = random.Random(3)
    world = make_world(3)
    world.run(merge(world, 0, 1, 2), rng)
    recovery = world.lose(1)
    assert recovery is not None
    world.boundary(0, is_serving=False)
    recovery.on_time()
    assert not recovery.failed
    world.time_out()
    assert recovery.failed == {2: "replica 2 rank 0 did not abandon within 30 s"}


def test_orders_that_do_not_fit_a_recovery(make_world: MakeWorld) -> None:
    rng = random.Random(3)
    world = make_world(2)
    world.run(merge(world, 0, 1), rng)
    recovery = world.lose(1)
    assert recovery is not None
    rank = world.ranks[0][0]
    world.boundary(0, is_serving=False)
    order = Order(recovery.number, Phase.REVIVE, world.plan.epoch - 1, world.plan, 1.0)
    assert rank.agent.why_unexpected(order) == "revive does not come after abandon"
    late = Order(recovery.number - 1, Phase.RELEASE, world.plan.epoch - 2, world.plan, 1.0)
    rank.agent.on_order(late)
    assert rank.replies.pop().result is Result.STALE
    assert rank.agent.stands
