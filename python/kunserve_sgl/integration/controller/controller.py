"""The data-parallel controller of KunServe: SGLang's, without the busy loop, and with the coordinator inside."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import zmq
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import AbortReq, sock_recv, sock_send
from sglang.srt.managers.utils import MsgpackDecodeError, is_health_check_generate_req, msgpack_decode_explained
from sglang.utils import TypeBasedDispatcher
from typing_extensions import override

from kunserve_sgl.args import Activations, Dispatch, Exchange, Mode
from kunserve_sgl.control.addresses import is_frame_address, is_inbox_address, is_memory_address, make_keys
from kunserve_sgl.control.answers import CommandAnswer, Verdict, answer_body
from kunserve_sgl.control.autopilot import Autopilot
from kunserve_sgl.control.coordinator import Coordinator
from kunserve_sgl.control.coordinator_link import CoordinatorLink
from kunserve_sgl.control.group_store import group_store_of
from kunserve_sgl.control.message_check import MessageCheck
from kunserve_sgl.control.messages import Hello, LoadReport, ToCoordinator, Waiting, Wanting
from kunserve_sgl.control.transition import Timeouts
from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.attach.attachment import current_attachment
from kunserve_sgl.integration.attach.collector import leave_startup_alone
from kunserve_sgl.integration.attach.head_sockets import enter_head, make_socket
from kunserve_sgl.integration.controller.commands import carry_out
from kunserve_sgl.integration.controller.dispatch import RequestDispatch
from kunserve_sgl.integration.controller.metrics import Metrics
from kunserve_sgl.integration.controller.open_requests import NotingWorkers, OpenRequests
from kunserve_sgl.integration.controller.polling import Polling
from kunserve_sgl.integration.controller.ray_cluster import RayCluster
from kunserve_sgl.integration.controller.refusals import ANSWERABLE, SURVIVABLE, refusal, verdict_of
from kunserve_sgl.integration.controller.replica_start import requests_socket
from kunserve_sgl.integration.controller.serving_clock import ServingClock
from kunserve_sgl.integration.controller.start_watch import StartWatch, end_controller, end_on_sigquit
from kunserve_sgl.integration.controller.survivor_budget import SurvivorBudget
from kunserve_sgl.integration.controller.waits_for_room import WaitsForRoom
from kunserve_sgl.integration.controller.worker_socket import WorkerSocket
from kunserve_sgl.integration.messages import (
    Command,
    CoordinatorCall,
    CoordinatorReply,
    RequestsEnded,
)
from kunserve_sgl.integration.placement import gpu_offset
from kunserve_sgl.policy.decision import Thresholds
from kunserve_sgl.policy.stalls import StallWatch
from kunserve_sgl.wire.rejections import Rejections

logger = logging.getLogger(__name__)

_POLL_MS = 500  # the watchdog wants a sign of life now and then, also when there is nothing to do
# Longest wait of an automatic restore for slots to become empty. It begins only when what lives there fits elsewhere,
# and while it waits nothing can be dropped.
_AUTO_DRAIN_S = 2.0


class KunserveDataParallelController(WaitsForRoom):
    """Sleeps until a message arrives, a scheduler ends, or a deadline passes. Upstream's loop asks its socket without
    pause and fills a core."""

    workers: Any

    def __init__(self, server_args: Any, *args: Any, **kwargs: Any) -> None:
        self._is_starting = True
        end_on_sigquit(server_args.kunserve_directory, lambda: self._is_starting)
        if server_args.use_ray:
            self._cluster = RayCluster(server_args)
        make_keys(server_args, server_args.dp_size, server_args.tp_size)
        self._clock = ServingClock()
        self._rejections = Rejections()
        self._link = CoordinatorLink(server_args, self._rejections)
        self.keys = self._link.curve
        self._store = group_store_of(server_args, self.keys, self._rejections, server_args.dp_size)
        if self._store is not None:
            server_args.override("kunserve", kunserve_group_store=self._store.address)
        self._metrics = (
            Metrics(server_args.served_model_name, server_args.tp_size, time.monotonic)
            if server_args.enable_metrics
            else None
        )
        if self._metrics is not None:
            self._rejections.tell = self._metrics.on_rejected
        watchers: dict[str, Any] = {} if self._metrics is None else {"on_transition": self._metrics.on_transition}
        self._coordinator = Coordinator(
            server_args.dp_size,
            server_args.tp_size,
            Timeouts(server_args.kunserve_transition_timeout, server_args.kunserve_drain_timeout),
            self._link.send,
            self._clock,
            activations=Activations(server_args.kunserve_activations),
            model=server_args.served_model_name,
            end_replicas=self._end_replicas,
            exchange=Exchange(server_args.kunserve_exchange),
            way=server_args.way_to_peers,
            stay_s=server_args.kunserve_min_stay,
            on_broken=lambda: self._autopilot.on_broken(),
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
            self._clock,
            orders=server_args.kunserve == Mode.AUTO.value,
        )
        by_need = server_args.kunserve_dispatch == Dispatch.BY_NEED.value
        self._by_need = RequestDispatch(server_args.dp_size, self._coordinator) if by_need else None
        started_s = time.monotonic()
        super().__init__(server_args, *args, **kwargs)
        self._clock.after_wait(math.inf)  # the start may take long
        self._make_restarts(time.monotonic() - started_s)
        if by_need:
            self.dispatching = self._dispatch_by_need
        logger.info(
            "KunServe: requests are dispatched by %s",
            "free memory and compute; any other --load-balance-method than auto turns that off"
            if by_need
            else f"SGLang's method {server_args.load_balance_method}",
        )
        self.dp_budget = SurvivorBudget(server_args.dp_size)
        self.workers = NotingWorkers(WorkerSocket(socket, replica) for replica, socket in enumerate(self.workers))
        self._open = OpenRequests(server_args.dp_size)
        self._stalls = StallWatch(server_args.dp_size, server_args.kunserve_order_timeout)
        self._check = MessageCheck(
            server_args.dp_size,
            server_args.tp_size,
            self._coordinator,
            self._stalls.sent_requests,
            self._is_address,
            self._clock,
        )
        self._stalled: set[int] = set()
        self._blocked: set[int] = set()  # those, and the replicas that are merged with them
        self._polling = Polling()
        self._why_ended: dict[int, str] = {}  # by replica, of those that were ended here
        self._seen_ended: list[Any] = []  # processes, while others of their replicas are waited for
        self._send_to_tokenizer = make_socket(
            self.keys, self.context, zmq.PUSH, self.port_args.tokenizer_ipc_name, False
        )
        current_attachment().mark_used(type(self))
        leave_startup_alone()
        self._is_starting = False

    @override
    def launch_dp_schedulers(self, server_args: Any, port_args: Any) -> None:
        watch = StartWatch(server_args.kunserve_directory, self.scheduler_procs, end_controller)
        if server_args.is_on_network:
            enter_head(server_args, port_args)
            self._inputs = [requests_socket(self, replica, 0) for replica in range(server_args.dp_size)]
        with watch, self.starts():
            super().launch_dp_schedulers(server_args, port_args)

    @override
    def launch_tensor_parallel_group_thread(
        self, server_args: Any, port_args: Any, base_gpu_id: int, dp_rank: int, *args: Any
    ) -> None:
        """Takes a socket for requests that a network can reach, in place of the one that SGLang has made."""
        if server_args.is_on_network:
            self.workers[dp_rank].close(linger=0)
            self.workers[dp_rank], port_args.scheduler_input_ipc_name = self._inputs[dp_rank]
        super().launch_tensor_parallel_group_thread(server_args, port_args, base_gpu_id, dp_rank, *args)

    @override
    def launch_tensor_parallel_group(
        self, server_args: Any, port_args: Any, base_gpu_id: int, dp_rank: int, *args: Any, **kwargs: Any
    ) -> None:
        super().launch_tensor_parallel_group(
            server_args, port_args, gpu_offset(server_args, dp_rank), dp_rank, *args, **kwargs
        )

    @override
    def init_dispatcher(self) -> None:
        super().init_dispatcher()
        handlers: list[Any] = [
            (CoordinatorCall, self._on_coordinator_call),
            (AbortReq, self._on_abort),
            (RequestsEnded, lambda ended: self._open.ended(ended.names)),
        ]
        self._request_dispatcher += TypeBasedDispatcher(handlers)

    @last_words.left_by
    @override
    def event_loop(self) -> None:
        """Serves until the process ends. Whatever is raised here ends the server; the launcher answers what is open."""
        self._polling.add(self.recv_from_tokenizer)
        self._polling.add(self._link.inbox)
        if self._store is not None:
            self._polling.add(self._store.socket)
        while True:
            self.soft_watchdog.feed()
            ready, processes = self._poll()
            # Losses last: an answer that a process sent before its end still counts.
            if self._link.inbox in ready:
                for message in self._link.receive(self._check.check):
                    self._on_message(message)
            if self._store is not None and self._store.socket in ready:
                self._store.serve()
            self._restarts.on_files(ready.keys())
            if ended := [processes[sentinel] for sentinel in ready.keys() & processes.keys()]:
                self._on_processes_ended(ended)
            self._follow_stalls()
            self._coordinator.on_tick()
            self._restarts.on_tick()
            self._require_somebody()
            self._follow_long()
            self._autopilot.on_tick()
            if self._by_need is not None:
                self._by_need.follow_plan()
            self._follow_held()
            if self._metrics is not None:
                self._metrics.update(self._coordinator, self._autopilot)
            if self.recv_from_tokenizer in ready:
                self._take_request()

    def _poll(self) -> tuple[dict[Any, int], dict[int, Any]]:
        """Waits until something happens; returns what is ready, and the processes that are watched, by the file that is
        ready when one has ended."""
        served = [process for process in self.scheduler_procs if process not in self._ended]
        processes = {process.sentinel: process for process in (*served, *self._restarts.processes)}
        wait_ms = self._time_to_wait_ms()
        ready = self._polling.poll({*processes, *self._restarts.files}, wait_ms)
        self._clock.after_wait(wait_ms / 1000)
        return ready, processes

    def _is_address(self, report: Hello | Wanting) -> bool:
        who = report.replica, report.rank, report.incarnation
        hosts = () if self._cluster is None else (self._cluster.host_of(report.replica) or "",)
        options = self.server_args
        if not is_memory_address(options, *who, report.memory_address, hosts):
            return False
        return isinstance(report, Wanting) or (
            is_inbox_address(options, *who, report.address, hosts)
            and is_frame_address(options, *who, report.frame_address)
        )

    def _on_message(self, message: ToCoordinator) -> None:
        """Takes in a rank's message; one that makes no sense is ignored. The load is an opinion, and the next report a
        newer one; but where an answer in a transition has failed half-way, the plan is not known any more."""
        try:
            if isinstance(message, LoadReport):
                self._on_load_report(message)
            elif isinstance(message, Waiting):
                self._stalls.on_waiting(message.replica, message.hosts, message.waited_s, self._clock())
            else:
                self._coordinator.on_message(message)
        except InvariantError:
            raise
        except Exception as error:
            is_start = isinstance(message, Hello) and self._coordinator.plan is None  # the flags do not fit the machine
            is_report = isinstance(message, LoadReport | Waiting)
            if is_start or not (is_report or isinstance(error, SURVIVABLE)):
                raise
            logger.exception("KunServe: ignored a %s of replica %d", type(message).__name__, message.replica)

    def _on_load_report(self, report: LoadReport) -> None:
        self._autopilot.on_load(report.replica, report.load)
        self._coordinator.on_load(report.replica, report.load)
        self._stalls.on_report(report.replica, report.load, self._clock())
        if self._by_need is not None:
            self._by_need.dispatcher.on_report(report.replica, report.load)
        if self._metrics is not None:
            self._metrics.on_report(report)

    def _time_to_wait_ms(self) -> int:
        deadlines_s = (
            self._coordinator.next_deadline_s(),
            self._autopilot.next_deadline_s(),
            self._restarts.next_deadline_s(),
            self._held.next_deadline_s,
            self._long.next_deadline_s,
        )
        left_ms = [math.ceil(1000 * (each - self._clock())) for each in deadlines_s if each is not None]
        return min([_POLL_MS, *(max(0, ms) for ms in left_ms)])

    # Commands

    def _on_coordinator_call(self, call: CoordinatorCall) -> None:
        def done(answer: CommandAnswer) -> None:
            self._reply(call, answer.verdict, answer_body(answer))

        try:
            if call.command is Command.STATUS:
                self._reply(call, Verdict.DONE, self._status())
            else:
                carry_out(call, self._coordinator, done)
        except Exception as error:
            done(CommandAnswer(verdict_of(error), f"{type(error).__name__}: {error}", epoch=0))
            if not isinstance(error, SURVIVABLE):
                raise

    def _status(self) -> dict[str, Any]:
        dispatch: dict[str, Any] = {"by": self.server_args.load_balance_method}
        if self._by_need is not None:
            dispatch = {"by": Dispatch.BY_NEED.value, "replicas": self._by_need.status()}
        return {
            **self._coordinator.status(),
            "auto": self._autopilot.status(),
            "dispatch": dispatch,
            "restarts": self._restarts.status(),
            "held_requests": len(self._held),
            "long_requests": len(self._long),
            "rejected_messages": dict(self._rejections.counts),
        }

    def _reply(self, call: CoordinatorCall, verdict: Verdict, body: dict[str, Any]) -> None:
        sock_send(self._send_to_tokenizer, CoordinatorReply(call_id=call.call_id, verdict=verdict, body=body))

    # Requests

    def _take_request(self) -> None:
        """Takes in what the HTTP server sends: requests, and what it asks all replicas or the coordinator."""
        if io_struct._USE_PICKLE_IPC:
            self._request_dispatcher(sock_recv(self.recv_from_tokenizer))
            return
        data = self.recv_from_tokenizer.recv()
        try:
            received = msgpack_decode_explained(data)
        except MsgpackDecodeError as error:
            logger.error("KunServe: ignored a message of %d bytes of the HTTP server: %s", len(data), error)
            if error.rid is not None:
                sock_send(self._send_to_tokenizer, refusal(error.rid, error))
            return
        self._request_dispatcher(received)

    @override
    def dispatching_with_trace(self, req: Any, *args: Any, since_s: float | None = None, **kwargs: Any) -> None:
        """Dispatches one request, or answers it with the reason where that fails; nothing else has changed then. In
        mode auto one that no replica has room for waits until one has; or goes on waiting, as it does `since_s`."""
        self.workers.take_last()
        try:
            if not self._may_dispatch:
                if self._active_workers and not self._restarts.is_any_coming_back:
                    raise TransientError("no replica makes progress")
                self._hold(req, since_s)
                return
            if self._autopilot.orders and self._waits_for_room(req, since_s):
                return
            super().dispatching_with_trace(req, *args, **kwargs)
        except InvariantError:
            raise
        except Exception as error:  # it has gone nowhere, and nothing else has changed
            logger.log(
                logging.WARNING if isinstance(error, ANSWERABLE) else logging.ERROR,
                "KunServe: request %s is not dispatched: %s",
                req.rid,
                error,
                exc_info=not isinstance(error, ANSWERABLE),
            )
            # Any answer to a health check would mean that all is well; none means the opposite, after a while.
            if not is_health_check_generate_req(req):
                sock_send(self._send_to_tokenizer, refusal(req.rid, error))
            return
        replica = self.workers.take_last()
        if replica is not None:
            if not is_health_check_generate_req(req):
                self._open.sent(replica, req)
            self._stalls.on_sent(replica, self._clock())

    @override
    def send_to_all_workers(self, obj: Any) -> None:
        """Sends `obj` to all replicas that are there, those included that are passed over for requests."""
        for replica in self._active_workers:
            sock_send(self.workers[replica], obj)

    def _dispatch_by_need(self, req: Any) -> None:
        """Dispatches in place of SGLang's methods of the same kind."""
        assert self._by_need is not None
        tokens = self._by_need.tokens_of(req, self.max_req_input_len)
        if self.maybe_external_dp_rank_routing(req):
            replica = req.routed_dp_rank
        else:
            replica = self._by_need.dispatcher.pick(tokens)
            sock_send(self.workers[replica], req)
        self._by_need.dispatcher.record(replica, tokens)

    @override
    def maybe_external_dp_rank_routing(self, req: Any) -> bool:
        """Ignores a replica that the client asks for where it has ended or makes no progress."""
        wanted = req.routed_dp_rank
        has_ended = wanted is not None and 0 <= wanted < len(self.dp_active) and not self.dp_active[wanted]
        if has_ended or wanted in self._blocked:
            why = "has ended" if has_ended else "makes no progress"
            logger.warning("KunServe: request %s asks for replica %d, which %s", req.rid, wanted, why)
            req.routed_dp_rank = None
        return bool(super().maybe_external_dp_rank_routing(req))
