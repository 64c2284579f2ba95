"""The loans of one frame pool: its frames that other replicas may map, and theirs that are mapped here.

Every operation happens entirely or not at all, on any number of spans.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kunserve_sgl.memory.errors import LedgerError, LoanError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.ledger import FrameLedger, FrameUse, lent_to, returned
from kunserve_sgl.memory.undoing import map_span, undoing, unmap_span
from kunserve_sgl.memory.virtual_range import Fence, Frame, LayerSpan
from kunserve_sgl.memory.vmm import VmmBackend


@dataclass(frozen=True, slots=True)
class Loan:
    """Holds frames that `borrower` may map until it returns them. Whatever they were used for, they stay mapped
    here."""

    loan_id: int
    borrower: str
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class BorrowedLoan:
    """Holds another replica's frames, mapped here behind `spans` in order."""

    loan_id: int
    owner: str
    frames: tuple[Frame, ...]
    spans: tuple[LayerSpan, ...]


class FrameLoans:
    """Keeps the loans in step with the pool's ledger and with what is mapped."""

    def __init__(self, vmm: VmmBackend, owner: str, ledger: FrameLedger) -> None:
        """Takes the backend and the ledger of the pool that belongs to `owner`."""
        self._vmm = vmm
        self._owner = owner
        self._ledger = ledger
        self._lent: dict[int, Loan] = {}
        self._loan_ids = itertools.count(1)
        self._borrowed: dict[tuple[str, int], BorrowedLoan] = {}

    def lend(self, borrower: str, frames: Sequence[Frame]) -> Loan:
        """Books frames of any use as lent; until their last loan ends they cannot be unmapped. Several borrowers
        may have the same frame, one of them not twice. `VmmBackend.export_frames` then gives what to send. Raises
        LedgerError."""
        if not frames:
            raise LedgerError(f"{self._owner}: a loan to {borrower} of no frames")
        if len(set(frames)) != len(frames):
            raise LedgerError(f"{self._owner}: a frame is named twice in one loan")
        by_use = self._by_use(frames)
        for use, group in by_use.items():
            if any(borrower == other for other, _ in use.loans):
                raise LedgerError(f"{self._owner}: {len(group)} frames are {use} already")
        loan = Loan(next(self._loan_ids), borrower, tuple(frames))
        for use, group in by_use.items():
            self._ledger.change(group, use, lent_to(borrower, loan.loan_id, use))
        self._lent[loan.loan_id] = loan
        return loan

    def end_loan(self, loan_id: int) -> None:
        """Books the frames of a loan, as far as nobody else borrows them, back to what they were. The borrower has
        unmapped them, or is dead. Raises LoanError."""
        loan = self._lent.pop(loan_id, None)
        if loan is None:
            raise LoanError(f"{self._owner}: loan {loan_id} does not exist or has ended")
        for use, group in self._by_use(loan.frames).items():
            self._ledger.change(group, use, returned(loan_id, use))

    def borrow(self, owner: str, loan_id: int, export: FrameExport, spans: Sequence[LayerSpan]) -> BorrowedLoan:
        """Imports another replica's frames and maps them behind `spans`, in order; the spans have as many
        positions as the export has frames. Raises LoanError, TransferError, PeerAccessError,
        AlreadyMappedError, MappingFailedError."""
        if (owner, loan_id) in self._borrowed:
            raise LoanError(f"{self._owner}: loan {loan_id} of {owner} is borrowed already")
        positions = sum(each.span.count for each in spans)
        if positions != export.frame_count:
            raise LoanError(f"{self._owner}: {export.frame_count} frames cannot be mapped behind {positions}")
        self._vmm.check_map([each.span for each in spans])
        with undoing(self._owner) as undo:
            frames = self._vmm.import_frames(export)
            undo.callback(self._vmm.destroy_frames, frames)
            rest = iter(frames)
            for each in spans:
                map_span(self._vmm, undo, each.span, tuple(itertools.islice(rest, each.span.count)))
        loan = BorrowedLoan(loan_id, owner, frames, tuple(spans))
        self._borrowed[owner, loan_id] = loan
        return loan

    def return_loan(self, owner: str, loan_id: int, after: Iterable[Fence] | None = None) -> None:
        """Unmaps and forgets the frames of a borrowed loan; tell the owner afterwards, not before. It is right when the
        owner is dead too. Raises LoanError, ViewInUseError, MappingFailedError."""
        loan = self._borrowed.get((owner, loan_id))
        if loan is None:
            raise LoanError(f"{self._owner}: loan {loan_id} of {owner} is not borrowed")
        self._vmm.check_unmap([each.span for each in loan.spans])
        with undoing(self._owner) as undo:
            for each in loan.spans:
                unmap_span(self._vmm, undo, each.span, after)
                after = ()
        del self._borrowed[owner, loan_id]
        self._vmm.destroy_frames(loan.frames)

    def move_loan(
        self, owner: str, loan_id: int, targets: Sequence[LayerSpan], after: Iterable[Fence] | None = None
    ) -> None:
        """Maps the frames of a borrowed loan behind other spans, in order, of the same sizes as those where they are.
        `after` is as in `VmmBackend.unmap`. Raises LoanError, AlreadyMappedError, MappingFailedError."""
        loan = self._borrowed.get((owner, loan_id))
        if loan is None:
            raise LoanError(f"{self._owner}: loan {loan_id} of {owner} is not borrowed")
        self._vmm.check_map([each.span for each in targets])
        self._vmm.check_unmap([each.span for each in loan.spans])
        with undoing(self._owner) as undo:
            for source, target in zip(loan.spans, targets, strict=True):
                map_span(self._vmm, undo, target.span, unmap_span(self._vmm, undo, source.span, after))
                after = ()
        self._borrowed[owner, loan_id] = replace(loan, spans=tuple(targets))

    def lent_by_borrower(self) -> Counter[str]:
        """Counts the frames of the loans to each borrower; a frame with several borrowers counts for each."""
        lent = Counter[str]()
        for loan in self._lent.values():
            lent[loan.borrower] += len(loan.frames)
        return lent

    def borrowed_by_owner(self) -> Counter[str]:
        """Counts the frames that are borrowed of each owner."""
        borrowed = Counter[str]()
        for loan in self._borrowed.values():
            borrowed[loan.owner] += len(loan.frames)
        return borrowed

    def check(self) -> None:
        """Compares the loans with the ledger and with what is really mapped. Raises LedgerError that says what is
        off."""
        booked = Counter[int]()
        for use, count in self._ledger.uses().items():
            for _, loan_id in use.loans:
                booked[loan_id] += count
        lent = {loan_id: len(loan.frames) for loan_id, loan in self._lent.items()}
        if booked != lent:
            raise LedgerError(f"{self._owner}: frames by loan are {dict(booked)}, the loans say {lent}")
        for loan in self._borrowed.values():
            places = [(each.span.virtual_range, at) for each in loan.spans for at in each.span.positions]
            if list(map(self._vmm.places.get, loan.frames)) != places:
                raise LedgerError(f"{self._owner}: loan {loan.loan_id} of {loan.owner} is not mapped as booked")

    def _by_use(self, frames: Sequence[Frame]) -> dict[FrameUse, list[Frame]]:
        groups: dict[FrameUse, list[Frame]] = {}
        for frame in frames:
            groups.setdefault(self._ledger.use_of(frame), []).append(frame)
        return groups
