"""The data-parallel controller of KunServe: SGLang's, without the busy loop, and with the coordinator inside."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from typing import Any

import zmq
from sglang.srt.managers.data_parallel_controller import DataParallelController, DPBudget
from sglang.srt.managers.io_struct import sock_recv, sock_send
from sglang.srt.utils.network import get_zmq_socket
from sglang.utils import TypeBasedDispatcher

from kunserve_sgl.args import Dispatch, Mode
from kunserve_sgl.control.answers import Answer, Verdict, answer_body
from kunserve_sgl.control.autopilot import Autopilot
from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.control.coordinator_link import CoordinatorLink
from kunserve_sgl.control.messages import LoadReport
from kunserve_sgl.control.transition import Timeouts
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.attachment import current_attachment
from kunserve_sgl.integration.collector import leave_startup_alone
from kunserve_sgl.integration.dispatch import RequestDispatch
from kunserve_sgl.integration.messages import Command, CoordinatorCall, CoordinatorReply, ReplicaEnded
from kunserve_sgl.integration.metrics import Metrics
from kunserve_sgl.integration.open_requests import NotingWorkers, OpenRequests
from kunserve_sgl.policy.automatic import Thresholds
from kunserve_sgl.policy.drop_plan import DropWish

logger = logging.getLogger(__name__)

_POLL_MS = 500  # the watchdog wants a sign of life now and then, also when there is nothing to do
_EXIT_DEADLINE_S = 5.0
# Longest wait of an automatic restore for slots to become empty. It begins only when what lives there fits elsewhere,
# and while it waits nothing can be dropped.
_AUTO_DRAIN_S = 2.0


class KunserveDataParallelController(DataParallelController):  # type: ignore[misc]
    """Sleeps until a message arrives, a scheduler ends, or a deadline passes. Upstream's loop asks its socket without
    pause and fills a core."""

    workers: Any

    def __init__(self, server_args: Any, *args: Any, **kwargs: Any) -> None:
        self._link = CoordinatorLink(server_args)
        self._metrics = (
            Metrics(server_args.served_model_name, server_args.tp_size, time.monotonic)
            if server_args.enable_metrics
            else None
        )
        watchers: dict[str, Any] = {} if self._metrics is None else {"on_transition": self._metrics.on_transition}
        self._coordinator = Coordinator(
            server_args.dp_size,
            server_args.tp_size,
            Timeouts(server_args.kunserve_transition_timeout, server_args.kunserve_drain_timeout),
            self._link.send,
            time.monotonic,
            **watchers,
        )
        self._autopilot = Autopilot(
            self._coordinator,
            Thresholds(
                drop_at=server_args.kunserve_drop_at,
                restore_at=server_args.kunserve_restore_at,
                horizon_s=server_args.kunserve_horizon,
                min_stay_s=server_args.kunserve_min_stay,
                cool_down_s=server_args.kunserve_cool_down,
                largest_group=server_args.kunserve_max_group,
            ),
            min(_AUTO_DRAIN_S, server_args.kunserve_drain_timeout),
            time.monotonic,
            orders=server_args.kunserve == Mode.AUTO.value,
        )
        by_need = server_args.kunserve_dispatch == Dispatch.BY_NEED.value
        self._by_need = RequestDispatch(server_args.dp_size, self._coordinator) if by_need else None
        super().__init__(server_args, *args, **kwargs)
        if by_need:
            self.dispatching = self._dispatch_by_need
        logger.info(
            "KunServe: requests are dispatched by %s",
            "free memory and compute; any other --load-balance-method than auto turns that off"
            if by_need
            else f"SGLang's method {server_args.load_balance_method}",
        )
        self.dp_budget = SurvivorBudget(server_args.dp_size)
        self.workers = NotingWorkers(self.workers)
        self._open = OpenRequests(server_args.dp_size)
        self._send_to_tokenizer = get_zmq_socket(self.context, zmq.PUSH, self.port_args.tokenizer_ipc_name, False)
        current_attachment().mark_used(type(self))
        leave_startup_alone()

    def init_dispatcher(self) -> None:
        super().init_dispatcher()
        handlers: list[Any] = [(CoordinatorCall, self._on_coordinator_call)]
        self._request_dispatcher += TypeBasedDispatcher(handlers)

    def event_loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self.recv_from_tokenizer, zmq.POLLIN)
        poller.register(self._link.inbox, zmq.POLLIN)
        processes = {process.sentinel: process for process in self.scheduler_procs}
        for sentinel in processes:
            poller.register(sentinel, zmq.POLLIN)
        while True:
            self.soft_watchdog.feed()
            ready = dict(poller.poll(self._time_to_wait_ms()))
            # Losses last: an answer that a process sent before its end still counts.
            if self._link.inbox in ready:
                for message in self._link.receive():
                    if isinstance(message, LoadReport):
                        self._on_load_report(message)
                    else:
                        self._coordinator.on_message(message)
            for sentinel in ready.keys() & processes.keys():
                poller.unregister(sentinel)
                self._on_process_ended(processes.pop(sentinel))
            self._coordinator.on_tick()
            self._autopilot.on_tick()
            if self._by_need is not None:
                self._by_need.follow_plan()
            if self._metrics is not None:
                self._metrics.update(self._coordinator, self._autopilot)
            if self.recv_from_tokenizer in ready:
                self._request_dispatcher(sock_recv(self.recv_from_tokenizer))

    def _on_load_report(self, report: LoadReport) -> None:
        self._autopilot.on_load(report.replica, report.load)
        self._open.ended(report.replica, report.ended)
        if self._by_need is not None:
            self._by_need.dispatcher.on_report(report.replica, report.load)
        if self._metrics is not None:
            self._metrics.on_report(report)

    def _time_to_wait_ms(self) -> int:
        deadlines_s = (self._coordinator.next_deadline_s(), self._autopilot.next_deadline_s())
        left_ms = [math.ceil(1000 * (each - time.monotonic())) for each in deadlines_s if each is not None]
        return min([_POLL_MS, *(max(0, ms) for ms in left_ms)])

    # Commands

    def _on_coordinator_call(self, call: CoordinatorCall) -> None:
        def done(answer: Answer) -> None:
            self._reply(call, answer.verdict, answer_body(answer))

        if call.command is Command.STATUS:
            self._reply(call, Verdict.DONE, self._status())
        elif call.command is Command.RESTORE:
            self._coordinator.restore(call.groups, done)
        elif call.command is Command.DROP:
            self._coordinator.drop(_wish(call), done)
        else:
            done(self._coordinator.dry_run(_wish(call)))

    def _status(self) -> dict[str, Any]:
        dispatch: dict[str, Any] = {"by": self.server_args.load_balance_method}
        if self._by_need is not None:
            dispatch = {"by": Dispatch.BY_NEED.value, "replicas": self._by_need.status()}
        return {**self._coordinator.status(), "auto": self._autopilot.status(), "dispatch": dispatch}

    def _reply(self, call: CoordinatorCall, verdict: Verdict, body: dict[str, Any]) -> None:
        sock_send(self._send_to_tokenizer, CoordinatorReply(call_id=call.call_id, verdict=verdict, body=body))

    # Requests

    def dispatching_with_trace(self, req: Any, *args: Any, **kwargs: Any) -> None:
        self.workers.take_last()
        super().dispatching_with_trace(req, *args, **kwargs)
        replica = self.workers.take_last()
        if replica is not None:
            self._open.sent(replica, req)

    def _dispatch_by_need(self, req: Any) -> None:
        """In place of SGLang's methods of the same kind."""
        assert self._by_need is not None
        tokens = self._by_need.tokens_of(req, self.max_req_input_len)
        if self.maybe_external_dp_rank_routing(req):
            replica = req.routed_dp_rank
        else:
            replica = self._by_need.dispatcher.pick(tokens)
            sock_send(self.workers[replica], req)
        self._by_need.dispatcher.record(replica, tokens)

    # Losses

    def _on_process_ended(self, process: Any) -> None:
        process.join(_EXIT_DEADLINE_S)  # it closes its files a moment before its exit code is there
        who = self._link.rank_of(process.pid)
        if who is None:
            # It ended before it could report. Without its number nobody else can be kept from waiting for it.
            raise TransientError(f"scheduler process {process.pid} ended with exit code {process.exitcode}")
        replica, rank = who
        self._stop_dispatch_to(replica)
        self._coordinator.on_member_lost(replica, rank, f"ended with exit code {process.exitcode}")
        # The other ranks of the replica cannot go on; they would fail in a collective, and end the whole server.
        # Nor can those that have layers there, or whose layers have: they would wait for their batches in vain.
        dependent = set(self._coordinator.dependent_on(replica))
        for other in self.scheduler_procs:
            found = self._link.rank_of(other.pid)
            if found is not None and found[0] in dependent and other.is_alive():
                other.kill()
        sock_send(self._send_to_tokenizer, ReplicaEnded(alive=len(self._active_workers)))
        for answer in self._open.take_answers(replica, f"replica {replica} has ended; ask again"):
            sock_send(self._send_to_tokenizer, answer)

    def _stop_dispatch_to(self, replica: int) -> None:
        """New requests and control messages go to the others."""
        if replica not in self._active_workers:
            return
        self.status[replica] = False
        self.dp_active[replica] = False
        self._refresh_active_workers()
        self.round_robin_counter = 0
        self.dp_budget.exclude(replica)
        if self._by_need is not None:
            self._by_need.dispatcher.on_lost(replica)
        if not self._active_workers:
            raise TransientError("all replicas have ended")
        logger.error("KunServe: serving goes on with replicas %s", self._active_workers)

    def maybe_external_dp_rank_routing(self, req: Any) -> bool:
        if req.routed_dp_rank is not None and self._coordinator.is_lost(req.routed_dp_rank):
            logger.warning("KunServe: request %s asks for replica %d, which has ended", req.rid, req.routed_dp_rank)
            req.routed_dp_rank = None
        return bool(super().maybe_external_dp_rank_routing(req))


class SurvivorBudget(DPBudget):  # type: ignore[misc]
    """The loads by which upstream picks a replica, without those that have ended."""

    def __init__(self, dp_size: int) -> None:
        super().__init__(dp_size)
        self._excluded: set[int] = set()

    def exclude(self, replica: int) -> None:
        self._excluded.add(replica)
        self.total_requests[replica] = self.total_tokens[replica] = float("inf")

    def update_budget(self, loads: Iterable[Any]) -> None:
        super().update_budget([load for load in loads if load.dp_rank not in self._excluded])


def _wish(call: CoordinatorCall) -> DropWish:
    layers: Any = call.layers
    if isinstance(layers, dict):
        layers = {replica: tuple(hosts) for replica, hosts in layers.items()}
    elif layers is not None:
        layers = tuple(layers)
    return DropWish(tuple(tuple(group) for group in call.groups or ()), layers, call.tokens)
