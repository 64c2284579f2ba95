"""Flushing a replica's cache: when it is possible, and what is said of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import FlushCacheReqInput

from kunserve_sgl.integration.scheduler.cache_flush import FlushAnswers, why_not_flushable

NOTHING = SimpleNamespace(req_pool_idx=None)
ROW = SimpleNamespace(req_pool_idx=3)


class Scheduler:
    def __init__(self, running: int = 0, waiting: int = 0, paused: bool = False) -> None:
        self.ps = SimpleNamespace(dp_rank=1)
        self.running_batch = SimpleNamespace(reqs=[SimpleNamespace(req_pool_idx=row) for row in range(running)])
        self.last_batch = self.chunked_req = None
        self.waiting_queue = [NOTHING] * waiting
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self._engine_paused = paused
        self.sent: list[Any] = []
        to_tokenizer = SimpleNamespace(send_output=lambda answer, request: self.sent.append(answer))
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=to_tokenizer)

    def is_fully_idle(self) -> bool:
        return not (self.running_batch.reqs or self.waiting_queue or self.chunked_req)

    def flush_cache(self) -> bool:
        return why_not_flushable(self) is None


def test_what_keeps_a_cache_from_being_flushed() -> None:
    assert why_not_flushable(Scheduler()) is None
    assert why_not_flushable(Scheduler(paused=True)) is None
    assert why_not_flushable(Scheduler(running=2, waiting=1)) == "2 requests run and 1 wait"
    assert why_not_flushable(Scheduler(running=1, paused=True)) == "1 requests run and 0 wait"
    assert why_not_flushable(Scheduler(waiting=1)) == "0 requests run and 1 wait"  # it could begin in a moment
    assert why_not_flushable(Scheduler(waiting=1, paused=True)) is None
    with_memory = Scheduler(paused=True)
    with_memory.waiting_queue = [ROW]
    assert why_not_flushable(with_memory) == "0 requests run and 1 wait"
    in_chunks = Scheduler(paused=True)
    in_chunks.chunked_req = ROW  # type: ignore[assignment]
    assert why_not_flushable(in_chunks) == "1 requests run and 0 wait"


def test_answers_say_whose_they_are_and_why() -> None:
    flushed = FlushAnswers(Scheduler()).handle(FlushCacheReqInput())
    assert (flushed.success, flushed.message, flushed.rid) == (True, "replica 1: cache flushed", "1")  # type: ignore[union-attr]
    refused = FlushAnswers(Scheduler(running=1)).handle(FlushCacheReqInput())
    assert refused is not None
    assert (refused.success, refused.message) == (False, "replica 1: not flushed: 1 requests run and 0 wait")


def test_answers_that_are_given_later(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(running=1)
    answers = FlushAnswers(scheduler)
    assert answers.handle(FlushCacheReqInput(timeout_s=1000.0)) is None
    answers.check_pending()
    assert scheduler.sent == []
    other = answers.handle(FlushCacheReqInput())
    assert other is not None
    assert "not flushed: Another flush_cache is already in progress. 1 requests run" in other.message
    scheduler.running_batch.reqs.clear()
    answers.check_pending()
    assert [(answer.success, answer.message) for answer in scheduler.sent] == [(True, "replica 1: cache flushed")]
