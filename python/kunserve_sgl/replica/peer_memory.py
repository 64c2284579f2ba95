"""How memory that a peer lends is used here: mapped, with file descriptors that come with the offer, or by messages to
the peer's memory service. All that differs between the two ways is here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import msgspec
from typing_extensions import override

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.exchange.memory_reads import LoanReader, Silences
from kunserve_sgl.exchange.read_region import ReadRegion
from kunserve_sgl.memory.borrowed_region import BorrowedRegion
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_pool import FramePool, Loan
from kunserve_sgl.memory.layer_sources import LentRegion
from kunserve_sgl.replica.frame_channel import ParameterOffer
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.wire.curve import Curve, Name


class PeerMemory(Protocol):
    """Is one of the ways."""

    def offered(self, offer: ParameterOffer, loan: Loan) -> tuple[ParameterOffer, AbstractContextManager[FrameExport]]:
        """Returns the offer of parameters that are lent here as it is to be sent, and the descriptors that go with
        it."""
        ...

    def region(self, offer: ParameterOffer, export: FrameExport) -> LentRegion:
        """Returns the parameters that a peer offers, to be read. `export` stays the caller's to close. Raises as
        `FramePool.borrow`."""
        ...


class MappedMemory(PeerMemory):
    """Maps the frames, so that they are read as own ones are."""

    def __init__(self, frames: FramePool) -> None:
        self._frames = frames

    @override
    def offered(self, offer: ParameterOffer, loan: Loan) -> tuple[ParameterOffer, AbstractContextManager[FrameExport]]:
        return offer, self._frames.vmm.export_frames(loan.frames)

    @override
    def region(self, offer: ParameterOffer, export: FrameExport) -> LentRegion:
        return BorrowedRegion(self._frames, named_replica(offer.owner), offer.loan_id, export, offer.layer)


class ReadMemory(PeerMemory):
    """Reads by messages. Nothing is mapped, and no descriptor is sent."""

    def __init__(
        self,
        me: Name,
        incarnation: int,
        address_of: Callable[[int, int], str],
        patience_s: float,
        curve: Curve | None = None,
    ) -> None:
        """`me` is the replica and the rank that reads; `address_of(replica, incarnation)` is where the same rank of a
        replica serves. Who does not answer for `patience_s` lends nothing. `curve` has the keys, over TCP."""
        self._replica, self._rank = me
        self._incarnation = incarnation
        self._address_of = address_of
        self._silences = Silences(patience_s)
        self._curve = curve
        self._read_bytes: Counter[int] = Counter()  # by owner

    def report(self) -> dict[str, int]:
        """Counts the bytes that have been read since the start, by owner."""
        return {str(owner): count for owner, count in sorted(self._read_bytes.items())}

    @override
    def offered(self, offer: ParameterOffer, loan: Loan) -> tuple[ParameterOffer, AbstractContextManager[FrameExport]]:
        return msgspec.structs.replace(offer, incarnation=self._incarnation), FrameExport("", 0, (), ())

    @override
    def region(self, offer: ParameterOffer, export: FrameExport) -> LentRegion:
        address = self._address_of(offer.owner, offer.incarnation)
        lender = offer.owner, self._rank
        reader = LoanReader(address, lender, self._replica, offer.loan_id, self._silences, self._curve)
        return ReadRegion(named_replica(offer.owner), offer.layer, reader, partial(self._count, offer.owner))

    def _count(self, owner: int, size_bytes: int) -> None:
        self._read_bytes[owner] += size_bytes


def peer_memory_of(
    options: KunserveOptions, memory: ReplicaMemory, rank: int, curve: Curve | None
) -> MappedMemory | ReadMemory:
    """Returns the way that `options` say, for one rank; `curve` has its keys, over TCP. Who does not answer for a
    quarter of the time that a phase of a transition has, lends nothing: then there is time for another source."""
    if not options.attends_by_message:
        return MappedMemory(memory.frames)
    return ReadMemory(
        (memory.replica, rank),
        options.kunserve_incarnation,
        lambda replica, incarnation: addresses.memory_address(options, replica, rank, incarnation),
        options.kunserve_transition_timeout / 4,
        curve,
    )


def named_replica(replica: int) -> str:
    """Names a replica as the books of frames do."""
    return f"replica {replica}"
