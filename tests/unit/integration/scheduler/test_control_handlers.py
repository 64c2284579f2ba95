"""What a scheduler is asked besides requests: errors are answers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from sglang.srt.managers import io_struct
from sglang.utils import TypeBasedDispatcher

from kunserve_sgl.integration.scheduler import control_handlers
from kunserve_sgl.integration.scheduler.control_handlers import answering

FAILING = [*control_handlers._ALONE, *control_handlers._TOGETHER]
FIELDS: dict[Any, dict[str, Any]] = {
    io_struct.SlowDownReqInput: {"forward_sleep_time": 1.0},
    io_struct.ExpertDistributionReq: {"action": io_struct.ExpertDistributionReqType.START_RECORD},
    io_struct.SetInternalStateReq: {"server_args": {}},
    io_struct.OpenSessionReqInput: {"capacity_of_str_len": 1, "session_id": "s"},
    io_struct.CloseSessionReqInput: {"session_id": "s"},
    io_struct.UpdateWeightsFromDistributedReqInput: {"names": [], "dtypes": [], "shapes": []},
    io_struct.UpdateWeightsFromTensorReqInput: {"serialized_named_tensors": []},
    io_struct.UpdateWeightsFromIPCReqInput: {"zmq_handles": {}},
    io_struct.InitWeightsUpdateGroupReqInput: {
        "master_address": "", "master_port": 1, "rank_offset": 0, "world_size": 2,
    },
    io_struct.InitWeightsSendGroupForRemoteInstanceReqInput: {
        "master_address": "", "ports": "", "group_rank": 0, "world_size": 2,
    },
    io_struct.SendWeightsToRemoteInstanceReqInput: {"master_address": "", "ports": ""},
}  # fmt: skip


def dispatcher(ranks: int = 1) -> Any:
    def fail(request: Any) -> Any:
        raise KeyError("something impossible")

    kinds = (*FAILING, *control_handlers._NEVER, io_struct.AbortReq)
    return answering(TypeBasedDispatcher([(kind, fail) for kind in kinds]), ranks)


@pytest.mark.parametrize("kind", FAILING, ids=lambda kind: kind.__name__)
def test_a_failure_is_answered(kind: Any) -> None:
    answer = dispatcher()(kind(**FIELDS.get(kind, {})))
    if kind in (io_struct.CloseSessionReqInput, io_struct.ConfigureLoggingReq, io_struct.FreezeGCReq):
        assert answer is None  # as when it succeeds
        return
    msgspec.msgpack.encode(answer)
    if hasattr(answer, "message"):
        assert (answer.success, answer.message) == (False, "KeyError: 'something impossible'")


@pytest.mark.parametrize("kind", control_handlers._TOGETHER, ids=lambda kind: kind.__name__)
def test_a_rank_that_others_wait_for_does_not_go_on(kind: Any) -> None:
    with pytest.raises(KeyError):
        dispatcher(ranks=2)(kind(**FIELDS.get(kind, {})))


def test_memory_is_never_released() -> None:
    for kind, answer in control_handlers._NEVER.items():
        assert isinstance(dispatcher()(kind()), answer)


def test_requests_are_left_alone() -> None:
    with pytest.raises(KeyError):
        dispatcher()(io_struct.AbortReq(rid="r"))
