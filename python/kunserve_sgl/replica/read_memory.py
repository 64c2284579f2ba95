"""Memory of peers that is used by messages to their memory services. Nothing of it is mapped, and no descriptor is
sent."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial

import msgspec
import numpy as np
import torch

from kunserve_sgl.exchange.kv_homes import RemoteKv
from kunserve_sgl.exchange.memory_reads import LoanReader, LoanSpan, LoanTransfer, LoanWriter, Silences
from kunserve_sgl.exchange.offers import KvOffer, LentOffer, ParameterOffer
from kunserve_sgl.exchange.read_region import ReadRegion
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.layer_sources import LentRegion
from kunserve_sgl.memory.virtual_range import Fence
from kunserve_sgl.policy.plan import KvMove
from kunserve_sgl.replica.batch_shape import Int64s
from kunserve_sgl.replica.kv_copy import KvTransfer
from kunserve_sgl.replica.memory_book import MemoryBook
from kunserve_sgl.replica.read_probe import Reading
from kunserve_sgl.replica.replica_memory import ReplicaMemory, named_replica
from kunserve_sgl.wire.curve import Curve

_AT_A_TIME_BYTES = 1 << 20  # since each time waits for an answer
_PART_BYTES = 1 << 19  # between two looks at whether there is something else to do


class ReadMemory:
    """Implements `PeerMemory`. KV that is at home at a peer is attended to there, so there is nothing behind its slots
    here; what comes home here is read to where it belongs, and what goes is written to its new home."""

    maps = False

    def __init__(
        self,
        memory: ReplicaMemory,
        rank: int,
        incarnation: int,
        book: MemoryBook,
        patience_s: float,
        curve: Curve | None = None,
    ) -> None:
        """`book` says where the same rank of a replica serves. Who does not answer for
        `patience_s` lends nothing. `curve` has the keys, over TCP."""
        self._memory = memory
        self._replica, self._rank = memory.replica, rank
        self._incarnation = incarnation
        self._book = book
        self._silences = Silences(patience_s)
        self._curve = curve
        self._read_bytes: Counter[int] = Counter()  # by owner
        self._incarnations: dict[tuple[int, int], int] = {}  # of those who have lent KV, by owner and loan
        self._aside: set[tuple[int, int]] = set()

    def report(self) -> dict[str, int]:
        """Counts the bytes that have been read since the start, by owner."""
        return {str(owner): count for owner, count in sorted(self._read_bytes.items())}

    def offered(self, offer: LentOffer, loan: Loan) -> tuple[LentOffer, AbstractContextManager[FrameExport]]:
        """See `PeerMemory`."""
        return msgspec.structs.replace(offer, incarnation=self._incarnation, address=self._book.own), FrameExport(
            "", 0, (), ()
        )

    def region(self, offer: ParameterOffer, export: FrameExport) -> LentRegion:
        """See `PeerMemory`."""
        self._book.learn(offer.owner, offer.incarnation, offer.address)
        reader = LoanReader(*self._at(offer.owner, offer.incarnation, offer.loan_id), self._silences, self._curve)
        return ReadRegion(named_replica(offer.owner), offer.layer, reader, partial(self._count, offer.owner))

    @property
    def aside(self) -> Collection[tuple[int, int]]:
        """See `WaysToPeers`."""
        return frozenset(self._aside)

    def borrow_kv(self, offer: KvOffer, kv: RemoteKv, export: FrameExport, *, aside: bool) -> None:
        """See `PeerMemory`."""
        self._book.learn(offer.owner, offer.incarnation, offer.address)
        self._incarnations[kv.home, kv.loan] = offer.incarnation
        if aside:
            self._aside.add((kv.home, kv.loan))

    def return_kv(self, kv: RemoteKv, after: Iterable[Fence] | None = None) -> None:
        """See `PeerMemory`."""
        del self._incarnations[kv.home, kv.loan]
        self._aside.discard((kv.home, kv.loan))

    def reader(self, kv: RemoteKv) -> LoanReader:
        """Returns what reads KV that is at home elsewhere: a part for each buffer of the layer, in the order of
        `ElasticKv.rows`. The caller closes it."""
        return LoanReader(*self._lender_of(kv), self._silences, self._curve)

    def writer(self, kv: RemoteKv) -> LoanWriter:
        """Returns what writes to KV that is at home elsewhere; see `reader`."""
        return LoanWriter(*self._lender_of(kv), self._silences, self._curve)

    @contextmanager
    def reading(self, kv: RemoteKv) -> Iterator[Reading]:
        """See `PeerMemory`."""
        with closing(self.reader(kv)) as reader:
            yield lambda into: deque(reader.transfer([LoanSpan(0, 0, into)], into.numel()), maxlen=0)

    def get_room(self, move: KvMove) -> None:
        """See `PeerMemory`."""
        self._memory.take_home(move.extent, move.layer)

    def give_room_back(self, move: KvMove) -> None:
        """See `PeerMemory`."""
        self._memory.leave_home(move.extent, move.layer)

    def transfer(self, move: KvMove, kv: RemoteKv) -> KvTransfer:
        """See `PeerMemory`."""
        comes_here = move.target == self._replica
        here = self._memory.kv.bytes_behind(kv.slots, kv.layer)
        count = partial(self._count, kv.home) if comes_here else lambda size_bytes: None
        return _ByMessages(self.reader(kv) if comes_here else self.writer(kv), here, kv.slots.count, count)

    def change_over(self, move: KvMove, kv: RemoteKv) -> None:
        """See `PeerMemory`."""
        if move.target != self._replica:
            self._aside.remove((kv.home, kv.loan))
            self._memory.leave_home(move.extent, move.layer, after=())

    def _lender_of(self, kv: RemoteKv) -> tuple[str, tuple[int, int], int, int]:
        return self._at(kv.home, self._incarnations[kv.home, kv.loan], kv.loan)

    def _at(self, owner: int, incarnation: int, loan: int) -> tuple[str, tuple[int, int], int, int]:
        return self._book.address_of(owner, incarnation), (owner, self._rank), self._replica, loan

    def _count(self, owner: int, size_bytes: int) -> None:
        self._read_bytes[owner] += size_bytes


class _ByMessages(KvTransfer):
    """Copies between memory here and a loan. Between two looks it waits for a millisecond at most."""

    least_bytes = _AT_A_TIME_BYTES

    def __init__(
        self, loan: LoanTransfer, here: list[torch.Tensor], slot_count: int, count: Callable[[int], None]
    ) -> None:
        """`here` are the bytes behind the slots, buffer by buffer. `count` is told how many have been copied."""
        self._loan = loan
        self._here = [part.view(slot_count, -1) for part in here]
        self._count = count
        self.slot_bytes = sum(part.shape[1] for part in self._here)

    def copy(self, first: int, count: int) -> Iterator[None]:
        return self._transfer(
            LoanSpan(part, first * here.shape[1], here[first : first + count].view(-1))
            for part, here in enumerate(self._here)
        )

    def copy_slots(self, ids: Int64s) -> Iterator[None]:
        rows, numbers = torch.from_numpy(ids), ids.astype(np.int32)
        held = [here[rows] for here in self._here]
        yield from self._transfer(
            LoanSpan(part, int(numbers[0]), each.view(-1), numbers) for part, each in enumerate(held)
        )
        if isinstance(self._loan, LoanReader):
            for here, each in zip(self._here, held, strict=True):
                here[rows] = each

    def close(self) -> None:
        self._loan.close()

    def _transfer(self, pieces: Iterable[LoanSpan]) -> Iterator[None]:
        before = 0
        self._loan.waits = self.waits
        for done in self._loan.transfer(pieces, _PART_BYTES):
            self._count(done - before)
            before = done
            yield
            self._loan.waits = self.waits
