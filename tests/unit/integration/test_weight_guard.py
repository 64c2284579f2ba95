"""Requests that touch all parameters: refused while some are dropped, followed up when they changed them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import io_struct
from sglang.utils import TypeBasedDispatcher
from torch import nn

from kunserve_sgl.integration.weight_guard import guard
from kunserve_sgl.memory.errors import ChecksumMismatchError
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_parameters import LayerParameters
from kunserve_sgl.memory.vmm_host import HostVmm

WRITERS = [
    io_struct.UpdateWeightFromDiskReqInput,
    io_struct.UpdateWeightsFromDistributedReqInput,
    io_struct.UpdateWeightsFromTensorReqInput,
    io_struct.UpdateWeightsFromIPCReqInput,
]
READERS = [io_struct.SendWeightsToRemoteInstanceReqInput, io_struct.CheckWeightsReqInput]
BY_NAME = io_struct.GetWeightsByNameReqInput
LAYERS = 2


class Scheduler:
    """The parts of a scheduler that the guard looks at, with parameters in a real pool."""

    def __init__(self, has_peers: bool = True) -> None:
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(LAYERS))
        parameters = LayerParameters(FramePool(HostVmm(4096), "replica 0"))
        parameters.adopt(self.model, list(self.model.layers))
        memory = SimpleNamespace(parameters=parameters, layer_count=LAYERS)
        self.parameters = parameters
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(kunserve_memory=memory))
        self.reports = 0
        self.member = SimpleNamespace(is_merged=False, report=self._report) if has_peers else None
        self.handled: list[Any] = []
        others = [(kind, self._handle) for kind in (*WRITERS, *READERS, BY_NAME, io_struct.AbortReq)]
        self.dispatcher = guard(self, TypeBasedDispatcher(others))

    def _report(self) -> None:
        self.reports += 1

    def _handle(self, request: Any) -> str:
        self.handled.append(request)
        with torch.no_grad():
            self.model.layers[0].weight += 1
        return "handled"


FIELDS: dict[type, dict[str, Any]] = {
    io_struct.UpdateWeightFromDiskReqInput: {"model_path": "model"},
    io_struct.UpdateWeightsFromDistributedReqInput: {"names": [], "dtypes": [], "shapes": []},
    io_struct.UpdateWeightsFromTensorReqInput: {"serialized_named_tensors": []},
    io_struct.UpdateWeightsFromIPCReqInput: {"zmq_handles": {}},
    io_struct.SendWeightsToRemoteInstanceReqInput: {"master_address": "", "ports": ""},
    BY_NAME: {"name": "weight"},
}


def request_of(kind: type) -> Any:
    return kind(**FIELDS.get(kind, {}))


@pytest.mark.parametrize("kind", [*WRITERS, *READERS], ids=lambda kind: kind.__name__)
def test_refused_while_merged(kind: type) -> None:
    scheduler = Scheduler()
    assert scheduler.member is not None
    scheduler.member.is_merged = True
    answer = scheduler.dispatcher(request_of(kind))
    assert answer.success is False
    assert "POST /kunserve/restore first" in answer.message
    assert scheduler.handled == []
    assert scheduler.reports == 0


def test_no_parameter_while_merged() -> None:
    scheduler = Scheduler()
    assert scheduler.member is not None
    scheduler.member.is_merged = True
    assert scheduler.dispatcher(request_of(BY_NAME)).parameter is None
    assert scheduler.handled == []


@pytest.mark.parametrize("has_peers", [True, False])
@pytest.mark.parametrize("kind", [*WRITERS, *READERS, BY_NAME], ids=lambda kind: kind.__name__)
def test_handled_otherwise(kind: type, has_peers: bool) -> None:
    scheduler = Scheduler(has_peers)
    request = request_of(kind)
    assert scheduler.dispatcher(request) == "handled"
    assert scheduler.handled == [request]
    if kind in WRITERS:
        scheduler.parameters.verify(0)  # the new bytes are the right ones
        assert scheduler.reports == (1 if has_peers else 0)
    else:
        with pytest.raises(ChecksumMismatchError):
            scheduler.parameters.verify(0)  # who only reads must not have changed them
        assert scheduler.reports == 0


def test_other_requests_pass_also_while_merged() -> None:
    scheduler = Scheduler()
    assert scheduler.member is not None
    scheduler.member.is_merged = True
    assert scheduler.dispatcher(request_of(io_struct.AbortReq)) == "handled"


def test_a_layer_whose_tensors_were_replaced_does_not_stop_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler()
    scheduler.model.layers[0].weight.data = torch.zeros(32, 32)
    with torch.no_grad():
        scheduler.model.layers[1].weight += 1
    scheduler.dispatcher(request_of(WRITERS[0]))
    scheduler.parameters.verify(1)
    assert "layer 0: weight was given other memory" in caplog.text
    assert scheduler.reports == 1
