"""A thread of a rank that has failed ends the rank, whichever of its replica it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.scheduler import Scheduler

from kunserve_sgl.errors import BatchCalledOffError, InvariantError, TransientError
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.scheduler.scheduler import KunserveScheduler
from kunserve_sgl.replica.kv_elsewhere import KvElsewhere
from kunserve_sgl.replica.peer_access import PeerAccess
from kunserve_sgl.replica.runtime import RankRuntime


def test_a_rank_that_gives_no_memory_any_more_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one behind rank 0, which takes no orders itself and reports no load."""
    taken: list[Any] = []
    monkeypatch.setattr(Scheduler, "process_input_requests", lambda scheduler, requests: taken.extend(requests))
    scheduler: Any = KunserveScheduler.__new__(KunserveScheduler)
    runtime: Any = RankRuntime.__new__(RankRuntime)
    access: Any = PeerAccess.__new__(PeerAccess)
    elsewhere: Any = KvElsewhere.__new__(KvElsewhere)
    scheduler.load_reporter, scheduler.runtime, runtime.access, access.elsewhere = None, runtime, access, elsewhere
    elsewhere._service = SimpleNamespace(failure="RuntimeError: the device is gone")
    with pytest.raises(InvariantError, match="not given to others any more: RuntimeError: the device is gone"):
        scheduler.process_input_requests(["r"])
    assert taken == ["r"]


def test_a_scheduler_that_leaves_its_loop_closes_the_runtime_and_one_whose_batch_is_called_off_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    did: list[str] = []

    def loop(scheduler: Any) -> None:
        did.append("loop")
        if len(did) == 1:
            raise BatchCalledOffError("replica 0 is to recover")
        scheduler.gracefully_exit = True

    monkeypatch.setattr(Scheduler, "run_event_loop", loop)
    scheduler: Any = KunserveScheduler.__new__(KunserveScheduler)
    scheduler.gracefully_exit = False
    scheduler.runtime = SimpleNamespace(close=lambda: did.append("close"))
    scheduler.run_event_loop()
    assert did == ["loop", "loop", "close"]


def test_a_scheduler_whose_runtime_does_not_close_has_left_its_loop_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread is at an order that takes its time."""

    def close() -> None:
        raise TransientError("thread kunserve-memory has not ended within 10 s")

    def loop(scheduler: Any) -> None:
        scheduler.gracefully_exit = True

    monkeypatch.setattr(Scheduler, "run_event_loop", loop)
    left: list[BaseException] = []
    monkeypatch.setattr(last_words, "leave", left.append)
    scheduler: Any = KunserveScheduler.__new__(KunserveScheduler)
    scheduler.gracefully_exit = False
    scheduler.runtime = SimpleNamespace(close=close)
    scheduler.run_event_loop()
    assert not left
    assert "thread kunserve-memory has not ended within 10 s" in caplog.text
