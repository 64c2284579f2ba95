"""A request that a scheduler cannot take in is answered with an error. It does not end the replica.

The launcher has checked what it can (`request_checks.py`). What is left is what only a scheduler knows, and what nobody
has thought of: an error here is one of the request's values, alike at all ranks, and nothing has been computed yet.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sgl.integration.bad_request import BadRequestError

logger = logging.getLogger(__name__)

# Errors of values. Others, of a device or of ours, may be different at each rank and end the process.
_VALUE_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


def admit(scheduler: Any, request: Any, take_in: Callable[[Any], None]) -> None:
    """Calls `take_in(request)`, and answers the request with the reason where that fails."""
    try:
        if request.custom_logit_processor:
            _check_processor(request.custom_logit_processor)
        take_in(request)
    except _VALUE_ERRORS as error:
        waiting = (*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue)
        if any(req.rid == request.rid for req in waiting):
            raise  # it is in, so it is no longer about what it says
        logger.info("KunServe: request %s refused", request.rid, exc_info=not isinstance(error, BadRequestError))
        _refuse(scheduler, request, str(error) if isinstance(error, BadRequestError) else f"bad request: {error!r}")


def refuse_empty(req: Any) -> None:
    """Refuses an empty prompt. That of a session is put together here, and may come out empty; there is nothing to
    compute then."""
    if not len(req.origin_input_ids):
        req.set_finish_with_abort("input_ids (prompt): the prompt is empty; at least one token is needed")


def _refuse(scheduler: Any, request: Any, message: str) -> None:
    """Answers in SGLang's way: by a request of one token that has ended before it is computed."""
    sampling = SamplingParams(max_new_tokens=0)
    sampling.normalize(scheduler.tokenizer)
    req = Req(
        request.rid,
        None,
        array("q", [0]),
        sampling,
        vocab_size=scheduler.model_config.vocab_size,
        http_worker_ipc=request.http_worker_ipc,
    )
    req.tokenizer = scheduler.tokenizer
    req.set_finish_with_abort(message)
    scheduler.init_req_max_new_tokens(req)
    scheduler._add_request_to_queue(req)


def _check_processor(serialized: str) -> None:
    """Makes a request's logit processor once, before SGLang does when the batch is prepared, together with others'
    requests; SGLang keeps what it has loaded."""
    try:
        processor = CustomLogitProcessor.from_str(serialized)
    except Exception as error:
        raise BadRequestError(
            f"custom_logit_processor: cannot be loaded ({error!r}); accepted is what its to_str() gives"
        ) from error
    if not callable(processor):
        raise BadRequestError(f"custom_logit_processor: a {type(processor).__name__}, which cannot be called")
