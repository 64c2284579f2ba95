"""Who measures the links between replicas, and when: each rank those to some of its peers, one after another, when it
meets them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import zmq

from kunserve_sgl.errors import KunserveError
from kunserve_sgl.exchange.link_probe import measure
from kunserve_sgl.threads import await_end
from kunserve_sgl.wire.curve import Curve

logger = logging.getLogger(__name__)


class Peer(NamedTuple):
    """Names an incarnation of a replica, and where memory of the same rank of it is used by messages."""

    replica: int
    incarnation: int
    address: str


def measured_by(replica: int, replicas: int) -> list[int]:
    """Lists the peers to which `replica` measures the links: those that follow it in a ring, as far as half of it. So
    each of the n(n-1)/2 pairs is measured once, nobody measures more than n/2, and those who begin together each read
    from one and are read by one at a time."""
    peers = [(replica + step) % replicas for step in range(1, (replicas + 1) // 2)]
    if replicas % 2 == 0 and replica < replicas // 2:
        peers.append(replica + replicas // 2)
    return peers


class LinkMeasuring:
    """Measures in the background, in a thread that ends when it is done: batches do not wait for it."""

    def __init__(
        self, replica: int, rank: int, replicas: int, tell: Callable[[Peer, float], None], curve: Curve | None
    ) -> None:
        """`tell` is called in the thread, with a peer and bytes per second. `curve` has the keys, over TCP."""
        self._replica, self._rank = replica, rank
        self._peers = frozenset(measured_by(replica, replicas))
        self._tell = tell
        self._curve = curve
        self._ends = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._threads: list[threading.Thread] = []

    def meet(self, peers: Sequence[Peer]) -> None:
        """Measures the links to those of `peers`, new incarnations of replicas, that this one is to measure."""
        wanted = [peer for peer in peers if peer.replica in self._peers]
        wanted.sort(key=lambda peer: peer.replica <= self._replica)  # in the order of the ring
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if wanted:
            self._threads.append(threading.Thread(target=self._run, args=(wanted,), name="kunserve-links", daemon=True))
            self._threads[-1].start()

    def close(self) -> None:
        """Ends what is under way. Raises TransientError where that does not come to its end."""
        self._ends.set()
        for thread in self._threads:
            await_end(thread)

    def _run(self, peers: Sequence[Peer]) -> None:
        with self._one_at_a_time:
            for peer in peers:
                if self._ends.is_set():
                    return
                try:
                    lender = peer.replica, self._rank
                    speed = measure(peer.address, lender, self._replica, self._curve, self._ends.is_set)
                    self._tell(peer, speed)
                except (KunserveError, zmq.ZMQError) as error:
                    # Nothing depends on it: partners are chosen by their nodes then.
                    logger.warning("KunServe: the link to replica %d has not been measured: %s", peer.replica, error)
