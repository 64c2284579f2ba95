"""Where KV lies by the loans of a rank: looked up for many slots at once."""

from __future__ import annotations

import numpy as np

from kunserve_sgl.exchange.kv_homes import KvHomes, RemoteKv
from kunserve_sgl.memory.slot_space import SlotRange

HERE = 1
BASE, MORE, OTHER = SlotRange(8, 24), SlotRange(40, 8), SlotRange(100, 50)
HOMES = KvHomes(
    HERE,
    [
        *(RemoteKv(OTHER, 0, 2, 31), RemoteKv(MORE, 0, 0, 5), RemoteKv(BASE, 0, 0, 6)),
        *(RemoteKv(BASE, 2, 0, 7), RemoteKv(BASE, 3, 0, 8)),
    ],
)


def test_all_is_here_that_nobody_has_lent() -> None:
    slots = np.array([0, 7, 8, 31, 32, 39, 40, 47, 48, 99, 100, 149, 150], np.int32)
    assert HOMES.of(slots, 0).tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 1]
    assert HOMES.of(slots, 1).tolist() == [HERE] * len(slots)
    assert HOMES.of(slots, 2).tolist() == [1, 1, 0, 0] + [1] * 9
    assert HOMES.of(np.empty(0, np.int32), 0).tolist() == []


def test_layers_with_the_same_homes_have_the_same_pattern() -> None:
    assert HOMES.pattern(1) == ()
    assert HOMES.pattern(2) == HOMES.pattern(3) == ((8, 32, 0),)
    assert HOMES.pattern(0) == ((8, 32, 0), (40, 48, 0), (100, 150, 2))


def test_loans_come_by_ascending_slots() -> None:
    assert HOMES.loans(0, 0) == (6, 5)
    assert HOMES.loans(2, 0) == (31,)
    assert HOMES.loans(0, 1) == HOMES.loans(2, 3) == ()
    assert HOMES.loans(0, 3) == (8,)
