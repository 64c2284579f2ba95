"""One rank as a member of its deployment: its link to the coordinator and to its peers, and what they order.

Built by the scheduler where there is a second replica. The coordinator's messages and the peers' work arrive in one
inbox, which the scheduler's loop looks into between batches and, when it is idle, sleeps on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
import zmq

from kunserve_sgl.args import sends_activations
from kunserve_sgl.control import addresses
from kunserve_sgl.control.messages import (
    FromCoordinator,
    Hello,
    LoadReport,
    ToCoordinator,
    Waiting,
    Welcome,
)
from kunserve_sgl.control.order_check import OrderCheck
from kunserve_sgl.exchange.activations import ActivationBuffer, buffer_bytes
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.handover import CollectiveHandover, Handover, MappedHandover
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work_check import Limits, WorkCheck
from kunserve_sgl.integration.controller.metrics import rejection_counter
from kunserve_sgl.integration.runner.layer_runner import SglangLayerRunner
from kunserve_sgl.integration.transition import TransitionAgent, facts_of
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.policy.cutting import MOST_PIECES
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.plan import ReplicaFacts
from kunserve_sgl.replica.frame_channel import FrameChannel
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.hosting import LayerHosting
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.pieces import TENSORS_PER_TOKEN
from kunserve_sgl.replica.replica_memory import make_vmm
from kunserve_sgl.wire.rejections import COORDINATOR, Rejections, Sender

# An offer is sent in one go, so whoever stops in the middle of one is dead or stopped, and must not hold others up.
_TRANSFER_TIMEOUT_S = 2.0
_BUSY_SLEEP_MS = 1  # an idle rank 0 looks after this, while a transition goes on at the ranks behind it


class Member:
    """Everything that one rank shares with others."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        runner = scheduler.tp_worker.model_runner
        arguments = scheduler.server_args
        self.replica: int = scheduler.ps.dp_rank
        self.rank: int = scheduler.ps.tp_rank
        self._memory = runner.kunserve_memory
        self.rejections = Rejections()
        if arguments.enable_metrics:
            self.rejections.tell = rejection_counter(arguments.served_model_name)
        curve = addresses.curve_of(arguments, (self.replica, self.rank))
        self.link = PeerLink(
            self.replica,
            self.rank,
            addresses.inbox_bind_address(arguments, self.replica, self.rank),
            self.rejections,
            curve,
        )
        self._channel = FrameChannel(
            addresses.frame_socket_path(arguments, self.replica, self.rank), _TRANSFER_TIMEOUT_S
        )
        space, rows = self._memory.kv.space, scheduler.req_to_token_pool
        activation_vmm = make_vmm(arguments.kunserve_frame_bytes, runner.device, runner.gpu_id)
        layers = SglangLayerRunner(runner, rows)
        size_bytes = buffer_bytes(
            most_tokens(scheduler), layers.hidden_size, TENSORS_PER_TOKEN, layers.dtype, MOST_PIECES
        )
        activations = None
        handover: Handover = MappedHandover()
        if sends_activations(arguments.kunserve_activations, runner.device):
            handover = CollectiveHandover(self._transport(runner, arguments))
        else:
            activations = SharedBuffer.create(activation_vmm, size_bytes)
            handover.share(self.replica, ActivationBuffer(activations))
        self.plan = HeldPlan(self.replica, layers.layer_count)
        self.hosting = LayerHosting(
            self.plan, layers, self.link, handover, scheduler.ps.tp_size, arguments.kunserve_order_timeout
        )
        decode, extend = layers.modes
        limits = Limits(
            replicas=arguments.dp_size,
            layers=self._memory.layer_count,
            rows=[rows.rows_of(replica) for replica in range(arguments.dp_size)],
            slots=[space.slots_of(replica, 0, space.replica_granules) for replica in range(arguments.dp_size)],
            row_width=rows.row_width,
            most_tensor_bytes=2 * size_bytes,
            decode=decode,
            extend=extend,
        )
        plan = self.plan
        check = WorkCheck(self.replica, self.rank, limits, self.hosting.away.hosts_of, lambda: plan.serves)
        self.link.check_with(check.check)
        self._loans = Loans(
            self.replica,
            self._memory.frames,
            self._memory.kv,
            self._memory.parameters,
            self._channel,
            activations,
            activation_vmm,
            handover.share,
        )
        self._agent = TransitionAgent(scheduler, self._loans, self.hosting, self.plan, self._send)
        self._decoder: msgspec.msgpack.Decoder[FromCoordinator] = msgspec.msgpack.Decoder(FromCoordinator)
        self._order_check = OrderCheck(arguments.dp_size, scheduler.ps.tp_size, self._facts(), self._is_address)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._coordinator = context.socket(zmq.PUSH)
        self._coordinator.setsockopt(zmq.LINGER, 0)
        if curve is not None:
            curve.call(self._coordinator, COORDINATOR)
        self._coordinator.connect(addresses.coordinator_address(arguments))
        runner.own_batches = self.hosting.own_batches
        if self.rank == 0:
            self.hosting.away.tell_of_waiting = self._send_waiting

    def _transport(self, runner: Any, arguments: Any) -> CollectiveTransport:
        on_cuda = runner.device == "cuda"
        return CollectiveTransport(
            addresses.collective_store_path(arguments),
            self.replica,
            self.rank,
            backend="nccl" if on_cuda else "gloo",
            device=torch.device("cuda", runner.gpu_id) if on_cuda else torch.device("cpu"),
            timeout_s=arguments.kunserve_order_timeout,
        )

    def _facts(self) -> ReplicaFacts:
        return facts_of(self._memory, self._scheduler.req_to_token_pool.space.row_count)

    def report(self) -> None:
        """Tells the coordinator who this is and what memory it has; again whenever that has changed."""
        facts = self._facts()
        parameters = self._memory.parameters
        checksums = tuple(str(parameters.report(layer).checksum) for layer in range(self._memory.layer_count))
        self._send(Hello(self.replica, self.rank, self.link.address, self._channel.path, facts, checksums))

    def send_load(self, load: ReplicaLoad, ended: Sequence[str]) -> bool:
        """`ended` are the requests that have ended since the last report. Whether the report went off; it does not
        where the coordinator takes nothing."""
        try:
            self._send(
                LoadReport(
                    self.replica,
                    load,
                    self.hosting.own_batches.sent,
                    self.hosting.serving.served,
                    self._remote_tokens(),
                    tuple(ended),
                )
            )
        except zmq.Again:
            return False
        return True

    def _send_waiting(self, hosts: Sequence[int], waited_s: float) -> None:
        with contextlib.suppress(zmq.Again):  # it is said again, as long as it is so
            self._send(Waiting(self.replica, tuple(hosts), waited_s))

    def _remote_tokens(self) -> int:
        """See `LoadReport`."""
        if not self.plan.is_pipelined:
            return 0
        allocator = self._scheduler.token_to_kv_pool_allocator
        base = allocator.slot_ranges[0]
        return int(allocator.count_in(base) - len(allocator.free_in(base)) * allocator.page_size)

    def wake_up_sources(self) -> Sequence[Any]:
        """What an idle scheduler has to wait for, besides requests. Not for offers: those of a transition that has
        failed may lie there until the next one, and during a transition the sleep is short anyway."""
        return (self.link.inbox,)

    def take_orders(self) -> list[FromCoordinator]:
        """What the coordinator has sent to rank 0, for all ranks of the replica to act on at the same boundary."""
        self.link.poll(0)
        taken = (self._read(payload, sender) for payload, sender in self.link.take_control())
        return [message for message in taken if message is not None]

    def on_message(self, message: FromCoordinator) -> None:
        """One that rank 0 has taken, in the same order at every rank. Nothing here waits."""
        if isinstance(message, Welcome):
            self._enter(message)
        elif (reason := self._agent.why_unexpected(message)) is not None:
            self.rejections.add(type(message).__name__, reason)
        else:
            self._agent.on_order(message)

    def at_boundary(self, is_serving: bool) -> bool:
        """Between two batches: goes on with a transition. Whether it has ended here."""
        self._agent.advance(is_serving)
        return not self._agent.is_busy

    @property
    def is_in_transition(self) -> bool:
        return self._agent.is_busy

    @property
    def is_merged(self) -> bool:
        """Whether this replica depends on others, or is about to."""
        return self.is_in_transition or self.plan.serves

    @property
    def longest_sleep_ms(self) -> int | None:
        """How long an idle scheduler may sleep; None for as long as it likes."""
        return _BUSY_SLEEP_MS if self.is_in_transition else None

    def _read(self, payload: bytes, sender: Sender) -> FromCoordinator | None:
        """The message, or None for one to ignore."""
        return self.rejections.read(
            self._decoder, payload, lambda message: self._order_check.check(message, sender, self.plan.agreed)
        )

    def _is_address(self, replica: int, rank: int, inbox: str, frame_address: str) -> bool:
        arguments = self._scheduler.server_args
        is_inbox = addresses.is_inbox_address(arguments, replica, rank, inbox)
        is_own = inbox == self.link.address or (replica, rank) != (self.replica, self.rank)
        return is_inbox and is_own and frame_address == addresses.frame_socket_path(arguments, replica, rank)

    def _enter(self, welcome: Welcome) -> None:
        self.link.connect(welcome.inboxes)
        self._loans.connect([addresses[self.rank] for addresses in welcome.frame_addresses])
        if not self.is_in_transition:
            self.plan.enter(welcome.plan)

    def _send(self, message: ToCoordinator) -> None:
        self._coordinator.send(msgspec.msgpack.encode(message), flags=zmq.NOBLOCK)


def most_tokens(scheduler: Any) -> int:
    """The most tokens that a batch of this replica can have: a chunk of prefill, and a token of every running
    request beside it. Without chunks, a prompt as long as the context may come by itself."""
    arguments = scheduler.server_args
    chunk = arguments.chunked_prefill_size or -1
    prefill = chunk if chunk > 0 else max(arguments.max_prefill_tokens, scheduler.model_config.context_len)
    return int(prefill + scheduler.max_running_requests)
