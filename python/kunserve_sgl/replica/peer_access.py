"""How a rank and its peers get at each other's memory, mapped or by messages, with each peer in the one way or the
other: what one rank has for the ways that there may be is put together here.

By messages a thread gives memory to others (`kv_elsewhere.py`), the addresses of peers have to be known
(`memory_book.py`), and the links to them are measured (`link_measuring.py`). Where all memory is mapped there is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kunserve_sgl.args import KunserveOptions, RemoteAttentionBy
from kunserve_sgl.control import addresses
from kunserve_sgl.control.messages import Lend, Welcome
from kunserve_sgl.exchange.attention_service import PartAttention
from kunserve_sgl.exchange.offer_messages import OfferMessages
from kunserve_sgl.exchange.offers import OfferAddress, OfferChannel, TwoChannels
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work_check import Limits
from kunserve_sgl.replica.frame_channel import FrameChannel
from kunserve_sgl.replica.hosting import LayerHosting
from kunserve_sgl.replica.kv_elsewhere import KvElsewhere
from kunserve_sgl.replica.layer_runner import LayerRunner
from kunserve_sgl.replica.link_measuring import LinkMeasuring, Peer
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.memory_book import MemoryBook
from kunserve_sgl.replica.peer_memory import ways_to_peers
from kunserve_sgl.replica.place import Place
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.replica.row_copies import CopiesByMessage, RowCopies
from kunserve_sgl.wire.curve import Curve

# An offer is sent in one go, so whoever stops in the middle of one is dead or stopped, and must not hold others up.
_TRANSFER_TIMEOUT_S = 2.0


class PeerAccess:
    """Is one rank's. `channel` takes offers, and `ways` use what is offered; `elsewhere` attends to KV of peers, and
    lets them attend to KV here, where that goes by messages: None before `begin`, and where all memory is mapped."""

    def __init__(self, place: Place, options: KunserveOptions, memory: ReplicaMemory, curve: Curve | None) -> None:
        """Takes offers from now on. `curve` has the keys, over TCP."""
        self._place = place
        self._options = options
        self._memory = memory
        self._curve = curve
        me = place.replica, place.rank, options.kunserve_incarnation
        self.frame_address = addresses.frame_socket_path(options, *me)
        self._book = MemoryBook(options, place.rank)
        self.ways = ways_to_peers(options, memory, place.rank, curve, self._book)
        self._mapping: dict[tuple[int, int], bool] = {}  # by peer and incarnation, where that is for each to say
        self._offers = OfferMessages(place.rank, curve) if options.uses_messages else None
        self.channel = self._channel()
        self.elsewhere: KvElsewhere | None = None
        self._links: LinkMeasuring | None = None

    def _channel(self) -> OfferChannel:
        if self._offers is not None and self._options.way_to_peers is RemoteAttentionBy.MESSAGE:
            return self._offers
        mapped = FrameChannel(self.frame_address, _TRANSFER_TIMEOUT_S)
        return mapped if self._offers is None else TwoChannels(mapped, self._offers)

    @property
    def memory_address(self) -> str:
        """Gives where memory of this rank is used by messages, as far as that has to be told."""
        return self._book.own

    def row_copies(self, layers: LayerRunner, loans: Loans) -> RowCopies:
        """Returns what copies KV of slots in the layers that run here."""
        if self.ways.read is None:
            return RowCopies(layers)
        return CopiesByMessage(layers, self._memory.kv, loans.homes, self.ways.read)

    def begin(
        self,
        link: PeerLink,
        loans: Loans,
        hosting: LayerHosting,
        all_ranks: Callable[[bool], bool],
        incarnation_of: Callable[[int], int],
        attention: PartAttention | None,
        limits: Limits,
        most_tokens: int,
        tell_link: Callable[[Peer, float], None],
    ) -> None:
        """Gives memory to others from now on, where that goes by messages, by a thread that uses `attention`.
        `all_ranks` is that of the engine, `incarnation_of(replica)` that of now. Messages are about what `limits` say,
        and a batch has `most_tokens` at most. `tell_link` is called in a thread, with bytes per second."""
        if self._offers is None:
            return
        assert attention is not None
        place, book = self._place, self._book
        self.elsewhere = KvElsewhere(
            link,
            loans,
            hosting.away,
            hosting.turns,
            all_ranks,
            place.replicas,
            self._memory.layer_count,
            attention,
            self._offers,
            addresses.memory_bind_address(self._options, place.replica, place.rank, self._options.kunserve_incarnation),
            lambda peer: book.address_of(peer, incarnation_of(peer)),
            self._curve,
            limits,
            most_tokens,
        )
        book.own = self.elsewhere.address if self._options.controls_by_tcp else ""
        self._links = LinkMeasuring(place.replica, place.rank, place.replicas, tell_link, self._curve)

    def maps(self, peer: int, incarnation: int) -> bool:
        """Tells whether a peer and this rank map each other's memory. Where nobody has said so, they do not."""
        way = self._options.way_to_peers
        is_said = self._mapping.get((peer, incarnation), False)
        return way is RemoteAttentionBy.MAP or (way is RemoteAttentionBy.AUTO and is_said)

    def offers_at(self, peer: int, incarnation: int) -> OfferAddress:
        """Returns where this rank of a replica takes offers of memory. Raises TransientError where nobody knows."""
        if not self.maps(peer, incarnation):
            return OfferAddress(self._book.address_of(peer, incarnation), maps=False)
        path = addresses.frame_socket_path(self._options, peer, self._place.rank, incarnation)
        return OfferAddress(path, maps=True)

    def learn_of_borrowers(self, order: Lend) -> None:
        """Takes note of where those are that something is to be lent to, and how."""
        for loan in order.loans if self.elsewhere is not None else ():
            self._mapping[loan.borrower, loan.incarnation] = loan.maps
            if loan.memory_addresses:
                self._book.learn(loan.borrower, loan.incarnation, loan.memory_addresses[self._place.rank])

    def meet(self, welcome: Welcome, new: Iterable[tuple[int, int]]) -> None:
        """Takes note of where the peers are, and whose memory is mapped. Links to those of the incarnations that are
        `new`, (replica, incarnation) each, whose memory is not mapped are measured."""
        if self._links is None:
            return
        self._mapping.update(zip(enumerate(welcome.incarnations), welcome.maps, strict=False))
        for peer, ranks in enumerate(welcome.memory_addresses):
            self._book.learn(peer, welcome.incarnations[peer], ranks[self._place.rank])
        self._links.meet([Peer(*each, self._book.address_of(*each)) for each in new if not self.maps(*each)])

    def forget(self, peer: int) -> None:
        """Closes the ways to a peer whose processes have ended, and forgets what they have asked for."""
        if self.elsewhere is not None and self._offers is not None:
            self.elsewhere.forget(peer)
            self._offers.forget(peer)
            self._mapping = {each: maps for each, maps in self._mapping.items() if each[0] != peer}

    def look(self) -> None:
        """Raises InvariantError where a thread of this rank has failed. Every rank is to look, now and then."""
        if self.elsewhere is not None:
            self.elsewhere.look()

    def report(self, incarnations: Sequence[int]) -> dict[str, Any]:
        """Says by what way memory of each peer, whose `incarnations` are by replica, is used here and, for messages,
        how many orders there were and how many bytes were read since the start."""
        peers = {}
        for peer, incarnation in enumerate(incarnations):
            if peer != self._place.replica:
                maps = self.maps(peer, incarnation)
                peers[str(peer)] = (RemoteAttentionBy.MAP if maps else RemoteAttentionBy.MESSAGE).value
        report: dict[str, Any] = {"by": self._options.way_to_peers.value, "peers": peers}
        if self.elsewhere is not None and self.ways.read is not None:
            report.update(self.elsewhere.report(), bytes_read=self.ways.read.report())
        return report

    def close(self) -> None:
        """Takes no more offers, and ends the threads, also where one of them does not come to its end. Raises
        TransientError then."""
        with contextlib.ExitStack() as parts:
            parts.callback(self.channel.close)
            if self.elsewhere is not None:
                parts.callback(self.elsewhere.close)
            if self._links is not None:
                parts.callback(self._links.close)
