"""The frame ledger: refused changes change nothing, and an unbalanced book is found and named."""

from __future__ import annotations

import re

import pytest

from kunserve_sgl.memory.errors import LedgerError, PoolFullError
from kunserve_sgl.memory.ledger import FREE, FrameLedger, FrameUse, kv_of, lent_to, parameters_of, returned
from kunserve_sgl.memory.virtual_range import Frame

FRAMES = [Frame(1, number) for number in range(10)]
P0, K0, K1 = parameters_of(0, "layer 0"), kv_of(0, "k 0"), kv_of(1, "k 1")


@pytest.fixture
def ledger() -> FrameLedger:
    ledger = FrameLedger("replica 0")
    ledger.add(FRAMES)
    return ledger


def book(ledger: FrameLedger) -> tuple[dict[Frame, FrameUse], dict[FrameUse, int], int, int]:
    return dict(iter(ledger)), dict(ledger.uses()), ledger.free, ledger.total


def test_the_lowest_free_frames_are_given_out_first(ledger: FrameLedger) -> None:
    assert ledger.take(4, P0) == tuple(FRAMES[:4])
    assert ledger.take(2, K0) == tuple(FRAMES[4:6])
    ledger.change(FRAMES[1:3], P0, FREE)
    assert ledger.take(3, K1) == (FRAMES[1], FRAMES[2], FRAMES[6])
    assert ledger.uses() == {P0: 2, K0: 2, K1: 3, FREE: 3}
    assert ledger.free == 3
    ledger.verify()


def test_removed_frames_are_those_that_would_be_given_out_last(ledger: FrameLedger) -> None:
    ledger.take(3, P0)
    ledger.change(FRAMES[:1], P0, FREE)
    assert ledger.remove(2) == tuple(FRAMES[8:])
    assert (ledger.total, ledger.free) == (8, 6)
    assert ledger.take(6, K0) == (FRAMES[0], *FRAMES[3:8])
    with pytest.raises(LedgerError, match="not in the ledger"):
        ledger.use_of(FRAMES[9])
    ledger.verify()


def test_a_full_pool_says_what_is_free(ledger: FrameLedger) -> None:
    ledger.take(7, P0)
    before = book(ledger)
    for refused in (lambda: ledger.take(4, K0), lambda: ledger.remove(4)):
        with pytest.raises(PoolFullError, match="4 frames are needed, 3 of 10 are free"):
            refused()
    with pytest.raises(LedgerError, match="-1 frames"):
        ledger.take(-1, K0)
    assert book(ledger) == before


def test_a_change_from_another_use_is_refused_entirely(ledger: FrameLedger) -> None:
    ledger.take(2, P0)
    ledger.take(2, K0)
    before = book(ledger)
    message = re.escape("Frame(arena=1, number=2) is kv of layer 0 in 'k 0', not parameters of layer 0 in 'layer 0'")
    with pytest.raises(LedgerError, match=message):
        ledger.change(FRAMES[:3], P0, FREE)
    with pytest.raises(LedgerError, match="is free, not kv"):
        ledger.change([FRAMES[2], FRAMES[8]], K0, K1)
    with pytest.raises(LedgerError, match="twice"):
        ledger.change([FRAMES[0], FRAMES[0]], P0, K0)
    with pytest.raises(LedgerError, match="not in the ledger"):
        ledger.change([Frame(2, 0)], P0, FREE)
    assert book(ledger) == before


def test_a_frame_is_entered_once(ledger: FrameLedger) -> None:
    before = book(ledger)
    with pytest.raises(LedgerError, match="twice"):
        ledger.add([Frame(2, 0), FRAMES[3]])
    with pytest.raises(LedgerError, match="twice"):
        ledger.add([Frame(2, 0), Frame(2, 0)])
    assert book(ledger) == before


def test_a_lent_frame_remembers_what_it_was(ledger: FrameLedger) -> None:
    ledger.take(2, K0)
    lent = lent_to("replica 1", 7, K0)
    ledger.change(FRAMES[:2], K0, lent)
    assert str(lent) == "lent to replica 1 (loan 7)"
    use = ledger.use_of(FRAMES[0])
    assert use.before == K0
    ledger.change(FRAMES[:2], lent, K0)
    assert ledger.uses() == {K0: 2, FREE: 8}, "an ended loan leaves no line in the book"


def test_a_frame_stays_lent_until_its_last_loan_has_ended() -> None:
    first = lent_to("replica 1", 7, K0)
    both = lent_to("replica 2", 9, first)
    assert str(both) == "lent to replica 1 (loan 7), replica 2 (loan 9)"
    assert (both.before, both.own, K0.own) == (K0, K0, K0)
    assert returned(9, both) == first
    assert returned(7, both) == lent_to("replica 2", 9, K0)
    assert returned(7, first) == returned(9, returned(7, both)) == K0


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda ledger: ledger._use.update({FRAMES[9]: K0}), "8 frames are booked as free, 7 are|0 frames are booked"),
        (lambda ledger: ledger._count.update({P0: 1}), "3 frames are booked as parameters of layer 0 .*, 2 are"),
        (lambda ledger: ledger._free.pop(), "the free list has 7 frames, 8 are free"),
        (lambda ledger: ledger._free.append(FRAMES[9]), "the free list has 9 frames, 8 are free"),
        (lambda ledger: ledger._free.__setitem__(0, FRAMES[0]), "is parameters of layer 0 .*, not free"),
        (lambda ledger: ledger._use.pop(FRAMES[0]), "2 frames are booked as parameters of layer 0 .*, 1 are"),
    ],
)
def test_damage_is_found_and_named(ledger: FrameLedger, damage: object, complaint: str) -> None:
    ledger.take(2, P0)
    ledger.verify()
    damage(ledger)  # type: ignore[operator]
    with pytest.raises(LedgerError, match=complaint):
        ledger.verify()
