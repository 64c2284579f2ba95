"""The giving end of memory that is used by messages: one socket and one thread per rank, which answer whoever has been
lent something, and take offers.

The thread waits for nothing but orders: not for the thread that runs batches, and not for other ranks, since no
collective is in what it does. So it answers whatever this rank does meanwhile: executes a segment, waits for a batch,
for an answer of another home, in a collective, or sleeps. Orders of one peer that ask for attention come by one
connection and those that read or write come by others, and connections take turns: attention waits for one of each.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec
import torch
import zmq

from kunserve_sgl.exchange.attention_service import AttentionService
from kunserve_sgl.exchange.attention_work import AttentionOrder
from kunserve_sgl.exchange.device_copies import own_stream
from kunserve_sgl.exchange.memory_reads import (
    BytesOrder,
    ReadOrder,
    ReadRowsOrder,
    ReadService,
    WriteOrder,
    WriteRowsOrder,
)
from kunserve_sgl.exchange.offers import KvOffer, LentOffers, ParameterOffer
from kunserve_sgl.threads import await_end
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.framing import MOST_CONTROL_BYTES
from kunserve_sgl.wire.rejections import Rejections, require

logger = logging.getLogger(__name__)

_Order = AttentionOrder | BytesOrder
_Message = _Order | KvOffer | ParameterOffer


class MemoryService:
    """Serves orders to one rank, from the thread that `start` starts until `close`."""

    def __init__(
        self,
        address: str,
        rank: int,
        attention: AttentionService,
        reads: ReadService,
        take_offer: Callable[[LentOffers], None],
        curve: Curve | None = None,
        most_bytes: int = MOST_CONTROL_BYTES,
    ) -> None:
        """Binds `address`, where the same `rank` of other replicas asks and offers. `take_offer` is called with each
        offer that comes, in the thread. With `curve`, which TCP needs, only those who
        have keys of the deployment are listened to, and each as nobody else. No frame has more than `most_bytes`."""
        self._rank = rank
        self._curve = curve
        self._device = attention.device
        self._serve: Mapping[type[_Order], Callable[..., tuple[msgspec.Struct, memoryview]]] = {
            AttentionOrder: attention.answer,
            ReadOrder: reads.answer,
            WriteOrder: reads.answer_write,
            ReadRowsOrder: reads.answer_rows,
            WriteRowsOrder: reads.answer_write_rows,
        }
        self._take_offer = take_offer
        self._decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(_Message)
        self.rejections = Rejections()
        self.failure: str = ""  # why the thread has ended, if it was not closed
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance() if curve is None else curve.context
        self._socket = context.socket(zmq.ROUTER)
        for option, value in ((zmq.LINGER, 0), (zmq.RCVHWM, 0), (zmq.SNDHWM, 0), (zmq.MAXMSGSIZE, most_bytes)):
            self._socket.setsockopt(option, value)
        if curve is not None:
            curve.listen(self._socket)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        name = f"inproc://memory-{id(self)}"
        self._ending, self._end = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._ending.bind(name)
        self._end.connect(name)
        self._thread = threading.Thread(target=self._run, name="kunserve-memory", daemon=True)

    def start(self) -> None:
        """Begins to serve."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread when it has served what it is at, unless it has failed, and closes the socket. Raises
        TransientError where the thread does not come to an end, and goes on using the memory; then it may be called
        again."""
        with contextlib.suppress(zmq.Again):  # it has failed, and takes nothing any more
            self._end.send(b"", zmq.NOBLOCK)
        await_end(self._thread)
        self._end.close(linger=0)

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._ending, zmq.POLLIN)
            with torch.inference_mode(), own_stream(self._device):
                while not any(socket is self._ending for socket, _ in poller.poll()):
                    self._answer(self._socket.recv_multipart(copy=False))
        except Exception as error:
            logger.exception("KunServe: memory is not given to others any more")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self._socket.close(linger=0)
            self._ending.close(linger=0)

    def _answer(self, frames: Sequence[zmq.Frame]) -> None:
        way_back, *rest = frames
        sender = None if self._curve is None else self._curve.sender_of(frames[-1])

        def check(order: _Message) -> None:
            is_from = sender is None or sender == (order.peer, self._rank)
            require(is_from, "it is from {}, and says to be from replica {}", sender, order.peer)

        order = self.rejections.read(self._decoder, rest[0].buffer if len(rest) == 2 else b"", check)
        if order is None:
            return
        if isinstance(order, LentOffers):
            self._take_offer(order)
            return
        answer, payload = self._serve[type(order)](order, rest[1].buffer)
        self._socket.send_multipart([way_back.bytes, msgspec.msgpack.encode(answer), payload], copy=False)
