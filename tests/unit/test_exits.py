"""How processes that were killed are waited for, by a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from kunserve_sgl import exits, status
from kunserve_sgl.exits import CONTROLLER_PATIENCE_S, EXIT_DEADLINE_S, await_exits
from kunserve_sgl.integration.launcher import calls
from kunserve_sgl.replica import hosting, orders_away


@dataclass
class Clock:
    now_s: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass
class Process:
    clock: Clock
    gone_s: float

    def is_alive(self) -> bool:
        return self.clock.now_s < self.gone_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(exits, "time", SimpleNamespace(monotonic=lambda: made.now_s, sleep=made.sleep))
    return made


def test_all_are_waited_for_at_once(clock: Clock) -> None:
    assert await_exits([Process(clock, 20.0), Process(clock, 25.0), Process(clock, 0.0)]) == []
    assert clock.now_s == pytest.approx(25.0, abs=0.1)


def test_nobody_is_waited_for_who_is_gone(clock: Clock) -> None:
    assert await_exits([]) == await_exits([Process(clock, 0.0)]) == []
    assert clock.now_s == 0.0


def test_those_who_are_not_gone_in_time_are_named(clock: Clock) -> None:
    processes = [Process(clock, gone_s) for gone_s in (1000.0, EXIT_DEADLINE_S - 1.0, 1000.0)]
    left = await_exits(processes)
    assert [each is one for each, one in zip(left, processes[::2], strict=True)] == [True, True]
    assert clock.now_s == pytest.approx(EXIT_DEADLINE_S, abs=0.1)


def test_who_waits_for_the_controller_waits_until_a_process_is_gone() -> None:
    """Also where it takes all of its time: a healthy peer does not give up before."""
    waits = (orders_away._CALL_OFF_S, hosting.VERDICT_S, CONTROLLER_PATIENCE_S, calls.CALL_DEADLINE_S)
    assert min(waits) >= EXIT_DEADLINE_S + 5.0
    assert calls.CALL_DEADLINE_S + calls.Calls.status_deadline_s <= status._TIMEOUT_S
