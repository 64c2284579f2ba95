"""Requests that a replica with fewer slots than at its start gives back, and those that it keeps."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, FINISH_MATCHED_TOKEN, Req
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sgl.integration.messages import ContinuedGenerateReqInput, RequestsReturned
from kunserve_sgl.integration.scheduler.request_limits import RequestLimits
from kunserve_sgl.integration.scheduler.returned_requests import ReturnedRequests

BASE, LEFT = 512, 128
PROMPT = 36
MOST_LEFT = LEFT - PROMPT - 2  # of an answer, with the slots that are left


class Replica:
    """What of a scheduler limits requests, and its way to the HTTP server."""

    max_new_tokens_limit: int | None = None
    page_size = 1
    model_config = SimpleNamespace(context_len=10_000)
    server_args = SimpleNamespace(dcp_size=1)
    ps = SimpleNamespace(dp_rank=1)

    def __init__(self, capacity: int = LEFT) -> None:
        self.sent: list[tuple[Any, Any]] = []
        sender = SimpleNamespace(send_output=lambda message, request: self.sent.append((message, request)))
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=sender)
        self.limits = RequestLimits(self)
        self.given_back: list[Any] = []
        self.load_reporter = SimpleNamespace(on_given_back=self.given_back.append)
        self.settled: list[Any] = []  # take what there is
        self.continued = SimpleNamespace(takes_what_there_is=lambda req: req in self.settled)
        self.returned = ReturnedRequests(self, self.limits, BASE)
        self.set_capacity(capacity)

    def set_capacity(self, tokens: int) -> None:
        self.max_total_num_tokens = tokens
        self.max_req_len = min(self.model_config.context_len - 1, tokens - 1)

    def admit(self, most: int | None, prompt: int = PROMPT, **fields: Any) -> Any:
        """SGLang's request, with the limit that it gets here."""
        req = Req("r", "", array("q", [1]) * prompt, SamplingParams(max_new_tokens=most), vocab_size=10)
        for name, value in fields.items():
            setattr(req, name, value)
        self.limits.on_arrival(req)
        Scheduler.init_req_max_new_tokens(self, req)
        self.limits.limit_to_expected(req)
        return req

    def answer(self, req: Any) -> Any:
        """Lets a request come to its limit."""
        req.output_ids = array("q", [2]) * req.sampling_params.max_new_tokens
        req.finished_reason = FINISH_LENGTH(len(req.output_ids))
        return req


