"""KV of slots is copied wherever it is at home: here, at another replica, from one to the other and back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transition_world import LAYERS, Rank, World, one_step_per_boundary, worlds_with_copies

from kunserve_sgl.control.transition import End
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan
from kunserve_sgl.replica.layer_runner import LayerRunner
from kunserve_sgl.replica.read_memory import ReadMemory, runs_of
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
    with worlds_with_copies(tmp_path, 2, by_message=True) as make:
        yield make


def copies_of(rank: Rank) -> CopiesByMessage:
    peers = cast(ReadMemory, rank.peer_memory)
    return CopiesByMessage(cast(LayerRunner, cast(Any, Pool(rank.kv))), rank.kv, rank.loans.homes, peers)


def merged(make_world: MakeWorld, replicas: int, rng: random.Random) -> World:
    world = make_world(replicas)
    new = drop_plan(world.plan, world.facts, DropWish((tuple(range(replicas)),)))
    assert world.run(new, rng).end is End.SUCCEEDED
    return world


def home_of(world: World, host: Rank, layer: int, slot: int) -> Rank:
    home = world.home_of(host, layer, SlotRange(slot, 1))
    assert home is not None
    return home


@pytest.mark.parametrize("replicas", [2, 3])
def test_slots_are_copied_from_home_to_home(make_world: MakeWorld, replicas: int) -> None:
    rng = random.Random(replicas)
    world = merged(make_world, replicas, rng)
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


def test_runs() -> None:
    assert list(runs_of(np.array([3, 4, 5, 9, 11, 12]))) == [(3, 3), (9, 1), (11, 2)]
    assert list(runs_of(np.array([], np.int64))) == []
