"""A request that goes on here from the last token that another replica has sent, as one of SGLang's that was retracted:
prompt and tokens are prefilled, and everything that counts, limits or follows the tokens of an answer goes on.

The text begins with the first token again: the detokenizer has never seen this request. The launcher, which has the
text so far, leaves that out (`launcher/continuations.py`).
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any
from weakref import WeakSet

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from kunserve_sgl.integration.messages import ContinuedGenerateReqInput

logger = logging.getLogger(__name__)


class ContinuedRequests:
    """Gives requests that go on what they have, on their way through SGLang's admission. `scheduler` is SGLang's."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._arriving: ContinuedGenerateReqInput | None = None
        self._admitted: WeakSet[Any] = WeakSet()  # requests that another replica had
        self._settled: WeakSet[Any] = WeakSet()  # of those, the ones that have waited in vain for more room
        self._behind: WeakSet[Any] = WeakSet()  # of those, the ones whose grammar has not followed their tokens yet

    def on_arrival(self, request: Any) -> None:
        """Takes note of which request SGLang is going to take in next."""
        self._arriving = request if isinstance(request, ContinuedGenerateReqInput) else None

    def resume(self, req: Any) -> None:
        """Gives SGLang's `req`, which has just been made, the tokens that it had. SGLang has set its limits."""
        request, self._arriving = self._arriving, None
        if request is None or req.rid != request.rid:
            return
        if req.finished() or req.to_finish is not None:
            return
        self._admitted.add(req)
        if request.has_waited:
            self._settled.add(req)
        tokens = len(request.output_ids)
        if not tokens:
            return
        most = req.sampling_params.max_new_tokens
        # One that takes what there is ends with what it has: SGLang computes one more token, and leaves it out.
        if tokens > most or (tokens == most and not request.has_waited):
            why = f"the request goes on here with {tokens} tokens of its answer, and this replica has room for {most}"
            req.set_finish_with_abort(why)
            req.to_finish = FINISH_ABORT(why, HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError")
            return
        req.output_ids = request.output_ids
        req.send_token_offset = tokens
        req.retracted_stain = True  # what it found in the cache is what it found at first
        req.cached_tokens = request.cached_tokens
        details = request.cached_tokens_details or {}
        req.cached_tokens_device, req.cached_tokens_host = details.get("device", 0), details.get("host", 0)
        if req.return_logprob:
            _leave_out_logprobs(req.logprob, tokens)
            req.send_output_token_logprobs_offset = tokens
            req.input_logprob_sent = True
        if req.return_sampling_mask:
            req.output_token_sampling_mask = [None] * tokens
            req.output_token_sampling_logprobs = [None] * tokens
            req.send_output_sampling_mask_offset = tokens
        processor = self._scheduler.batch_result_processor
        processor._maybe_update_reasoning_tokens(req, list(req.output_ids))
        self._behind.add(req)

    def follow(self, req: Any) -> None:
        """Lets the grammar of a request that is about to be queued follow the tokens that it has; it is there now."""
        if req not in self._behind:
            return
        self._behind.discard(req)
        if req.grammar is None or req.to_finish is not None:
            return
        try:
            for token in req.output_ids:
                req.grammar.accept_token(token)
        except ValueError as error:  # as SGLang does where a token is not of the grammar
            logger.error("KunServe: request %s cannot go on: its grammar refuses its tokens: %s", req.rid, error)
            req.to_finish = FINISH_ABORT("the grammar refuses the answer so far", HTTPStatus.INTERNAL_SERVER_ERROR)

    def was_admitted(self, req: Any) -> bool:
        """Tells whether another replica had the request: it is not refused for the length of the queue here."""
        return req in self._admitted

    def takes_what_there_is(self, req: Any) -> bool:
        """Tells whether the request has waited in vain for more room than there is here: its answer may be cut."""
        return req in self._settled

    def bring_forward(self, req: Any) -> None:
        """Puts a request that has just been queued before those that nobody had before, in the order of coming."""
        queue = self._scheduler.waiting_queue
        if req not in self._admitted or not queue or queue[-1] is not req:
            return
        place = next(i for i, other in enumerate(queue) if other is req or other not in self._admitted)
        queue.insert(place, queue.pop())


def _leave_out_logprobs(logprob: Any, tokens: int) -> None:
    """Puts something in the place of log-probabilities that were sent before: those of the prompt, which SGLang then
    does not compute again, and those of the tokens so far."""
    for name in ("token_logprobs", "top_logprobs", "token_ids_logprobs"):
        for kind in ("val", "idx"):
            setattr(logprob, f"input_{name}_{kind}", [])
            setattr(logprob, f"output_{name}_{kind}", [None] * tokens)
