"""KV changes its home over real memory and sockets while batches write: there and back, taken back at any step, and
when members die. Also what is written to slots that have been copied already."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transition_world import (
    LAYERS,
    PHASES_WITH_A_WAY_BACK,
    WAYS,
    Rank,
    World,
    one_step_per_boundary,
    worlds_with_copies,
)

from kunserve_sgl.control.messages import Phase
from kunserve_sgl.control.recovery import Recovery
from kunserve_sgl.control.transition import End, Transition
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.exchange import MovesMade, after_moves, exchange_round, moves_before, remote_kv
from kunserve_sgl.policy.plan import Plan, kv_moves
from kunserve_sgl.replica import read_probe
from kunserve_sgl.replica.kv_copy import CopyPace
from kunserve_sgl.replica.kv_writes import KvWrites

MakeWorld = Callable[..., World]
SLOT_BYTES = 1536  # in one layer
DEADLINE_S = 300.0


@pytest.fixture(params=WAYS)
def make_world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    one_step_per_boundary(monkeypatch)
    # Three slots at a time, so that batches write in between.
    monkeypatch.setattr(CopyPace, "chunk_bytes", lambda pace, is_serving: 3 * SLOT_BYTES)
    with worlds_with_copies(tmp_path, 2, WAYS[request.param]) as make:
        yield make


def merge(world: World, rng: random.Random, *group: int) -> Plan:
    """Returns the plan before."""
    before = world.plan
    group = group or tuple(range(len(world.ranks)))
    new = drop_plan(world.plan, world.facts, DropWish((group,), leaves_spare=True))
    assert world.run(new, rng).end is End.SUCCEEDED
    return before


def next_round(world: World) -> Plan | None:
    return exchange_round(world.plan, world.facts, remote_kv(world.plan))


def exchange(world: World, rng: random.Random, made: MovesMade, rounds: int = 1000) -> None:
    for _ in range(rounds):
        new = next_round(world)
        if new is None:
            return
        made.add(new, kv_moves(world.plan, new))
        assert world.run(new, rng).end is End.SUCCEEDED


def restore(world: World, rng: random.Random, before: Plan, made: MovesMade) -> None:
    everybody = range(len(world.ranks))
    while moves_before(world.plan, restore_plan(world.plan, before, everybody)):
        last = made.last_undone(everybody)
        assert last is not None
        new = after_moves(world.plan, [last])
        made.add(new, [last])
        assert world.run(new, rng).end is End.SUCCEEDED
    assert world.run(restore_plan(world.plan, before, everybody), rng).end is End.SUCCEEDED


def without_plan(world: World) -> dict[tuple[int, int], dict[str, object]]:
    return {
        (rank.replica, rank.rank): {name: value for name, value in rank.state().items() if name != "plan"}
        for rank in world.everybody
    }


def require_right_books(world: World) -> None:
    for rank in world.everybody:
        rank.pool.check()
        assert rank.loans.differences(world.plan) == []
        assert not rank.memory.staged
        me = rank.replica
        for layer in range(LAYERS):
            extents = [
                extent
                for extent in world.plan.extents
                if extent.homes[layer] == me
                or (
                    world.plan.hosts[extent.replica][layer] == me
                    and rank.loans.is_mapped(extent.homes[layer], extent, layer)
                )
            ]
            assert rank.kv.differences(layer, [rank.memory.slots(extent) for extent in extents]) == []


@pytest.mark.parametrize(("replicas", "ranks"), [(2, 2), (3, 1)])
def test_all_kv_goes_to_where_it_is_read_and_comes_back(make_world: MakeWorld, replicas: int, ranks: int) -> None:
    rng = random.Random(replicas)
    world = make_world(replicas, ranks)
    at_start, made = without_plan(world), MovesMade()
    before = merge(world, rng)
    assert remote_kv(world.plan)
    assert all(rank.loans.borrowed for rank in world.everybody)
    frames = [rank.pool.snapshot() for rank in world.everybody]
    exchange(world, rng, made)
    if replicas == 2:
        assert not remote_kv(world.plan)
        assert all(rank.pool.snapshot().lent == rank.pool.snapshot().borrowed == 0 for rank in world.everybody)
        assert not any(rank.loans.homes().pattern(layer) for rank in world.everybody for layer in range(LAYERS))
    assert len(remote_kv(world.plan)) <= replicas - 2
    assert [rank.pool.snapshot().total for rank in world.everybody] == [each.total for each in frames]
    require_right_books(world)
    world.write_all()
    world.check()
    restore(world, rng, before, made)
    require_right_books(world)
    assert without_plan(world) == at_start


@pytest.mark.parametrize("direction", ["there", "back"])
@pytest.mark.parametrize("seed", range(5))
def test_a_move_that_is_taken_back_at_any_moment(make_world: MakeWorld, direction: str, seed: int) -> None:
    rng = random.Random(f"{direction} {seed}")
    world = make_world(rng.choice([2, 3]), rng.choice([1, 1, 2]))
    at_start, made = without_plan(world), MovesMade()
    before = merge(world, rng)
    exchange(world, rng, made, rounds=rng.randrange(1, 3) if direction == "back" else rng.randrange(2))
    if direction == "there":
        new = next_round(world)
    else:
        last = made.last_undone(range(len(world.ranks)))
        assert last is not None
        new = after_moves(world.plan, [last])
    assert new is not None
    as_before = without_plan(world)
    fails_at, count = rng.randrange(1, 40), 0

    def disturb(transition: Transition) -> None:
        nonlocal count
        count += 1
        if count == fails_at and transition.phase in PHASES_WITH_A_WAY_BACK:
            world.time_out()

    transition = world.run(new, rng, after_boundary=disturb)
    if transition.end is End.ROLLED_BACK:
        assert without_plan(world) == as_before
        assert world.run(replace(new, epoch=world.plan.epoch + 1), rng).end is End.SUCCEEDED
    made.add(new, kv_moves(transition.old, new))
    require_right_books(world)
    restore(world, rng, before, made)
    assert without_plan(world) == at_start


@pytest.mark.parametrize("seed", range(8))
def test_a_death_at_any_moment_of_an_exchange(make_world: MakeWorld, seed: int) -> None:
    rng = random.Random(seed)
    world = make_world(rng.choice([2, 3]), rng.choice([1, 1, 2]))
    at_start, made = without_plan(world), MovesMade()
    merge(world, rng)
    exchange(world, rng, made, rounds=rng.randrange(3))
    new = next_round(world)
    if new is None or rng.random() < 0.4:
        last = made.last_undone(range(len(world.ranks)))
        new = new if last is None else after_moves(world.plan, [last])
    assert new is not None
    boundary, lost, count = rng.randrange(1, 60), rng.randrange(len(world.ranks)), 0
    begun: list[Recovery | None] = []

    def disturb(transition: Transition) -> None:
        nonlocal count
        count += 1
        if count == boundary:
            begun.append(world.lose(lost))

    world.run(new, rng, after_boundary=disturb)
    recovery = begun[0] if begun else world.lose(lost)
    assert recovery is not None
    world.recover(recovery, rng)
    require_right_books(world)
    now = without_plan(world)
    assert now == {who: at_start[who] for who in now}


def test_frames_that_are_gone_when_it_begins_are_a_refusal(make_world: MakeWorld) -> None:
    rng = random.Random(1)
    world = make_world()
    merge(world, rng)
    new = next_round(world)
    assert new is not None
    rank = world.ranks[kv_moves(world.plan, new)[0].target][0]
    rank.pool.remove_frames(rank.pool.free_frames)
    as_before = without_plan(world)
    transition = world.run(new, rng)
    assert transition.end is End.ROLLED_BACK
    assert "frames are needed, 0 of" in transition.reason
    assert without_plan(world) == as_before


def test_a_member_that_lives_on_with_memory_away_grows_and_shrinks_not(make_world: MakeWorld) -> None:
    rng = random.Random(1)
    world = make_world()
    merge(world, rng)
    exchange(world, rng, MovesMade())
    kv = world.ranks[0][0].kv
    assert len(kv.away) == 2
    snapshot = world.ranks[0][0].pool.snapshot()
    assert sum(kv.mapped_bytes.values()) == snapshot.kv * snapshot.frame_bytes
    for change in (kv.grow, kv.shrink):
        with pytest.raises(Exception, match="is at home at another replica"):
            change(1)


# What is written while it is copied


class Copying:
    """One rank that copies to its own memory, as far as `step` says."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        new = next_round(world)
        assert new is not None
        self.move = kv_moves(world.plan, new)[0]
        self.transition = world.begin(new)
        self.host: Rank = world.ranks[self.move.host][0]
        self.slots = self.host.memory.slots(self.move.extent)
        self.is_mapped = self.host.loans.is_mapped(self.move.source, self.move.extent, self.move.layer)
        self.rng = rng

    def until(self, happened: Callable[[], bool]) -> None:
        ends_s = time.monotonic() + DEADLINE_S  # by message, answers come when the other thread has its turn
        while not happened():
            assert time.monotonic() < ends_s, "it does not happen"
            self.world.boundary(self.rng.choice(self.transition.members), is_serving=True)

    def copied(self) -> int:
        copies = getattr(self.host.agent._active, "copies", ())
        return copies[0]._copied_slots if copies else 0

    def write(self, offset: int, value: float) -> None:
        at = SlotRange(self.slots.first + offset, 1)
        self.host.note(self.move.layer, at)
        self.home.write(self.move.layer, at, value)

    @property
    def home(self) -> Rank:
        """Who attends to the KV now."""
        home = self.world.home_of(self.host, self.move.layer, self.slots)
        assert home is not None
        return home

    def values(self) -> list[float]:
        home = self.home
        k = home.tensors[self.move.layer, "k"][self.slots.first : self.slots.stop]
        v = home.tensors[self.move.layer, "v"][self.slots.first : self.slots.stop]
        assert (k[:, 0] == -v[:, 0]).all()
        assert (k == k[:, :1]).all()
        return [float(each) for each in k[:, 0]]


