"""SGLang's scheduler, with the runtime of its rank, a KV cache that grows and shrinks, and limits that follow it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import zmq
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import NextBatchPlan
from sglang.srt.managers.scheduler import Scheduler
from sglang.utils import TypeBasedDispatcher
from typing_extensions import override

from kunserve_sgl.args import Mode
from kunserve_sgl.errors import BatchCalledOffError, TransientError
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.attach.attachment import current_attachment
from kunserve_sgl.integration.attach.collector import leave_startup_alone
from kunserve_sgl.integration.attach.scheduler_actor import own_metrics
from kunserve_sgl.integration.messages import (
    CheckCall,
    Outcome,
    ReplicaOrder,
    ReplicaReply,
    ResizeKvCall,
    StatusCall,
    WritableCall,
)
from kunserve_sgl.integration.rejection_metric import rejection_counter
from kunserve_sgl.integration.runner.layer_runner import SglangLayerRunner
from kunserve_sgl.integration.scheduler import admission
from kunserve_sgl.integration.scheduler.cache_flush import FlushAnswers, holds_nothing
from kunserve_sgl.integration.scheduler.continuation import ContinuedRequests
from kunserve_sgl.integration.scheduler.control_handlers import answering
from kunserve_sgl.integration.scheduler.engine import SglangEngine
from kunserve_sgl.integration.scheduler.head_channels import channels_to_head
from kunserve_sgl.integration.scheduler.metric_files import MetricFiles
from kunserve_sgl.integration.scheduler.mixed_batches import mix
from kunserve_sgl.integration.scheduler.profiler import KunserveProfilerManager
from kunserve_sgl.integration.scheduler.request_limits import RequestLimits
from kunserve_sgl.integration.scheduler.request_receiver import KunserveRequestReceiver
from kunserve_sgl.integration.scheduler.returned_requests import KunserveOutputStreamer, ReturnedRequests
from kunserve_sgl.integration.scheduler.standstill import StandstillGuard
from kunserve_sgl.integration.scheduler.weight_guard import guard, why_unwritable
from kunserve_sgl.replica.capacity import BadResizeError, CapacityManager
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.integrity import IntegrityCheck
from kunserve_sgl.replica.load_report import LoadReporter
from kunserve_sgl.replica.place import Place
from kunserve_sgl.replica.runtime import RankRuntime
from kunserve_sgl.replica.warm_up import warm_up

logger = logging.getLogger(__name__)

# Checks and reports of an idle replica; as often as it would wake up if it did not serve others.
HOUSEKEEPING_INTERVAL_S = 1.0
# What the controller dispatches to one replica; everything else goes to all.
REQUEST_TYPES = (TokenizedGenerateReqInput, TokenizedEmbeddingReqInput)


class KunserveScheduler(Scheduler):  # type: ignore[misc]
    """Schedules the requests of one replica. It keeps its own requests, radix cache, sampling and output at all times.

    Calls are answered between two batches, when no forward of this replica is being prepared.
    """

    runtime: RankRuntime | None = None  # where there is another replica
    load_reporter: LoadReporter | None = None
    returned: ReturnedRequests | None = None  # in automatic mode
    metric_files: MetricFiles | None = None  # on another machine than the HTTP server
    _housekeeping_s = 0.0
    output_streamer: Any
    request_receiver: Any
    waiting_queue: list[Any]
    _request_dispatcher: Any

    @override
    def __init__(self, server_args: Any, *args: Any, **kwargs: Any) -> None:
        with last_words.ending_alone(server_args):
            super().__init__(server_args, *args, **kwargs)
            self._complete()

    def _complete(self) -> None:
        """Adds what SGLang's scheduler does not have; once, when that is there."""
        self.limits = RequestLimits(self)
        self.continued = ContinuedRequests(self)
        runner = self.tp_worker.model_runner
        self.layers = SglangLayerRunner(runner, self.req_to_token_pool)
        self.engine: Engine = SglangEngine(self, self.limits, self.layers)
        self.capacity = CapacityManager(self.engine, runner.kunserve_memory)
        self._standstill = StandstillGuard(self)
        if self.server_args.dp_size > 1:
            warm_up(self.engine.layers, self.max_running_requests, self.engine.most_tokens)
            self.runtime = self._make_runtime()
            runner.own_batches = self.runtime.hosting.own_batches
            self.request_receiver = KunserveRequestReceiver.replacing(self.request_receiver, self._take_orders)
            if self.idle_sleeper is not None:
                for source in self.runtime.wake_up_sources():
                    self.idle_sleeper.poller.register(source, zmq.POLLIN)
            if self.server_args.kunserve == Mode.AUTO.value:
                self.returned = ReturnedRequests(self, self.limits, self.max_total_num_tokens)
            self.runtime.report()
            if self.runtime.rank == 0:
                longest_s = self.server_args.kunserve_order_timeout / 4
                self.load_reporter = LoadReporter(
                    self.engine, self.runtime.reports.send_load, time.monotonic, longest_s
                )
                if (own := own_metrics(self.server_args.kunserve_directory)) is not None:
                    send = self.ipc_channels.send_to_tokenizer.send_output
                    self.metric_files = MetricFiles(own, send, time.monotonic)
        held = None if self.runtime is None else self.runtime.held
        self.integrity = IntegrityCheck(runner.kunserve_memory, self.engine, held)
        current_attachment().mark_used(type(self))
        leave_startup_alone()

    def _make_runtime(self) -> RankRuntime:
        runner, arguments = self.tp_worker.model_runner, self.server_args
        device = torch.device("cuda", runner.gpu_id) if runner.device == "cuda" else torch.device(runner.device)
        place = Place(self.ps.dp_rank, self.ps.tp_rank, arguments.dp_size, self.ps.tp_size, device)
        count = rejection_counter(arguments.served_model_name) if arguments.enable_metrics else None
        attention = runner.part_attention() if arguments.uses_messages else None
        runtime = RankRuntime(place, arguments, self.engine, self.capacity, runner.kunserve_memory, count, attention)
        if (elsewhere := runtime.access.elsewhere) is not None:
            runner.attend_elsewhere(elsewhere.remote)
            self.layers.remote = elsewhere.remote
        return runtime

    @override
    def init_ipc_channels(self, port_args: Any) -> None:
        with channels_to_head(self, port_args) as ports:
            super().init_ipc_channels(ports)

    @override
    def init_request_dispatcher(self) -> None:
        self.flush_wrapper = FlushAnswers(self)
        super().init_request_dispatcher()
        handlers: list[Any] = [
            (StatusCall, self._on_status),
            (ResizeKvCall, self._on_resize_kv),
            (WritableCall, self._on_writable),
            (CheckCall, self._on_check),
            (ReplicaOrder, self._on_order),
        ]
        self._request_dispatcher += TypeBasedDispatcher(handlers)
        self._request_dispatcher = answering(guard(self, self._request_dispatcher), self.ps.tp_size)

    @override
    def init_output_streamer(self) -> None:
        super().init_output_streamer()
        self.output_streamer = KunserveOutputStreamer.replacing(
            self.output_streamer,
            lambda requests: requests if self.returned is None else self.returned.without_cut(requests),
        )

    @override
    def init_profiler(self) -> None:
        self.profiler_manager = KunserveProfilerManager(
            ps=self.ps, dp_tp_cpu_group=self.dp_tp_cpu_group, get_forward_ct=lambda: self.forward_ct
        )

    def run_event_loop(self) -> None:
        """Serves until the process ends. Where there are other replicas, a failure ends this process only. The
        controller sees it end, ends the other ranks and those that are merged with it, answers their requests, and
        serves on without them. Upstream's way ends the controller, and with it the whole server."""
        try:
            while not self.gracefully_exit:
                try:
                    super().run_event_loop()
                except BatchCalledOffError as called_off:
                    # All ranks of the replica leave the loop here, and begin anew with the order that waits.
                    logger.warning("KunServe: %s", called_off)
        except Exception as error:
            last_words.leave(error)
            if self.server_args.dp_size == 1 or envs.SGLANG_KILLPG_ON_SCHEDULER_EXCEPTION.get():
                raise
            logger.exception("KunServe: replica %d rank %d ends", self.ps.dp_rank, self.ps.tp_rank)
            last_words.end_process()
        if self.runtime is not None:
            try:
                self.runtime.close()
            except Exception:
                # The process ends, and what it has with it. What it was to do is done.
                logger.warning("KunServe: something does not close", exc_info=True)

    # Between two batches

    @override
    def get_next_batch_to_run(self, running_batch: Any, last_batch: Any) -> Any:
        if self.runtime is not None and self.runtime.stands:
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        return mix(self, super().get_next_batch_to_run(running_batch, last_batch))

    @override
    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        if self.load_reporter is not None:
            self.load_reporter.on_received(sum(isinstance(each, REQUEST_TYPES) for each in recv_reqs))
        super().process_input_requests(recv_reqs)
        if self.metric_files is not None:
            self.metric_files.follow()
        if self.runtime is not None:
            self.runtime.access.look()
        if self.runtime is not None and self.runtime.is_lending:
            self.runtime.lend_on(is_serving=not self.is_fully_idle())
        if self.runtime is not None and self.runtime.is_in_transition:
            has_ended = self.runtime.at_boundary(is_serving=not self.is_fully_idle())
            if has_ended and self.load_reporter is not None:
                self.load_reporter.on_memory_changed()
        self.integrity.advance()
        if self.load_reporter is not None:
            self.load_reporter.at_boundary()

    @override
    def init_req_max_new_tokens(self, req: Any) -> None:
        self.limits.on_arrival(req)
        super().init_req_max_new_tokens(req)
        self.limits.limit_to_expected(req)
        self.continued.resume(req)

    @override
    def handle_generate_request(self, recv_req: Any) -> None:
        if self.returned is not None and self.returned.give_back(recv_req):
            return
        self.continued.on_arrival(recv_req)
        with self._taking_in(recv_req):
            admission.admit(self, recv_req, super().handle_generate_request)

    @override
    def handle_embedding_request(self, recv_req: Any) -> None:
        with self._taking_in(recv_req):
            super().handle_embedding_request(recv_req)

    @contextlib.contextmanager
    def _taking_in(self, recv_req: Any) -> Iterator[None]:
        """Leaves word of a request that this replica does not survive the taking in of."""
        begun = None if self.runtime is None else self.runtime.begun
        if begun is not None:
            begun.begin_taking_in(recv_req.rid)
        yield
        if begun is not None:
            begun.end_taking_in()

    @override
    def run_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.runtime is not None and self.runtime.begun is not None and batch.forward_mode.is_extend():
            self.runtime.begun.add(req.rid for req in batch.reqs)
        return super().run_batch(batch, *args, **kwargs)

    @override
    def _abort_on_queued_limit(self, recv_req: Any) -> bool:
        return not self.continued.was_admitted(recv_req) and bool(super()._abort_on_queued_limit(recv_req))

    def _add_request_to_queue(self, req: Any, *args: Any, **kwargs: Any) -> None:
        admission.refuse_empty(req)
        self.continued.follow(req)
        super()._add_request_to_queue(req, *args, **kwargs)
        self.continued.bring_forward(req)
        if self.load_reporter is not None:
            self.load_reporter.on_queued(req)

    def on_idle(self) -> None:
        """Does what is to be done when nothing runs here. Others' work comes before housekeeping, which a replica that
        serves others does once in a while only."""
        self._standstill.look(is_memory_changing=self.runtime is not None and self.runtime.is_in_transition)
        if self.load_reporter is not None:
            self.load_reporter.on_idle(self.runtime is not None and self.runtime.plan.serves)
        if self.runtime is not None and self.runtime.plan.serves:
            served = self.runtime.hosting.serving.serve()
            if time.monotonic() < self._housekeeping_s:
                self.maybe_send_health_check_signal()
                if not served:
                    self.maybe_sleep_on_idle()
                return
            self._housekeeping_s = time.monotonic() + HOUSEKEEPING_INTERVAL_S
        super().on_idle()

    def maybe_sleep_on_idle(self) -> None:
        """Sleeps until something comes. A paused engine calls it too, and goes on serving others."""
        if self.runtime is not None and self._engine_paused and self.runtime.hosting.serving.serve():
            return
        if self.integrity.is_busy or (self.runtime is not None and self.runtime.has_taken_in):
            return
        longest_ms = None if self.runtime is None else self.runtime.longest_sleep_ms
        if longest_ms is None or self.idle_sleeper is None:
            super().maybe_sleep_on_idle()
        else:
            self.idle_sleeper.poller.poll(longest_ms)

    def _take_orders(self) -> list[ReplicaOrder]:
        assert self.runtime is not None
        return [ReplicaOrder(payload=payload) for payload in self.runtime.take_orders()]

    def _on_order(self, order: ReplicaOrder) -> None:
        assert self.runtime is not None
        before = self.max_total_num_tokens
        self.runtime.on_payload(order.payload)
        if self.max_total_num_tokens != before and self.load_reporter is not None:  # by a Resize
            self.load_reporter.on_memory_changed()

    def copy_slots(self, targets: torch.Tensor, sources: torch.Tensor) -> None:
        """Copies the KV of own slots, int64[n] each and disjoint, in all layers, wherever they run."""
        if self.runtime is not None:
            self.runtime.hosting.slot_copies.copy(targets, sources)
        else:
            pool = self.token_to_kv_pool_allocator.get_kvcache()
            pool.copy_slots(targets, sources, range(pool.layer_num))

    def flush_cache(self, empty_cache: bool = True) -> bool:
        """Flushes the cache, also with requests that wait without any memory, while the engine is paused; upstream
        refuses that, although /pause_generation says that mode "retract" is for it."""
        if not holds_nothing(self):
            return bool(super().flush_cache(empty_cache))
        waiting, self.waiting_queue = self.waiting_queue, []
        for_grammar, self.grammar_manager.grammar_queue = self.grammar_manager.grammar_queue, []
        try:
            return bool(super().flush_cache(empty_cache))
        finally:
            self.waiting_queue, self.grammar_manager.grammar_queue = waiting, for_grammar

    # Calls

    def _on_writable(self, call: WritableCall) -> ReplicaReply:
        if (reason := why_unwritable(self, call.flushes)) is None:
            return self._reply(call, Outcome.DONE, "")
        ends = call.flushes and not self._engine_paused and why_unwritable(self, flushes=False) is None
        return self._reply(call, Outcome.BUSY if ends else Outcome.CONFLICT, reason)

    def _on_status(self, call: StatusCall) -> ReplicaReply:
        return self._reply(call, Outcome.DONE, "")

    def _on_check(self, call: CheckCall) -> ReplicaReply | None:
        """Begins a check, and answers when it has ended."""

        def answer(outcome: Outcome, message: str, differences: Sequence[str] = ()) -> None:
            epoch = 0 if self.runtime is None else self.runtime.plan.epoch
            reply = self._reply(call, outcome, message, {"differences": list(differences), "epoch": epoch})
            self.ipc_channels.send_to_tokenizer.send_output(reply, call)

        try:
            self.integrity.begin(partial(answer, Outcome.DONE, ""), partial(answer, Outcome.CONFLICT))
        except TransientError as error:
            return self._reply(call, Outcome.CONFLICT, str(error))
        return None

    def _on_resize_kv(self, call: ResizeKvCall) -> ReplicaReply:
        if call.replica != (self.ps.dp_rank or 0):
            return self._reply(call, Outcome.NOT_ADDRESSED, "")
        try:
            if self.runtime is not None and self.runtime.is_merged:
                raise TransientError(f"replica {call.replica} depends on others until it is restored")
            message = self.capacity.resize(call.frames)
            if self.runtime is not None:
                self.runtime.report()
            if self.load_reporter is not None:
                self.load_reporter.on_memory_changed()
        except BadResizeError as error:
            return self._reply(call, Outcome.BAD_REQUEST, str(error))
        except TransientError as error:
            logger.info("KunServe: KV capacity stays as it is: %s", error)
            return self._reply(call, Outcome.CONFLICT, str(error))
        return self._reply(call, Outcome.DONE, message)

    def _reply(
        self,
        call: StatusCall | ResizeKvCall | WritableCall | CheckCall,
        outcome: Outcome,
        message: str,
        more: Mapping[str, Any] | None = None,
    ) -> ReplicaReply:
        return ReplicaReply(
            call_id=call.call_id,
            replica=self.ps.dp_rank or 0,
            outcome=outcome,
            message=message,
            status={
                **self.capacity.status(),
                "pipeline": {} if self.runtime is None else self.runtime.hosting.report(),
                "remote_attention": {} if self.runtime is None else self.runtime.report_elsewhere(),
                "transition_step": "" if self.runtime is None else self.runtime.progress,
                "load_reports": self._load_report_cost(),
                "rejected_messages": {} if self.runtime is None else dict(self.runtime.rejections.counts),
                **(more or {}),
            },
        )

    def _load_report_cost(self) -> dict[str, float]:
        reporter = self.load_reporter
        return {} if reporter is None else {"count": reporter.reports, "seconds": round(reporter.seconds, 6)}

    @override
    def get_internal_state(self, recv_req: Any) -> Any:
        output = super().get_internal_state(recv_req)
        output.internal_state["max_total_num_tokens"] = self.max_total_num_tokens
        return output
