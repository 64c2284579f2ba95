"""Requests whose replica has ended go on at another, under a new name: the launcher keeps what was sent, knows what has
been answered, and tells late answers of the replica that has ended from those of the one that goes on.

A replica sends its answers through the detokenizer, and that it has ended is told by the controller; nothing orders the
two. So a request that is sent again has a name of its own at the replicas and in the detokenizer. Whatever comes under
the old one after that is dropped, and computed again, so no token is lost or comes twice. For the client, and in the
rest of the launcher, the request keeps its name.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import logging
import uuid
from array import array
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchStrOutput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
    wrap_as_pickle,
)
from sglang.srt.managers.tokenizer_manager import ReqState

from kunserve_sgl.integration.messages import ContinuedGenerateReqInput, RequestsEnded

logger = logging.getLogger(__name__)

# A request with which so many replicas had begun when they ended is not sent again: it may be what ends them. One end
# alone says nothing, since every request of the replica, and of those merged with it, was there too.
MOST_LOSSES = 2
# Nor is one that was at so many, begun or not: what ends a replica before it begins with a request is not known.
MOST_MOVES = 5
# One that was given back so often is taken in as it is: the controller takes a replica for larger than it is, or has
# too many that wait, and would send it there again at once.
MOST_RETURNS = 5
# SGLang ignores answers to health checks that nobody waits for any more.
_DROPPED = f"{HEALTH_CHECK_RID_PREFIX}_DROPPED"
# Fields of ReqState that stay when an answer begins anew; all others with a default are of the answer.
_OF_THE_REQUEST = {"abort_requested", "lifecycle_id", "dispatched", "ttft_observed", "prompt_token_ids"}
ENDED_AFTER_S = 0.5  # how long ends of requests are gathered before the controller is told, at most


class WayOn(enum.Enum):
    """Says how a request that was lost goes on."""

    WHOLE = "whole"  # as it was sent, since nothing was answered
    CONTINUED = "continued"  # from the last token that was answered
    ANEW = "anew"  # as it was sent; what was answered, and no client has seen, is forgotten


class NoWayOnError(Exception):
    """Says why a request cannot go on."""


@dataclasses.dataclass
class OpenRequest:
    """Holds what is known of a request that has been sent and has not ended."""

    sent: Any  # SGLang's tokenized request
    sent_name: str  # its name at the replicas
    losses: int = 0  # replicas that had begun with it when they ended
    moves: int = 0  # replicas that had it when they ended
    is_aborted: bool = False
    waited_s: float = 0.0  # for room
    returns: int = 0  # by replicas that had less room than at their start
    cached_tokens: int = 0
    cached_tokens_details: dict[str, Any] | None = None
    # Characters at the beginning of the text to come that the client has: the detokenizer begins with the first token.
    known_characters: int = 0


class Continuations:
    """Keeps the open requests of the launcher, by the names that clients know. Called in its event loop.

    `states` are SGLang's states by name, `send` sends a message to the controller, `abort` ends a request with the
    AbortReq given, which has the client's name, and `later` makes a call after so many seconds; None where there is one
    replica only, and so no controller that is to be told what has ended.
    """

    def __init__(
        self,
        states: dict[str, Any],
        send: Callable[[Any], None],
        abort: Callable[[AbortReq], None],
        later: Callable[[float, Callable[[], None]], object] | None,
    ) -> None:
        self._states = states
        self._send = send
        self._abort = abort
        self._later = later
        self._open: dict[str, OpenRequest] = {}
        self._client_names: dict[str, str] = {}  # of requests that have been sent again, by their new names
        self._ended: dict[str, None] = {}  # names at the replicas, which the controller is still to be told

    def on_sent(self, request: Any) -> None:
        """Takes note of a request that is being sent for the first time. A client may use a name again: the controller
        is told before that the last one has ended, so that it does not take this one for it."""
        if request.rid in self._ended:
            self._tell_ended()
        if not request.rid.startswith(HEALTH_CHECK_RID_PREFIX):
            self._open[request.rid] = OpenRequest(request, request.rid)

    def on_abort(self, name: str, is_of_all: bool) -> None:
        """Takes note that a client wants one request, or all, to end: such a one is not sent again."""
        for known in self._open.values() if is_of_all else filter(None, [self._open.get(name)]):
            known.is_aborted = True

    def forget(self, name: str) -> None:
        """Takes note that a request has ended."""
        if (known := self._open.pop(name, None)) is not None:
            self._client_names.pop(known.sent_name, None)
            if self._later is None:
                return
            if not self._ended:
                self._later(ENDED_AFTER_S, self._tell_ended)
            self._ended[known.sent_name] = None

    def _tell_ended(self) -> None:
        """Tells the controller what no replica can lose any more. It knows for a while of requests that have ended: if
        their replica ends then, they are not open here."""
        names, self._ended = list(self._ended), {}
        if names:
            self._send(RequestsEnded(names=names))

    def client_name(self, name: str) -> str | None:
        """Returns the client's name for one that a replica or the controller uses; None where the request has been sent
        again under another one since."""
        if (found := self._client_names.get(name)) is not None:
            return found
        known = self._open.get(name)
        return name if known is None or known.sent_name == name else None

    def on_output(self, output: Any) -> None:
        """Gives requests in a batch of answers the names that clients know, and takes out of it what they have."""
        has_text, is_embedding = isinstance(output, BatchStrOutput), isinstance(output, BatchEmbeddingOutput)
        for i, sent_name in enumerate(output.rids):
            name = self.client_name(sent_name)
            if name is None:
                output.rids[i] = _DROPPED
                continue
            known = self._open.get(name)
            if known is None:
                continue
            output.rids[i] = name
            if is_embedding:
                continue
            known.cached_tokens = output.cached_tokens[i]
            known.cached_tokens_details = output.cached_tokens_details[i] if output.cached_tokens_details else None
            if has_text and known.known_characters:
                text = output.output_strs[i]
                output.output_strs[i] = text[known.known_characters :]
                known.known_characters -= min(len(text), known.known_characters)

    def on_lost(self, names: Iterable[str], begun: Iterable[str], reason: str, can_go_on: bool) -> None:
        """Sends the requests again that a replica had when it ended, or answers them with 503 and the reason. `names`
        are those that the replica knew, `begun` those of them with which it had begun."""
        has_begun = set(begun)
        ways: dict[str, int] = {}
        for sent_name in names:
            name = self.client_name(sent_name) or ""  # "" where it has been sent again
            known, state = self._open.get(name), self._states.get(name)
            if known is None or state is None:
                continue  # it has ended
            known.moves += 1
            known.losses += sent_name in has_begun
            try:
                way = self._go_on(known, name, state, reason, can_go_on)
            except NoWayOnError as error:
                ways["answered with 503"] = ways.get("answered with 503", 0) + 1
                self._end(name, {"status_code": int(HTTPStatus.SERVICE_UNAVAILABLE), "message": str(error)})
            else:
                ways[way] = ways.get(way, 0) + 1
        if ways:
            logger.warning("KunServe: %s; its requests: %s", reason, ", ".join(f"{ways[way]} {way}" for way in ways))

    def on_waited(self, sent_name: str, waited_s: float) -> None:
        """Takes note for how long a request has waited for room, all its waits together."""
        if (known := self._open.get(self.client_name(sent_name) or "")) is not None:
            known.waited_s = waited_s

    def on_returned(self, names: Iterable[str], reason: str) -> None:
        """Sends requests again that a replica has given back for lack of room. The controller is told before that it
        has them no more."""
        self._ended |= dict.fromkeys(names)
        self._tell_ended()
        for sent_name in names:
            name = self.client_name(sent_name) or ""
            known, state = self._open.get(name), self._states.get(name)
            if known is None or state is None:
                continue  # it has ended
            known.returns += 1
            try:
                way = self._go_on(known, name, state, reason, can_go_on=True)
            except NoWayOnError as error:
                self._end(name, {"status_code": int(HTTPStatus.SERVICE_UNAVAILABLE), "message": str(error)})
            else:
                logger.info("KunServe: request %s: %s; %s", name, reason, way)

    def _go_on(self, known: OpenRequest, name: str, state: Any, reason: str, can_go_on: bool) -> str:
        if known.is_aborted or state.abort_requested:
            self._end(name, {"message": "Abort in waiting queue"})  # as SGLang does with one that waits
            return "aborted"
        if not can_go_on:
            raise NoWayOnError(reason)
        if known.losses >= MOST_LOSSES or known.moves >= MOST_MOVES:
            raise NoWayOnError(
                f"{reason}; the request was at {known.moves} replicas when they ended, and is not tried again"
            )
        try:
            way = way_on(known.sent, state)
        except NoWayOnError as error:
            raise NoWayOnError(f"{reason}; the request cannot go on elsewhere: {error}; ask again") from None
        self._client_names.pop(known.sent_name, None)
        known.sent_name = f"{name}_{uuid.uuid4().hex}"  # begins with the old one: an abort finds it, as SGLang's do
        self._client_names[known.sent_name] = name
        if way is WayOn.ANEW:
            begin_anew(state)
        known.known_characters = len(state.get_text())
        request = (
            _continued(known, state) if isinstance(known.sent, TokenizedGenerateReqInput) else copy.copy(known.sent)
        )
        request.rid = known.sent_name
        if known.returns:
            request.routed_dp_rank = None
        request.time_stats = wrap_as_pickle(state.time_stats)
        self._send(request)
        return way.value

    def _end(self, name: str, finish: dict[str, Any]) -> None:
        self._abort(AbortReq(rid=name, finished_reason={"type": "abort", **finish}))


def way_on(sent: Any, state: Any) -> WayOn:
    """Decides how a request goes on, `sent` as SGLang's tokenized request. Raises NoWayOnError where it cannot."""
    if getattr(sent, "mm_inputs", None) is not None or getattr(sent, "mm_data_mooncake", None) is not None:
        raise NoWayOnError("its images, audio or video were handed over to the replica")
    if isinstance(sent, TokenizedEmbeddingReqInput):
        return WayOn.WHOLE
    if sent.session_params is not None:
        raise NoWayOnError("what its session had so far was at the replica")
    if not state.output_ids:
        return WayOn.WHOLE
    if (what := _what_is_of_the_whole(sent, state)) is None:
        return WayOn.CONTINUED
    if not state.obj.stream:
        return WayOn.ANEW
    raise NoWayOnError(f"its stream has begun, and {what} cannot be continued")


