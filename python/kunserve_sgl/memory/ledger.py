"""The book of a replica's frames: what each one is used for, and that the uses add up to the total.

Every frame is in exactly one state, so free + parameters + KV + lent == total holds at all times. A change
names the use it starts from, so that a mistaken caller is refused instead of corrupting the book.
"""

from __future__ import annotations

import enum
import functools
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kunserve_sgl.memory.errors import LedgerError, PoolFullError
from kunserve_sgl.memory.virtual_range import Frame


class FrameState(enum.Enum):
    """Names the one state that a frame is in."""

    FREE = "free"
    PARAMETERS = "parameters"
    KV = "kv"
    LENT = "lent"


@dataclass(frozen=True, slots=True)
class FrameUse:
    """Says what a frame is used for. The functions below make it.

    `layer` and `buffer` (the label of the virtual range) belong to parameters and KV; `loans` (borrower and number of
    each, ascending by number) and `before` (the use it returns to after the last one) to lent frames.
    """

    state: FrameState
    layer: int | None = None
    buffer: str | None = None
    loans: tuple[tuple[str, int], ...] = ()
    before: FrameUse | None = None

    @property
    def own(self) -> FrameUse:
        """Says what the frame is used for here, whether it is lent or not."""
        return self if self.before is None else self.before

    def __str__(self) -> str:
        if self.state is FrameState.LENT:
            return "lent to " + ", ".join(f"{borrower} (loan {loan_id})" for borrower, loan_id in self.loans)
        if self.state is FrameState.FREE:
            return "free"
        return f"{self.state.value} of layer {self.layer} in {self.buffer!r}"


FREE = FrameUse(FrameState.FREE)


@functools.cache
def parameters_of(layer: int, buffer: str) -> FrameUse:
    """Makes the use of a frame behind the parameters of `layer`; `buffer` is the label of its virtual range."""
    return FrameUse(FrameState.PARAMETERS, layer, buffer)


@functools.cache
def kv_of(layer: int, buffer: str) -> FrameUse:
    """Makes the use of a frame behind a KV buffer of `layer`; `buffer` is the label of its virtual range."""
    return FrameUse(FrameState.KV, layer, buffer)


def lent_to(borrower: str, loan_id: int, use: FrameUse) -> FrameUse:
    """Returns what `use` becomes by one more loan. Loan numbers ascend, so equal sets of loans are equal uses."""
    return FrameUse(FrameState.LENT, loans=(*use.loans, (borrower, loan_id)), before=use.own)


def returned(loan_id: int, use: FrameUse) -> FrameUse:
    """Returns what `use` becomes when loan `loan_id` ends; loans end in any order."""
    loans = tuple(loan for loan in use.loans if loan[1] != loan_id)
    return FrameUse(FrameState.LENT, loans=loans, before=use.before) if loans else use.own