@pytest.mark.parametrize("phase", [Phase.LOAD, Phase.SWITCH, Phase.RELEASE])
def test_what_is_written_after_it_was_copied_is_copied_again(make_world: MakeWorld, phase: Phase) -> None:
    rng = random.Random(5)
    world = make_world()
    merge(world, rng)
    copying = Copying(world, rng)
    for offset in range(copying.slots.count):
        copying.write(offset, 100.0 + offset)
    expected = [100.0 + offset for offset in range(copying.slots.count)]
    if phase is Phase.LOAD:
        copying.until(lambda: copying.copied() >= 6)
    else:
        copying.until(lambda: copying.transition.phase is phase)
    assert bool(copying.host.memory.staged) == copying.is_mapped
    for offset, value in ((1, 7.0), (4, 8.0), (copying.slots.count - 1, 9.0)):
        copying.write(offset, value)
        expected[offset] = value
    copying.until(lambda: copying.transition.end is not None)
    assert copying.transition.end is End.SUCCEEDED
    assert copying.host.loans.differences(copying.transition.new) == []
    assert copying.values() == expected


def test_without_the_notes_what_is_written_late_would_be_lost(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    rng = random.Random(5)
    world = make_world()
    merge(world, rng)
    copying = Copying(world, rng)
    copying.write(1, 1.0)
    copying.until(lambda: copying.transition.phase is Phase.SWITCH)
    monkeypatch.setattr(KvWrites, "note", lambda writes, slots, layers: None)
    copying.write(1, 7.0)
    copying.until(lambda: copying.transition.end is not None)
    assert copying.values()[1] == 1.0


def test_notes_are_of_the_watched_slots_and_layers() -> None:
    writes = KvWrites()
    writes.note(np.array([5]), [0])
    slots = SlotRange(8, 8)
    writes.watch(slots, 1)
    writes.note(np.array([7, 8, 15, 16, 9]), range(0, 2))
    writes.note(np.array([10]), range(2, 9))
    writes.note(np.array([9, 8]), [1])
    assert writes.take(slots, 1).tolist() == [8, 9, 15]
    assert writes.take(slots, 1).tolist() == []
    writes.note(np.array([11]), [1])
    writes.watch(SlotRange(100, 4), 1)
    writes.forget(slots, 1)
    writes.note(np.array([12, 101]), [1])
    assert writes.take(SlotRange(100, 4), 1).tolist() == [101]
    writes.forget_all()
    writes.note(np.array([101]), [1])


def test_the_pace_leaves_batches_their_time() -> None:
    now = [0.0]
    pace = CopyPace(lambda: now[0])
    assert pace.chunk_bytes(is_serving=True) == 0
    now[0] = 0.005
    assert pace.chunk_bytes(is_serving=True) == 0, "a twentieth of that is no time"
    now[0] = 0.02
    assert pace.chunk_bytes(is_serving=True) > 0, "nothing is measured yet"
    pace.account(1_000_000, 0.001)
    now[0] = 0.06
    assert pace.chunk_bytes(is_serving=True) == pytest.approx(2_000_000)
    assert pace.chunk_bytes(is_serving=False) == pytest.approx(5_000_000)
    now[0] = 10.0
    assert pace.chunk_bytes(is_serving=True) == pytest.approx(5_000_000), "a step between batches stays short"
    assert (pace.copied_bytes, pace.copying_s) == (1_000_000, 0.001)


def test_who_borrows_measures_once_how_fast_it_reads(make_world: MakeWorld) -> None:
    rng = random.Random(2)
    world = make_world(3)
    for rank in world.everybody:
        rank.agent._measures_reads = True
    before = merge(world, rng)
    assert {(host, owner) for host, owner in world.transition.reads} == {
        (host, owner) for host in range(3) for owner in range(3) if owner in world.plan.owners_served_by(host)
    }
    for speeds in world.transition.reads.values():
        assert min(speeds.own, speeds.borrowed) > 1e6
        assert 0 <= speeds.noise < 10
    assert world.run(restore_plan(world.plan, before, range(3)), rng).end is End.SUCCEEDED
    merge(world, rng)
    assert world.transition.reads == {}


def test_what_is_measured_is_what_takes_time() -> None:
    waits = []

    def wait() -> None:
        waits.append(len(waits))

    own, read = torch.zeros(1 << 16, dtype=torch.uint8), []
    clock = itertools.count()

    def seconds() -> float:
        """A reading of own memory takes 1, one of lent memory 2."""
        at = next(clock)
        return at // 4 * 3 + (0, 1, 1, 3)[at % 4]

    speeds = read_probe.measure(3, own, read.append, wait, seconds)
    assert (speeds.owner, speeds.own, speeds.borrowed, speeds.noise) == (3, 1 << 16, 1 << 15, 0)
    assert len(waits) == 2 * 2 * 6
    assert [each.numel() for each in read] == [1 << 16] * 6


def test_a_layer_may_come_back_before_its_kv(make_world: MakeWorld) -> None:
    """The owner then is the layer host of its own base slots, and borrows what is behind them until that comes home."""
    rng = random.Random(3)
    world = make_world(2)
    merge(world, rng)
    exchange(world, rng, MovesMade())
    owner = world.ranks[0][0]
    owner.pool.add_frames(32)  # the drop would have used them
    layer = owner.kv.away[0]
    hosts = tuple(0 if each == layer else host for each, host in enumerate(world.plan.hosts[0]))
    resident = tuple(sorted({*world.plan.resident[0], layer}))
    back = replace(
        world.plan,
        epoch=world.plan.epoch + 1,
        hosts=(hosts, world.plan.hosts[1]),
        resident=(resident, world.plan.resident[1]),
    )
    assert world.run(back, rng).end is End.SUCCEEDED
    require_right_books(world)
    remote = [move for move in remote_kv(world.plan) if move.extent.first_granule == 0]
    assert [(move.layer, move.source, move.target, move.host) for move in remote] == [(layer, 1, 0, 0)]
    home = after_moves(world.plan, remote)
    assert world.run(home, rng).end is End.SUCCEEDED
    assert layer not in owner.kv.away
    require_right_books(world)