def begin_anew(state: ReqState) -> None:
    """Forgets what has been answered; nothing of it has got to a client."""
    for field in dataclasses.fields(state):
        if field.name in _OF_THE_REQUEST:
            continue
        if field.default_factory is not dataclasses.MISSING:
            setattr(state, field.name, field.default_factory())
        elif field.default is not dataclasses.MISSING:
            setattr(state, field.name, field.default)


def _what_is_of_the_whole(sent: Any, state: Any) -> str | None:
    """Names what was asked for that a replica can only give for a whole answer, if anything."""
    if sent.input_embeds is not None:
        return "a prompt of embeddings"
    if sent.positional_embed_overrides is not None:
        return "a prompt with embeddings"
    if sent.return_hidden_states:
        return "return_hidden_states"
    if sent.return_routed_experts or sent.return_indexer_topk:
        return "return_routed_experts"
    if state.customized_info_accumulated:
        return "what the model says of each token"
    return None


def _continued(known: OpenRequest, state: Any) -> ContinuedGenerateReqInput:
    # Log-probabilities of the prompt came with the first token.
    fields = {"logprob_start_len": -1} if state.output_ids else {}
    return ContinuedGenerateReqInput.of(
        known.sent,
        **fields,
        output_ids=array("q", state.output_ids),
        cached_tokens=known.cached_tokens,
        cached_tokens_details=known.cached_tokens_details,
        was_returned=known.returns > 0,
        has_waited=known.returns > MOST_RETURNS,
        waited_s=known.waited_s,
    )
