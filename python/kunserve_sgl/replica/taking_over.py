"""How a rank that is started again gets its layers: from the same rank of replicas that live, else from what it has by
itself. It is no part of the deployment yet."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter

import msgspec
import zmq

from kunserve_sgl.args import KunserveOptions, RemoteAttentionBy
from kunserve_sgl.control import addresses
from kunserve_sgl.control.messages import Device, Wanting
from kunserve_sgl.errors import KunserveError, TransientError
from kunserve_sgl.exchange.offer_messages import OfferInbox
from kunserve_sgl.exchange.offers import Offer, ParameterOffer
from kunserve_sgl.exits import CONTROLLER_PATIENCE_S
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.source_chain import NamedSource
from kunserve_sgl.replica.frame_channel import FrameChannel
from kunserve_sgl.replica.memory_book import MemoryBook
from kunserve_sgl.replica.peer_memory import ways_to_peers
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.wire.asking import NOBODY_TO_ASK
from kunserve_sgl.wire.rejections import COORDINATOR

logger = logging.getLogger(__name__)

_TRANSFER_TIMEOUT_S = 2.0
_LINGER_MS = 1000


def take_over(memory: ReplicaMemory, options: KunserveOptions, rank: int, device: Device) -> None:
    """Restores all layers of `memory`, which are dropped. Where nothing has come of a peer for half of
    --kunserve-transition-timeout, the rest comes from the other sources; the first layer may be as late as the
    controller that asks for it. Raises RestoreSourceError where a layer has none."""
    started_s = time.monotonic()
    taken: Counter[str] = Counter()
    if options.kunserve_lenders:
        with _Borrower(memory, options, rank, device) as borrower:
            taken = borrower.take_what_is_lent(options.kunserve_transition_timeout / 2)
    for layer in range(memory.layer_count):
        if layer not in memory.resident_layers:
            taken[memory.restore_layer(layer)] += 1
    logger.info(
        "KunServe: the layers have come from %s in %.2f s",
        ", ".join(f"{source} ({count})" for source, count in sorted(taken.items())),
        time.monotonic() - started_s,
    )


class _Borrower:
    """Takes what peers lend, at the address where the rank takes offers later on too."""

    def __init__(self, memory: ReplicaMemory, options: KunserveOptions, rank: int, device: Device) -> None:
        self._memory = memory
        self._me = memory.replica, rank, options.kunserve_incarnation
        self._device = device
        curve = self._curve = addresses.curve_of(options, (memory.replica, rank))
        self._mapped: FrameChannel | None = None
        self._by_message: OfferInbox | None = None
        self._address = ""  # where that is not known by the rank's number
        if options.way_to_peers is not RemoteAttentionBy.MESSAGE:
            self._mapped = FrameChannel(addresses.frame_socket_path(options, *self._me), _TRANSFER_TIMEOUT_S)
        if options.uses_messages:
            self._by_message = OfferInbox(addresses.memory_bind_address(options, *self._me), rank, curve)
            self._address = self._by_message.address if options.controls_by_tcp else ""
        self._ways = ways_to_peers(options, memory, rank, curve, MemoryBook(options, rank))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._coordinator = context.socket(zmq.PUSH)
        self._coordinator.setsockopt(zmq.LINGER, _LINGER_MS)
        if curve is not None:
            curve.call(self._coordinator, COORDINATOR)
        self._coordinator.connect(addresses.coordinator_address(options))

    def __enter__(self) -> _Borrower:
        with contextlib.ExitStack() as parts:
            parts.callback(self._close)
            self._say(is_done=False)
            parts.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        with contextlib.ExitStack() as parts:
            parts.callback(self._close)
            try:
                self._say(is_done=True)
            except TransientError as error:
                if kind is None:
                    raise
                logger.warning("KunServe: %s", error)  # what was raised before says why this start fails

    def _close(self) -> None:
        with contextlib.ExitStack() as parts:
            if self._curve is not None:
                parts.callback(self._curve.close)
            for inbox in (self._mapped, self._by_message):
                if inbox is not None:
                    parts.callback(inbox.close)
            parts.callback(self._coordinator.close)

    def take_what_is_lent(self, patience_s: float) -> Counter[str]:
        """Restores layers as they are offered, until all are there or nothing has come for `patience_s`. Returns how
        many came from where."""
        taken: Counter[str] = Counter()
        waits_s = max(patience_s, CONTROLLER_PATIENCE_S)
        until_s = time.monotonic() + waits_s
        offers = zmq.Poller()
        for inbox in (self._mapped, self._by_message):
            if inbox is not None:
                offers.register(inbox.listener, zmq.POLLIN)
        while len(self._memory.resident_layers) < self._memory.layer_count:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                logger.warning("KunServe: no peer has lent a layer for %g s; others are asked", waits_s)
                break
            if not offers.poll(math.ceil(1000 * left_s)):
                continue
            try:
                source = self._take_one()
            except KunserveError as error:
                logger.warning("KunServe: a layer that a peer lends is not taken: %s", error)
                continue
            if source:
                taken[source] += 1
                waits_s = patience_s
                until_s = time.monotonic() + waits_s
        return taken

    def _take_one(self) -> str:
        """Returns where a layer has come from; an empty text where none has been restored."""
        arrived = self._accept()
        if arrived is None:
            return ""
        offer, export = arrived
        with export:
            lacking = set(range(self._memory.layer_count)).difference(self._memory.resident_layers)
            if not isinstance(offer, ParameterOffer) or offer.layer not in lacking:
                return ""
            region = self._ways.taking(export).region(offer, export)
        with region:
            name = self._memory.restore_layer(offer.layer, NamedSource(region.name, region))
            region.close(after=())  # the checksum has been read, so the copy has ended
        return region.owner if name == region.name else name

    def _accept(self) -> tuple[Offer, FrameExport] | None:
        if self._mapped is not None and (arrived := self._mapped.accept()) is not None:
            return arrived
        offer = None if self._by_message is None else self._by_message.take()
        return None if offer is None else (offer, FrameExport("", 0, (), ()))

    def _say(self, is_done: bool) -> None:
        replica, rank, incarnation = self._me
        wanting = Wanting(replica, rank, self._device, is_done, incarnation, self._address)
        try:
            self._coordinator.send(msgspec.msgpack.encode(wanting), zmq.NOBLOCK)
        except zmq.Again as error:
            raise TransientError(f"the coordinator cannot be told what is wanted here: {NOBODY_TO_ASK}") from error
