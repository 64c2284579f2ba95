"""Parameters restored from another replica's memory: between two pools of one process on both backends, and between
two processes with real descriptors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from layer_setup import LAYERS, AdoptedModel
from lender_process import Lender

from cuda_model.driver import FakeBindings
from kunserve_sgl.memory.borrowed_region import BorrowedRegion
from kunserve_sgl.memory.errors import (
    ChecksumMismatchError,
    LayerStateError,
    LedgerError,
    MappingFailedError,
    PoolFullError,
    RestoreSourceError,
    TransferError,
)
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.virtual_range import Frame, LayerSpan, Span


@dataclass
class Pair:
    """Two replicas of one model. The borrower's books and addresses must be as before when a test ends."""

    lender: AdoptedModel
    borrower: AdoptedModel
    loan_ids: list[int] = field(default_factory=list)

    def lend(self, frames: Sequence[Frame]) -> Loan:
        loan = self.lender.pool.loans.lend("borrower", frames)
        self.loan_ids.append(loan.loan_id)
        return loan

    def open(self, layer: int) -> BorrowedRegion:
        loan = self.lend(self.lender.parameters.frames_of(layer))
        with self.lender.pool.vmm.export_frames(loan.frames) as export:
            return BorrowedRegion(self.borrower.pool, "lender", loan.loan_id, export, layer)

    def end_loans(self) -> None:
        while self.loan_ids:
            self.lender.pool.loans.end_loan(self.loan_ids.pop())


