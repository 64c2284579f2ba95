"""Requests that a replica gives back, because it has room for less of their answers than it had at its start.

A replica that lends has fewer slots of its own than it began with, and SGLang cuts answers to the slots there are.
Nobody is to get a shorter answer for that. The controller sends such a replica only what it has room for; what is on
the way when slots go, and an answer that has no limit and gets to the end of the room, comes back. It goes on where
there is room, from its last token, under another name (`launcher/continuations.py`).

In automatic mode only: otherwise nobody brings slots back, and a request would wait in vain.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_LENGTH
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.utils import is_health_check_generate_req

from kunserve_sgl.integration.messages import ContinuedGenerateReqInput, RequestsReturned
from kunserve_sgl.integration.scheduler.request_limits import RequestLimits

logger = logging.getLogger(__name__)


class ReturnedRequests:
    """Gives requests back, at one rank of a replica that began with `base_tokens` slots. `scheduler` is SGLang's. All
    ranks decide alike, and rank 0 sends."""

    def __init__(self, scheduler: Any, limits: RequestLimits, base_tokens: int) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._base_tokens = base_tokens

    def give_back(self, request: Any) -> bool:
        """Gives back one that arrives, SGLang's tokenized `request`, if an answer as long as its client says would be
        cut here and not at a replica as it is at its start. One without a limit is let in: it may end before."""
        capacity, so_far = self._limits.capacity_for_new, 0
        if isinstance(request, ContinuedGenerateReqInput):
            if request.has_waited:
                return False
            so_far = len(request.output_ids)
        if capacity >= self._base_tokens or not _can_move(request) or is_health_check_generate_req(request):
            return False
        prompt, named = len(request.input_ids), request.sampling_params.max_new_tokens
        most = so_far + 1 if named is None else named
        full = self._limits.most_new_tokens(self._base_tokens, prompt)
        if full <= so_far or not self._limits.takes_prompt(self._base_tokens, prompt):
            return False  # it would be refused at the start, too
        has_room = self._limits.most_new_tokens(capacity, prompt) >= min(most, full)
        if has_room and self._limits.takes_prompt(capacity, prompt):
            return False
        self._send(request, capacity)
        return True

    def without_cut(self, requests: Sequence[Any]) -> list[Any]:
        """Takes those out of `requests`, SGLang's of a batch that has ended, that have come to the end of the room and
        would have had more at the start; they are given back."""
        cut = [request for request in requests if self._is_cut(request)]
        for request in cut:
            request.finished_output = True  # nothing of it is sent any more
            if self._scheduler.load_reporter is not None:
                self._scheduler.load_reporter.on_given_back(request)
            self._send(request, self._scheduler.max_total_num_tokens)
        return [request for request in requests if request not in cut] if cut else list(requests)

    def _is_cut(self, request: Any) -> bool:
        if not isinstance(request.finished_reason, FINISH_LENGTH) or request.finished_output:
            return False
        if self._scheduler.continued.takes_what_there_is(request) or not _may_go_on(request):
            return False
        return len(request.output_ids) < self._limits.full_answer(request, self._base_tokens)

    def _send(self, request: Any, capacity: int) -> None:
        reason = f"replica {self._scheduler.ps.dp_rank} has {capacity} slots for now, of {self._base_tokens}"
        self._scheduler.ipc_channels.send_to_tokenizer.send_output(
            RequestsReturned(names=[request.rid], reason=reason), request
        )


def _can_move(request: Any) -> bool:
    """Tells whether another replica can take a request, SGLang's tokenized one, that nobody has begun with."""
    return bool(request.input_ids) and request.session_params is None and request.mm_inputs is None


def _may_go_on(request: Any) -> bool:
    """Tells whether another replica can go on with a request; see `launcher/continuations.way_on`."""
    if request.session is not None or request.multimodal_inputs is not None or request.input_embeds is not None:
        return False
    if request.positional_embed_overrides is not None or request.customized_info is not None:
        return False
    return not (request.return_hidden_states or request.return_routed_experts or request.return_indexer_topk)


@dataclasses.dataclass(kw_only=True, slots=True)
class KunserveOutputStreamer(SchedulerOutputStreamer):  # type: ignore[misc]
    """Streams what `without_cut` leaves of the requests of a batch."""

    without_cut: Callable[[Sequence[Any]], Sequence[Any]]

    @classmethod
    def replacing(cls, streamer: Any, without_cut: Callable[[Sequence[Any]], Sequence[Any]]) -> KunserveOutputStreamer:
        """Makes a streamer with everything that SGLang's `streamer` has."""
        fields = {field.name: getattr(streamer, field.name) for field in dataclasses.fields(streamer)}
        return cls(**fields, without_cut=without_cut)

    def stream_output(self, reqs: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """Streams as SGLang does."""
        SchedulerOutputStreamer.stream_output(self, list(self.without_cut(reqs)), *args, **kwargs)
