"""No deadline passes while the controller stands still."""

from __future__ import annotations

import time

import pytest

from kunserve_sgl.integration.controller.serving_clock import ServingClock


def test_the_time_for_which_the_process_stood_still_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    clock = ServingClock()
    assert clock() == 100.0
    now_s = 100.9  # as on a busy machine
    assert clock() == 100.9
    now_s = 102.4
    assert clock.after_wait(0.6) == 102.4
    now_s = 113.4
    assert clock.after_wait(0.5) == pytest.approx(102.9), "in a wait"
    now_s = 113.5
    assert clock() == pytest.approx(103.0)
    now_s = 120.0
    assert clock() == pytest.approx(103.0), "between two looks"
    now_s = 120.2
    assert clock() == pytest.approx(103.2)
