"""The runtime of one rank: its link to the coordinator and to its peers, and the parts that do what they order.

Built by the scheduler where there is a second replica. The coordinator's messages and the peers' work arrive in one
inbox, which the scheduler's loop looks into between batches and, when it is idle, sleeps on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch
import zmq
from torch._C._distributed_c10d import FileStore, Store

from kunserve_sgl.args import Activations, Exchange, KunserveOptions, RemoteAttentionBy
from kunserve_sgl.control import addresses
from kunserve_sgl.control.begun_requests import BegunRequests
from kunserve_sgl.control.messages import (
    MOST_REASON,
    Device,
    FromCoordinator,
    Hello,
    HostFailed,
    Lend,
    LinkSpeed,
    LoadReport,
    Order,
    Phase,
    Resize,
    ResizeRefused,
    ToCoordinator,
    Waiting,
    Welcome,
)
from kunserve_sgl.control.order_check import OrderCheck
from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.agreed_handover import AgreedHandover
from kunserve_sgl.exchange.attention_service import PartAttention
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.group_store import SocketStore
from kunserve_sgl.exchange.handover import CollectiveHandover, MappedHandover
from kunserve_sgl.exchange.message_limits import most_work_bytes
from kunserve_sgl.exchange.offer_messages import OfferMessages
from kunserve_sgl.exchange.offers import OfferChannel
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work_check import Limits, WorkCheck
from kunserve_sgl.memory.cuda_driver import CudaDriver
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.plan import ReplicaFacts
from kunserve_sgl.replica.aside_loans import AsideLoans
from kunserve_sgl.replica.capacity import BadResizeError, CapacityManager
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.frame_channel import FrameChannel
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.hosting import LayerHosting
from kunserve_sgl.replica.integrity import Held
from kunserve_sgl.replica.kv_elsewhere import KvElsewhere
from kunserve_sgl.replica.link_measuring import LinkMeasuring, Peer
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.memory_book import MemoryBook
from kunserve_sgl.replica.peer_memory import peer_memory_of
from kunserve_sgl.replica.pieces import activation_bytes
from kunserve_sgl.replica.read_memory import ReadMemory
from kunserve_sgl.replica.replica_memory import ReplicaMemory, make_vmm
from kunserve_sgl.replica.row_copies import CopiesByMessage, RowCopies
from kunserve_sgl.replica.transition_agent import TransitionAgent
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.rejections import COORDINATOR, Rejections, Sender

# An offer is sent in one go, so whoever stops in the middle of one is dead or stopped, and must not hold others up.
_TRANSFER_TIMEOUT_S = 2.0
_LINK_LINGER_MS = 10_000  # for what a thread says and nobody waits for
_BUSY_SLEEP_MS = 1  # an idle rank 0 looks after this, while a transition goes on at the ranks behind it


@dataclass(frozen=True, slots=True)
class Place:
    """Says where a rank is: `rank` of the `ranks` that each of the `replicas` has. `device` has its index on CUDA."""

    replica: int
    rank: int
    replicas: int
    ranks: int
    device: torch.device


class RankRuntime:
    """Holds everything that one rank shares with others."""

    def __init__(
        self,
        place: Place,
        options: KunserveOptions,
        engine: Engine,
        capacity: CapacityManager,
        memory: ReplicaMemory,
        on_rejected: Callable[[str], None] | None = None,
        attention: PartAttention | None = None,
    ) -> None:
        """Binds the rank's sockets in the deployment's directory. `on_rejected` is told the kind of each message that
        is ignored. `attention` attends to KV of this rank for others, where that goes by messages; a thread uses it.
        Raises TransientError where there is no coordinator."""
        self._place = place
        self._options = options
        self._engine = engine
        self._memory = memory
        self._capacity = capacity
        self.replica, self.rank = place.replica, place.rank
        self.rejections = Rejections()
        if on_rejected is not None:
            self.rejections.tell = on_rejected
        curve = self._curve = addresses.curve_of(options, (self.replica, self.rank))
        self._incarnation = options.kunserve_incarnation
        self.begun: BegunRequests | None = None  # at rank 0
        if self.rank == 0:
            self.begun = BegunRequests(addresses.begun_requests_path(options, self.replica, self._incarnation))
        me = self.replica, self.rank, self._incarnation
        inbox = addresses.inbox_bind_address(options, *me)
        layers, most_tokens = engine.layers, engine.most_tokens
        size_bytes = activation_bytes(most_tokens, layers.hidden_size, layers.dtype)
        limits = _limits(place, engine, memory, 2 * size_bytes)
        work_bytes = most_work_bytes(limits, most_tokens)
        self.link = PeerLink(self.replica, self.rank, inbox, self.rejections, curve, work_bytes)
        offers = self._offers = OfferMessages(self.rank, curve) if options.attends_by_message else None
        self._channel: OfferChannel = offers or FrameChannel(
            addresses.frame_socket_path(options, *me), _TRANSFER_TIMEOUT_S
        )
        self._activation_bytes = size_bytes
        self._activation_vmm = make_vmm(options.kunserve_frame_bytes, place.device.type, place.device.index or 0)
        requested = Activations(options.kunserve_activations)
        handover = self._handover = AgreedHandover()
        self.plan = HeldPlan(self.replica, layers.layer_count)
        book = self._book = MemoryBook(options, self.rank)
        self._peer_memory = peer_memory_of(options, memory, self.rank, curve, book)
        # As long as a lender that says nothing is waited for; see `peer_memory_of`.
        end_timeout_s = options.kunserve_transition_timeout / 4
        self._loans = Loans(
            memory, self._channel, self._peer_memory, None, self._activation_vmm, handover.share, end_timeout_s
        )
        rows = RowCopies(layers)
        if isinstance(self._peer_memory, ReadMemory):
            rows = CopiesByMessage(layers, memory.kv, self._loans.homes, self._peer_memory)
        order_timeout_s, rank_timeout_s = options.kunserve_order_timeout, engine.rank_timeout_s
        self.hosting = LayerHosting(
            self.plan, layers, rows, self.link, handover, place.ranks, order_timeout_s, rank_timeout_s
        )
        plan = self.plan
        check = WorkCheck(self.replica, self.rank, limits, self.hosting.away.hosts_of, lambda: plan.takes_orders)
        self.link.check_with(check.check)
        self._aside = AsideLoans(self._loans, self._offers_at)
        self.elsewhere: KvElsewhere | None = None
        if offers is not None:
            assert attention is not None
            self.elsewhere = KvElsewhere(
                self.link,
                self._loans,
                self.hosting.away,
                self.hosting.turns,
                place.replicas,
                memory.layer_count,
                attention,
                offers,
                addresses.memory_bind_address(options, *me),
                lambda peer: book.address_of(peer, self._incarnations[peer]),
                curve,
                limits,
                most_tokens,
            )
            book.own = self.elsewhere.address if options.controls_by_tcp else ""
        self._links = LinkMeasuring(self.replica, self.rank, place.replicas, self._send_link, curve)
        self._agent = TransitionAgent(
            self.rank,
            self.plan,
            engine,
            capacity,
            memory,
            self._loans,
            self.hosting,
            self.hosting.writes,
            self._send,
            measures_reads=options.kunserve_exchange == Exchange.AUTO.value,
        )
        self._decoder: msgspec.msgpack.Decoder[FromCoordinator] = msgspec.msgpack.Decoder(FromCoordinator)
        self._order_check = OrderCheck(
            place.replicas,
            place.ranks,
            self._facts(),
            self._is_address,
            partial(addresses.is_memory_address, options),
            requested,
        )
        self._device = device_of(place.device, options)
        self._most_requests = engine.load_now().max_running_requests
        self._coordinator = self._way_to_coordinator(linger_ms=0)
        self._orders: list[bytes] = []  # have come, and are not followed yet
        self._incarnations: Sequence[int] = ()  # of all replicas, from the first welcome on
        self._is_called_off = False  # one of them begins a recovery
        self.hosting.away.tell_of_failure = self._send_failure
        if self.rank == 0:
            self.hosting.away.tell_of_waiting = self._send_waiting
            self.hosting.away.is_called_off = self._looks_called_off
        if self.hosting.own_batches.stops_between_layers:
            self.hosting.own_batches.between_layers = self._between_layers

    def _facts(self) -> ReplicaFacts:
        node = self._options.kunserve_host if self._options.is_on_network else ""
        return replace(self._memory.facts(self._engine.rows.row_count), node=node)

    def report(self) -> None:
        """Tells the coordinator who this is and what memory it has; again whenever that has changed."""
        facts = self._facts()
        parameters = self._memory.parameters
        checksums = tuple(str(parameters.report(layer).checksum) for layer in range(self._memory.layer_count))
        self._send(
            Hello(
                self.replica,
                self.rank,
                self.link.address,
                addresses.frame_socket_path(self._options, self.replica, self.rank, self._incarnation),
                facts,
                checksums,
                self._device,
                self._most_requests,
                self._engine.most_tokens,
                self._incarnation,
                self._memory.rest_checksum,
                memory_address=self._book.own,
            )
        )

    def send_load(self, load: ReplicaLoad) -> bool:
        """Sends a load report. Returns whether it went off; it does not where the coordinator takes nothing."""
        own = self.hosting.own_batches
        asked, answered = (0, 0) if self.elsewhere is None else self.elsewhere.counts
        times = () if self.elsewhere is None else self.elsewhere.remote.times()
        load = replace(load, merged_ms=int(1000 * own.merged_s), home_ms=int(1000 * own.home_s), attention=times)
        try:
            self._send(
                LoadReport(
                    self.replica,
                    load,
                    own.sent,
                    self.hosting.serving.served,
                    self._remote_tokens(),
                    self._incarnation,
                    asked,
                    answered,
                )
            )
        except zmq.Again:
            return False
        return True

    def report_elsewhere(self) -> dict[str, Any]:
        """Says by what way KV of others is attended to here and, for messages, how many orders there were and how many
        bytes were read since the start."""
        by = (RemoteAttentionBy.MAP if self.elsewhere is None else RemoteAttentionBy.MESSAGE).value
        peers = {str(owner): by for owner in sorted({key[0] for key in self._loans.borrowed})}
        report: dict[str, Any] = {"by": by, "peers": peers}
        if self.elsewhere is not None and isinstance(self._peer_memory, ReadMemory):
            report.update(self.elsewhere.report(), bytes_read=self._peer_memory.report())
        return report

    def _send_waiting(self, hosts: Sequence[int], waited_s: float) -> None:
        with contextlib.suppress(zmq.Again):  # it is said again, as long as it is so
            self._send(Waiting(self.replica, tuple(hosts), waited_s, self._incarnation))

    def _send_failure(self, host: int, reason: str) -> None:
        self._send(HostFailed(self.replica, self.rank, host, reason[:MOST_REASON], self._incarnation))

    def _way_to_coordinator(self, linger_ms: int) -> zmq.Socket[bytes]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, linger_ms)
        if self._curve is not None:
            self._curve.call(socket, COORDINATOR)
        socket.connect(addresses.coordinator_address(self._options))
        return socket

    def _send_link(self, peer: Peer, bytes_per_second: float) -> None:
        """Tells the coordinator of a link, in a thread beside the one that sends everything else."""
        link = LinkSpeed(self.replica, self.rank, peer.replica, peer.incarnation, bytes_per_second, self._incarnation)
        with self._way_to_coordinator(_LINK_LINGER_MS) as socket:
            socket.send(msgspec.msgpack.encode(link), flags=zmq.NOBLOCK)

    def _remote_tokens(self) -> int:
        """Counts the KV tokens that other replicas attend to; see `LoadReport`."""
        plan = self.plan.routed
        if plan is None or not self.plan.is_pipelined:
            return 0
        allocator, tokens = self._engine.allocator, 0
        for extent in plan.extents_of(self.replica):
            if extent.homes != plan.hosts[self.replica]:
                slots = self._memory.slots(extent)
                tokens += allocator.count_in(slots) - len(allocator.free_in(slots)) * allocator.page_size
        return tokens

    def wake_up_sources(self) -> Sequence[zmq.Socket[bytes]]:
        """Returns what an idle scheduler has to wait for, besides requests. Not for offers: those of a transition that
        has failed may lie there until the next one, and during a transition the sleep is short anyway."""
        return (self.link.inbox,)

    def look(self) -> None:
        """Raises InvariantError where a thread of this rank has failed. Every rank is to look, now and then."""
        if self.elsewhere is not None:
            self.elsewhere.look()

    def take_orders(self) -> list[bytes]:
        """Returns what the coordinator has sent to rank 0, checked, for all ranks of the replica to act on at the same
        boundary."""
        self.link.poll(0)
        self._take_in_orders()
        taken, self._orders, self._is_called_off = self._orders, [], False
        return taken

    def _take_in_orders(self) -> None:
        for payload, sender in self.link.take_control():
            message = self._believed(payload, sender)
            if message is not None:
                self._orders.append(payload)
                self._is_called_off |= isinstance(message, Order) and message.phase is Phase.ABANDON

    def _looks_called_off(self) -> bool:
        if self.link.has_control:
            self._take_in_orders()
        return self._is_called_off

    def _between_layers(self) -> None:
        """Goes on with a transition while an own batch is under way, as far as that is possible; the rest of the orders
        waits for the batch boundary."""
        self._take_in_orders()
        while self._orders and self._may_follow_between_layers(self._orders[0]):
            self.on_payload(self._orders.pop(0))
        self._agent.advance_between_layers()
        self._aside.advance(is_serving=True)

    def _may_follow_between_layers(self, payload: bytes) -> bool:
        message = self._decoder.decode(payload)
        if isinstance(message, Order):
            return self._agent.may_begin_between_layers(message)
        return isinstance(message, Lend)

    @property
    def held(self) -> Held:
        """Gives what a check of this rank has to know."""
        return Held(self.plan, self._loans, lambda: self.is_in_transition)

    def on_payload(self, payload: bytes) -> None:
        """Acts on a message that rank 0 has taken, in the same order at every rank. Nothing here waits."""
        message = self._decoder.decode(payload)
        if isinstance(message, Welcome):
            self._enter(message)
        elif isinstance(message, Lend):
            self._learn_of(message)
            self._aside.on_lend(message)
        elif isinstance(message, Resize):
            self._on_resize(message)
        elif (reason := self._agent.why_unexpected(message)) is not None:
            self.rejections.add(type(message).__name__, reason)
        else:
            self._agent.on_order(message)

    def _on_resize(self, message: Resize) -> None:
        try:
            if self.is_merged or self.is_in_transition:
                raise TransientError(f"replica {self.replica} shares memory with others, or is about to")
            self._capacity.resize(message.frames)
        except (BadResizeError, TransientError) as error:
            if self.rank == 0:  # all ranks have refused, for the same reason
                refused = ResizeRefused(self.replica, message.number, str(error)[:MOST_REASON], self._incarnation)
                self._send(refused)
        else:
            self.report()

    def at_boundary(self, is_serving: bool) -> bool:
        """Goes on with a transition, between two batches. Returns whether it has ended here."""
        self.link.poll(0)  # a step may wait for the device, and a peer's send keeps its own busy until it is received
        self._agent.advance(is_serving)
        return not self._agent.is_busy

    @property
    def is_lending(self) -> bool:
        """Says whether there is something left to lend beside transitions."""
        return self._aside.is_busy

    def lend_on(self, is_serving: bool) -> None:
        """Goes on with what is lent beside transitions, between two batches."""
        self._aside.advance(is_serving)

    @property
    def is_in_transition(self) -> bool:
        """Says whether a transition is under way here."""
        return self._agent.is_busy

    @property
    def stands(self) -> bool:
        """Says whether no batch may run: see `TransitionAgent.stands`."""
        return self._agent.stands

    @property
    def progress(self) -> str:
        """Says where the transition that is under way stands, for people; empty where none is."""
        return self._agent.progress

    @property
    def is_merged(self) -> bool:
        """Says whether this replica depends on others, or is about to."""
        return self.is_in_transition or self.plan.depends

    @property
    def has_taken_in(self) -> bool:
        """Says whether there is something to do here that has been taken out of the inbox, and so would not end a
        sleep."""
        # While something is held back the loop goes round, so that the other ranks look into their inboxes.
        is_held_back = self.plan.serves and self.link.holds_back
        return self.link.has_control or self.hosting.serving.is_waited_for or is_held_back

    @property
    def longest_sleep_ms(self) -> int | None:
        """Says how long an idle scheduler may sleep; None for as long as it likes."""
        return _BUSY_SLEEP_MS if self.is_in_transition else None

    def _believed(self, payload: bytes, sender: Sender) -> FromCoordinator | None:
        """Returns a message of the coordinator that makes sense here; one that does not is counted."""
        check, plan = self._order_check.check, self.plan.agreed
        return self.rejections.read(self._decoder, payload, lambda m: check(m, sender, plan))

    def _is_address(self, replica: int, rank: int, incarnation: int, inbox: str, frame_address: str) -> bool:
        who = replica, rank, incarnation
        is_inbox = addresses.is_inbox_address(self._options, *who, inbox)
        is_own = inbox == self.link.address or (replica, rank) != (self.replica, self.rank)
        return is_inbox and is_own and addresses.is_frame_address(self._options, *who, frame_address)

    def _learn_of(self, order: Lend) -> None:
        for loan in order.loans if self.elsewhere is not None else ():
            if loan.memory_addresses:
                self._book.learn(loan.borrower, loan.incarnation, loan.memory_addresses[self.rank])

    def _offers_at(self, peer: int, incarnation: int) -> str:
        """Returns where this rank of a replica takes offers of memory. Raises TransientError where nobody knows."""
        if self.elsewhere is not None:
            return self._book.address_of(peer, incarnation)
        return addresses.frame_socket_path(self._options, peer, self.rank, incarnation)

    def _enter(self, welcome: Welcome) -> None:
        known = self._incarnations
        for peer, (before, now) in enumerate(zip(known, welcome.incarnations, strict=False)):
            if before != now:
                self.forget_peer(peer, now)
        self._incarnations = welcome.incarnations
        self.link.connect(welcome.inboxes)
        for peer, ranks in enumerate(welcome.memory_addresses if self.elsewhere is not None else ()):
            self._book.learn(peer, welcome.incarnations[peer], ranks[self.rank])
        self._loans.connect(lambda peer: self._offers_at(peer, welcome.incarnations[peer]))
        if self.elsewhere is not None:
            new = [(r, i) for r, i in enumerate(welcome.incarnations) if r >= len(known) or known[r] != i]
            others = [(peer, incarnation) for peer, incarnation in new if peer != self.replica]
            self._links.meet([Peer(*each, self._book.address_of(*each)) for each in others])
        if not self._handover.is_agreed:
            self._agree(welcome)
        if not self.is_in_transition:
            self.plan.enter(welcome.plan)

    def forget_peer(self, peer: int, incarnation: int) -> None:
        """Forgets all that this rank holds of a peer whose processes have ended, and which is `incarnation` now: the
        one place for it. All ranks call it at the same boundary; no loan to or from the peer stands any more, and
        nothing of a batch is with it."""
        self._engine.synchronize()  # what the device was given may write to a buffer of the peer
        self._engine.rows.forget_hosts()
        self.hosting.forget(peer, incarnation)
        self._loans.forget(peer)
        self._agent.forget(peer)
        if self.elsewhere is not None and self._offers is not None:
            self.elsewhere.forget(peer)
            self._offers.forget(peer)

    def close(self) -> None:
        """Ends the threads of this rank and closes its sockets, all of them also where one fails. Memory that is shared
        goes with the process. Raises TransientError where a thread does not come to an end."""
        with contextlib.ExitStack() as parts:
            parts.callback(self._coordinator.close)
            parts.callback(self._channel.close)
            parts.callback(self.link.close)
            if self.elsewhere is not None:
                parts.callback(self.elsewhere.close)
            parts.callback(self._links.close)

    def _agree(self, welcome: Welcome) -> None:
        """Hands activations over as the coordinator has chosen for all replicas. The KV cache has left room for the
        buffer. Raises OutOfMemoryError where somebody else has taken it."""
        if welcome.activations is Activations.COLLECTIVE:
            transport = _transport(self._place, self._options, self._curve)
            for replica, incarnation in enumerate(welcome.incarnations):
                transport.expect_incarnation(replica, incarnation)
            self._handover.agree(CollectiveHandover(transport))
            return
        buffer = SharedBuffer.create(self._activation_vmm, self._activation_bytes)
        self._handover.agree(MappedHandover())
        self._handover.share(self.replica, ActivationBuffer(buffer))
        self._loans.offer_activations(buffer)

    def _send(self, message: ToCoordinator) -> None:
        self._coordinator.send(msgspec.msgpack.encode(message), flags=zmq.NOBLOCK)


def device_of(device: torch.device, options: KunserveOptions) -> Device:
    """Says where memory of `device` is, for everybody on this machine; nothing of it where nobody maps that."""
    if device.type != "cuda" or options.attends_by_message:
        return Device()
    return Device(*CudaDriver().identity(device.index or 0))


def _transport(place: Place, options: KunserveOptions, curve: Curve | None) -> CollectiveTransport:
    """Makes what sends activations: NCCL on CUDA, gloo elsewhere."""
    if options.is_on_network and curve is not None:
        store: Store = SocketStore(options.kunserve_group_store, curve)
    else:
        store = FileStore(addresses.collective_store_path(options))
    return CollectiveTransport(
        store,
        place.replica,
        place.rank,
        backend="nccl" if place.device.type == "cuda" else "gloo",
        device=place.device,
        timeout_s=options.kunserve_order_timeout,
        incarnation=options.kunserve_incarnation,
        host=options.kunserve_host,
    )


def _limits(place: Place, engine: Engine, memory: ReplicaMemory, most_tensor_bytes: int) -> Limits:
    """Says what messages of peers may be about."""
    space, rows, replicas = memory.kv.space, engine.rows, range(place.replicas)
    decode, extend = engine.layers.modes
    return Limits(
        replicas=place.replicas,
        layers=memory.layer_count,
        rows=[rows.rows_of(replica) for replica in replicas],
        slots=[space.slots_of(replica, 0, space.replica_granules) for replica in replicas],
        row_width=rows.row_width,
        most_tensor_bytes=most_tensor_bytes,
        decode=decode,
        extend=extend,
    )
