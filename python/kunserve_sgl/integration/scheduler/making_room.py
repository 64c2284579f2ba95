"""Slots that go although requests have more: each request gets to its end with what is left, or is answered.

What runs and has no room is retracted by SGLang itself, when its allocator has nothing free (`ElasticSlots.withhold`).
Here is what that could never help: limits that are too large for what is left, and requests that have no room at all.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from kunserve_sgl.integration.scheduler.known_requests import known_requests
from kunserve_sgl.integration.scheduler.request_limits import RequestLimits

logger = logging.getLogger(__name__)


def make_room(scheduler: Any, limits: RequestLimits, capacity: int) -> int:
    """Limits every request to what it has room for in `capacity` slots, whoever named what; an answer that is longer
    already ends with its next token. Answers with 503 those whose tokens so far have no room: one that runs as soon as
    its batch has ended. Returns how many tokens those need who end with their next token. All ranks of a replica call
    it at the same batch boundary."""
    running = {id(request) for request in known_requests(scheduler).running}
    ending, without_room = limits.force_to(capacity, running)
    for request in without_room:
        tokens = len(request.origin_input_ids) + len(request.output_ids)
        message = f"the request of {tokens} tokens was admitted while there was more memory; {capacity} slots are left"
        logger.warning("KunServe: %s; it is answered so: %s", message, request.rid)
        _refuse(scheduler, request, FINISH_ABORT(message, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"))
    # A page for the next token, and one for that of a batch whose result has not been looked at.
    return sum(len(each.origin_input_ids) + len(each.output_ids) + 2 * scheduler.page_size for each in ending)


def _refuse(scheduler: Any, request: Any, reason: FINISH_ABORT) -> None:
    known = known_requests(scheduler)
    if any(each is request for each in known.waiting):
        scheduler.waiting_queue = [each for each in scheduler.waiting_queue if each is not request]
        scheduler.ipc_channels.send_to_tokenizer.send_output(
            AbortReq(finished_reason=reason.to_json(), rid=request.rid), request
        )
        return
    if any(each is request for each in known.for_grammar):
        request.set_finish_with_abort(reason.message)  # makes its prompt a single token, which there is room for
    request.to_finish = reason
