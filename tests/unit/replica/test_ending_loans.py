"""A loan ends after the order of a peer that is served under it. The rank goes on meanwhile, and what needs the memory
waits."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transition_world import World, one_step_per_boundary, worlds_with_copies

from kunserve_sgl.control.messages import LayerLoan, Lend, Phase
from kunserve_sgl.control.transition import End, Transition
from kunserve_sgl.errors import InvariantError
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan
from kunserve_sgl.policy.lending import LendWish, lend_plan
from kunserve_sgl.policy.plan import Plan
from kunserve_sgl.replica.ending_loans import EndingLoans
from kunserve_sgl.replica.lent_memory import LentMemory

BOUNDARIES = 200  # several times as many as a phase takes here
LONGEST_S = 60.0

MakeWorld = Callable[..., World]


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    one_step_per_boundary(monkeypatch)
    with worlds_with_copies(tmp_path, 2) as make:
        yield make


def merge(world: World) -> Plan:
    return drop_plan(world.plan, world.facts, DropWish((tuple(range(len(world.ranks))),)))


def lend(world: World) -> Plan:
    """In memory that the lender gets for it."""
    return lend_plan(world.plan, world.facts, LendWish(1, 0, 8))


def serve_under_all_loans(world: World) -> contextlib.ExitStack:
    """Orders that are served until the stack is closed."""
    served = contextlib.ExitStack()
    for lent in (rank.loans.lent for rank in world.everybody):
        for loan, (borrower, layer, _) in tuple(lent._slots.items()):
            served.enter_context(lent.held(borrower, layer, [loan]))
        for loan, (borrower, _, _) in tuple(lent._bytes.items()):
            served.enter_context(lent.held_bytes(borrower, loan))
    return served


def are_ending(world: World) -> int:
    return sum(bool(rank.loans.ending) for rank in world.everybody)


class Holding:
    """Serves orders from the first boundary in `phase` on, for a number of boundaries, all of which are in it."""

    def __init__(self, world: World, phase: Phase) -> None:
        self.world, self.phase, self.left = world, phase, BOUNDARIES
        self.served: contextlib.ExitStack | None = None

    def look(self, transition: Any) -> None:
        if transition.phase is self.phase and self.served is None:
            self.served = serve_under_all_loans(self.world)
        elif self.served is not None and self.left:
            self.left -= 1
            assert transition.phase is self.phase
            if not self.left:
                assert are_ending(self.world)
                self.served.close()


def test_a_restore_waits_for_the_loans_that_it_ends(make_world: MakeWorld) -> None:
    world, rng = make_world(), random.Random(3)
    at_start, before = [rank.pool.snapshot() for rank in world.everybody], world.plan
    world.run(merge(world), rng)
    holding = Holding(world, Phase.RESUME)
    transition = world.run(restore_plan(world.plan, before, range(2)), rng, after_boundary=holding.look)
    assert transition.end is End.SUCCEEDED
    assert not holding.left
    assert not are_ending(world)
    assert [rank.pool.snapshot() for rank in world.everybody] == at_start


@pytest.mark.parametrize("to", [merge, lend])
def test_a_way_back_waits_for_the_loans_that_it_ends(make_world: MakeWorld, to: Callable[[World], Plan]) -> None:
    world, rng = make_world(reserve_frames=40), random.Random(3)
    at_start = world.states()
    holding = Holding(world, Phase.REOPEN)
    late = False

    def look(transition: Transition) -> None:
        nonlocal late
        if transition.phase is Phase.SWITCH and not late:
            late = True
            world.time_out()
        holding.look(transition)

    transition = world.run(to(world), rng, after_boundary=look)
    assert transition.end is End.ROLLED_BACK
    assert late
    assert not holding.left
    assert world.states() == at_start


class Restored:
    """A world that was merged and has restored what it had dropped, in which loans of the parameters are still served,
    as nothing in the restore needs them to have ended."""

    def __init__(self, world: World) -> None:
        self.world = world
        rng = random.Random(3)
        self.at_start, self.before = [rank.pool.snapshot() for rank in world.everybody], world.plan
        self.served, self._known = contextlib.ExitStack(), set[tuple[int, int]]()
        world.run(merge(world), rng)
        transition = world.run(restore_plan(world.plan, self.before, range(2)), rng, after_boundary=self._look)
        assert transition.end is End.SUCCEEDED
        assert are_ending(world)

    def _look(self, transition: Transition) -> None:
        for rank in self.world.everybody if transition.phase is Phase.RESUME else ():
            for (borrower, _), loan in rank.loans._lent_regions.items():
                if (rank.replica, loan.loan_id) not in self._known:
                    self._known.add((rank.replica, loan.loan_id))
                    self.served.enter_context(rank.loans.lent.held_bytes(borrower, loan.loan_id))

    def go_on(self, transition: Transition, is_serving: bool = False) -> None:
        for boundary in range(BOUNDARIES):
            if transition.end is None:
                self.world.boundary(boundary % 2, is_serving)


def test_a_transition_ends_before_loans_that_nothing_in_it_needs(make_world: MakeWorld) -> None:
    """Of parameters, to who has loaded them. The next one waits before it does anything that needs the memory."""
    restored = Restored(make_world())
    world = restored.world
    transition = world.begin(merge(world))
    restored.go_on(transition, is_serving=True)
    assert transition.phase is Phase.PREPARE
    restored.served.close()
    restored.go_on(transition)
    assert transition.end is End.SUCCEEDED
    world.plan = transition.new
    world.run(restore_plan(world.plan, restored.before, range(2)), random.Random(3))
    assert [rank.pool.snapshot() for rank in world.everybody] == restored.at_start


def test_a_way_back_waits_for_no_loan_before_it_needs_the_memory(make_world: MakeWorld) -> None:
    """Else nobody would be back in time whose PREPARE was late because of it."""
    restored = Restored(make_world())
    world = restored.world
    transition = world.begin(merge(world))
    restored.go_on(transition)
    assert transition.phase is Phase.PREPARE
    world.time_out()
    restored.go_on(transition)
    assert transition.phase is Phase.REOPEN
    restored.served.close()
    restored.go_on(transition)
    assert transition.end is End.ROLLED_BACK
    assert [rank.pool.snapshot() for rank in world.everybody] == restored.at_start


def test_who_has_prepared_switches_whatever_is_lent_beside_the_transition(make_world: MakeWorld) -> None:
    world = make_world()
    rank = world.ranks[0][0]
    transition = world.begin(merge(world))
    while transition.phase is not Phase.SWITCH:
        world.boundary(0, is_serving=True)
        if transition.phase is not Phase.SWITCH:
            world.boundary(1, is_serving=True)
    loan = rank.loans._lend_parameters("replica 1, 7", 1, 0)
    with rank.loans.lent.held_bytes(1, loan.loan_id):
        rank.loans.ending.end(loan)
        for boundary in range(BOUNDARIES):
            world.boundary(boundary % 2, is_serving=True)
        assert transition.phase is Phase.RELEASE
        assert rank.loans.ending
    for boundary in range(BOUNDARIES):
        if transition.end is None:
            world.boundary(boundary % 2, is_serving=False)
    assert transition.end is End.SUCCEEDED
    world.plan = transition.new


def test_a_recovery_waits_for_the_loans_that_it_ends(make_world: MakeWorld) -> None:
    """An order of the one that has died is served."""
    world = make_world(2)
    rank = world.ranks[0][0]
    world.run(merge(world), random.Random(3))
    recovery = world.lose(1)
    assert recovery is not None
    with serve_under_all_loans(world):
        for _ in range(BOUNDARIES):
            world.boundary(0, is_serving=False)
        assert recovery.phase is Phase.RELOAD
        assert rank.loans.ending
    while not recovery.has_ended:
        world.boundary(0, is_serving=False)
    assert not recovery.failed
    assert not rank.pool.snapshot().lent


def test_what_is_lent_beside_transitions_ends_later_and_is_lent_again_then(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(2)
    rank = world.ranks[0][0]
    before = rank.pool.snapshot()
    order = Lend(7, (LayerLoan(1, 0, (0,)),))
    rank.aside.on_lend(order)
    rank.aside.advance(is_serving=False)
    lent = rank.pool.snapshot()
    with serve_under_all_loans(world):
        rank.aside.on_lend(order)
        rank.aside.advance(is_serving=False)
        assert "ends after the order of replica 1, 7 that is served under it" in caplog.text
        assert rank.aside.is_busy
        assert not rank.loans.lent._bytes
        assert rank.pool.snapshot() == lent
    rank.aside.advance(is_serving=False)
    assert not rank.aside.is_busy
    assert len(rank.loans.lent._bytes) == 1
    rank.aside.on_lend(Lend(7))
    assert rank.pool.snapshot() == before


def test_an_order_that_does_not_come_to_its_end_is_found() -> None:
    lent, ended, now_s = LentMemory(), list[int](), 100.0
    frames: Any = type("Frames", (), {"end_loan": staticmethod(ended.append)})
    ending = EndingLoans(lent, frames, LONGEST_S, lambda: now_s)
    lent.lend_slots(7, 1, 0, SlotRange(0, 8))
    with lent.held(1, 0, [7]):
        ending.end(Loan(7, "replica 1", ()))
        now_s += LONGEST_S - 1
        ending.advance()
        assert ending
        now_s += 1
        with pytest.raises(InvariantError, match="loan 7 was to end 60 s ago, and an order of a peer is still served"):
            ending.advance()
    assert not ended
    ending.advance()
    assert ended == [7]
    assert not ending
