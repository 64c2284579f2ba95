"""Requests that read or write parameters: refused where they cannot be carried out, before anything has changed, and
followed up when they have changed parameters."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from sglang.srt.managers import io_struct
from sglang.utils import TypeBasedDispatcher

from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.scheduler.cache_flush import why_not_flushable
from kunserve_sgl.memory.errors import ChecksumMismatchError, LayerStateError
from kunserve_sgl.memory.layer_parameters import LayerState

logger = logging.getLogger(__name__)

Handler = Callable[[Any], Any]

# Request, and the answer that refuses it with a message.
_WRITERS = {
    io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
    io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
    io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
    io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
}
# The layers are at `model.layers`, else KunServe does not start; see `decoder_layers`.
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
# How upstream's message begins where it has not written anything yet.
_NOTHING_WRITTEN = ("Failed to get model loader", "Failed to get weights iterator")
_RESET_ACTION = "reset_tensors"
_SNAPSHOT_ACTION = "snapshot"


def guard(scheduler: Any, handlers: Any) -> Any:
    """Returns SGLang's dispatcher `handlers` with a guard before those that touch all parameters."""
    ours = _Guard(scheduler)
    by_kind: list[Any] = [
        (kind, ours.writing(handlers._mapping[kind], kind, answer)) for kind, answer in _WRITERS.items()
    ]
    for kind, handler in (
        (io_struct.SendWeightsToRemoteInstanceReqInput, ours.send),
        (io_struct.CheckWeightsReqInput, ours.check),
        (io_struct.GetWeightsByNameReqInput, ours.get),
    ):
        by_kind.append((kind, handler(handlers._mapping[kind])))
    combined = TypeBasedDispatcher(by_kind)
    combined += handlers
    return combined


def why_unwritable(scheduler: Any, flushes: bool) -> str | None:
    """Says what keeps the parameters from being replaced now, `flushes` together with the cache; None where nothing
    does. All ranks of the replica call it at the same boundary."""
    if (reason := _why_not_whole(scheduler)) is not None:
        return reason
    # Upstream flushes after it has written, and ends the process where it cannot.
    if flushes and (busy := why_not_flushable(scheduler)) is not None:
        return f"the cache cannot be flushed: {busy}; pause with mode retract, or ask without flush_cache"
    return None


def _why_not_whole(scheduler: Any) -> str | None:
    # A rank may still be at the end of a transition that another rank has behind it.
    runtime = scheduler.runtime
    if runtime is None or scheduler.engine.all_ranks(not runtime.is_merged):
        return None
    return "this replica shares parameters or memory with others, or is about to; POST /kunserve/restore first"


