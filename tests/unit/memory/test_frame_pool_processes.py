"""Lending frames to other processes: they map, read and write them, return them, or are killed while they
hold them.

The owner is this process; the borrowers are real ones. Random sequences of operations run over all, and the
ledgers must agree after each.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from borrower_process import FRAME_BYTES, POSITIONS, TIMEOUT_S, Borrower, lend_and_wait, make_context
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kunserve_sgl.memory.errors import LedgerError
from kunserve_sgl.memory.frame_export import receive_export, send_export
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.virtual_range import LayerSpan, Span
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

BORROWERS = ("borrower 1", "borrower 2")
borrowers = st.sampled_from(BORROWERS)


@dataclass
class Held:
    """A loan: the owner's positions, and those of the borrower."""

    borrower: str
    here: list[int]
    there: list[int]


class SeveralProcesses(RuleBasedStateMachine):
    """The owner maps KV positions and stamps them; loans of them go to two borrowers and come back. Both may
    borrow the same position."""

    @initialize()
    def start(self) -> None:
        self.context = make_context()
        self.pool = FramePool(MemfdVmm(FRAME_BYTES), "owner")
        self.pool.add_frames(POSITIONS)
        self.area = self.pool.vmm.reserve(POSITIONS, "k 0")
        self.stamps: dict[int, int] = {}
        self.borrowers = {name: Borrower(self.context) for name in BORROWERS}
        self.loans: dict[int, Held] = {}

    def teardown(self) -> None:
        if hasattr(self, "borrowers"):
            for borrower in self.borrowers.values():
                borrower.close()
                assert borrower.process.exitcode == 0
            self.pool.vmm.close()

    def lent(self, borrower: str | None = None) -> set[int]:
        """The owner's positions that are lent, to anybody or to one."""
        return {at for loan in self.loans.values() if borrower in (None, loan.borrower) for at in loan.here}

    @rule(data=st.data(), value=st.integers(1, 200))
    def grow(self, data: st.DataObject, value: int) -> None:
        first = data.draw(st.integers(0, POSITIONS - 1))
        count = data.draw(st.integers(1, POSITIONS - first))
        wanted = list(range(first, first + count))
        if not self.stamps.keys().isdisjoint(wanted):
            return
        self.pool.map_kv([LayerSpan(0, Span(self.area, first, count))])
        for position in wanted:
            self.stamps[position] = value
            self.pool.vmm.tensor(self.area, position * FRAME_BYTES, FRAME_BYTES).fill_(value)

    @precondition(lambda self: self.stamps)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        position = data.draw(st.sampled_from(sorted(self.stamps)))
        span = LayerSpan(0, Span(self.area, position, 1))
        if position in self.lent():
            with pytest.raises(LedgerError, match="lent to"):
                self.pool.unmap_kv([span])
        else:
            self.pool.unmap_kv([span])
            del self.stamps[position]

    @precondition(lambda self: self.stamps)
    @rule(data=st.data(), name=borrowers)
    def lend(self, data: st.DataObject, name: str) -> None:
        positions = data.draw(st.lists(st.sampled_from(sorted(self.stamps)), min_size=1, unique=True))
        frames = [self.area.frames[position] for position in positions]
        if not self.lent(name).isdisjoint(positions):
            with pytest.raises(LedgerError, match=f"lent to .*{name}.*already"):
                self.pool.loans.lend(name, frames)
            return
        at = data.draw(st.integers(0, POSITIONS - len(positions)))
        there = list(range(at, at + len(positions)))
        occupied = {taken for loan in self.loans.values() if loan.borrower == name for taken in loan.there}
        loan = self.pool.loans.lend(name, frames)
        self.borrowers[name].tell(do="borrow", loan=loan.loan_id, spans=[[at, len(positions)]])
        with self.pool.vmm.export_frames(loan.frames) as export:
            send_export(self.borrowers[name].sock, export, TIMEOUT_S)
        reply = self.borrowers[name].reply()
        if occupied.isdisjoint(there):
            assert "error" not in reply, reply
            self.loans[loan.loan_id] = Held(name, positions, there)
        else:
            assert reply["error"] == "AlreadyMappedError"
            self.pool.loans.end_loan(loan.loan_id)
        self.compare(name, reply)

    @precondition(lambda self: self.loans)
    @rule(data=st.data(), value=st.integers(201, 250))
    def write_from_the_other_side(self, data: st.DataObject, value: int) -> None:
        loan = self.loans[data.draw(st.sampled_from(sorted(self.loans)))]
        number = data.draw(st.integers(0, len(loan.here) - 1))
        self.borrowers[loan.borrower].tell(do="write", at=loan.there[number], value=value)
        self.stamps[loan.here[number]] = value
        self.compare(loan.borrower, self.borrowers[loan.borrower].reply())

    @rule(name=borrowers)
    def look(self, name: str) -> None:
        """What one borrower wrote is what the other reads."""
        self.borrowers[name].tell(do="look")
        self.compare(name, self.borrowers[name].reply())

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        loan_id = data.draw(st.sampled_from(sorted(self.loans)))
        name = self.loans.pop(loan_id).borrower
        self.borrowers[name].tell(do="return", loan=loan_id)
        self.compare(name, self.borrowers[name].reply())
        self.pool.loans.end_loan(loan_id)

    @precondition(lambda self: self.loans)
    @rule(name=borrowers)
    def kill_a_borrower(self, name: str) -> None:
        self.borrowers[name].kill()
        for loan_id in [loan_id for loan_id, loan in self.loans.items() if loan.borrower == name]:
            self.pool.loans.end_loan(loan_id)
            del self.loans[loan_id]
        self.borrowers[name] = Borrower(self.context)

    def compare(self, name: str, reply: dict[str, Any]) -> None:
        """What a borrower sees must be what the owner lent."""
        seen = {
            there: self.stamps[here]
            for loan in self.loans.values()
            if loan.borrower == name
            for there, here in zip(loan.there, loan.here, strict=True)
        }
        assert reply["bytes"] == seen
        assert reply["borrowed"].get("owner", 0) == len(seen)

    @invariant()
    def the_owners_books_balance(self) -> None:
        self.pool.check()
        snapshot = self.pool.snapshot()
        assert snapshot.lent == len(self.lent())
        for name in BORROWERS:
            assert snapshot.lent_by_borrower.get(name, 0) == len(self.lent(name))
        assert (snapshot.kv, snapshot.free) == (
            len(self.stamps) - len(self.lent()),
            POSITIONS - len(self.stamps),
        )
        for position, stamp in self.stamps.items():
            assert int(self.pool.vmm.tensor(self.area, position * FRAME_BYTES, FRAME_BYTES)[0]) == stamp


