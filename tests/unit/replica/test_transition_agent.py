"""Whole transitions over real memory and sockets: batches find parameters and KV at every moment, and after a failure
everything is as before."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from transition_world import BASE_GRANULES, LAYERS, MAX_SLOTS, PHASES_WITH_A_WAY_BACK, World, one_step_per_boundary

from kunserve_sgl.control.messages import Order, Phase, Result
from kunserve_sgl.control.transition import End, Transition
from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.memory.virtual_range import LayerSpan, Span
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.lending import LendWish, lend_plan
from kunserve_sgl.policy.partial_restore import is_as_before, partial_plan
from kunserve_sgl.policy.plan import Plan, normal_plan, steps_of
from kunserve_sgl.policy.plan_check import check_transition
from kunserve_sgl.replica.frame_channel import FrameChannel
from unit.policy.plan_worlds import last_merges, random_restore, random_wish, way_to

MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    one_step_per_boundary(monkeypatch)
    worlds: list[World] = []

    def make(replicas: int = 2, ranks: int = 1, reserve_frames: int = 8) -> World:
        directory = tmp_path / str(len(worlds))
        directory.mkdir()
        worlds.append(World(directory, replicas, ranks, reserve_frames))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def merge(world: World, *groups: tuple[int, ...]) -> Plan:
    return drop_plan(world.plan, world.facts, DropWish(groups or (tuple(range(len(world.ranks))),)))


def lend(world: World) -> Plan:
    """In the memory of each of two others."""
    one = lend_plan(world.plan, world.facts, LendWish(1, 0, 20))
    return lend_plan(one, world.facts, LendWish(2, 0, 8))


def restore(world: World, before: Plan) -> Plan:
    return restore_plan(world.plan, before, range(len(world.ranks)))


def without_epoch(states: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{name: value for name, value in state.items() if name != "plan"} for state in states]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_random_drops_and_restores(make_world: MakeWorld, seed: int, ranks: int) -> None:
    rng = random.Random(seed)
    world = make_world(rng.randint(2, 4), ranks, reserve_frames=rng.choice([0, 8, 40]))
    at_start = world.states()
    history: list[tuple[tuple[int, ...], Plan]] = []
    transitions = 0
    while transitions < 4 or history:
        way: list[Plan] = []
        if history and (transitions >= 4 or rng.random() < 0.5):
            place = rng.choice(last_merges(history))
            members, before = history[place]
            new = restore_plan(world.plan, before, members)
            if rng.random() < 0.4:
                with contextlib.suppress(ConfigurationError, TransientError):
                    wish = random_restore(rng, world.plan, history[place])
                    new = partial_plan(world.plan, world.facts, [history[place]], wish)
            if is_as_before(new, history[place]):
                del history[place]
            *way, new = way_to(world.plan, new)
        elif rng.random() < 0.3:
            lender, borrower = rng.sample(range(len(world.ranks)), 2)
            try:
                new = lend_plan(world.plan, world.facts, LendWish(lender, borrower, rng.randint(1, 20)))
            except (ConfigurationError, TransientError):
                continue
            transitions += 1
            history.append((new.group_of(borrower), world.plan))
        else:
            wish = random_wish(rng, world.plan)
            transitions += 1
            try:
                new = drop_plan(world.plan, world.facts, wish)
            except (ConfigurationError, TransientError):
                continue
            history += [(tuple(group), world.plan) for group in wish.groups]
        for plan in (*way, new):
            check_transition(world.plan, plan, world.facts)
            assert world.run(plan, rng, is_serving=rng.random() < 0.7).end is End.SUCCEEDED
            assert not any(rank.agent.is_busy for rank in world.everybody)
    assert without_epoch(world.states()) == without_epoch(at_start)
    assert world.number >= 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", PHASES_WITH_A_WAY_BACK)
@pytest.mark.parametrize("direction", ["drop", "restore", "lend", "take back"])
def test_a_deadline_at_any_moment_leads_back(make_world: MakeWorld, phase: Phase, direction: str, ranks: int) -> None:
    """Fails after 0, 1, 2, 3, 4, 7 ... boundaries of the phase, until it ends earlier: then the transition works."""
    rng = random.Random(phase.value + direction)
    world = make_world(3, ranks, reserve_frames=40)
    before = world.plan
    begin = merge if direction in ("drop", "restore") else lend
    if direction in ("restore", "take back"):
        assert world.run(begin(world), rng).end is End.SUCCEEDED
    at_start = world.states()
    failed_after = 0
    while True:
        new = begin(world) if direction in ("drop", "lend") else restore(world, before)
        boundaries = iter(range(failed_after + 1))

        def fail(transition: Transition, boundaries: Iterator[int] = boundaries, last: int = failed_after) -> None:
            if transition.phase is phase and next(boundaries, None) == last:
                world.time_out()

        transition = world.run(new, rng, after_boundary=fail)
        if transition.end is End.SUCCEEDED:
            break
        assert transition.end is End.ROLLED_BACK
        assert world.states() == at_start, f"after {failed_after} boundaries of {phase}"
        failed_after += 1 if failed_after < 4 else 3
    if phase is Phase.PREPARE or (direction in ("drop", "restore") and (phase, direction) != (Phase.LOAD, "drop")):
        assert failed_after > 2  # a drop loads nothing, and where memory is lent only, nothing moves
    assert [rank.plan.routed == world.plan for rank in world.everybody] == [True] * 3 * ranks


def test_what_keeps_a_layer_is_found_while_there_is_a_way_back(make_world: MakeWorld) -> None:
    rng = random.Random(4)
    world = make_world(2)
    at_start = world.states()
    new = merge(world)
    dropped = steps_of(world.plan, new, 1).drop[0]
    held = world.ranks[1][0].model.layers[dropped].weight.data[:2]
    transition = world.run(new, rng)
    assert transition.end is End.ROLLED_BACK
    assert f"layer {dropped}: the memory of weight is held" in transition.reason
    assert world.states() == at_start
    del held
    before = world.plan
    world.ranks[1][0].model.layers[dropped].cache = world.ranks[1][0].model.layers[dropped].weight.data
    assert world.run(merge(world), rng).end is End.SUCCEEDED
    assert world.run(restore(world, before), rng).end is End.SUCCEEDED


def test_kv_that_moves_to_another_host_stays_and_goes_both_ways(make_world: MakeWorld) -> None:
    rng = random.Random(1)
    world = make_world()
    normal, start = world.plan, dict(world.content)
    world.run(merge(world), rng)
    base = normal.extents_of(0)[0]
    layer = next(i for i, host in enumerate(world.plan.hosts[0]) if host == 1)
    owner, host = world.ranks[0][0], world.ranks[1][0]
    slots = owner.memory.slots(base)
    for written, read in ((host, owner), (owner, host)):
        world.stamp += 1
        written.write(layer, slots, world.stamp)
        assert read.read(layer, slots) == world.stamp
        world.content[0, base.place, layer] = world.stamp
    assert (0, base.place, layer) in start
    world.run(restore(world, normal), rng)
    assert owner.read(layer, slots) == world.content[0, base.place, layer] >= world.stamp - 2 * LAYERS


def test_numbers_of_a_drop_and_of_a_restore(make_world: MakeWorld) -> None:
    rng = random.Random(2)
    world = make_world()
    normal, size = world.plan, world.ranks[0][0].allocator.size
    drop = world.run(merge(world), rng)
    extents = [world.plan.extents_of(r) for r in range(2)]
    gained = [sum(e.granules for e in own) - BASE_GRANULES for own in extents]
    granule = world.ranks[0][0].kv.space.granule_slots
    assert drop.extension_slots == granule * sum(gained) > 0
    assert drop.freed_bytes == sum(
        world.facts[r].frame_bytes * world.facts[r].layer_frames[layer]
        for r in range(2)
        for layer in set(range(LAYERS)) - set(world.plan.resident[r])
    )
    assert [r[0].allocator.size for r in world.ranks] == [size + granule * g for g in gained]
    assert drop.longest_pause_s > 0
    published = [rank.engine.capacity_changes for rank in world.everybody]
    back = world.run(restore(world, normal), rng)
    assert back.freed_bytes == 0
    assert [rank.engine.capacity_changes for rank in world.everybody] == [n + 1 for n in published]


def test_slots_go_when_their_requests_have_left(make_world: MakeWorld) -> None:
    rng = random.Random(3)
    world = make_world(ranks=2)
    normal = world.plan
    world.run(merge(world), rng)
    ranks = world.ranks[0]
    used = [rank.allocator.alloc(rank.allocator.size) for rank in ranks]
    for _ in range(200):
        if world.number == 1:
            transition = world.begin(restore(world, normal))
        world.boundary(rng.randrange(2), is_serving=True)
        world.check()
    assert transition.phase is Phase.PREPARE
    assert transition.waiting_for == [(0, 0), (0, 1)]
    for rank, slots in zip(ranks, used, strict=True):
        rank.allocator.free(slots)
    base = ranks[0].memory.slots(normal.extents_of(0)[0])
    for rank in ranks:
        first = rank.allocator.alloc(base.count)
        assert all(int(slot) in base for slot in first), "new requests are kept out of slots that are about to go"
        rank.allocator.free(first)
    while transition.end is None:
        world.boundary(rng.randrange(2), is_serving=True)
    assert transition.end is End.SUCCEEDED
    assert [rank.allocator_ranges for rank in ranks] == [(base,), (base,)]
    assert ranks[0].allocator._preferred is None


def test_requests_are_limited_by_what_will_be_left(make_world: MakeWorld) -> None:
    """From the moment in which slots are to go; also after that has failed, because it is tried again."""
    rng = random.Random(9)
    world = make_world(ranks=2)
    normal = world.plan
    base = [rank.allocator.size for rank in world.everybody]
    world.run(merge(world), rng)
    assert [rank.engine.limits.expected_capacity for rank in world.everybody] == [None] * 4
    for rank in world.ranks[0]:
        rank.engine.prefill_rest_tokens = MAX_SLOTS  # there is no room for that without the slots
    transition = world.begin(restore(world, normal))
    for _ in range(10):
        for replica in range(2):
            world.boundary(replica, is_serving=True)
    assert [rank.engine.limits.expected_capacity for rank in world.everybody] == base
    world.time_out()
    while transition.end is None:
        for replica in range(2):
            world.boundary(replica, is_serving=True)
    assert transition.end is End.ROLLED_BACK
    assert [rank.engine.limits.expected_capacity for rank in world.everybody] == base
    for rank in world.ranks[0]:
        rank.engine.prefill_rest_tokens = 0
    assert world.run(restore(world, normal), rng).end is End.SUCCEEDED
    assert world.run(merge(world), rng).end is End.SUCCEEDED
    assert [rank.engine.limits.expected_capacity for rank in world.everybody] == [None] * 4


def test_slots_that_stay_in_use_are_the_reason(make_world: MakeWorld) -> None:
    rng = random.Random(4)
    world = make_world()
    normal = world.plan
    world.run(merge(world), rng)
    rank = world.ranks[0][0]
    used = rank.allocator.alloc(rank.allocator.size)
    before = world.states()
    transition = world.begin(restore(world, normal))
    world.orders[0][0] = msg = replace_timeout(world.orders[0][0], 0.0)
    while transition.end is None:
        world.boundary(rng.randrange(2), is_serving=True)
    assert transition.end is End.ROLLED_BACK
    gone = sum(rank.memory.slots(e).count for e in steps_of(world.plan, msg.plan, 0).close)
    assert f"{gone} pages, had no room elsewhere within 0 s" in transition.reason
    assert world.states() == before
    rank.allocator.free(used)
    assert world.run(restore(world, normal), rng).end is End.SUCCEEDED


def test_requests_are_kept_out_of_slots_that_go_and_get_those_that_stay(make_world: MakeWorld) -> None:
    """Also those that an earlier drop has brought."""
    rng = random.Random(6)
    world = make_world()
    normal = world.plan
    world.run(drop_plan(world.plan, world.facts, DropWish(((0, 1),), tokens=1)), rng)
    first = world.plan
    world.run(merge(world), rng)
    gained = [e for e in first.extents if e.first_granule]
    going = [e for e in world.plan.extents if e not in first.extents]
    replica = next(e.replica for e in gained if e.replica in {other.replica for other in going})
    rank = world.ranks[replica][0]
    stays = [rank.memory.slots(e) for e in first.extents_of(replica)]
    transition = world.begin(restore_plan(world.plan, first, (0, 1)))
    for other in world.everybody:
        other.engine.prefill_rest_tokens = MAX_SLOTS  # there is no room for that without the slots
    for _ in range(10):
        world.boundary(rng.randrange(2), is_serving=True)
    given = rank.allocator.alloc(sum(slots.count for slots in stays))
    assert all(any(int(slot) in slots for slots in stays) for slot in given)
    rank.allocator.free(given)
    for other in world.everybody:
        other.engine.prefill_rest_tokens = 0
    while transition.end is None:
        world.boundary(rng.randrange(2), is_serving=True)
        world.check()
    assert transition.end is End.SUCCEEDED
    world.plan = transition.new
    assert world.run(restore(world, normal), rng).end is End.SUCCEEDED


def test_an_order_that_forces_takes_slots_at_once_that_are_in_use(make_world: MakeWorld) -> None:
    rng = random.Random(8)
    world = make_world(ranks=2)
    normal = world.plan
    base = [rank.allocator.size for rank in world.everybody]
    at_start = world.states()
    world.run(merge(world), rng)
    merged, sizes = world.states(), [rank.allocator.size for rank in world.everybody]
    ranks = world.ranks[0]
    used = [rank.allocator.alloc(rank.allocator.size) for rank in ranks]
    for ends in (False, True):
        for rank in world.everybody:
            rank.engine.room_made.clear()
            rank.engine.ending_tokens = 3
        transition = world.begin(restore(world, normal), forces=True)
        for _ in range(20):
            for replica in range(2):
                world.boundary(replica, is_serving=True)
            world.check()
        assert transition.phase is Phase.PREPARE
        assert [rank.allocator.size for rank in ranks] == [size + 3 for size in base[:2]], "some are about to end"
        for rank in ranks:
            rank.engine.ending_tokens = 0
        world.boundary(0, is_serving=True)
        assert [rank.allocator.size for rank in ranks] == base[:2], "what is to go counts as none of the capacity"
        assert [rank.allocator.available_size() for rank in ranks] == [b - s for b, s in zip(base, sizes, strict=True)][
            :2
        ]
        for rank in ranks:
            assert len(rank.engine.room_made) > 5, "at every boundary: what was retracted since has no room either"
            assert set(rank.engine.room_made) == {base[0]}
        if ends:
            for rank, slots in zip(ranks, used, strict=True):
                rank.allocator.free(slots)
        else:
            world.time_out()
        while transition.end is None:
            world.boundary(rng.randrange(2), is_serving=True)
        if not ends:
            assert transition.end is End.ROLLED_BACK
            for rank, slots in zip(ranks, used, strict=True):
                rank.allocator.free(slots)
            assert world.states() == merged
            used = [rank.allocator.alloc(rank.allocator.size) for rank in ranks]
    assert transition.end is End.SUCCEEDED
    assert without_epoch(world.states()) == without_epoch(at_start)
    assert [rank.allocator.withheld for rank in world.everybody] == [0] * 4


def replace_timeout(order: Order, timeout_s: float) -> Order:
    return Order(order.transition, order.phase, order.old_epoch, order.plan, timeout_s)


def test_ranks_close_together_where_one_of_them_failed(make_world: MakeWorld) -> None:
    """Rank 1 cannot borrow; rank 0 closes slots that come free later, and rank 1 does so at the same boundary."""
    rng = random.Random(5)
    world = make_world(ranks=2)
    normal = world.plan
    world.run(merge(world), rng)
    ranks = world.ranks[0]
    used = [rank.allocator.alloc(rank.allocator.size) for rank in ranks]
    before = [rank.allocator_ranges for rank in ranks]
    world.begin(restore(world, normal))
    world.boundary(0, is_serving=True)
    world.ranks[1][1].channel.close()
    world.ranks[1][1].channel.close()  # rank 1 of replica 0 has nobody to offer to
    while world.transition.phase is Phase.PREPARE:
        world.boundary(0, is_serving=True)
    assert "rank 1 refused to prepare: " in world.transition.reason
    held, world.orders[0] = world.orders[0], type(world.orders[0])()
    for rank, slots in zip(ranks, used, strict=True):
        rank.allocator.free(slots)
    world.boundary(0, is_serving=True)  # the order to go back has not come yet
    assert ranks[0].allocator_ranges == ranks[1].allocator_ranges != before[0]
    world.orders[0] = held
    while world.transition.end is None:
        world.boundary(rng.randrange(2), is_serving=True)
        world.check()
    assert world.transition.end is End.ROLLED_BACK
    assert [sorted(map(str, rank.allocator_ranges)) for rank in ranks] == [sorted(map(str, each)) for each in before]


def test_peer_that_is_gone_is_no_loss(make_world: MakeWorld) -> None:
    rng = random.Random(6)
    world = make_world(3)
    gone = world.ranks[2][0].channel
    assert isinstance(gone, FrameChannel)
    path = Path(gone.path)
    hidden = path.with_name("hidden")
    path.rename(hidden)
    before = world.states()
    transition = world.run(merge(world), rng)
    assert transition.end is End.ROLLED_BACK
    assert "frames cannot be offered" in transition.reason
    assert world.states() == before
    hidden.rename(path)
    assert world.run(merge(world), rng).end is End.SUCCEEDED


def test_wrong_bytes_of_a_lender_are_not_taken(make_world: MakeWorld) -> None:
    rng = random.Random(7)
    world = make_world()
    normal = world.plan
    world.run(merge(world), rng)
    layer = world.plan.resident[1][-1]
    assert layer not in world.plan.resident[0]
    before = world.states()
    weight = world.ranks[1][0].model.layers[layer].weight
    with torch.no_grad():
        good = weight[0, 0].item()
        weight[0, 0] += 1
    transition = world.run(restore(world, normal), rng)
    assert transition.end is End.ROLLED_BACK
    assert f"layer {layer} as restored has checksum" in transition.reason
    assert world.states() == before
    with torch.no_grad():
        weight[0, 0] = good
    assert world.run(restore(world, normal), rng).end is End.SUCCEEDED
    assert torch.equal(world.ranks[0][0].model.layers[layer].weight, weight)


def test_no_frames_for_parameters(make_world: MakeWorld) -> None:
    rng = random.Random(8)
    world = make_world(reserve_frames=0)
    normal = world.plan
    world.run(merge(world), rng)
    pool = world.ranks[0][0].pool
    new = restore(world, normal)
    taken: list[LayerSpan] = []

    def take(transition: Transition) -> None:
        if transition.phase is Phase.LOAD and pool.free_frames and not taken:
            count = pool.free_frames
            taken.append(LayerSpan(0, Span(pool.vmm.reserve(count, "k of somebody else"), 0, count)))
            pool.map_kv(taken)

    before = world.states()
    transition = world.run(new, rng, after_boundary=take)
    assert "frames are needed" in transition.reason
    assert transition.end is End.ROLLED_BACK
    pool.unmap_kv(taken)
    assert world.states() == before
    assert world.run(restore(world, normal), rng).end is End.SUCCEEDED


def test_offers_of_a_failed_transition_are_dropped(make_world: MakeWorld) -> None:
    """Replica 1 hangs while the others offer; it wakes up when all that has failed."""
    rng = random.Random(9)
    world = make_world(3)
    before = world.states()
    transition = world.begin(merge(world))
    for _ in range(100):
        world.boundary(rng.choice([0, 2]), is_serving=True)
    assert transition.waiting_for == [(0, 0), (1, 0), (2, 0)]
    world.time_out()
    while transition.end is None:
        world.boundary(rng.randrange(3), is_serving=True)
    assert transition.end is End.ROLLED_BACK
    assert world.states() == before
    assert world.run(merge(world), rng).end is End.SUCCEEDED
    for rank in world.everybody:
        assert set(rank.hosting.buffers) == {0, 1, 2} - {rank.replica}


def test_a_boundary_does_little_while_batches_run(make_world: MakeWorld) -> None:
    world = make_world()
    boundaries = {}
    for is_serving in (True, False):
        transition = world.begin(merge(world))
        boundaries[is_serving] = 0
        while transition.phase is Phase.PREPARE:
            for replica in range(2):
                world.boundary(replica, is_serving)
            boundaries[is_serving] += 1
        world.time_out()
        while transition.end is None:
            for replica in range(2):
                world.boundary(replica, is_serving=False)
        assert transition.end is End.ROLLED_BACK
    steps = steps_of(world.plan, merge(world), 0)
    lent = sum(len(part.layers) for loan in steps.lend_kv for part in loan.parts)
    assert boundaries[True] >= 2 * lent > boundaries[False]
    assert boundaries[False] <= 2


def test_a_long_batch_holds_up_no_more_than_route_and_slots(make_world: MakeWorld) -> None:
    """Both replicas are in a long batch; what is left for its end is to take the new route, and slots that come or
    go."""
    world = make_world()

    def in_long_batches() -> None:
        for _ in range(1000):
            for replica in range(2):
                world.between_layers(replica)
                world.check()

    transition = world.begin(merge(world))
    for phase in (Phase.SWITCH, Phase.RESUME):
        in_long_batches()
        assert transition.phase is phase
        assert [rank.agent.is_busy for rank in world.everybody] == [True, True]
        for replica in range(2):
            world.boundary(replica, is_serving=True)
    while transition.end is None:
        for replica in range(2):
            world.boundary(replica, is_serving=True)
    assert transition.end is End.SUCCEEDED
    before, world.plan = world.plan, transition.new
    slots = [rank.allocator_ranges for rank in world.everybody]
    transition = world.begin(restore(world, before))
    in_long_batches()
    assert transition.phase is Phase.PREPARE
    assert [rank.allocator_ranges for rank in world.everybody] == slots
    while transition.phase is Phase.PREPARE:
        for replica in range(2):
            world.boundary(replica, is_serving=True)
    assert transition.phase is Phase.LOAD
    in_long_batches()
    assert transition.phase is Phase.SWITCH


def test_a_transition_ends_at_a_boundary(make_world: MakeWorld) -> None:
    world = make_world()
    before = world.plan
    assert world.run(merge(world), random.Random(3)).end is End.SUCCEEDED
    transition = world.begin(restore(world, before))
    while transition.phase is not Phase.RELEASE:
        for replica in range(2):
            world.boundary(replica, is_serving=True)
    for _ in range(1000):
        for replica in range(2):
            world.between_layers(replica)
    assert [rank.agent.is_busy for rank in world.everybody] == [True, True]


def test_orders_that_do_not_fit(make_world: MakeWorld) -> None:
    rng = random.Random(10)
    world = make_world()
    rank = world.ranks[0][0]
    new = merge(world)

    def ask(transition: int, phase: Phase, epoch: int) -> tuple[Result, str]:
        rank.agent.on_order(Order(transition, phase, epoch, new, 10.0))
        reply = rank.replies.pop()
        assert (reply.transition, reply.phase, reply.replica, reply.rank) == (transition, phase, 0, 0)
        return reply.result, reply.reason

    before = world.states()
    assert ask(7, Phase.PREPARE, world.plan.epoch + 1) == (
        Result.REFUSED,
        f"the plan here has epoch {world.plan.epoch}, not {world.plan.epoch + 1}",
    )
    for phase in Phase:
        if phase not in (Phase.PREPARE, Phase.ABANDON):
            assert ask(7, phase, world.plan.epoch) == (Result.STALE, "transition 7 is not under way")
    assert world.states() == before
    transition = world.begin(new)
    world.boundary(0, is_serving=True)
    assert ask(7, Phase.PREPARE, world.plan.epoch) == (Result.REFUSED, "transition 1 is under way")
    assert ask(7, Phase.UNDO, world.plan.epoch)[0] is Result.STALE
    while transition.end is None:
        world.boundary(rng.randrange(2), is_serving=True)
    assert transition.end is End.SUCCEEDED


def test_who_has_nothing_to_resume_is_done_after_release(make_world: MakeWorld) -> None:
    """Replica 0 keeps all its layers and hosts one of replica 1: on the way back it only returns what it borrowed."""
    rng = random.Random(11)
    world = make_world(ranks=2)
    normal = world.plan
    hosts = (normal.hosts[0], (0, *normal.hosts[1][1:]))
    resident = (normal.resident[0], normal.resident[1][1:])
    merged = replace(normal, epoch=2, hosts=hosts, resident=resident)
    check_transition(normal, merged, world.facts)
    assert world.run(merged, rng).end is End.SUCCEEDED
    steps = steps_of(merged, replace(normal, epoch=3), 0)
    assert not steps.open
    assert not steps.end_kv
    assert steps.return_kv
    seen = []

    def note(transition: Transition) -> None:
        seen.append((transition.phase, [rank.agent.is_busy for rank in world.ranks[0]]))

    assert world.run(replace(normal, epoch=3), rng, after_boundary=note).end is End.SUCCEEDED
    assert (Phase.RESUME, [False, False]) in seen
    order = Order(world.number, Phase.RESUME, 2, world.plan, 10.0)
    world.ranks[0][0].agent.on_order(order)
    assert world.ranks[0][0].replies.pop().result is Result.APPLIED


def test_a_cache_that_was_resized_before_the_order_came_is_no_base_for_the_plan(make_world: MakeWorld) -> None:
    world = make_world()
    new = merge(world)
    world.ranks[1][0].kv.shrink(1)
    transition = world.begin(new)
    while transition.end is None:
        for replica in transition.members:
            world.boundary(replica, is_serving=True)
    assert transition.end is End.ROLLED_BACK
    assert transition.reason.endswith(
        f"refused to prepare: the KV cache here has been resized from {BASE_GRANULES} to {BASE_GRANULES - 1} granules"
    )


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_an_idle_replica_goes_on_until_others_wait_for_it(make_world: MakeWorld, is_waited_for: bool) -> None:
    world = make_world()
    world.begin(merge(world))
    host = world.ranks[1][0]
    host.hosting.is_waited_for = is_waited_for
    world.boundary(1, is_serving=False)
    active = host.agent._active
    assert active is not None
    assert bool(active.todo) == is_waited_for


def test_a_rank_that_hears_of_all_the_way_back_at_once_takes_all_of_it(make_world: MakeWorld) -> None:
    """It did not answer for so long that the others went on without it."""
    rng = random.Random(3)
    world = make_world()
    before = world.plan
    assert world.run(merge(world), rng).end is End.SUCCEEDED
    at_start = world.states()
    transition = world.begin(restore(world, before))
    while transition.phase is not Phase.SWITCH:  # slots are unmapped and layers loaded
        for replica in transition.members:
            world.boundary(replica, is_serving=False)
    world.orders[1].clear()
    order = Order(transition.number, Phase.REVERT, transition.old.epoch, transition.new, 30.0)
    world.orders[1].extend(
        msgspec.structs.replace(order, phase=phase) for phase in (Phase.REVERT, Phase.UNDO, Phase.REOPEN)
    )
    world.boundary(1, is_serving=True)
    while world.ranks[1][0].agent.is_busy:
        world.boundary(1, is_serving=True)
    assert world.states()[1] == at_start[1]


def test_orders_of_those_who_are_not_served_are_forgotten_before_their_memory_goes(make_world: MakeWorld) -> None:
    rng = random.Random(4)
    world = make_world(3)

    def fail(transition: Transition) -> None:
        if transition.phase is Phase.SWITCH:
            world.time_out()

    world.ranks[1][0].hosting.remembered = {0, 2}
    assert world.run(merge(world), rng, after_boundary=fail).end is End.ROLLED_BACK
    assert world.ranks[1][0].hosting.remembered == set()


@pytest.mark.parametrize("fails", [False, True])
def test_a_replica_goes_on_while_its_peers_are_connected(make_world: MakeWorld, fails: bool) -> None:
    """A peer may join in only after this replica has executed something for it."""
    rng = random.Random(5)
    world = make_world()
    at_start = world.states()
    connection = FakeConnection()
    world.ranks[1][0].hosting.connection = connection
    transition = world.begin(merge(world))
    for _ in range(200):
        for replica in transition.members:
            world.boundary(replica, is_serving=True)
    assert transition.phase is Phase.PREPARE
    assert transition.waiting_for == [(1, 0)]
    assert world.ranks[1][0].agent._active.todo == deque(), "everything else is done"  # type: ignore[union-attr]
    if fails:
        connection.error = TransientError("replica 0 did not connect")
    connection.has_ended = True
    while transition.end is None:
        world.boundary(rng.choice(transition.members), is_serving=True)
    assert transition.end is (End.ROLLED_BACK if fails else End.SUCCEEDED)
    assert connection.is_cancelled == fails
    if fails:
        assert transition.reason == "replica 1 rank 0 refused to prepare: replica 0 did not connect"
        assert world.states() == at_start


class FakeConnection:
    """In place of `Connecting`."""

    def __init__(self) -> None:
        self.has_ended = self.is_cancelled = False
        self.error: Exception | None = None

    def is_done(self) -> bool:
        if self.has_ended and self.error is not None:
            raise self.error
        return self.has_ended

    def cancel(self) -> None:
        self.is_cancelled = True


def test_rows_that_were_mapped_before_others_failed_go_again(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(3)
    at_start = world.states()
    host = next(rank for rank in world.everybody if len(merge(world).owners_served_by(rank.replica)) == 2)
    first, second = merge(world).owners_served_by(host.replica)
    map_rows = host.rows.map_rows_of

    def fail(owner: int) -> None:
        if owner == second:
            raise TransientError("no memory for request rows")
        map_rows(owner)
        assert host.rows.mapped == {host.replica, first}

    monkeypatch.setattr(host.rows, "map_rows_of", fail)
    transition = world.run(merge(world), random.Random(6))
    assert transition.end is End.ROLLED_BACK
    assert transition.reason == f"replica {host.replica} rank 0 refused to prepare: no memory for request rows"
    assert host.rows.mapped == {host.replica}
    assert world.states() == at_start


def test_an_agent_says_which_step_it_is_at(make_world: MakeWorld) -> None:
    world = make_world()
    agent = world.ranks[0][0].agent
    assert agent.progress == ""
    transition = world.begin(merge(world))
    world.boundary(0, is_serving=True)
    said = {agent.progress}
    while transition.end is None:
        for replica in transition.members:
            world.boundary(replica, is_serving=True)
        said.add(agent.progress)
    dropped = steps_of(normal_plan(world.facts), transition.new, 0).drop
    assert all(any(f": drop the parameters of layer {layer}" in each for each in said) for layer in dropped)
    assert any(each.startswith("release, step 1 of ") for each in said)
    assert agent.progress == ""