@pytest.fixture(params=["host", "cuda with a fake driver"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    bindings = FakeBindings() if request.param != "host" else None
    pair = Pair(AdoptedModel(bindings), AdoptedModel(bindings))
    ranges = set(pair.borrower.pool.vmm._ranges)
    yield pair
    for adopted in (pair.lender, pair.borrower):
        adopted.pool.check()
        assert adopted.pool.snapshot().borrowed == 0
    assert pair.borrower.pool.vmm._ranges == ranges, "scratch addresses were not given back"
    assert bindings is None or bindings.broken_rules == []


def test_layers_come_back_from_the_other_replica(pair: Pair) -> None:
    for layer in range(LAYERS):
        pair.borrower.parameters.drop(layer)
    pair.borrower.scribble()
    for layer in reversed(range(LAYERS)):
        with pair.open(layer) as source:
            assert pair.borrower.pool.snapshot().borrowed == pair.lender.reports[layer].frames
            pair.borrower.parameters.restore(layer, source)
            source.close()
        pair.end_loans()
    pair.borrower.assert_same_answers()
    pair.lender.assert_same_answers()


def test_a_lent_layer_is_usable_and_cannot_be_dropped_before_the_last_loan_has_ended(pair: Pair) -> None:
    source = pair.open(1)
    other = pair.lender.pool.loans.lend("another borrower", pair.lender.parameters.frames_of(1))
    for _ in range(2):
        with pytest.raises(LedgerError, match="lent to"):
            pair.lender.parameters.drop(1)
        pair.lender.assert_same_answers()
        pair.lender.parameters.verify(1)
        source.close()
        pair.end_loans()
    pair.lender.pool.loans.end_loan(other.loan_id)
    pair.lender.parameters.drop(1)
    with pytest.raises(LayerStateError):
        pair.lender.parameters.frames_of(1)
    pair.lender.parameters.restore(1, pair.lender.source)


def test_failed_restores_return_the_loan(pair: Pair) -> None:
    borrower = pair.borrower
    frames = borrower.reports[1].frames
    borrower.parameters.drop(1)

    def restore(source: BorrowedRegion) -> None:
        with source:
            borrower.parameters.restore(1, source)

    pair.lender.parameters.region(1)[5] ^= 1
    with pytest.raises(ChecksumMismatchError):
        restore(pair.open(1))
    pair.end_loans()
    borrower.assert_dropped(1, frames)
    pair.lender.parameters.region(1)[5] ^= 1

    with pytest.raises(RestoreSourceError, match="of layer 0 at lender cannot be the source of layer 1"):
        restore(pair.open(0))
    pair.end_loans()
    borrower.assert_dropped(1, frames)

    kv = borrower.pool.vmm.reserve(1, "kv")
    borrower.pool.map_kv([LayerSpan(0, Span(kv, 0, 1))])
    with pytest.raises(PoolFullError):
        restore(pair.open(1))
    pair.end_loans()
    borrower.pool.unmap_kv([LayerSpan(0, Span(kv, 0, 1))])
    borrower.pool.vmm.release(kv)

    short = pair.lender.pool.vmm.reserve(frames - 1, "short")
    pair.lender.pool.add_frames(frames - 1)
    pair.lender.pool.map_parameters([LayerSpan(1, Span(short, 0, frames - 1))])
    loan = pair.lend(pair.lender.pool.vmm.frames_at(Span(short, 0, frames - 1)))
    with pair.lender.pool.vmm.export_frames(loan.frames) as export:
        source = BorrowedRegion(borrower.pool, "lender", loan.loan_id, export, 1)
    with pytest.raises(RestoreSourceError, match=f"{frames - 1} frames, not {frames}"):
        restore(source)
    pair.end_loans()
    borrower.assert_dropped(1, frames)

    restore(pair.open(1))
    pair.end_loans()
    borrower.assert_same_answers()


def test_a_region_that_cannot_be_mapped_keeps_no_addresses() -> None:
    bindings = FakeBindings()
    pair = Pair(AdoptedModel(bindings), AdoptedModel(bindings))
    loan = pair.lend(pair.lender.parameters.frames_of(0))
    before = bindings.state()
    with pair.lender.pool.vmm.export_frames(loan.frames) as export:
        for name in ("cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"):
            bindings.fail_when(lambda called, number, name=name: called == name)  # type: ignore[misc]
            with pytest.raises((TransferError, MappingFailedError)):
                BorrowedRegion(pair.borrower.pool, "lender", loan.loan_id, export, 0)
            assert bindings.state() == before
    assert bindings.broken_rules == []


# Two processes


@pytest.fixture
def lender() -> Iterator[Lender]:
    lender = Lender()
    yield lender
    lender.close()


@pytest.fixture
def borrower() -> Iterator[AdoptedModel]:
    adopted = AdoptedModel(None)
    adopted.copies.clear()
    ranges = set(adopted.pool.vmm._ranges)
    yield adopted
    adopted.pool.check()
    assert adopted.pool.snapshot().borrowed == 0
    assert adopted.pool.vmm._ranges == ranges


def borrow(lender: Lender, borrower: AdoptedModel, layer: int) -> tuple[int, BorrowedRegion]:
    loan_id: int = lender.ask("lend", layer=layer, borrower="me")["loan"]
    with lender.export_for("me") as export:
        return loan_id, BorrowedRegion(borrower.pool, "lender", loan_id, export, layer)


def test_layers_come_back_from_another_process(lender: Lender, borrower: AdoptedModel) -> None:
    for layer in range(LAYERS):
        borrower.parameters.drop(layer)
    borrower.scribble()
    for layer in range(LAYERS):
        loan_id, source = borrow(lender, borrower, layer)
        refused = lender.ask("drop", layer=layer)
        assert (refused["error"], refused["lent"]) == ("LedgerError", borrower.reports[layer].frames)
        with source:
            borrower.parameters.restore(layer, source)
        borrower.parameters.verify(layer)
        assert lender.ask("end", loan=loan_id) == {"lent": 0}
    borrower.assert_same_answers()
    assert "error" not in lender.ask("answer")
    assert "error" not in lender.ask("drop", layer=1)
    borrower.assert_same_answers()


def test_corrupt_bytes_of_another_process_are_found(lender: Lender, borrower: AdoptedModel) -> None:
    borrower.parameters.drop(2)
    lender.ask("flip", layer=2, at=4096)
    loan_id, source = borrow(lender, borrower, 2)
    with source:
        with pytest.raises(ChecksumMismatchError, match="layer 2 as restored"):
            borrower.parameters.restore(2, source)
        borrower.assert_dropped(2, borrower.reports[2].frames)
        # The memory is the lender's own: what it repairs is seen through the same loan.
        lender.ask("flip", layer=2, at=4096)
        borrower.parameters.restore(2, source)
    lender.ask("end", loan=loan_id)
    borrower.assert_same_answers()


def test_a_lender_that_is_killed_in_the_middle_does_no_harm(lender: Lender, borrower: AdoptedModel) -> None:
    borrower.parameters.drop(0)
    borrower.scribble()
    _, source = borrow(lender, borrower, 0)
    target = borrower.parameters.begin_restore(0)
    lender.kill()
    source.fill(target)
    del target
    source.close()
    borrower.parameters.finish_restore(0)
    borrower.assert_same_answers()


def test_a_lender_that_is_killed_while_it_sends_its_frames_leaves_the_layer_dropped(
    lender: Lender, borrower: AdoptedModel
) -> None:
    copy = borrower.parameters.region(0).clone()
    borrower.parameters.drop(0)
    lender.ask("lend", layer=0, borrower="me")
    with pytest.raises(TransferError, match="in the middle of a transfer"):
        lender.export_for("me", do="die in the middle of an export")
    borrower.assert_dropped(0, borrower.reports[0].frames)
    borrower.copies[0] = copy
    borrower.parameters.restore(0, borrower.source)
    borrower.assert_same_answers()