TestSeveralProcesses = SeveralProcesses.TestCase
TestSeveralProcesses.settings = settings(
    max_examples=30,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_a_killed_owner_leaves_the_borrower_its_mapping_and_no_file() -> None:
    """The roles turned round: the lender dies, the borrower still reads, and gives everything back on its
    own."""
    gc.collect()  # what earlier tests left must not vanish between two looks
    mapped_before = Path("/proc/self/maps").read_text().count("memfd:kunserve-frames")
    context = make_context()
    ours, theirs = socket.socketpair()
    lender = context.Process(target=lend_and_wait, args=(theirs,))
    lender.start()
    theirs.close()
    pool = FramePool(MemfdVmm(FRAME_BYTES), "borrower")
    area = pool.vmm.reserve(4, "k 0")
    with ours, receive_export(ours, TIMEOUT_S) as export:
        pool.loans.borrow("owner", 1, export, [LayerSpan(0, Span(area, 1, 2))])
        assert lender.pid is not None
        os.kill(lender.pid, signal.SIGKILL)
        lender.join(TIMEOUT_S)
    assert lender.exitcode == -signal.SIGKILL
    assert pool.vmm.tensor(area, FRAME_BYTES, 2 * FRAME_BYTES).unique().tolist() == [77]
    pool.loans.return_loan("owner", 1)
    pool.check()
    assert Path("/proc/self/maps").read_text().count("memfd:kunserve-frames") == mapped_before
    assert not any("kunserve-frames" in name for name in os.listdir("/dev/shm"))
    pool.vmm.close()