class FrameLedger:
    """Books the uses of all frames of one owner, with their counts. Every change happens entirely or not at all."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._use: dict[Frame, FrameUse] = {}
        self._count: Counter[FrameUse] = Counter()
        # The lowest free frame is given out first: frames that follow each other are mapped by fewer calls.
        self._free: list[Frame] = []

    @property
    def total(self) -> int:
        """Counts all frames that are booked."""
        return len(self._use)

    @property
    def free(self) -> int:
        """Counts the frames that are free."""
        return len(self._free)

    def uses(self) -> Mapping[FrameUse, int]:
        """Counts the frames of each use; uses without frames are left out."""
        return dict(self._count)

    def use_of(self, frame: Frame) -> FrameUse:
        """Looks up what a frame is used for. Raises LedgerError where it is not booked."""
        try:
            return self._use[frame]
        except KeyError:
            raise LedgerError(f"{self.owner}: {frame} is not in the ledger") from None

    def __iter__(self) -> Iterator[tuple[Frame, FrameUse]]:
        return iter(self._use.items())

    def add(self, frames: Sequence[Frame]) -> None:
        """Enters new frames as free."""
        if len(set(frames)) != len(frames) or not self._use.keys().isdisjoint(frames):
            raise LedgerError(f"{self.owner}: a frame would be entered twice")
        self._use.update((frame, FREE) for frame in frames)
        self._book(FREE, len(frames))
        self._put_free(frames)

    def remove(self, count: int) -> tuple[Frame, ...]:
        """Strikes `count` free frames out, those that would be given out last. Raises PoolFullError."""
        self.require_free(count)
        # A sorted list is a valid heap, so the rest stays one.
        self._free.sort()
        removed = tuple(self._free[len(self._free) - count :])
        del self._free[len(self._free) - count :]
        for frame in removed:
            del self._use[frame]
        self._book(FREE, -count)
        return removed

    def free_frames(self) -> list[Frame]:
        """Returns the free frames, the lowest first."""
        self._free.sort()  # a sorted list is a valid heap
        return list(self._free)

    def strike(self, frames: Sequence[Frame]) -> None:
        """Strikes these free frames out. Raises LedgerError where one is not free."""
        self.require(frames, FREE)
        self._leave_free(frames)
        for frame in frames:
            del self._use[frame]
        self._book(FREE, -len(frames))

    def take(self, count: int, use: FrameUse) -> tuple[Frame, ...]:
        """Puts `count` free frames to `use`, the lowest first. Raises PoolFullError."""
        self.require_free(count)
        taken = tuple(heapq.heappop(self._free) for _ in range(count))
        self._enter(taken, FREE, use)
        return taken

    def change(self, frames: Sequence[Frame], before: FrameUse, after: FrameUse) -> None:
        """Puts frames that are in use `before` to use `after`. Raises LedgerError where one is in another
        use."""
        self.require(frames, before)
        if len(set(frames)) != len(frames):
            raise LedgerError(f"{self.owner}: a frame is named twice in one change")
        if before == FREE:
            self._leave_free(frames)
        self._enter(frames, before, after)
        if after == FREE:
            self._put_free(frames)

    def require(self, frames: Iterable[Frame], use: FrameUse) -> None:
        """Raises LedgerError where a frame is not in `use`."""
        for frame in frames:
            found = self.use_of(frame)
            if found is not use and found != use:
                raise LedgerError(f"{self.owner}: {frame} is {found}, not {use}")

    def verify(self) -> None:
        """Counts everything anew. Raises LedgerError that names the line that is off."""
        # Counted by identity first: hashing a use costs ten times as much, and nearly always this is enough.
        by_identity = Counter(map(id, self._use.values()))
        if by_identity != {id(use): count for use, count in self._count.items()}:
            self._verify_counts(by_identity)
        listed, free = set(self._free), self._count.get(FREE, 0)
        if len(listed) != len(self._free) or len(listed) != free:
            raise LedgerError(f"{self.owner}: the free list has {len(self._free)} frames, {free} are free")
        self.require(listed, FREE)
        if sum(self._count.values()) != self.total:
            raise LedgerError(f"{self.owner}: uses add up to {sum(self._count.values())} of {self.total} frames")

    def _verify_counts(self, by_identity: Mapping[int, int]) -> None:
        """Compares the counts of uses, of which several that are the same may be in the book."""
        counted = Counter[FrameUse]()
        distinct = {id(use): use for use in self._use.values()}
        for identity, count in by_identity.items():
            counted[distinct[identity]] += count
        for use in counted.keys() | self._count.keys():
            if counted[use] != self._count[use]:
                raise LedgerError(f"{self.owner}: {self._count[use]} frames are booked as {use}, {counted[use]} are")

    def _enter(self, frames: Sequence[Frame], before: FrameUse, after: FrameUse) -> None:
        self._use.update((frame, after) for frame in frames)
        self._book(before, -len(frames))
        self._book(after, len(frames))

    def _book(self, use: FrameUse, difference: int) -> None:
        self._count[use] += difference
        # Loans come and go without end, so a use without frames is struck out.
        if not self._count[use]:
            del self._count[use]

    def _leave_free(self, frames: Sequence[Frame]) -> None:
        leaving = set(frames)
        self._free = [frame for frame in self._free if frame not in leaving]
        heapq.heapify(self._free)

    def _put_free(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            heapq.heappush(self._free, frame)

    def require_free(self, count: int) -> None:
        """Raises PoolFullError where fewer than `count` frames are free."""
        if count < 0:
            raise LedgerError(f"{self.owner}: {count} frames cannot be taken")
        if count > len(self._free):
            raise PoolFullError(f"{self.owner}: {count} frames are needed, {len(self._free)} of {self.total} are free")
