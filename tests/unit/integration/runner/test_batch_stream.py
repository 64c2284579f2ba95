"""In which order the device does what batches, others' segments and transitions give it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_streams import FakeDevice, FakeStream

from kunserve_sgl.integration.runner.layer_runner import SglangLayerRunner
from kunserve_sgl.integration.scheduler.streams import wait_for_streams


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    return fake


def runner_on(device: FakeDevice, kind: str = "cuda") -> SglangLayerRunner:
    runner: Any = SimpleNamespace(
        model_config=SimpleNamespace(num_hidden_layers=2, hidden_size=8),
        dtype=torch.float32,
        device=kind,
        forward_stream=FakeStream(device),
    )
    return SglangLayerRunner(runner, SimpleNamespace())  # type: ignore[arg-type]


def test_an_idle_segment_comes_behind_the_graph_that_still_runs_and_before_the_next_batch(device: FakeDevice) -> None:
    """SGLang's loop with overlap: batches in the forward stream, all else in the scheduler's."""
    runner, schedule = runner_on(device), FakeStream(device)
    forward = runner._runner.forward_stream
    with device.stream(schedule):
        device.launch("write the rows of the batch")
        with device.stream(forward):
            forward.wait_stream(schedule)
            device.launch("replay a graph")
        device.launch("map and zero frames")  # a step of a transition
        with runner.batch_stream():
            device.launch("serve a segment")
        device.launch("move slots")
        with device.stream(forward):
            forward.wait_stream(schedule)
            device.launch("the next batch")
    assert device.before["serve a segment"] >= {"replay a graph", "map and zero frames"}
    assert "serve a segment" in device.before["move slots"]
    assert device.before["the next batch"] >= {"serve a segment", "move slots"}


def test_without_overlap_own_batches_and_segments_follow_each_other(device: FakeDevice) -> None:
    """Own batches run in the scheduler's stream then, and use the same buffers of the attention backend."""
    runner, schedule = runner_on(device), FakeStream(device)
    with device.stream(schedule):
        device.launch("own layers")
        with runner.batch_stream():
            device.launch("serve a segment")
        device.launch("own layers again")
    assert device.before["serve a segment"] == {"own layers"}
    assert device.before["own layers again"] == {"own layers", "serve a segment"}


def test_a_segment_that_fails_is_waited_for_too(device: FakeDevice) -> None:
    runner = runner_on(device)

    def serve() -> None:
        with runner.batch_stream():
            device.launch("a part of a segment")
            raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        serve()
    device.launch("own layers")
    assert device.before["own layers"] == {"a part of a segment"}


def test_a_segment_within_an_own_batch_stays_in_its_stream(device: FakeDevice) -> None:
    runner = runner_on(device)
    with device.stream(runner._runner.forward_stream):
        device.launch("own layers")
        with runner.batch_stream():
            device.launch("serve a segment")
            assert device.current_stream() is runner._runner.forward_stream
        device.launch("own layers again")
    assert device.before["own layers again"] == {"own layers", "serve a segment"}


def test_a_transition_waits_for_batches_and_not_for_what_a_peer_has_to_receive(device: FakeDevice) -> None:
    """The send ends when the peer receives it; the peer may wait for its own device meanwhile, with a send to here."""
    forward, copy, schedule, group = (FakeStream(device) for _ in range(4))
    scheduler = SimpleNamespace(device="cuda", device_module=device, forward_stream=forward, copy_stream=copy)
    for stream, work in ((forward, "a batch"), (copy, "results"), (schedule, "zero frames"), (group, "a send")):
        with device.stream(stream):
            device.launch(work)
    with device.stream(schedule):
        wait_for_streams(scheduler)
    assert device.ended == {"a batch", "results", "zero frames"}


def test_a_cpu_has_no_streams(device: FakeDevice) -> None:
    wait_for_streams(SimpleNamespace(device="cpu"))
    with runner_on(device, "cpu").batch_stream():
        assert device.current_stream() is device.default
