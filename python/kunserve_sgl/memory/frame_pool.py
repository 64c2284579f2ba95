"""All frames of one replica (one tensor-parallel rank): mapped behind parameters and KV, lent to and borrowed
from other replicas, with the ledger kept in step.

Every operation happens entirely or not at all, on any number of spans. One thread uses a pool at a time.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType

from kunserve_sgl.errors import InvariantError, KunserveError
from kunserve_sgl.memory.errors import LedgerError, LoanError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.ledger import (
    FREE,
    FrameLedger,
    FrameState,
    FrameUse,
    kv_of,
    lent_to,
    parameters_of,
    returned,
)
from kunserve_sgl.memory.virtual_range import Fence, Frame, Span
from kunserve_sgl.memory.vmm import VmmBackend


@dataclass(frozen=True, slots=True)
class LayerSpan:
    """Names a span of a buffer of one decoder layer."""

    layer: int
    span: Span


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


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """Counts frames at one moment: free + parameters + kv + lent == total; borrowed frames belong to their owner's
    total, not to this one. A frame with several borrowers is lent once, and counted for each of them in
    `lent_by_borrower`."""

    owner: str
    frame_bytes: int
    total: int
    free: int
    parameters: int
    kv: int
    lent: int
    borrowed: int
    parameters_by_layer: Mapping[int, int]
    kv_by_layer: Mapping[int, int]
    lent_by_borrower: Mapping[str, int]
    borrowed_by_owner: Mapping[str, int]


class FramePool:
    """Maps frames of a backend that nothing else maps, and accounts for each of them."""

    def __init__(self, vmm: VmmBackend, owner: str) -> None:
        """`owner` names this replica in messages and in the books of its borrowers."""
        self.vmm = vmm
        self.owner = owner
        self._ledger = FrameLedger(owner)
        self._loans: dict[int, Loan] = {}
        self._loan_ids = itertools.count(1)
        self._borrowed: dict[tuple[str, int], BorrowedLoan] = {}

    @property
    def free_frames(self) -> int:
        """Counts the frames that can be mapped now."""
        return self._ledger.free

    @property
    def total_frames(self) -> int:
        """Counts the frames that this replica created, lent ones included and borrowed ones not."""
        return self._ledger.total

    def add_frames(self, count: int, *, in_one_piece: bool = False) -> None:
        """Creates `count` free frames. `in_one_piece` is as in `VmmBackend.create_frames`. Raises OutOfMemoryError."""
        self._ledger.add(self.vmm.create_frames(count, in_one_piece=in_one_piece))

    def remove_frames(self, count: int) -> None:
        """Gives the memory of `count` free frames back to the machine. Raises PoolFullError."""
        removed = self._ledger.remove(count)
        with self._undoing() as undo:
            undo.callback(self._ledger.add, removed)
            self.vmm.destroy_frames(removed)

    # Parameters and KV. What is mapped `in_one_piece`, one for each span, costs a few calls of the machine however many
    # frames it has; it is then unmapped and lent as a whole only. Free frames that are in pieces of other sizes are
    # given back to the machine and created anew for that, in one go.

    def map_parameters(self, spans: Sequence[LayerSpan], *, in_one_piece: bool = False) -> None:
        """Maps free frames behind parameter spans. Raises PoolFullError, AlreadyMappedError, OutOfMemoryError,
        MappingFailedError."""
        self._map([(parameters_of(each.layer, _buffer(each)), each.span) for each in spans], in_one_piece)

    def unmap_parameters(self, spans: Sequence[LayerSpan], after: Iterable[Fence] | None = None) -> None:
        """Makes the frames behind parameter spans free. `after` is as in `VmmBackend.unmap`. Raises LedgerError where a
        frame is lent, ViewInUseError, MappingFailedError."""
        self._unmap([(parameters_of(each.layer, _buffer(each)), each.span) for each in spans], after)

    def map_kv(self, spans: Sequence[LayerSpan], *, in_one_piece: bool = False) -> None:
        """Maps free frames behind spans of KV buffers, with whatever bytes they hold. Raises PoolFullError,
        AlreadyMappedError, OutOfMemoryError, MappingFailedError."""
        self._map([(kv_of(each.layer, _buffer(each)), each.span) for each in spans], in_one_piece)

    def create_kv(self, spans: Sequence[LayerSpan]) -> None:
        """Creates frames behind spans of KV buffers, in one piece for each span; see `VmmBackend.create_frames`. Raises
        OutOfMemoryError, AlreadyMappedError, MappingFailedError."""
        self.vmm.check_map([each.span for each in spans])
        with self._undoing() as undo:
            for each in spans:
                use, count = kv_of(each.layer, _buffer(each)), each.span.count
                frames = self.vmm.create_frames(count, in_one_piece=True)
                undo.callback(self.vmm.destroy_frames, frames)
                self._ledger.add(frames)
                undo.callback(self._ledger.strike, frames)
                self._ledger.change(frames, FREE, use)
                undo.callback(self._ledger.change, frames, use, FREE)
                self._map_one(undo, each.span, frames)

    def unmap_kv(self, spans: Sequence[LayerSpan], after: Iterable[Fence] | None = None) -> None:
        """Makes the frames behind spans of KV buffers free. `after` is as in `VmmBackend.unmap`. Raises LedgerError
        where a frame is lent or borrowed, NotMappedError, MappingFailedError."""
        self._unmap([(kv_of(each.layer, _buffer(each)), each.span) for each in spans], after)

    def move_kv(
        self, sources: Sequence[LayerSpan], targets: Sequence[LayerSpan], after: Iterable[Fence] | None = None
    ) -> None:
        """Maps the frames behind KV spans behind others of the same sizes, in order, with the bytes that they hold.
        `after` is as in `VmmBackend.unmap`. Raises LedgerError where a frame is lent or borrowed, NotMappedError,
        AlreadyMappedError, MappingFailedError."""
        self.vmm.check_map([each.span for each in targets])
        uses = [kv_of(each.layer, _buffer(each)) for each in sources]
        for use, mapped in zip(uses, self.vmm.check_unmap([each.span for each in sources]), strict=True):
            self._ledger.require(mapped, use)
        with self._undoing() as undo:
            for use, source, target in zip(uses, sources, targets, strict=True):
                frames = self._unmap_one(undo, source.span, after)
                booked = kv_of(target.layer, _buffer(target))
                self._ledger.change(frames, use, booked)
                undo.callback(self._ledger.change, frames, booked, use)
                self._map_one(undo, target.span, frames)
                after = ()

    # Lending

    def lend(self, borrower: str, frames: Sequence[Frame]) -> Loan:
        """Books frames of any use as lent; until their last loan ends they cannot be unmapped. Several borrowers
        may have the same frame, one of them not twice. `vmm.export_frames` then gives what to send. Raises
        LedgerError."""
        if not frames:
            raise LedgerError(f"{self.owner}: a loan to {borrower} of no frames")
        if len(set(frames)) != len(frames):
            raise LedgerError(f"{self.owner}: a frame is named twice in one loan")
        by_use = self._by_use(frames)
        for use, group in by_use.items():
            if any(borrower == other for other, _ in use.loans):
                raise LedgerError(f"{self.owner}: {len(group)} frames are {use} already")
        loan = Loan(next(self._loan_ids), borrower, tuple(frames))
        for use, group in by_use.items():
            self._ledger.change(group, use, lent_to(borrower, loan.loan_id, use))
        self._loans[loan.loan_id] = loan
        return loan

    def end_loan(self, loan_id: int) -> None:
        """Books the frames of a loan, as far as nobody else borrows them, back to what they were. The borrower has
        unmapped them, or is dead. Raises LoanError."""
        loan = self._loans.pop(loan_id, None)
        if loan is None:
            raise LoanError(f"{self.owner}: loan {loan_id} does not exist or has ended")
        for use, group in self._by_use(loan.frames).items():
            self._ledger.change(group, use, returned(loan_id, use))

    # Borrowing

    def borrow(self, owner: str, loan_id: int, export: FrameExport, spans: Sequence[LayerSpan]) -> BorrowedLoan:
        """Imports another replica's frames and maps them behind `spans`, in order; the spans have as many
        positions as the export has frames. Raises LoanError, TransferError, PeerAccessError,
        AlreadyMappedError, MappingFailedError."""
        if (owner, loan_id) in self._borrowed:
            raise LoanError(f"{self.owner}: loan {loan_id} of {owner} is borrowed already")
        positions = sum(each.span.count for each in spans)
        if positions != export.frame_count:
            raise LoanError(f"{self.owner}: {export.frame_count} frames cannot be mapped behind {positions}")
        self.vmm.check_map([each.span for each in spans])
        with self._undoing() as undo:
            frames = self.vmm.import_frames(export)
            undo.callback(self.vmm.destroy_frames, frames)
            rest = iter(frames)
            for each in spans:
                self._map_one(undo, each.span, tuple(itertools.islice(rest, each.span.count)))
        loan = BorrowedLoan(loan_id, owner, frames, tuple(spans))
        self._borrowed[owner, loan_id] = loan
        return loan

    def return_loan(self, owner: str, loan_id: int, after: Iterable[Fence] | None = None) -> None:
        """Unmaps and forgets the frames of a borrowed loan; tell the owner afterwards, not before. It is right when the
        owner is dead too. Raises LoanError, ViewInUseError, MappingFailedError."""
        loan = self._borrowed.get((owner, loan_id))
        if loan is None:
            raise LoanError(f"{self.owner}: loan {loan_id} of {owner} is not borrowed")
        self.vmm.check_unmap([each.span for each in loan.spans])
        with self._undoing() as undo:
            for each in loan.spans:
                self._unmap_one(undo, each.span, after)
                after = ()
        del self._borrowed[owner, loan_id]
        self.vmm.destroy_frames(loan.frames)

    def move_loan(
        self, owner: str, loan_id: int, targets: Sequence[LayerSpan], after: Iterable[Fence] | None = None
    ) -> None:
        """Maps the frames of a borrowed loan behind other spans, in order, of the same sizes as those where they are.
        `after` is as in `VmmBackend.unmap`. Raises LoanError, AlreadyMappedError, MappingFailedError."""
        loan = self._borrowed.get((owner, loan_id))
        if loan is None:
            raise LoanError(f"{self.owner}: loan {loan_id} of {owner} is not borrowed")
        self.vmm.check_map([each.span for each in targets])
        self.vmm.check_unmap([each.span for each in loan.spans])
        with self._undoing() as undo:
            for source, target in zip(loan.spans, targets, strict=True):
                self._map_one(undo, target.span, self._unmap_one(undo, source.span, after))
                after = ()
        self._borrowed[owner, loan_id] = replace(loan, spans=tuple(targets))

    # Accounting

    def snapshot(self) -> PoolSnapshot:
        """Counts frames by use, layer and peer at this moment, for status and metrics."""
        uses = self._ledger.uses()
        states: Counter[FrameState] = Counter()
        layers: dict[FrameState, Counter[int]] = {FrameState.PARAMETERS: Counter(), FrameState.KV: Counter()}
        for use, count in uses.items():
            states[use.state] += count
            if use.layer is not None:
                layers[use.state][use.layer] += count
        lent, borrowed = Counter[str](), Counter[str]()
        for loan in self._loans.values():
            lent[loan.borrower] += len(loan.frames)
        for taken in self._borrowed.values():
            borrowed[taken.owner] += len(taken.frames)
        return PoolSnapshot(
            owner=self.owner,
            frame_bytes=self.vmm.frame_bytes,
            total=self._ledger.total,
            free=states[FrameState.FREE],
            parameters=states[FrameState.PARAMETERS],
            kv=states[FrameState.KV],
            lent=states[FrameState.LENT],
            borrowed=sum(borrowed.values()),
            parameters_by_layer=MappingProxyType(dict(sorted(layers[FrameState.PARAMETERS].items()))),
            kv_by_layer=MappingProxyType(dict(sorted(layers[FrameState.KV].items()))),
            lent_by_borrower=MappingProxyType(dict(sorted(lent.items()))),
            borrowed_by_owner=MappingProxyType(dict(sorted(borrowed.items()))),
        )

    def check(self) -> None:
        """Compares the ledger with itself, with the loans and with what is really mapped. Takes about a fifth of a
        microsecond per frame. Raises LedgerError that says what is off."""
        self._ledger.verify()
        booked = Counter[int]()
        for use, count in self._ledger.uses().items():
            for _, loan_id in use.loans:
                booked[loan_id] += count
        lent = {loan_id: len(loan.frames) for loan_id, loan in self._loans.items()}
        if booked != lent:
            raise LedgerError(f"{self.owner}: frames by loan are {dict(booked)}, the loans say {lent}")
        if self.vmm.own_frame_count != self._ledger.total:
            raise LedgerError(f"{self.owner}: {self.vmm.own_frame_count} frames exist, {self._ledger.total} are booked")
        self._check_places()
        for loan in self._borrowed.values():
            places = [(each.span.virtual_range, at) for each in loan.spans for at in each.span.positions]
            if list(map(self.vmm.places.get, loan.frames)) != places:
                raise LedgerError(f"{self.owner}: loan {loan.loan_id} of {loan.owner} is not mapped as booked")

    def _check_places(self) -> None:
        place_of = self.vmm.places.get
        for frame, use in self._ledger:
            place = place_of(frame)
            buffer = None if place is None else place[0].label
            booked = use if use.before is None else use.before
            if buffer != booked.buffer:
                raise LedgerError(f"{self.owner}: {frame} is booked as {use}, but mapped in {buffer!r}")

    # All or nothing

    def _map(self, spans: Sequence[tuple[FrameUse, Span]], in_one_piece: bool) -> None:
        self.vmm.check_map([span for _, span in spans])
        self._ledger.require_free(sum(span.count for _, span in spans))
        counts = [span.count for _, span in spans]
        chosen: Iterator[Frame] | None = None
        if self.vmm.keeps_pieces_whole:
            sizes = [count for count in counts if count] if in_one_piece else [1] * sum(counts)
            chosen = itertools.chain.from_iterable(self._pieces_of(sizes))
        with self._undoing() as undo:
            for use, span in spans:
                if chosen is None:
                    frames = self._ledger.take(span.count, use)
                else:
                    frames = tuple(itertools.islice(chosen, span.count))
                    self._ledger.change(frames, FREE, use)
                undo.callback(self._ledger.change, frames, use, FREE)
                self._map_one(undo, span, frames)

    def _pieces_of(self, sizes: Sequence[int]) -> list[tuple[Frame, ...]]:
        """Returns free frames in pieces of `sizes`, in order. Those that are there are taken; for the others the
        smallest of the rest are given back and created anew, with what is left over in one piece. Raises
        OutOfMemoryError, with nothing changed."""
        by_size: defaultdict[int, list[tuple[Frame, ...]]] = defaultdict(list)
        for piece in reversed(self.vmm.pieces(self._ledger.free_frames())):
            by_size[len(piece)].append(piece)
        found = {number: by_size[size].pop() for number, size in enumerate(sizes) if by_size[size]}
        missing = [number for number in range(len(sizes)) if number not in found]
        wanted = [sizes[number] for number in missing]
        given: list[tuple[Frame, ...]] = []
        left_over = -sum(wanted)
        for size in sorted(by_size):
            while left_over < 0 and by_size[size]:
                given.append(by_size[size].pop())
                left_over += size
        created = self._recast(given, [*wanted, left_over] if left_over else wanted)
        found.update(zip(missing, created, strict=False))
        return [found[number] for number in range(len(sizes))]

    def _recast(self, pieces: Sequence[Sequence[Frame]], sizes: Sequence[int]) -> list[tuple[Frame, ...]]:
        """Gives free pieces back to the machine and creates as many frames in pieces of `sizes`. Raises
        OutOfMemoryError, with as many free frames as before, in pieces of the same sizes."""
        created = []
        with self._undoing() as undo:
            if pieces:
                self._destroy_free(tuple(itertools.chain.from_iterable(pieces)))
            for piece in pieces:
                undo.callback(self.add_frames, len(piece), in_one_piece=True)
            for size in sizes:
                frames = self.vmm.create_frames(size, in_one_piece=True)
                self._ledger.add(frames)
                undo.callback(self._destroy_free, frames)
                created.append(frames)
        return created

    def _destroy_free(self, frames: Sequence[Frame]) -> None:
        self.vmm.destroy_frames(frames)
        self._ledger.strike(frames)

    def _unmap(self, spans: Sequence[tuple[FrameUse, Span]], after: Iterable[Fence] | None) -> None:
        behind = self.vmm.check_unmap([span for _, span in spans])
        for (use, _), mapped in zip(spans, behind, strict=True):
            self._ledger.require(mapped, use)
        with self._undoing() as undo:
            for use, span in spans:
                frames = self._unmap_one(undo, span, after)
                self._ledger.change(frames, use, FREE)
                undo.callback(self._ledger.change, frames, FREE, use)
                after = ()

    def _map_one(self, undo: ExitStack, span: Span, frames: Sequence[Frame]) -> None:
        self.vmm.map(span, frames)
        undo.callback(self.vmm.unmap, span, after=())

    def _unmap_one(self, undo: ExitStack, span: Span, after: Iterable[Fence] | None) -> tuple[Frame, ...]:
        frames = self.vmm.unmap(span, after)
        undo.callback(self.vmm.map, span, frames)
        return frames

    @contextmanager
    def _undoing(self) -> Iterator[ExitStack]:
        """Runs the callbacks, last first, if the block fails. Raises InvariantError where one of them fails
        too: the books and the machine then disagree."""
        undo = ExitStack()
        try:
            yield undo
        except BaseException as failure:
            try:
                undo.close()
            except KunserveError as error:
                raise InvariantError(
                    f"{self.owner}: a failed operation could not be undone: {error}; it had failed because: {failure}"
                ) from error
            raise

    def _by_use(self, frames: Sequence[Frame]) -> dict[FrameUse, list[Frame]]:
        groups: dict[FrameUse, list[Frame]] = {}
        for frame in frames:
            groups.setdefault(self._ledger.use_of(frame), []).append(frame)
        return groups


def _buffer(each: LayerSpan) -> str:
    return each.span.virtual_range.label
