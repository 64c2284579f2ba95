"""Requests that read or write all parameters: refused while some are dropped, and followed up when they change them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.managers import io_struct
from sglang.utils import TypeBasedDispatcher

from kunserve_sgl.memory.errors import LayerStateError

logger = logging.getLogger(__name__)

# Request, and the answer that refuses it with a message.
_WRITERS = {
    io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
    io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
    io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
    io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
}
_READERS = {
    io_struct.SendWeightsToRemoteInstanceReqInput: io_struct.SendWeightsToRemoteInstanceReqOutput,
    io_struct.CheckWeightsReqInput: io_struct.CheckWeightsReqOutput,
}


def guard(scheduler: Any, handlers: Any) -> Any:
    """SGLang's dispatcher `handlers` with a guard before those that touch all parameters."""

    def refusal() -> str | None:
        member = scheduler.member
        if member is None or not member.is_merged:
            return None
        return "KunServe has dropped parameters of this replica, or is about to; POST /kunserve/restore first"

    def guarded(kind: type, refuse: Callable[[str], Any], follow_up: Callable[[], None]) -> Callable[[Any], Any]:
        handle = handlers._mapping[kind]

        def handler(request: Any) -> Any:
            reason = refusal()
            if reason is not None:
                logger.warning("%s refused: %s", kind.__name__, reason)
                return refuse(reason)
            answer = handle(request)
            follow_up()
            return answer

        return handler

    def renew() -> None:
        _renew_checksums(scheduler.tp_worker.model_runner.kunserve_memory)
        if scheduler.member is not None:
            scheduler.member.report()

    ours: list[Any] = []
    for kind, answer in _WRITERS.items():
        ours.append((kind, guarded(kind, _failed(answer), renew)))
    for kind, answer in _READERS.items():
        ours.append((kind, guarded(kind, _failed(answer), lambda: None)))
    by_name = io_struct.GetWeightsByNameReqInput
    no_parameter = io_struct.GetWeightsByNameReqOutput(parameter=None)
    ours.append((by_name, guarded(by_name, lambda _: no_parameter, lambda: None)))
    combined = TypeBasedDispatcher(ours)
    combined += handlers
    return combined


def _failed(answer: Any) -> Callable[[str], Any]:
    return lambda reason: answer(success=False, message=reason)


def _renew_checksums(memory: Any) -> None:
    """The new weights are the right ones from now on. A layer whose tensors were replaced, not written to, cannot be
    dropped any more; `LayerParameters.drop` refuses it."""
    for layer in range(memory.layer_count):
        try:
            memory.parameters.renew_checksum(layer)
        except LayerStateError as error:
            logger.error("KunServe: %s; it will not be dropped", error)
