"""Offers of memory that is used by messages: sent to the memory service of the borrower, and taken from the own one."""

from __future__ import annotations

from queue import Empty, SimpleQueue

import msgspec
import zmq
from typing_extensions import override

from kunserve_sgl.exchange.offers import LentOffers, Offer, OfferChannel
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.wire.asking import NOBODY_TO_ASK, connect_asker
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.framing import BESIDE_BYTES
from kunserve_sgl.wire.rejections import Rejections, require


class OfferMessages(OfferChannel):
    """Sends and takes offers without descriptors, for one rank."""

    def __init__(self, rank: int, curve: Curve | None) -> None:
        """`curve` has the keys, over TCP."""
        self._rank = rank
        self._curve = curve
        self._arrived: SimpleQueue[LentOffers] = SimpleQueue()
        self._sockets: dict[tuple[int, str], zmq.Socket[bytes]] = {}

    def put(self, offer: LentOffers) -> None:
        """Takes in an offer that has come. Any thread may call it."""
        self._arrived.put(offer)

    def forget(self, borrower: int) -> None:
        """Closes the ways to a replica whose processes have ended."""
        for key in [key for key in self._sockets if key[0] == borrower]:
            self._sockets.pop(key).close(linger=0)

    @override
    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close(linger=0)
        self._sockets.clear()

    @override
    def offer(self, borrower: int, address: str, offer: Offer, export: FrameExport) -> None:
        if export.fds:
            raise TransferError(f"descriptors cannot be sent to replica {borrower}, which is elsewhere")
        way = borrower, address
        if way not in self._sockets:
            self._sockets[way] = connect_asker(address, (borrower, self._rank), self._curve, BESIDE_BYTES)
        try:
            self._sockets[way].send_multipart([msgspec.msgpack.encode(offer), b""], zmq.NOBLOCK)
        except zmq.Again as error:
            raise TransferError(f"memory cannot be offered to replica {borrower}: {NOBODY_TO_ASK}") from error

    @override
    def accept(self) -> tuple[Offer, FrameExport] | None:
        try:
            return self._arrived.get_nowait(), FrameExport("", 0, (), ())
        except Empty:
            return None


class OfferInbox:
    """Takes offers for a rank that has no memory service yet, at the address where that will be. One thread uses it."""

    def __init__(self, address: str, rank: int, curve: Curve | None) -> None:
        """Binds `address`, where the same `rank` of other replicas offers. With `curve`, which TCP needs, only those
        who have keys of the deployment are listened to, and each as nobody else."""
        self._rank = rank
        self._curve = curve
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance() if curve is None else curve.context
        self.listener = context.socket(zmq.ROUTER)
        self.listener.setsockopt(zmq.LINGER, 0)
        self.listener.setsockopt(zmq.MAXMSGSIZE, BESIDE_BYTES)
        if curve is not None:
            curve.listen(self.listener)
        self.listener.bind(address)
        self.address = self.listener.getsockopt_string(zmq.LAST_ENDPOINT)
        self._decoder: msgspec.msgpack.Decoder[LentOffers] = msgspec.msgpack.Decoder(LentOffers)
        self._rejections = Rejections()

    def take(self) -> LentOffers | None:
        """Returns an offer that has come; None where there is none. What makes no sense is ignored."""
        if not self.listener.poll(0):
            return None
        frames = self.listener.recv_multipart(copy=False)
        sender = None if self._curve is None else self._curve.sender_of(frames[-1])

        def check(offer: LentOffers) -> None:
            is_from = sender is None or sender == (offer.peer, self._rank)
            require(is_from, "it is from {}, and says to be from replica {}", sender, offer.peer)

        return self._rejections.read(self._decoder, frames[1].buffer if len(frames) == 3 else b"", check)

    def close(self) -> None:
        """Listens no more. The address can be bound again: what is left there of an ipc socket is replaced then."""
        self.listener.close(0)