class _Guard:
    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        # Model path and format that the parameters were loaded from last, None for those of the start.
        self._source: tuple[str, str] | None = None
        self._has_source = True  # else they came from somewhere else since

    def writing(self, handle: Handler, kind: type, answer: Any) -> Handler:
        def handler(request: Any) -> Any:
            if (reason := why_unwritable(self._scheduler, request.flush_cache)) is not None:
                return self._refuse(kind, reason, answer)
            if kind is io_struct.UpdateWeightFromDiskReqInput:
                result = self._update_from_disk(handle, request)
            else:
                result = handle(request)
                self._has_source = False
            self._renew()
            return result

        return handler

    def send(self, handle: Handler) -> Handler:
        kind, answer = (
            io_struct.SendWeightsToRemoteInstanceReqInput,
            io_struct.SendWeightsToRemoteInstanceReqOutput,
        )

        def handler(request: Any) -> Any:
            reason = _why_not_whole(self._scheduler)
            return handle(request) if reason is None else self._refuse(kind, reason, answer)

        return handler

    def check(self, handle: Handler) -> Handler:
        def handler(request: Any) -> Any:
            reason = _why_not_whole(self._scheduler)
            if reason is None and request.action == _RESET_ACTION:
                busy = why_not_flushable(self._scheduler)
                reason = None if busy is None else f"tensors are reset while no request needs them: {busy}"
            if reason is not None:
                return self._refuse(type(request), reason, io_struct.CheckWeightsReqOutput)
            answer = handle(request)
            if request.action == _RESET_ACTION:
                self._has_source = False
                self._renew()
            elif request.action == _SNAPSHOT_ACTION:
                self._own_snapshot()
            return answer

        return handler

    def get(self, handle: Handler) -> Handler:
        """No parameter of a layer that is not here; upstream would find it empty. Another replica has it."""

        def handler(request: Any) -> Any:
            parameter = None if self._is_elsewhere(request.name) else handle(request).parameter
            return io_struct.GetWeightsByNameReqOutput(rid=str(self._scheduler.ps.dp_rank or 0), parameter=parameter)

        return handler

    def _is_elsewhere(self, name: str) -> bool:
        found = _LAYER.match(name)
        if found is None:
            return False
        try:
            state = self._scheduler.tp_worker.model_runner.kunserve_memory.parameters.state(int(found[1]))
        except LayerStateError:  # there is no such layer
            return False
        return state is not LayerState.RESIDENT

    def _own_snapshot(self) -> None:
        """Copies the snapshot. On a CPU it is the parameters themselves: it would change with them, and no layer of
        which it holds tensors can be dropped."""
        checker = self._scheduler.tp_worker.model_runner._weight_checker
        if self._scheduler.tp_worker.model_runner.device == "cpu" and checker._snapshot_tensors is not None:
            checker._snapshot_tensors = {name: tensor.clone() for name, tensor in checker._snapshot_tensors.items()}

    def _update_from_disk(self, handle: Handler, request: Any) -> Any:
        """Updates from disk, and keeps where the old parameters came from. Upstream forgets that before it has the new
        ones: it goes back to the new ones, and ends the process where these cannot be loaded."""
        updater = self._scheduler.tp_worker.model_runner.weight_updater
        configuration = updater.model_config
        source = self._source or (configuration.model_path, self._scheduler.server_args.load_format)
        try:
            answer = handle(request)
        except Exception as error:
            logger.exception("KunServe: the parameters of %s cannot be loaded", request.model_path)
            message = f"Failed to update weights: {type(error).__name__}: {error}"
            answer = io_struct.UpdateWeightFromDiskReqOutput(success=False, message=message)
        if answer.success:
            self._source, self._has_source = (request.model_path, request.load_format), True
            return answer
        configuration.model_path = source[0]
        if answer.message.startswith(_NOTHING_WRITTEN):
            return answer
        if not self._has_source:
            raise TransientError(f"{answer.message}; the parameters before it were not loaded from a disk")
        succeeded, message = updater.update_weights_from_disk(*source)
        if not succeeded:
            raise TransientError(f"the parameters of {source[0]} cannot be loaded again: {message}")
        # A replica that was started again has its layers from others, to which they may have been sent since.
        try:
            self._scheduler.tp_worker.model_runner.kunserve_memory.require_parameters()
        except ChecksumMismatchError as error:
            raise TransientError(f"{answer.message}; those of {source[0]} are not those before it: {error}") from error
        message = f"{answer.message}; those of {source[0]} were loaded again"
        return io_struct.UpdateWeightFromDiskReqOutput(success=False, message=message)

    def _renew(self) -> None:
        runner = self._scheduler.tp_worker.model_runner
        runner.kunserve_memory.renew_parameters()
        runner.on_parameters_written(from_disk=self._has_source)
        if self._scheduler.runtime is not None:
            self._scheduler.runtime.report()

    def _refuse(self, kind: type, reason: str, answer: Any) -> Any:
        message = f"replica {self._scheduler.ps.dp_rank or 0}: {reason}"
        logger.warning("%s refused: %s", kind.__name__, message)
        return answer(success=False, message=message)
