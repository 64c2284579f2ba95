"""Flushing the cache of one replica: when it is possible, and what is said of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.io_struct import FlushCacheReqInput, FlushCacheReqOutput
from sglang.srt.managers.scheduler_components.flush_wrapper import SchedulerFlushWrapper
from typing_extensions import override

from kunserve_sgl.integration.scheduler.known_requests import known_requests


def why_not_flushable(scheduler: Any) -> str | None:
    """Says what keeps the cache from being flushed now; None where nothing does."""
    if scheduler.is_fully_idle() or holds_nothing(scheduler):
        return None
    known = known_requests(scheduler)
    waiting = len(known.waiting) + len(known.for_grammar)
    return f"{len(known.running)} requests run and {waiting} wait"


def holds_nothing(scheduler: Any) -> bool:
    """Tells whether the engine is paused and its requests, all of them waiting, have no memory: those that ran were
    retracted, and are computed again from their first token."""
    if not scheduler._engine_paused:
        return False
    known = known_requests(scheduler)
    return not known.running and all(request.req_pool_idx is None for request in known.all)


class FlushAnswers(SchedulerFlushWrapper):  # type: ignore[misc]
    """Gives upstream's answers, each with the reason; those that are given later come by `send_output`."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(
            flush_cache=scheduler.flush_cache,
            is_fully_idle=lambda: why_not_flushable(scheduler) is None,
            ipc_channels=SimpleNamespace(send_to_tokenizer=self),
        )
        self._scheduler = scheduler

    @override
    def handle(self, recv_req: FlushCacheReqInput) -> FlushCacheReqOutput | None:
        answer = super().handle(recv_req)
        return None if answer is None else self._explained(answer)

    def send_output(self, answer: FlushCacheReqOutput, request: FlushCacheReqInput) -> None:
        """Sends an answer with its reason. Upstream calls it, as it calls its own channel, for a flush that has
        waited."""
        self._scheduler.ipc_channels.send_to_tokenizer.send_output(self._explained(answer), request)

    def _explained(self, answer: FlushCacheReqOutput) -> FlushCacheReqOutput:
        if answer.success:
            message = "cache flushed"
        else:
            reason = why_not_flushable(self._scheduler)
            message = " ".join(filter(None, ("not flushed:", answer.message, reason)))
        replica = self._scheduler.ps.dp_rank or 0
        return FlushCacheReqOutput(rid=str(replica), success=answer.success, message=f"replica {replica}: {message}")