def request(most: int | None, prompt: int = PROMPT, kind: Any = TokenizedGenerateReqInput, **fields: Any) -> Any:
    known: dict[str, Any] = {
        **{"rid": "r", "input_text": "", "input_ids": array("q", [1]) * prompt, "mm_inputs": None},
        **{"token_type_ids": None, "sampling_params": SamplingParams(max_new_tokens=most)},
    }
    known |= {"input_embeds": None, "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0}
    known |= {"token_ids_logprob": None, "stream": False}
    return kind(**known | fields)


def going_on(most: int | None, tokens: int, **fields: Any) -> Any:
    so_far = {**fields, "output_ids": array("q", [2]) * tokens, "cached_tokens": 0, "cached_tokens_details": None}
    return request(most, kind=ContinuedGenerateReqInput, **so_far)


@pytest.mark.parametrize(
    ("arriving", "is_returned"),
    [
        (request(MOST_LEFT), False),
        (request(MOST_LEFT + 1), True),
        (request(10 * BASE), True),  # SGLang would cut it at the start too, but not by so much
        (request(None), False),  # it may end before
        (request(None, prompt=LEFT), True),
        (request(1, prompt=BASE), False),  # SGLang refuses it
        (request(MOST_LEFT + 1, session_params=SimpleNamespace()), False),  # its session is here
        (request(MOST_LEFT + 1, mm_inputs=SimpleNamespace()), False),
        (request(MOST_LEFT + 1, rid="HEALTH_CHECK_1"), False),
        (going_on(MOST_LEFT, 30), False),
        (going_on(MOST_LEFT + 1, 30), True),
        (going_on(None, MOST_LEFT - 1), False),
        (going_on(None, MOST_LEFT), True),
        (going_on(None, MOST_LEFT, has_waited=True), False),
        (ContinuedGenerateReqInput.of(request(10 * BASE), has_waited=True), False),
        (request(1, prompt=LEFT - 7), False),
        (request(1, prompt=LEFT - 6), True),  # SGLang would refuse it here, and not at the start
        (request(None, prompt=BASE - 6), False),  # and this one there, too
    ],
)
def test_who_would_be_cut_is_given_back(arriving: Any, is_returned: bool) -> None:
    replica = Replica()
    assert replica.returned.give_back(arriving) is is_returned
    reason = f"replica 1 has {LEFT} slots for now, of {BASE}"
    assert replica.sent == [(RequestsReturned(names=["r"], reason=reason), arriving)] * is_returned
    assert not Replica(BASE).returned.give_back(arriving)


def test_slots_that_are_about_to_go_are_not_counted_on() -> None:
    replica = Replica(BASE)
    assert not replica.returned.give_back(request(MOST_LEFT + 1))
    replica.limits.expect_capacity(LEFT)
    assert replica.returned.give_back(request(MOST_LEFT + 1))


def test_an_answer_at_the_end_of_the_room_is_given_back_and_not_streamed() -> None:
    replica = Replica()
    cut, whole, stopped = replica.answer(replica.admit(None)), replica.answer(replica.admit(20)), replica.admit(None)
    stopped.output_ids, stopped.finished_reason = array("q", [2]), FINISH_MATCHED_TOKEN(2)
    running = replica.admit(None)
    assert len(cut.output_ids) == MOST_LEFT
    assert replica.returned.without_cut([cut, whole, stopped, running]) == [whole, stopped, running]
    assert [request for _, request in replica.sent] == replica.given_back == [cut]
    assert cut.finished_output, "what the next batch brings of it is not streamed either"
    replica.returned.without_cut([cut])
    assert len(replica.sent) == 1


def test_what_runs_when_slots_go_is_cut_for_the_time_being() -> None:
    replica = Replica(BASE)
    begun = replica.admit(None)
    assert begun.sampling_params.max_new_tokens == BASE - PROMPT - 2
    begun.sampling_params.max_new_tokens = replica.limits.most_new_tokens(LEFT, PROMPT)
    assert replica.returned.without_cut([replica.answer(begun)]) == []


def test_with_all_slots_the_end_of_the_room_is_the_end() -> None:
    replica = Replica(BASE)
    whole = replica.answer(replica.admit(None))
    assert replica.returned.without_cut([whole]) == [whole]
    replica.max_new_tokens_limit = 7  # SGLANG_MAX_NEW_TOKENS_LIMIT
    replica.set_capacity(LEFT)
    limited = replica.answer(replica.admit(None))
    assert len(limited.output_ids) == 7
    assert replica.returned.without_cut([limited]) == [limited]


def test_one_that_takes_what_there_is_is_not_given_back_at_its_end() -> None:
    """It would wait anew, and then be answered with an error."""
    replica = Replica()
    replica.settled.append(cut := replica.answer(replica.admit(None)))
    assert replica.returned.without_cut([cut]) == [cut]
    assert replica.sent == []


def test_a_prompt_that_no_context_has_room_for_is_not_sent_to_and_fro() -> None:
    replica = Replica()
    replica.model_config = SimpleNamespace(context_len=BASE - 50)
    assert replica.returned.give_back(request(1, prompt=BASE - 57))
    assert not replica.returned.give_back(request(1, prompt=BASE - 56))


BOUND = ["session", "multimodal_inputs", "return_hidden_states", "input_embeds", "positional_embed_overrides"]


@pytest.mark.parametrize("field", [*BOUND, "customized_info"])
def test_what_cannot_go_on_elsewhere_ends_here(field: str) -> None:
    replica = Replica()
    bound = replica.answer(replica.admit(None, **{field: True}))
    assert replica.returned.without_cut([bound]) == [bound]
