"""The tokenizer manager of KunServe: SGLang's, which checks what requests say, waits for nobody that has ended, sends
requests on to another replica then, and ends in order itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException
from sglang.srt.environ import envs
from sglang.srt.managers import tokenizer_control_mixin, tokenizer_manager
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedEmbeddingReqInput,
    BatchTokenizedGenerateReqInput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.tokenizer_manager import ServerStatus, _slice_streaming_output_meta_info
from sglang.utils import TypeBasedDispatcher
from typing_extensions import override

from kunserve_sgl.integration.attach.head_sockets import tokenizer_ports
from kunserve_sgl.integration.launcher import far_metrics
from kunserve_sgl.integration.launcher.asked_replicas import AskedReplicas, nobody_left
from kunserve_sgl.integration.launcher.calls import Calls
from kunserve_sgl.integration.launcher.checked_requests import CheckedRequests
from kunserve_sgl.integration.launcher.continuations import Continuations
from kunserve_sgl.integration.launcher.control_requests import ControlRequests
from kunserve_sgl.integration.launcher.ending import Ending, KunserveSignalHandler
from kunserve_sgl.integration.launcher.load_snapshots import LoadSnapshots
from kunserve_sgl.integration.messages import (
    CALLS,
    LoadSnapshotTold,
    MetricsTold,
    ReplicasAlive,
    RequestsLost,
    RequestsReturned,
    RequestWaited,
)

_REQUESTS = (TokenizedGenerateReqInput, TokenizedEmbeddingReqInput)
_BATCHES = (BatchTokenizedGenerateReqInput, BatchTokenizedEmbeddingReqInput)
# What is answered also while no replica is there.
_FOR_THE_CONTROLLER = (*_REQUESTS, *_BATCHES, *CALLS, AbortReq)


class KunserveTokenizerManager(CheckedRequests, ControlRequests):
    """Waits only for replicas that are there. Upstream waits for `dp_size` answers to what it asks all replicas,
    without a deadline."""

    _alive: Collection[int] = (0,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._alive = range(self.server_args.dp_size)
        self.ending = Ending(self)
        self.signal_handler_class = KunserveSignalHandler
        self.calls = Calls(self)

        def later(seconds: float, call: Callable[[], None]) -> None:
            asyncio.get_running_loop().call_later(seconds, call)

        self.continuations = Continuations(
            self.rid_to_state,
            super()._dispatch_to_scheduler,
            self.answer,
            later if self.server_args.dp_size > 1 else None,
        )
        handlers: list[Any] = [
            (ReplicasAlive, self._on_replicas_alive),
            (RequestsLost, self._on_requests_lost),
            (RequestsReturned, self._on_requests_returned),
            (RequestWaited, self._on_request_waited),
            (LoadSnapshotTold, self._load_snapshots.on_told),
            (MetricsTold, far_metrics.on_told),
        ]
        self._result_dispatcher += TypeBasedDispatcher(handlers)

    @override
    def init_ipc_channels(self, port_args: Any) -> None:
        with tokenizer_ports(
            self.server_args, tokenizer_manager, port_args, lambda: self.recv_from_detokenizer
        ) as ports:
            super().init_ipc_channels(ports)
        self._load_snapshots = LoadSnapshots(port_args.instance_id, self.server_args.dp_size)

    @property
    def server_status(self) -> ServerStatus:
        """Says what SGLang's /health goes by: it answers 503 at once while a server starts, and so it does while no
        replica is there."""
        return self._server_status if self._alive else ServerStatus.Starting

    @server_status.setter
    def server_status(self, status: ServerStatus) -> None:
        self._server_status = status

    def _on_replicas_alive(self, message: ReplicasAlive) -> None:
        """Where a replica has ended, lets whatever is being waited for end with the answers of the others."""
        self._alive = message.alive
        for asked in self._asked_replicas:
            asked.on_alive(self._alive)
        self._updating &= frozenset(self._alive)
        self._end_model_update()
        self.calls.on_alive(self._alive)

    @override
    def init_communicators(self, server_args: Any) -> None:
        super().init_communicators(server_args)
        names = [f"{name}_communicator" for name, *_ in tokenizer_control_mixin._COMMUNICATOR_SPECS]
        self._asked_replicas = [AskedReplicas(getattr(self, name), range(server_args.dp_size)) for name in names]
        for name, asked in zip(names, self._asked_replicas, strict=True):
            setattr(self, name, asked)

    def _handle_update_weights_from_disk_req_output(self, recv_obj: Any) -> None:
        self.model_update_tmp.append(recv_obj)
        self._end_model_update()

    def _end_model_update(self) -> None:
        result, answers = self.model_update_result, self.model_update_tmp
        if result is None or result.done() or len(answers) < len(self._updating):
            return
        if not answers:
            result.set_exception(nobody_left())
        else:  # who waits for one answer of one replica from the start takes it as it is
            result.set_result(answers[0] if self.model_update_expected_workers == 1 else answers)

    @override
    async def get_loads(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Leaves out replicas that have ended: what each had said last is still in the file that SGLang reads."""
        return [load for load in await super().get_loads(*args, **kwargs) if load.dp_rank in self._alive]

    # Requests

    def _on_requests_lost(self, message: RequestsLost) -> None:
        self.continuations.on_lost(message.names, message.begun, message.reason, message.can_go_on)

    def _on_request_waited(self, message: RequestWaited) -> None:
        self.continuations.on_waited(message.name, message.waited_s)

    def _on_requests_returned(self, message: RequestsReturned) -> None:
        self.continuations.on_returned(message.names, message.reason)

    @override
    def _dispatch_to_scheduler(self, obj: Any) -> None:
        """Sends a request on; those that come while the server ends are answered like those that were open, a moment
        later: SGLang would not find what had been answered before it has returned from here."""
        if not self._alive and not isinstance(obj, _FOR_THE_CONTROLLER):
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "no replica is there; one is being started again")
        if isinstance(obj, (*_REQUESTS, *_BATCHES)):
            requests = obj if isinstance(obj, _BATCHES) else (obj,)
            if self.ending.reason is not None:
                for request in requests:
                    asyncio.get_running_loop().call_soon(self.ending.answer, request.rid)
                return
            for request in requests:
                self.continuations.on_sent(request)
        elif isinstance(obj, AbortReq):
            self.continuations.on_abort(obj.rid, obj.abort_all)
        super()._dispatch_to_scheduler(obj)

    @override
    def _wait_one_response(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        """Looks for the state of the request at once. Upstream does so when the answer is waited for, which of a batch
        is when all of it has been sent: by then a part of it may have ended, and be forgotten."""
        return self._answers_of(self.rid_to_state.get(obj.rid), obj, request)

    async def _answers_of(self, state: Any, obj: Any, request: Any) -> AsyncIterator[Any]:
        is_forgotten = state is not None and obj.rid not in self.rid_to_state
        if is_forgotten:
            self.rid_to_state[obj.rid] = state
        answers = super()._wait_one_response(obj, request)
        try:
            async for answer in answers:
                yield answer
        finally:
            if is_forgotten:
                self.rid_to_state.pop(obj.rid, None)
            await answers.aclose()

    @override
    async def _handle_abort_finish_reason(self, out: Any, *args: Any, **kwargs: Any) -> Any:
        """Lets OpenAI's streams say why they end: they look for SGLang's type of status, and a number is what messages
        make of it."""
        finish_reason = out["meta_info"]["finish_reason"]
        with contextlib.suppress(ValueError):
            finish_reason["status_code"] = HTTPStatus(finish_reason.get("status_code"))
        return await super()._handle_abort_finish_reason(out, *args, **kwargs)

    @override
    async def _handle_batch_output(self, recv_obj: Any) -> None:
        self.continuations.on_output(recv_obj)
        await super()._handle_batch_output(recv_obj)

    @override
    def _handle_abort_req(self, recv_obj: AbortReq) -> None:
        """Takes in that a replica or the controller has ended a request."""
        name = self.continuations.client_name(recv_obj.rid)
        if name is not None:
            recv_obj.rid = name
            self.answer(recv_obj)

    def answer(self, abort: AbortReq) -> None:
        """Ends a request, by the client's name. Upstream leaves in the last message of a stream only the last of its
        tokens, but all of its text."""
        state = self.rid_to_state.get(abort.rid)
        before = 0 if state is None else len(state.out_list)
        super()._handle_abort_req(abort)
        if state is None or len(state.out_list) == before or not getattr(state.obj, "stream", False):
            return
        last = state.out_list[-1]
        if self.incremental_streaming_output:  # all that there is has been sent before
            last.update(text="", output_ids=[])
            _slice_streaming_output_meta_info(last["meta_info"], len(state.output_ids))
        else:
            last.update(output_ids=state.output_ids.copy())

    @override
    def _remove_req_state(self, rid: str, *args: Any, **kwargs: Any) -> Any:
        removed = super()._remove_req_state(rid, *args, **kwargs)
        if removed is not None:
            self.continuations.forget(rid)
        return removed

    # The end

    @override
    def dump_requests_before_crash(self, *args: Any, **kwargs: Any) -> None:
        """Dumps the requests only: how processes are looked into before the end is in `ending.py`. SGLang waits here,
        in the event loop, for a GPU to settle and to write core dumps, also where there is none."""
        with (
            envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.override(False),
            envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.override(False),
        ):
            super().dump_requests_before_crash(*args, **kwargs)
