"""A request that another replica has begun to answer, as SGLang's request on its way into the queue."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT, ReqLogprob

from kunserve_sgl.integration.messages import ContinuedGenerateReqInput
from kunserve_sgl.integration.scheduler.continuation import ContinuedRequests

TOKENS = [7, 8, 9]


class Request:
    """Of SGLang's request, what goes on."""

    def __init__(self, rid: str = "r", most: int = 10, logprobs: bool = False) -> None:
        self.rid, self.output_ids = rid, array("q")
        self.grammar: Any = None
        self.to_finish: Any = None
        self.output_token_sampling_mask: list[Any] = []
        self.send_output_sampling_mask_offset = 0
        self.sampling_params = SimpleNamespace(max_new_tokens=most)
        self.return_logprob, self.return_sampling_mask, self.input_logprob_sent = logprobs, logprobs, False
        self.logprob = ReqLogprob(top_logprobs_num=1, token_ids_logprob=None)
        self.send_token_offset = self.send_output_token_logprobs_offset = 0
        self.cached_tokens = self.cached_tokens_device = self.cached_tokens_host = 0
        self.retracted_stain = False
        self.reasoning: list[int] = []

    def finished(self) -> bool:
        return False

    def set_finish_with_abort(self, reason: str) -> None:
        self.to_finish = FINISH_ABORT(reason)


class Grammar:
    """Accepts tokens up to 8, in order."""

    def __init__(self, most: int) -> None:
        self.accepted: list[int] = []
        self._most = most

    def accept_token(self, token: int) -> None:
        if token > self._most:
            raise ValueError("Tokens not accepted")
        self.accepted.append(token)


def requests() -> ContinuedRequests:
    def update(req: Request, tokens: list[int]) -> None:
        req.reasoning += tokens

    processor = SimpleNamespace(_maybe_update_reasoning_tokens=update)
    return ContinuedRequests(SimpleNamespace(batch_result_processor=processor, waiting_queue=[]))


def arriving(name: str = "r", tokens: list[int] = TOKENS, has_waited: bool = False) -> Any:
    fields = dict.fromkeys(ContinuedGenerateReqInput.__struct_fields__)
    details = {"device": 3, "host": 1}
    fields |= {"rid": name, "output_ids": array("q", tokens), "cached_tokens": 4, "cached_tokens_details": details}
    return ContinuedGenerateReqInput(**fields | {"has_waited": has_waited})


def resumed(req: Request, has_waited: bool = False) -> ContinuedRequests:
    made = requests()
    made.on_arrival(arriving(has_waited=has_waited))
    made.resume(req)
    return made


def test_it_has_its_tokens_and_sends_none_again() -> None:
    resumed(req := Request(logprobs=True))
    assert list(req.output_ids) == req.reasoning == TOKENS
    assert req.send_token_offset == req.send_output_token_logprobs_offset == 3
    assert (req.cached_tokens, req.cached_tokens_device, req.cached_tokens_host) == (4, 3, 1)
    assert (req.retracted_stain, req.input_logprob_sent) == (True, True)
    # What SGLang takes from there on begins behind them.
    for name in ("token_logprobs", "top_logprobs", "token_ids_logprobs"):
        assert getattr(req.logprob, f"input_{name}_val") == []
        assert len(getattr(req.logprob, f"output_{name}_idx")) == 3
    assert len(req.output_token_sampling_mask) == req.send_output_sampling_mask_offset == 3


def test_others_stay_as_they_are() -> None:
    made = requests()
    made.on_arrival(arriving())
    made.resume(other := Request("other"))
    made.on_arrival(SimpleNamespace(rid="r"))
    made.resume(plain := Request())
    made.follow(plain)
    assert not other.output_ids
    assert not plain.output_ids


def test_its_grammar_follows_once_it_is_there() -> None:
    made = resumed(req := Request())
    req.grammar = grammar = Grammar(9)
    made.follow(req)
    made.follow(req)  # comes back into the queue after a retraction
    assert grammar.accepted == TOKENS
    assert req.to_finish is None


def test_a_grammar_that_refuses_its_tokens_ends_it() -> None:
    made = resumed(req := Request())
    req.grammar = Grammar(8)
    made.follow(req)
    assert req.to_finish.to_json()["status_code"] == 500


@pytest.mark.parametrize("most", [2, 3])
def test_it_ends_where_it_has_no_room(most: int) -> None:
    resumed(req := Request(most=most))
    assert not req.output_ids
    finish = req.to_finish.to_json()
    assert finish["status_code"] == 503
    assert (
        finish["message"]
        == f"the request goes on here with 3 tokens of its answer, and this replica has room for {most}"
    )


def test_one_that_takes_what_there_is_ends_with_what_it_has() -> None:
    made = resumed(req := Request(most=3), has_waited=True)
    assert (list(req.output_ids), req.to_finish) == (TOKENS, None), "what is computed beyond the limit is left out"
    assert made.takes_what_there_is(req)
    assert not resumed(other := Request()).takes_what_there_is(other)
    resumed(smaller := Request(most=2), has_waited=True)
    assert smaller.to_finish.to_json()["status_code"] == 503


def test_what_has_been_refused_stays_so() -> None:
    req = Request()
    req.set_finish_with_abort("no")
    resumed(req)
    assert not req.output_ids


def test_those_that_another_replica_had_come_before_others() -> None:
    made = requests()
    queue = made._scheduler.waiting_queue
    for name, tokens in [("a", None), ("b", TOKENS), ("c", []), ("d", None), ("e", TOKENS)]:
        request = SimpleNamespace(rid=name) if tokens is None else arriving(name, tokens)
        made.on_arrival(request)
        made.resume(req := Request(name))
        assert made.was_admitted(req) == (tokens is not None)
        queue.append(req)
        made.bring_forward(req)
    assert [req.rid for req in queue] == ["b", "c", "e", "a", "d"]
    made.bring_forward(queue[1])  # was not queued, but refused
    assert [req.rid for req in queue] == ["b", "c", "e", "a", "d"]
