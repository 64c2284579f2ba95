"""Times of layers, on a CPU at once, on a GPU when its stream has come so far."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from kunserve_sgl.exchange.layer_clock import LayerClock


def test_the_host_knows_at_once() -> None:
    noted: list[float] = []
    clock = LayerClock("cpu")
    with clock.measure(noted.append):
        time.sleep(0.1)  # the time is what is tested
    assert 0.1 <= noted[0] < 60.0
    with pytest.raises(ValueError, match="broken"), clock.measure(noted.append):
        raise ValueError("broken")
    assert len(noted) == 1


class Event:
    """In place of a CUDA event: the device reaches it when the test says so."""

    recorded: list[Event] = []  # noqa: RUF012 - emptied by each test

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.reached_ms: float | None = None
        self.waits = 0

    def record(self) -> None:
        self.recorded.append(self)

    def query(self) -> bool:
        return self.reached_ms is not None

    def synchronize(self) -> None:
        self.waits += 1
        self.reached_ms = 0.0

    def elapsed_time(self, end: Any) -> float:
        assert self.reached_ms is not None
        return float(end.reached_ms - self.reached_ms)


def test_a_gpu_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.recorded.clear()
    noted: list[tuple[str, float]] = []
    clock = LayerClock("cuda:0")
    for name in ("first", "second"):
        with clock.measure(lambda seconds, name=name: noted.append((name, seconds))):  # type: ignore[misc]
            pass
    assert noted == []
    first, second = Event.recorded[:2], Event.recorded[2:4]
    first[0].reached_ms, first[1].reached_ms, second[0].reached_ms = 10.0, 35.0, 36.0
    with clock.measure(lambda seconds: None):
        pass
    assert noted == [("first", 0.025)]
    second[1].reached_ms = 46.0
    with clock.measure(lambda seconds: None):
        pass
    assert noted == [("first", 0.025), ("second", 0.01)]


def test_a_gpu_gets_no_more_than_two_blocks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.recorded.clear()
    clock = LayerClock("cuda:0")
    for _ in range(4):
        with clock.measure(lambda seconds: None):
            pass
        begin = Event.recorded[-2]
        begin.reached_ms = 0.0
        clock.pace()
    ends = Event.recorded[1::2]
    assert [end.waits for end in ends] == [1, 1, 1, 0]
