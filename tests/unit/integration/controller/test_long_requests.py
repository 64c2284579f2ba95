"""Requests that are longer than what a replica has room for wait in the controller until it has more."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sgl.integration.controller.long_requests import LongRequests, Room, room_for
from kunserve_sgl.integration.messages import ContinuedGenerateReqInput

CONTEXT, BASE = 4096, 130


def made_of(kind: type, name: str, prompt: int, sampling: SamplingParams, **more: Any) -> Any:
    fields = {
        "rid": name,
        "input_text": "",
        "input_ids": array("q", range(prompt)),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": [],
        "sampling_params": sampling,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": [],
        "stream": False,
    }
    return kind(**fields, **more)


def request(prompt: int, answer: int | None, name: str = "r", **sampling: Any) -> Any:
    parameters = SamplingParams(max_new_tokens=answer, **sampling)
    parameters.normalize(None)
    return made_of(TokenizedGenerateReqInput, name, prompt, parameters)


@pytest.mark.parametrize(
    ("prompt", "answer", "options", "room"),
    [
        # As `RequestLimits.most_new_tokens`: 152 tokens leave room for 50 new ones.
        (100, 50, {}, Room(BASE, 152)),
        (100, 20, {}, Room(122, 122)),
        (100, 50, {"ignore_eos": True}, Room(152, 152)),
        (100, None, {}, Room(107, 358)),
        (100, 50, {"ignore_eos": True, "stop": ["x"]}, Room(BASE, 152)),
        (CONTEXT - 10, 50, {}, Room(CONTEXT - 3, CONTEXT + 2)),
    ],
)
def test_the_room_that_a_request_needs(prompt: int, answer: int | None, options: dict[str, Any], room: Room) -> None:
    if "stop" in options:
        parameters = request(prompt, answer, ignore_eos=True)
        parameters.sampling_params.stop_strs = options["stop"]
        assert room_for(parameters, CONTEXT, 1, BASE) == room
    else:
        assert room_for(request(prompt, answer, **options), CONTEXT, 1, BASE) == room


def test_pages_and_the_tokens_of_a_continued_request_count() -> None:
    assert room_for(request(100, 50, ignore_eos=True), CONTEXT, 16, BASE) == Room(179, 179)
    assert room_for(going_on(50), CONTEXT, 1, BASE) == Room(152, 152)


def going_on(answer: int | None, **more: Any) -> Any:
    """Makes a request of 100 tokens that has 30 of its answer."""
    return made_of(
        ContinuedGenerateReqInput,
        "r",
        100,
        request(1, answer, ignore_eos=True).sampling_params,
        output_ids=array("q", range(30)),
        cached_tokens=0,
        cached_tokens_details=None,
        **more,
    )


def test_one_without_a_limit_that_was_returned_goes_where_there_is_as_much_room_as_at_the_start() -> None:
    assert room_for(going_on(None), CONTEXT, 1, 300) == Room(137, 358)
    assert room_for(going_on(None, was_returned=True), CONTEXT, 1, 300) == Room(300, 300)
    assert room_for(going_on(50, was_returned=True), CONTEXT, 1, 100) == Room(152, 152)


def test_what_is_not_told_here() -> None:
    assert room_for(SimpleNamespace(input_ids=[1]), CONTEXT, 1, BASE) is None
    assert room_for(request(CONTEXT, 1), CONTEXT, 1, BASE) is None
    assert room_for(request(0, 1), CONTEXT, 1, BASE) is None


def test_requests_wait_each_for_its_replica() -> None:
    long = LongRequests(60.0)
    for name, replica, tokens, now_s in (("a", 0, 500, 1.0), ("b", 1, 900, 2.0), ("c", 1, 700, 3.0), ("ab", 1, 100, 4)):
        assert long.add(request(5, 1, name), replica, tokens, now_s)
    assert long.wanted == {0: 500, 1: 900}
    assert long.next_deadline_s == 61.0
    capacity = {0: 400, 1: 800}
    ready = long.take_ready(lambda replica, tokens: tokens <= capacity[replica])
    assert [(each.rid, replica, since_s) for each, replica, since_s in ready] == [("c", 1, 3.0), ("ab", 1, 4.0)]
    assert [each.rid for each in long.take_aborted(AbortReq(rid="a"))] == ["a"]
    assert long.wanted == {1: 900}
    assert [each.rid for each in long.take_overdue(62.0)] == ["b"]
    assert (len(long), long.wanted, long.next_deadline_s) == (0, {}, None)


def test_one_that_goes_on_waiting_has_its_deadline() -> None:
    long = LongRequests(60.0)
    for name, since_s in (("a", 1.0), ("c", 3.0), ("b", 2.0), ("b2", 2.0)):
        assert long.add(request(5, 1, name), 0, 500, since_s)
    assert [each.rid for each in long.take_overdue(62.0)] == ["a", "b", "b2"]
    assert long.next_deadline_s == 63.0
