"""How memory that a peer lends is used here: mapped, with file descriptors that come with the offer, or by messages to
the peer's memory service. All that differs between the two ways is here, and in `mapped_memory.py` and
`read_memory.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.kv_homes import RemoteKv
from kunserve_sgl.exchange.offers import KvOffer, LentOffer, ParameterOffer
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.layer_sources import LentRegion
from kunserve_sgl.memory.virtual_range import Fence
from kunserve_sgl.policy.plan import KvMove
from kunserve_sgl.replica.kv_copy import KvTransfer
from kunserve_sgl.replica.mapped_memory import MappedMemory
from kunserve_sgl.replica.memory_book import MemoryBook
from kunserve_sgl.replica.read_memory import ReadMemory
from kunserve_sgl.replica.read_probe import Reading
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.wire.curve import Curve

# Whose memory, and the number of the loan there.
BorrowedKey = tuple[int, int]


class PeerMemory(Protocol):
    """Is one of the ways."""

    maps: bool

    def offered(self, offer: LentOffer, loan: Loan) -> tuple[LentOffer, AbstractContextManager[FrameExport]]:
        """Returns the offer of what is lent here as it is to be sent, and the descriptors that go with it."""
        ...

    # Parameters

    def region(self, offer: ParameterOffer, export: FrameExport) -> LentRegion:
        """Returns the parameters that a peer offers, to be read. `export` stays the caller's to close. Raises as
        `FrameLoans.borrow`."""
        ...

    # KV that is at home at a peer

    def borrow_kv(self, offer: KvOffer, kv: RemoteKv, export: FrameExport, *, aside: bool) -> None:
        """Takes KV that a peer offers into use, or aside. `export` stays the caller's to close. Raises as
        `FrameLoans.borrow`."""
        ...

    def return_kv(self, kv: RemoteKv, after: Iterable[Fence] | None = None) -> None:
        """Gives KV back. `after` is as in `VmmBackend.unmap`. Raises as `FrameLoans.return_loan`."""
        ...

    def reading(self, kv: RemoteKv) -> AbstractContextManager[Reading]:
        """Gives what reads KV that is at home at a peer, from its first byte on: that of the layer's first buffer."""
        ...

    # Moves whose layer host this is

    def get_room(self, move: KvMove) -> None:
        """Gets memory for KV that comes home here. Batches use it at its old home. Raises PoolFullError,
        OutOfMemoryError, MappingFailedError."""
        ...

    def give_room_back(self, move: KvMove) -> None:
        """Frees what `get_room` has got."""
        ...

    def transfer(self, move: KvMove, kv: RemoteKv) -> KvTransfer:
        """Returns what copies the KV from home to home. `kv` is what the other has lent."""
        ...

    def change_over(self, move: KvMove, kv: RemoteKv) -> None:
        """Lets batches use the KV at its new home, which has all of it. Where that is here, what was lent has been
        given back. The device has finished what touches either."""
        ...


class WaysToPeers:
    """Knows both ways at one rank. What is lent is used in the way in which it has come: who lends decides."""

    def __init__(self, mapped: PeerMemory, read: ReadMemory | None = None) -> None:
        """`read` is there where memory of a peer may be used by messages."""
        self._mapped = mapped
        self.read = read

    def lending(self, maps: bool) -> PeerMemory:
        """Returns the way to lend memory to a peer that `maps` it."""
        return self._of(maps)

    def taking(self, export: FrameExport) -> PeerMemory:
        """Returns the way to use what came with these descriptors."""
        return self._of(bool(export.fds))

    def of(self, kv: RemoteKv) -> PeerMemory:
        """Returns the way in which KV at home at a peer is used."""
        return self._of(kv.is_mapped)

    @property
    def aside(self) -> Collection[BorrowedKey]:
        """Lists the loans of KV that is used by messages, but not yet: it gets its home there, and is copied there."""
        return () if self.read is None else self.read.aside

    def _of(self, maps: bool) -> PeerMemory:
        if maps:
            return self._mapped
        if self.read is None:
            raise InvariantError("memory is lent without descriptors, where all of it is mapped")
        return self.read


def ways_to_peers(
    options: KunserveOptions, memory: ReplicaMemory, rank: int, curve: Curve | None, book: MemoryBook
) -> WaysToPeers:
    """Returns what `options` take, for one rank; `curve` has its keys, over TCP, and `book` the addresses of
    memory. Who does not answer for a
    quarter of the time that a phase of a transition has, lends nothing: then there is time for another source."""
    patience_s, incarnation = options.kunserve_transition_timeout / 4, options.kunserve_incarnation
    read = ReadMemory(memory, rank, incarnation, book, patience_s, curve) if options.uses_messages else None
    return WaysToPeers(MappedMemory(memory), read)


def _implemented(mapped: MappedMemory, read: ReadMemory) -> tuple[PeerMemory, PeerMemory]:
    """Never called: mypy checks here that both are ways."""
    return mapped, read
