"""What a scheduler is asked besides requests: an error there is an answer, and does not end the replica."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.managers import io_struct
from sglang.utils import TypeBasedDispatcher

logger = logging.getLogger(__name__)


def _with_message(answer: Any) -> Callable[[Any, str], Any]:
    return lambda request, message: answer(success=False, message=message)


# Request, and the answer to one that failed. The HTTP server has checked what can be checked there.
_ALONE: dict[Any, Callable[[Any, str], Any]] = {
    io_struct.SlowDownReqInput: lambda request, message: io_struct.SlowDownReqOutput(),
    io_struct.ExpertDistributionReq: lambda request, message: io_struct.ExpertDistributionReqOutput(),
    io_struct.SetInternalStateReq: lambda request, message: io_struct.SetInternalStateReqOutput(updated=False),
    io_struct.OpenSessionReqInput: lambda request, message: io_struct.OpenSessionReqOutput(
        session_id=request.session_id, success=False
    ),
    io_struct.CloseSessionReqInput: lambda request, message: None,
    io_struct.ConfigureLoggingReq: lambda request, message: None,
    io_struct.FreezeGCReq: lambda request, message: None,
    io_struct.CheckWeightsReqInput: _with_message(io_struct.CheckWeightsReqOutput),
}
# In these the ranks of a replica wait for each other: one that answered in the middle would leave the others waiting.
_TOGETHER: dict[Any, Callable[[Any, str], Any]] = {
    io_struct.UpdateWeightsFromDistributedReqInput: _with_message(io_struct.UpdateWeightsFromDistributedReqOutput),
    io_struct.UpdateWeightsFromTensorReqInput: _with_message(io_struct.UpdateWeightsFromTensorReqOutput),
    io_struct.UpdateWeightsFromIPCReqInput: _with_message(io_struct.UpdateWeightsFromIPCReqOutput),
    io_struct.InitWeightsUpdateGroupReqInput: _with_message(io_struct.InitWeightsUpdateGroupReqOutput),
    io_struct.DestroyWeightsUpdateGroupReqInput: _with_message(io_struct.DestroyWeightsUpdateGroupReqOutput),
    io_struct.InitWeightsSendGroupForRemoteInstanceReqInput: _with_message(
        io_struct.InitWeightsSendGroupForRemoteInstanceReqOutput
    ),
    io_struct.SendWeightsToRemoteInstanceReqInput: _with_message(io_struct.SendWeightsToRemoteInstanceReqOutput),
}
# KunServe manages this memory. The HTTP server refuses these with the reason.
_NEVER: dict[Any, Any] = {
    io_struct.ReleaseMemoryOccupationReqInput: io_struct.ReleaseMemoryOccupationReqOutput,
    io_struct.ResumeMemoryOccupationReqInput: io_struct.ResumeMemoryOccupationReqOutput,
}


def answering(handlers: Any, ranks: int) -> Any:
    """Returns SGLang's dispatcher `handlers` of a replica of so many ranks, with an answer where a handler fails."""

    def answered(kind: Any, failed: Callable[[Any, str], Any]) -> Callable[[Any], Any]:
        handle = handlers._mapping[kind]

        def handler(request: Any) -> Any:
            try:
                return handle(request)
            except Exception as error:
                logger.exception("KunServe: %s failed", kind.__name__)
                return failed(request, f"{type(error).__name__}: {error}")

        return handler

    guarded = _ALONE if ranks > 1 else {**_ALONE, **_TOGETHER}
    ours: list[Any] = [(kind, answered(kind, failed)) for kind, failed in guarded.items()]
    ours += [(kind, lambda request, answer=answer: answer()) for kind, answer in _NEVER.items()]
    combined = TypeBasedDispatcher(ours)
    combined += handlers
    return combined
