"""What a rank tells the coordinator, and the sockets for it. Nothing here waits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import zmq

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.control.messages import (
    MOST_REASON,
    Hello,
    HostFailed,
    LinkSpeed,
    LoadReport,
    ResizeRefused,
    ToCoordinator,
    Waiting,
)
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.plan import ReplicaFacts
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.hosting import LayerHosting
from kunserve_sgl.replica.link_measuring import Peer
from kunserve_sgl.replica.peer_access import PeerAccess
from kunserve_sgl.replica.place import Place, device_of
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.rejections import COORDINATOR

_LINK_LINGER_MS = 10_000  # for what a thread says and nobody waits for


class CoordinatorReports:
    """Speaks for one rank. Whatever it says raises zmq.Again where the coordinator takes nothing, unless it says
    otherwise."""

    def __init__(
        self,
        place: Place,
        options: KunserveOptions,
        engine: Engine,
        memory: ReplicaMemory,
        plan: HeldPlan,
        hosting: LayerHosting,
        access: PeerAccess,
        curve: Curve | None,
    ) -> None:
        """`curve` has the keys of this rank, over TCP. Raises TransientError where there is no coordinator."""
        self._replica, self._rank = place.replica, place.rank
        self._incarnation = options.kunserve_incarnation
        self._options = options
        self._engine = engine
        self._memory = memory
        self._plan = plan
        self._hosting = hosting
        self._access = access
        self._curve = curve
        self._device = device_of(place.device, options)
        self._most_requests = engine.load_now().max_running_requests
        self._socket = self._connect(linger_ms=0)

    def close(self) -> None:
        """Says nothing any more."""
        self._socket.close()

    @property
    def facts(self) -> ReplicaFacts:
        """Returns what memory this rank has."""
        node = self._options.kunserve_host if self._options.is_on_network else ""
        return replace(self._memory.facts(self._engine.rows.row_count), node=node)

    def send(self, message: ToCoordinator) -> None:
        """Sends a message."""
        self._socket.send(msgspec.msgpack.encode(message), flags=zmq.NOBLOCK)

    def send_hello(self, inbox: str) -> None:
        """Says who this is, that it listens at `inbox`, and what memory it has; again whenever that has changed."""
        parameters = self._memory.parameters
        self.send(
            Hello(
                self._replica,
                self._rank,
                inbox,
                self._access.frame_address,
                self.facts,
                tuple(str(parameters.report(layer).checksum) for layer in range(self._memory.layer_count)),
                self._device,
                self._most_requests,
                self._engine.most_tokens,
                self._incarnation,
                self._memory.rest_checksum,
                memory_address=self._access.memory_address,
            )
        )

    def send_load(self, load: ReplicaLoad) -> bool:
        """Sends a load report. Returns whether it went off; it does not where the coordinator takes nothing."""
        own, elsewhere = self._hosting.own_batches, self._access.elsewhere
        times = () if elsewhere is None else elsewhere.remote.times()
        load = replace(load, merged_ms=int(1000 * own.merged_s), home_ms=int(1000 * own.home_s), attention=times)
        try:
            self.send(
                LoadReport(
                    self._replica,
                    load,
                    own.sent,
                    self._hosting.serving.served,
                    self._remote_tokens(),
                    self._incarnation,
                )
            )
        except zmq.Again:
            return False
        return True

    def send_waiting(self, hosts: Sequence[int], waited_s: float) -> None:
        """Says who has kept a batch waiting, and for how long, unless the coordinator takes nothing."""
        with contextlib.suppress(zmq.Again):  # it is said again, as long as it is so
            self.send(Waiting(self._replica, tuple(hosts), waited_s, self._incarnation))

    def send_failure(self, host: int, reason: str) -> None:
        """Says that a layer host has failed in a batch of this replica."""
        self.send(HostFailed(self._replica, self._rank, host, reason[:MOST_REASON], self._incarnation))

    def send_refusal(self, resize: int, reason: str) -> None:
        """Says why the cache does not get another size, as ordered under number `resize`."""
        self.send(ResizeRefused(self._replica, resize, reason[:MOST_REASON], self._incarnation))

    def send_link(self, peer: Peer, bytes_per_second: float) -> None:
        """Says how fast a link is, by a socket of its own: any thread may call it."""
        link = LinkSpeed(self._replica, self._rank, peer.replica, peer.incarnation, bytes_per_second, self._incarnation)
        with self._connect(_LINK_LINGER_MS) as socket:
            socket.send(msgspec.msgpack.encode(link), flags=zmq.NOBLOCK)

    def _connect(self, linger_ms: int) -> zmq.Socket[bytes]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, linger_ms)
        if self._curve is not None:
            self._curve.call(socket, COORDINATOR)
        socket.connect(addresses.coordinator_address(self._options))
        return socket

    def _remote_tokens(self) -> int:
        """Counts the KV tokens that other replicas attend to; see `LoadReport`."""
        plan = self._plan.routed
        if plan is None or not self._plan.is_pipelined:
            return 0
        allocator, tokens = self._engine.allocator, 0
        for extent in plan.extents_of(self._replica):
            if extent.homes != plan.hosts[self._replica]:
                slots = self._memory.slots(extent)
                tokens += allocator.count_in(slots) - len(allocator.free_in(slots)) * allocator.page_size
        return tokens
