"""The runtime of one rank: its link to the coordinator and to its peers, and the parts that do what they order.

Built by the scheduler where there is a second replica. The coordinator's messages and the peers' work arrive in one
inbox, which the scheduler's loop looks into between batches and, when it is idle, sleeps on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from torch._C._distributed_c10d import FileStore, Store

from kunserve_sgl.args import Activations, Exchange, KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.control.begun_requests import BegunRequests
from kunserve_sgl.control.messages import FromCoordinator, Lend, Order, Resize, Welcome
from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.agreed_handover import AgreedHandover
from kunserve_sgl.exchange.attention_service import PartAttention
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.group_store import SocketStore
from kunserve_sgl.exchange.handover import CollectiveHandover, MappedHandover
from kunserve_sgl.exchange.message_limits import most_work_bytes
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work_check import Limits, WorkCheck
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.replica.aside_loans import AsideLoans
from kunserve_sgl.replica.capacity import BadResizeError, CapacityManager
from kunserve_sgl.replica.coordinator_orders import CoordinatorOrders
from kunserve_sgl.replica.coordinator_reports import CoordinatorReports
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.hosting import LayerHosting
from kunserve_sgl.replica.integrity import Held
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.peer_access import PeerAccess
from kunserve_sgl.replica.pieces import activation_bytes
from kunserve_sgl.replica.place import Place
from kunserve_sgl.replica.replica_memory import ReplicaMemory, make_vmm
from kunserve_sgl.replica.transition_agent import TransitionAgent
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.rejections import Rejections

_BUSY_SLEEP_MS = 1  # an idle rank 0 looks after this, while a transition goes on at the ranks behind it


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
        me = self.replica, self.rank, options.kunserve_incarnation
        self.begun: BegunRequests | None = None  # at rank 0
        if self.rank == 0:
            self.begun = BegunRequests(addresses.begun_requests_path(options, self.replica, me[2]))
        inbox = addresses.inbox_bind_address(options, *me)
        layers, most_tokens = engine.layers, engine.most_tokens
        self._activation_bytes = activation_bytes(most_tokens, layers.hidden_size, layers.dtype)
        limits = _limits(place, engine, memory, 2 * self._activation_bytes)
        work_bytes = most_work_bytes(limits, most_tokens)
        self.link = PeerLink(self.replica, self.rank, inbox, self.rejections, curve, work_bytes)
        self.access = PeerAccess(place, options, memory, curve)
        self._activation_vmm = make_vmm(options.kunserve_frame_bytes, place.device.type, place.device.index or 0)
        self._handover = AgreedHandover()
        self._loans = Loans(
            memory,
            self.access.channel,
            self.access.ways,
            self._activation_vmm,
            self._handover.share,
            # An order is a part of a layer of a batch, or a MiB, and a whole batch of others may not take longer.
            longest_order_s=options.kunserve_order_timeout,
        )
        plan = self.plan = HeldPlan(self.replica, layers.layer_count)
        self.hosting = LayerHosting(
            plan,
            layers,
            self.access.row_copies(layers, self._loans),
            self.link,
            self._handover,
            place.ranks,
            options.kunserve_order_timeout,
            engine.rank_timeout_s,
        )
        hosts_of = self.hosting.away.hosts_of
        check = WorkCheck(
            self.replica, self.rank, limits, hosts_of, lambda: plan.takes_orders, lambda: plan.least_epoch
        )
        self.link.check_with(check.check)
        self.reports = CoordinatorReports(place, options, engine, memory, plan, self.hosting, self.access, curve)
        self._orders = CoordinatorOrders(place, options, self.reports.facts, self.link, plan, self.rejections)
        self._incarnations: Sequence[int] = ()  # of all replicas, from the first welcome on
        self.access.begin(
            self.link,
            self._loans,
            self.hosting,
            engine.all_ranks,
            lambda peer: self._incarnations[peer],
            attention,
            limits,
            most_tokens,
            self.reports.send_link,
        )
        self._aside = AsideLoans(self._loans, self.access.offers_at)
        self._agent = TransitionAgent(
            self.rank,
            plan,
            engine,
            capacity,
            memory,
            self._loans,
            self.hosting,
            self.hosting.writes,
            self.reports.send,
            measures_reads=options.kunserve_exchange == Exchange.AUTO.value,
        )
        self.hosting.away.tell_of_failure = self.reports.send_failure
        if self.rank == 0:
            self.hosting.away.tell_of_waiting = self.reports.send_waiting
            self.hosting.away.is_called_off = self._orders.looks_called_off
        if self.hosting.own_batches.stops_between_layers:
            self.hosting.own_batches.between_layers = self._between_layers

    def report(self) -> None:
        """Tells the coordinator who this is and what memory it has; again whenever that has changed."""
        self.reports.send_hello(self.link.address)

    def report_elsewhere(self) -> dict[str, Any]:
        """Says by what way memory of each peer is used here; see `PeerAccess.report`."""
        return self.access.report(self._incarnations)

    def wake_up_sources(self) -> Sequence[zmq.Socket[bytes]]:
        """Returns what an idle scheduler has to wait for, besides requests. Not for offers: those of a transition that
        has failed may lie there until the next one, and during a transition the sleep is short anyway."""
        return (self.link.inbox,)

    def take_orders(self) -> list[bytes]:
        """Returns what the coordinator has sent to rank 0, checked, for all ranks of the replica to act on at the same
        boundary."""
        return self._orders.take()

    def _between_layers(self) -> None:
        """Goes on with a transition while an own batch is under way, as far as that is possible; the rest of the orders
        waits for the batch boundary."""
        if self.link.has_control or self._orders.is_any_waiting:
            self._orders.take_in()
            for payload in self._orders.take_while(self._may_follow_between_layers):
                self.on_payload(payload)
        if self.is_in_transition:
            self._agent.advance_between_layers()
        if self.is_lending:
            self._aside.advance(is_serving=True)

    def _may_follow_between_layers(self, message: FromCoordinator) -> bool:
        if isinstance(message, Order):
            return self._agent.may_begin_between_layers(message)
        return isinstance(message, Lend)

    @property
    def held(self) -> Held:
        """Gives what a check of this rank has to know."""
        return Held(self.plan, self._loans, lambda: self.is_in_transition)

    def on_payload(self, payload: bytes) -> None:
        """Acts on a message that rank 0 has taken, in the same order at every rank. Nothing here waits."""
        message = self._orders.read(payload)
        if isinstance(message, Welcome):
            self._enter(message)
        elif isinstance(message, Lend):
            self.access.learn_of_borrowers(message)
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
                self.reports.send_refusal(message.number, str(error))
        else:
            self.report()

    def at_boundary(self, is_serving: bool) -> bool:
        """Goes on with a transition, between two batches. Returns whether it has ended here."""
        self.link.poll(0)  # a step may wait for the device, and a peer's send keeps its own busy until it is received
        self._agent.advance(is_serving)
        return not self._agent.is_busy

    @property
    def is_lending(self) -> bool:
        """Says whether there is something left to lend beside transitions, or a loan that is to end."""
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
        return _BUSY_SLEEP_MS if self.is_in_transition or self.is_lending else None

    def _enter(self, welcome: Welcome) -> None:
        known, self._incarnations = self._incarnations, welcome.incarnations
        new = []
        for peer, incarnation in enumerate(welcome.incarnations):
            if peer < len(known) and known[peer] == incarnation:
                continue
            if peer < len(known):
                self.forget_peer(peer, incarnation)
            if peer != self.replica:
                new.append((peer, incarnation))
        self.link.connect(welcome.inboxes)
        self._loans.connect(lambda peer: self.access.offers_at(peer, welcome.incarnations[peer]))
        self.access.meet(welcome, new)
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
        self.access.forget(peer)

    def close(self) -> None:
        """Ends the threads of this rank and closes its sockets, all of them also where one fails. Memory that is shared
        goes with the process. Raises TransientError where a thread does not come to an end."""
        with contextlib.ExitStack() as parts:
            parts.callback(self.reports.close)
            parts.callback(self.link.close)
            parts.callback(self.access.close)

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
