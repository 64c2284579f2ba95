"""KV of slots is copied wherever it is at home: here, at another replica, from one to the other and back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transition_world import IN_PAIRS, LAYERS, ONE_EACH, Rank, World, one_step_per_boundary, worlds_with_copies

from kunserve_sgl.control.transition import End
from kunserve_sgl.exchange.memory_reads import BytesOrder, LoanTransfer, ReadRowsOrder, WriteRowsOrder
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan
from kunserve_sgl.policy.exchange import remote_kv
from kunserve_sgl.replica.layer_runner import LayerRunner
from kunserve_sgl.replica.row_copies import CopiesByMessage, HomeFailedError

MakeWorld = Callable[..., World]


class Pool:
    """Copies what is here, as SGLang's pool does."""

    def __init__(self, kv: ElasticKv) -> None:
        self._kv = kv

    def copy_slots(self, targets: torch.Tensor, sources: torch.Tensor, layers: Iterable[int]) -> None:
        for layer in layers:
            for rows in self._kv.rows(layer):
                rows[targets] = rows[sources]


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    one_step_per_boundary(monkeypatch)
    with worlds_with_copies(tmp_path, 2, ONE_EACH) as make:
        yield make


def copies_of(rank: Rank) -> CopiesByMessage:
    assert rank.ways.read is not None
    return CopiesByMessage(cast(LayerRunner, cast(Any, Pool(rank.kv))), rank.kv, rank.loans.homes, rank.ways.read)


def merged(make_world: MakeWorld, replicas: int, rng: random.Random) -> World:
    world = make_world(replicas)
    new = drop_plan(world.plan, world.facts, DropWish((tuple(range(replicas)),)))
    assert world.run(new, rng).end is End.SUCCEEDED
    return world


@pytest.fixture
def make_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    one_step_per_boundary(monkeypatch)
    with worlds_with_copies(tmp_path, 3, IN_PAIRS) as make:
        yield make


def home_of(world: World, host: Rank, layer: int, slot: int) -> Rank:
    home = world.home_of(host, layer, SlotRange(slot, 1))
    assert home is not None
    return home


@pytest.mark.parametrize("replicas", [2, 3])
def test_slots_are_copied_from_home_to_home(make_world: MakeWorld, replicas: int) -> None:
    require_copied(merged(make_world, replicas, random.Random(replicas)), replicas)


def test_slots_are_copied_where_some_are_mapped(make_mixed: MakeWorld) -> None:
    world = merged(make_mixed, 3, random.Random(3))
    lent = {(kv.home, rank.replica): kv.is_mapped for rank in world.everybody for kv in rank.loans._borrowed.values()}
    assert lent == {(one, other): {one, other} == {0, 1} for one in range(3) for other in range(3) if one != other}
    require_copied(world, 3)


def require_copied(world: World, replicas: int) -> None:
    rng = random.Random(replicas)
    ways = set()
    for owner in range(replicas):
        slots = [s for each in world.open_slots(owner).values() for s in range(each.first, each.stop)]
        rng.shuffle(slots)
        sources, targets = slots[: len(slots) // 3], slots[len(slots) // 3 : 2 * (len(slots) // 3)]
        for layer in range(LAYERS):
            host = world.ranks[world.plan.hosts[owner][layer]][0]
            values = {slot: 1000.0 * layer + slot for slot in slots}
            for slot, value in values.items():
                home_of(world, host, layer, slot).write(layer, SlotRange(slot, 1), value)
            ways |= {
                tuple(home_of(world, host, layer, slot) is host for slot in pair)
                for pair in zip(sources, targets, strict=True)
            }
            copies_of(host).copy(torch.tensor(targets), torch.tensor(sources), [layer])
            values.update({target: values[source] for source, target in zip(sources, targets, strict=True)})
            found = {slot: home_of(world, host, layer, slot).read(layer, SlotRange(slot, 1)) for slot in slots}
            assert found == values
    assert ways == {(here, there) for here in (True, False) for there in (True, False)}


def test_a_home_that_does_not_answer_is_named(make_world: MakeWorld) -> None:
    rng = random.Random(7)
    world = merged(make_world, 2, rng)
    layer = world.plan.hosts[0].index(1)
    host, home = world.ranks[1][0], world.ranks[0][0]
    base, extension = (world.space.slots_of(0, e.first_granule, e.granules) for e in world.plan.extents_of(0)[:2])
    assert home_of(world, host, layer, base.first) is home
    assert home.service is not None
    home.service.close()
    home.service = None
    with pytest.raises(HomeFailedError, match="KV at replica 0 cannot be copied: it has not answered") as raised:
        copies_of(host).copy(torch.tensor([base.first]), torch.tensor([extension.first]), [layer])
    assert raised.value.home == 0


def test_slots_that_lie_apart_move_with_one_order_for_each_buffer(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[BytesOrder] = []
    send = LoanTransfer._send

    def noted(loan: LoanTransfer, order: BytesOrder, payload: memoryview) -> None:
        orders.append(order)
        send(loan, order, payload)

    monkeypatch.setattr(LoanTransfer, "_send", noted)
    rng = random.Random(8)
    world = make_world(2)
    assert world.run(drop_plan(world.plan, world.facts, DropWish(((0, 1),), leaves_spare=True)), rng).end is not None
    move = next(move for move in remote_kv(world.plan) if move.target == 1)
    host, home = world.ranks[1][0], world.ranks[0][0]
    slots = world.space.slots_of(0, move.extent.first_granule, move.extent.granules)
    for slot in range(slots.first, slots.stop):
        home.write(move.layer, SlotRange(slot, 1), float(slot))
    lent = host.loans.borrowed_of(0, move.extent, move.layer)
    way = host.ways.of(lent)
    way.get_room(move)
    orders.clear()
    apart = np.arange(0, slots.count, 2)
    with closing(way.transfer(move, lent)) as transfer:
        assert list(transfer.copy_slots(apart)) != []
    assert [type(order) for order in orders] == [ReadRowsOrder] * len(host.kv.rows(move.layer))
    for slot in apart + slots.first:
        assert host.read(move.layer, SlotRange(int(slot), 1)) == slot
    # And back, to where nothing was copied from.
    host.write(move.layer, slots, 7.0)
    orders.clear()
    back = replace(move, source=move.target, target=move.source)
    with closing(way.transfer(back, lent)) as transfer:
        assert list(transfer.copy_slots(apart)) != []
    assert [type(order) for order in orders] == [WriteRowsOrder] * len(host.kv.rows(move.layer))
    found = [home.read(move.layer, SlotRange(slot, 1)) for slot in range(slots.first, slots.stop)]
    assert found == [7.0 if slot % 2 == slots.first % 2 else slot for slot in range(slots.first, slots.stop)]
    way.give_room_back(move)
