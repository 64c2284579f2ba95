"""Requests that touch all parameters: refused while some are dropped, followed up when they changed them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import io_struct
from sglang.utils import TypeBasedDispatcher
from torch import nn

from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.scheduler.weight_guard import guard
from kunserve_sgl.memory.errors import ChecksumMismatchError
from kunserve_sgl.replica.replica_memory import MemoryOptions, ReplicaMemory

WRITERS = [
    io_struct.UpdateWeightFromDiskReqInput,
    io_struct.UpdateWeightsFromDistributedReqInput,
    io_struct.UpdateWeightsFromTensorReqInput,
    io_struct.UpdateWeightsFromIPCReqInput,
]
READERS = [io_struct.SendWeightsToRemoteInstanceReqInput, io_struct.CheckWeightsReqInput]
BY_NAME = io_struct.GetWeightsByNameReqInput
FROM_DISK = io_struct.UpdateWeightFromDiskReqInput
LAYERS = 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(LAYERS))


class Scheduler:
    """The parts of a scheduler that the guard looks at, with parameters in a real pool. What a handler gives back, or
    raises, is `result`."""

    def __init__(self, has_peers: bool = True) -> None:
        self.model = Model()
        options = MemoryOptions(4096, reserve_frames=0, max_replicas=2, max_slots=None)
        memory = ReplicaMemory(options, "cpu", 0, 1, "replica 1")
        memory.adopt_parameters(self.model, list(self.model.layers))
        self.parameters = memory.parameters
        self.written: list[bool] = []  # whether from a disk
        self.loaded: list[Any] = []
        self.reload = True, "loaded"
        self.on_disk = {"first": self.model.layers[0].weight.detach().clone()}
        self.updater = SimpleNamespace(
            model_config=SimpleNamespace(model_path="first"), update_weights_from_disk=self._load
        )
        self.checker = SimpleNamespace(_snapshot_tensors=None)
        runner = SimpleNamespace(
            kunserve_memory=memory,
            on_parameters_written=lambda from_disk: self.written.append(from_disk),
            weight_updater=self.updater,
            _weight_checker=self.checker,
            device="cpu",
        )
        self.tp_worker = SimpleNamespace(model_runner=runner)
        self.server_args = SimpleNamespace(load_format="auto")
        self.ps = SimpleNamespace(dp_rank=1)
        self.reports = 0
        self.runtime = SimpleNamespace(is_merged=False, report=self._report) if has_peers else None
        self.are_others_whole = True  # the other ranks of the replica
        self.engine = SimpleNamespace(all_ranks=lambda is_whole: is_whole and self.are_others_whole)
        self._engine_paused = False
        self.running_batch = SimpleNamespace(reqs=[])
        self.last_batch = self.chunked_req = None
        self.waiting_queue: list[Any] = []
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.handled: list[Any] = []
        self.result: Any = SimpleNamespace(success=True, message="handled", parameter=[1.0])
        others = [(kind, self._handle) for kind in (*WRITERS, *READERS, BY_NAME, io_struct.AbortReq)]
        self.dispatcher = guard(self, TypeBasedDispatcher(others))

    def is_fully_idle(self) -> bool:
        return not (self.running_batch.reqs or self.waiting_queue)

    def _report(self) -> None:
        self.reports += 1

    def _load(self, path: str, load_format: str) -> tuple[bool, str]:
        self.loaded.append((path, load_format))
        if self.reload[0]:
            with torch.no_grad():
                self.model.layers[0].weight.copy_(self.on_disk[path])
        return self.reload

    def _handle(self, request: Any) -> Any:
        self.handled.append(request)
        if isinstance(request, FROM_DISK):
            self.updater.model_config.model_path = request.model_path
        with torch.no_grad():
            self.model.layers[0].weight += 1
        if isinstance(self.result, Exception):
            raise self.result
        if isinstance(request, FROM_DISK) and self.result.success:
            self.on_disk[request.model_path] = self.model.layers[0].weight.detach().clone()
        return self.result


FIELDS: dict[type, dict[str, Any]] = {
    io_struct.UpdateWeightFromDiskReqInput: {"model_path": "model"},
    io_struct.UpdateWeightsFromDistributedReqInput: {"names": [], "dtypes": [], "shapes": []},
    io_struct.UpdateWeightsFromTensorReqInput: {"serialized_named_tensors": []},
    io_struct.UpdateWeightsFromIPCReqInput: {"zmq_handles": {}},
    io_struct.SendWeightsToRemoteInstanceReqInput: {"master_address": "", "ports": ""},
    BY_NAME: {"name": "lm_head.weight"},
}


def request_of(kind: type) -> Any:
    return kind(**FIELDS.get(kind, {}))


@pytest.mark.parametrize("is_here", [True, False], ids=["here", "at-another-rank"])
@pytest.mark.parametrize("kind", [*WRITERS, *READERS], ids=lambda kind: kind.__name__)
def test_refused_while_merged(kind: type, is_here: bool) -> None:
    scheduler = Scheduler()
    assert scheduler.runtime is not None
    scheduler.runtime.is_merged, scheduler.are_others_whole = is_here, is_here
    answer = scheduler.dispatcher(request_of(kind))
    assert answer.success is False
    assert "POST /kunserve/restore first" in answer.message
    assert scheduler.handled == []
    assert scheduler.reports == 0


def test_a_parameter_that_was_dropped_is_elsewhere() -> None:
    scheduler = Scheduler()
    scheduler.parameters.drop(1)

    def get(name: str) -> Any:
        answer = scheduler.dispatcher(BY_NAME(name=name))
        assert answer.rid == "1"  # whose answer it is
        return answer.parameter

    assert get("model.layers.1.weight") is None
    assert scheduler.handled == []
    for name in ("model.layers.0.weight", "model.layers.10.weight", "lm_head.weight", f"model.layers.{'1' * 5000}.x"):
        assert get(name) == [1.0]


@pytest.mark.parametrize("kind", WRITERS, ids=lambda kind: kind.__name__)
def test_nothing_is_written_where_the_cache_cannot_be_flushed(kind: type) -> None:
    scheduler = Scheduler()
    scheduler.running_batch.reqs = [SimpleNamespace(req_pool_idx=3), SimpleNamespace(req_pool_idx=4)]
    scheduler.waiting_queue = [SimpleNamespace(req_pool_idx=None)]
    for paused in (False, True):
        scheduler._engine_paused = paused
        answer = scheduler.dispatcher(request_of(kind))
        assert answer.success is False
        assert "replica 1: the cache cannot be flushed: 2 requests run and 1 wait" in answer.message
    assert scheduler.handled == []
    request = kind(**FIELDS[kind], flush_cache=False)
    assert scheduler.dispatcher(request).success
    assert scheduler.handled == [request]


def test_weights_are_written_while_requests_wait_without_memory() -> None:
    scheduler = Scheduler()
    scheduler._engine_paused = True
    scheduler.waiting_queue = [SimpleNamespace(req_pool_idx=None)]
    scheduler.grammar_manager.grammar_queue = [SimpleNamespace(req_pool_idx=None)]
    assert scheduler.dispatcher(request_of(FROM_DISK)).success
    scheduler.waiting_queue = [SimpleNamespace(req_pool_idx=5)]
    assert not scheduler.dispatcher(request_of(FROM_DISK)).success


@pytest.mark.parametrize(
    "result", [ValueError("of another shape"), SimpleNamespace(success=False, message="Failed to update weights: x")]
)
def test_the_old_parameters_come_back_where_new_ones_cannot_be_loaded(result: Any) -> None:
    scheduler = Scheduler()
    scheduler.result = result
    answer = scheduler.dispatcher(FROM_DISK(model_path="broken", load_format="pt"))
    assert (answer.success, scheduler.loaded) == (False, [("first", "auto")])
    assert answer.message.startswith("Failed to update weights: ")
    assert answer.message.endswith("; those of first were loaded again")
    assert scheduler.updater.model_config.model_path == "first"
    scheduler.parameters.verify(0)
    scheduler.result = SimpleNamespace(success=True, message="")
    assert scheduler.dispatcher(FROM_DISK(model_path="second", load_format="pt")).success
    scheduler.result = result
    scheduler.dispatcher(FROM_DISK(model_path="broken", load_format="auto"))
    assert scheduler.loaded[1:] == [("second", "pt")]
    assert scheduler.written == [True, True, True]


def test_nothing_is_loaded_again_where_nothing_was_written() -> None:
    scheduler = Scheduler()
    scheduler.result = SimpleNamespace(success=False, message="Failed to get weights iterator: no such file.")
    assert scheduler.dispatcher(FROM_DISK(model_path="nowhere")) is scheduler.result
    assert scheduler.loaded == []
    assert scheduler.updater.model_config.model_path == "first"


def test_a_replica_ends_where_its_parameters_are_lost() -> None:
    scheduler = Scheduler()
    scheduler.result = ValueError("of another shape")
    scheduler.reload = False, "no such file"
    with pytest.raises(TransientError, match="first cannot be loaded again: no such file"):
        scheduler.dispatcher(FROM_DISK(model_path="broken"))
    scheduler.result = SimpleNamespace(success=True, message="")
    scheduler.dispatcher(request_of(io_struct.UpdateWeightsFromTensorReqInput))
    scheduler.result = ValueError("of another shape")
    with pytest.raises(TransientError, match="not loaded from a disk"):
        scheduler.dispatcher(FROM_DISK(model_path="broken"))


def test_a_replica_ends_where_a_disk_has_other_parameters_than_it_had() -> None:
    """It was started again, and has had its layers from others, to which they had been sent."""
    scheduler = Scheduler()
    with torch.no_grad():
        scheduler.model.layers[0].weight += 5
    scheduler.parameters.renew_checksum(0)
    scheduler.result = SimpleNamespace(success=False, message="Failed to update weights: x")
    with pytest.raises(TransientError, match="x; those of first are not those before it: layer 0"):
        scheduler.dispatcher(FROM_DISK(model_path="broken"))
    assert scheduler.loaded == [("first", "auto")]
    assert scheduler.reports == 0


def test_a_snapshot_does_not_hold_the_parameters() -> None:
    scheduler = Scheduler()
    scheduler.checker._snapshot_tensors = {"w": scheduler.model.layers[0].weight.data}
    expected = scheduler.model.layers[0].weight.detach() + 1
    scheduler.dispatcher(io_struct.CheckWeightsReqInput(action="snapshot"))
    scheduler.parameters.renew_checksum(0)
    scheduler.parameters.drop(0)  # refused while something else holds a tensor of it
    assert torch.equal(scheduler.checker._snapshot_tensors["w"], expected)


def test_tensors_that_were_reset_are_the_right_ones() -> None:
    scheduler = Scheduler()
    scheduler.dispatcher(io_struct.CheckWeightsReqInput(action="reset_tensors"))
    scheduler.parameters.verify(0)
    assert (scheduler.reports, scheduler.written) == (1, [False])
    scheduler.running_batch.reqs = [SimpleNamespace(req_pool_idx=3)]
    assert not scheduler.dispatcher(io_struct.CheckWeightsReqInput(action="reset_tensors")).success
    assert len(scheduler.handled) == 1


@pytest.mark.parametrize("has_peers", [True, False])
@pytest.mark.parametrize("kind", [*WRITERS, *READERS, BY_NAME], ids=lambda kind: kind.__name__)
def test_handled_otherwise(kind: type, has_peers: bool) -> None:
    scheduler = Scheduler(has_peers)
    request = request_of(kind)
    assert scheduler.dispatcher(request).parameter == [1.0]
    assert scheduler.handled == [request]
    if kind in WRITERS:
        scheduler.parameters.verify(0)  # the new bytes are the right ones
        assert scheduler.reports == (1 if has_peers else 0)
        assert scheduler.written == [kind is FROM_DISK]
    else:
        with pytest.raises(ChecksumMismatchError):
            scheduler.parameters.verify(0)  # who only reads must not have changed them
        assert scheduler.reports == 0


def test_other_requests_pass_also_while_merged() -> None:
    scheduler = Scheduler()
    assert scheduler.runtime is not None
    scheduler.runtime.is_merged = True
    assert scheduler.dispatcher(request_of(io_struct.AbortReq)) is scheduler.result


def test_a_layer_whose_tensors_were_replaced_does_not_stop_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler()
    scheduler.model.layers[0].weight.data = torch.zeros(32, 32)
    with torch.no_grad():
        scheduler.model.layers[1].weight += 1
    scheduler.dispatcher(request_of(WRITERS[0]))
    scheduler.parameters.verify(1)
    assert "layer 0: weight was given other memory" in caplog.text
    assert scheduler.reports == 1
