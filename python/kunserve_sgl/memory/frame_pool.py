"""All frames of one replica (one tensor-parallel rank): mapped behind parameters and KV, with the ledger kept in step.
What is lent to other replicas and borrowed from them is in `frame_loans.py`.

Every operation happens entirely or not at all, on any number of spans. One thread uses a pool at a time.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kunserve_sgl.memory.errors import LedgerError
from kunserve_sgl.memory.frame_loans import FrameLoans
from kunserve_sgl.memory.ledger import FREE, FrameLedger, FrameState, FrameUse, kv_of, parameters_of
from kunserve_sgl.memory.undoing import map_span, undoing, unmap_span
from kunserve_sgl.memory.virtual_range import Fence, Frame, LayerSpan, Span
from kunserve_sgl.memory.vmm import VmmBackend


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
        self.loans = FrameLoans(vmm, owner, self._ledger)

    @property
    def free_frames(self) -> int:
        """Counts the frames that can be mapped now."""
        return self._ledger.free

    def add_frames(self, count: int, *, in_one_piece: bool = False) -> None:
        """Creates `count` free frames. `in_one_piece` is as in `VmmBackend.create_frames`. Raises OutOfMemoryError."""
        self._ledger.add(self.vmm.create_frames(count, in_one_piece=in_one_piece))

    def remove_frames(self, count: int) -> None:
        """Gives the memory of `count` free frames back to the machine. Raises PoolFullError."""
        removed = self._ledger.remove(count)
        with undoing(self.owner) as undo:
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
        with undoing(self.owner) as undo:
            for each in spans:
                use, count = kv_of(each.layer, _buffer(each)), each.span.count
                frames = self.vmm.create_frames(count, in_one_piece=True)
                undo.callback(self.vmm.destroy_frames, frames)
                self._ledger.add(frames)
                undo.callback(self._ledger.strike, frames)
                self._ledger.change(frames, FREE, use)
                undo.callback(self._ledger.change, frames, use, FREE)
                map_span(self.vmm, undo, each.span, frames)

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
        with undoing(self.owner) as undo:
            for use, source, target in zip(uses, sources, targets, strict=True):
                frames = unmap_span(self.vmm, undo, source.span, after)
                booked = kv_of(target.layer, _buffer(target))
                self._ledger.change(frames, use, booked)
                undo.callback(self._ledger.change, frames, booked, use)
                map_span(self.vmm, undo, target.span, frames)
                after = ()

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
        lent, borrowed = self.loans.lent_by_borrower(), self.loans.borrowed_by_owner()
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
        self.loans.check()
        if self.vmm.own_frame_count != self._ledger.total:
            raise LedgerError(f"{self.owner}: {self.vmm.own_frame_count} frames exist, {self._ledger.total} are booked")
        self._check_places()

    def _check_places(self) -> None:
        place_of = self.vmm.places.get
        for frame, use in self._ledger:
            place = place_of(frame)
            buffer = None if place is None else place[0].label
            if buffer != use.own.buffer:
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
        with undoing(self.owner) as undo:
            for use, span in spans:
                if chosen is None:
                    frames = self._ledger.take(span.count, use)
                else:
                    frames = tuple(itertools.islice(chosen, span.count))
                    self._ledger.change(frames, FREE, use)
                undo.callback(self._ledger.change, frames, use, FREE)
                map_span(self.vmm, undo, span, frames)

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
        with undoing(self.owner) as undo:
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
        with undoing(self.owner) as undo:
            for use, span in spans:
                frames = unmap_span(self.vmm, undo, span, after)
                self._ledger.change(frames, use, FREE)
                undo.callback(self._ledger.change, frames, FREE, use)
                after = ()


def _buffer(each: LayerSpan) -> str:
    return each.span.virtual_range.label
