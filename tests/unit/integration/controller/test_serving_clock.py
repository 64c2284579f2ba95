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
    clock.on_waited(0.9, 0.5)
    assert clock() == 100.9
    now_s = 112.4
    clock.on_waited(11.5, 0.5)
    assert clock() == pytest.approx(101.4)
    now_s = 113.4
    assert clock() == pytest.approx(102.4)
