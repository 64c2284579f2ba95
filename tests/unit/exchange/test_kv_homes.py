"""Where KV lies by a plan: looked up for many slots at once, and compared with the extents one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.kv_homes import KvHomes
from kunserve_sgl.memory.slot_space import SlotSpace
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan
from kunserve_sgl.policy.plan import Plan, ReplicaFacts, normal_plan

LAYERS, GRANULE, BASE, ROOM = 4, 8, 3, 20
SPACE = SlotSpace(GRANULE, ROOM, 2)


def plans() -> tuple[Plan, Plan]:
    facts = tuple(
        ReplicaFacts(replica, 4096, GRANULE, BASE, ROOM, 0, (10,) * LAYERS, (1,) * LAYERS) for replica in range(2)
    )
    normal = normal_plan(facts)
    return normal, drop_plan(normal, facts, DropWish(((0, 1),)))


def test_homes_are_those_of_the_extents() -> None:
    """After a drop base slots are at home at their owner, and the slots it made room for at their layer hosts."""
    _, plan = plans()
    homes = KvHomes(plan, SPACE)
    kinds = set()
    for extent in plan.extents:
        slots = SPACE.slots_of(extent.replica, extent.first_granule, extent.granules)
        every_slot = np.arange(slots.first, slots.stop, dtype=np.int32)
        for layer in range(LAYERS):
            assert set(homes.of(every_slot, layer).tolist()) == {extent.homes[layer]}
            assert slots in homes.at(extent.homes[layer], layer)
            assert slots not in homes.at(1 - extent.homes[layer], layer)
            kinds.add((extent.first_granule == 0, extent.homes[layer] == extent.replica))
    assert {(True, True), (False, False), (False, True)} <= kinds
    mixed = np.array([SPACE.slots_of(1, 0, 1).first, SPACE.slots_of(0, 0, 1).stop - 1, SPACE.slots_of(1, 1, 1).first])
    assert homes.of(mixed, 0).tolist() == [1, 0, 1]
    assert homes.of(np.empty(0, np.int32), 0).tolist() == []


def test_layers_with_the_same_homes_have_the_same_pattern() -> None:
    normal, plan = plans()
    homes = KvHomes(plan, SPACE)
    columns = [tuple(extent.homes[layer] for extent in plan.extents) for layer in range(LAYERS)]
    for one in range(LAYERS):
        for other in range(LAYERS):
            assert (homes.pattern(one) == homes.pattern(other)) == (columns[one] == columns[other])
    assert len(set(columns)) > 1
    assert len({KvHomes(normal, SPACE).pattern(layer) for layer in range(LAYERS)}) == 1


def test_a_slot_of_no_extent_has_no_home() -> None:
    normal, _ = plans()
    homes = KvHomes(normal, SPACE)
    own = SPACE.slots_of(0, 0, BASE)
    for slot in (0, own.stop, SPACE.slots_of(1, 0, BASE).stop, SPACE.slot_count + 5):
        with pytest.raises(InvariantError, match=rf"slots \[{slot}\] have no home"):
            homes.of(np.array([own.first, slot]), 1)
    with pytest.raises(InvariantError, match="have no home"):
        KvHomes(replace(normal, extents=()), SPACE).of(np.array([own.first]), 0)
