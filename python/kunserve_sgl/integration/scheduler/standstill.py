"""A queue that cannot move, because its first request has no room although nothing runs: that request is answered."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import AbortReq

logger = logging.getLogger(__name__)


class StandstillGuard:
    """Answers a request that has no room although nothing runs. There is one per rank; all ranks of a replica see the
    same queue and the same memory, and do the same.

    Limits on arrival and before slots go away keep this from happening (`request_limits.py`). It is a guard for what
    they may have missed: SGLang looks at its queue again only when a request has ended, so one that has no room while
    nothing runs would stop all behind it for ever.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._seen: tuple[Any, int] | None = None  # the first request, and the capacity that it had no room in

    def look(self, is_memory_changing: bool) -> None:
        """Looks at the queue, after SGLang has found nothing to run. `is_memory_changing` says that slots may be on
        their way."""
        scheduler = self._scheduler
        before, self._seen = self._seen, None
        if not self._stands_still():
            return
        # SGLang looks at the queue again: memory may have come free since, or the first request have left.
        scheduler.running_batch.batch_is_full = False
        first, capacity = scheduler.waiting_queue[0], scheduler.max_total_num_tokens
        if before != (first, capacity) or is_memory_changing:
            self._seen = first, capacity
            return
        scheduler.waiting_queue.pop(0)
        prompt = len(first.origin_input_ids) + len(first.output_ids)
        message = (
            f"Out of memory: a request of {prompt} tokens, with {first.sampling_params.max_new_tokens} new ones at "
            f"most, has no room in a KV cache of {capacity} tokens"
        )
        logger.error("KunServe: %s, although nothing else runs; aborted %s", message, first.rid)
        reason = {"type": "abort", "status_code": HTTPStatus.INTERNAL_SERVER_ERROR, "message": message}
        scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(finished_reason=reason, rid=first.rid), first)

    def _stands_still(self) -> bool:
        """Tells whether SGLang has refused the first in the queue for want of memory while nothing holds any."""
        scheduler = self._scheduler
        return (
            bool(scheduler.waiting_queue)
            and scheduler.running_batch.batch_is_full
            and scheduler.running_batch.is_empty()
            and scheduler.chunked_req is None
            and (scheduler.last_batch is None or scheduler.last_batch.is_empty())
            and not (scheduler.enable_overlap and scheduler.result_queue)
        )
