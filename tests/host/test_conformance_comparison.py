"""The comparison that all conformance tests rest on notices what it has to notice; needs no server."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from _compare import LOGPROB_TOLERANCE, differences

ANSWER: dict[str, Any] = {
    "text": " a b",
    "output_ids": [7, 8],
    "meta_info": {
        "id": "x",
        "finish_reason": {"type": "stop", "matched": 8},
        "output_token_logprobs": [[-0.5, 7, None], [-1.5, 8, None]],
        "cached_tokens": 0,
        "ok": True,
    },
}


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy of ANSWER with another value at `path`."""
    answer = copy.deepcopy(ANSWER)
    place: Any = answer
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return answer


def test_equal_answers_have_no_differences() -> None:
    assert differences(ANSWER, copy.deepcopy(ANSWER)) == []


def test_names_and_times_may_differ() -> None:
    assert differences(ANSWER, changed(("meta_info", "id"), "y")) == []


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("text",), " a c", "$.text"),
        (("output_ids", 1), 9, "$.output_ids[1]"),
        (("output_ids",), [7], "$.output_ids"),
        (("output_ids",), None, "$.output_ids"),
        (("meta_info", "finish_reason", "type"), "length", "$.meta_info.finish_reason.type"),
        (("meta_info", "output_token_logprobs", 0, 0), -0.5002, "$.meta_info.output_token_logprobs[0][0]"),
        (("meta_info", "output_token_logprobs", 0, 0), float("nan"), "$.meta_info.output_token_logprobs[0][0]"),
        (("meta_info", "output_token_logprobs", 0, 0), None, "$.meta_info.output_token_logprobs[0][0]"),
        (("meta_info", "output_token_logprobs", 1, 1), 9, "$.meta_info.output_token_logprobs[1][1]"),
        (("meta_info", "cached_tokens"), 1, "$.meta_info.cached_tokens"),
        (("meta_info", "cached_tokens"), False, "$.meta_info.cached_tokens"),
        (("meta_info", "ok"), 1, "$.meta_info.ok"),
        (("meta_info", "added"), 0, "$.meta_info.added"),
    ],
)
def test_a_difference_is_found_at_its_place(path: tuple[str | int, ...], value: Any, place: str) -> None:
    for expected, actual in ((ANSWER, changed(path, value)), (changed(path, value), ANSWER)):
        found = differences(expected, actual, tolerance=LOGPROB_TOLERANCE)
        assert [line.split(":")[0] for line in found] == [place]


def test_log_probabilities_may_differ_within_the_tolerance() -> None:
    close = changed(("meta_info", "output_token_logprobs", 0, 0), -0.50005)
    assert differences(ANSWER, close, tolerance=LOGPROB_TOLERANCE) == []
    assert differences(ANSWER, close) != []
    whole = changed(("meta_info", "output_token_logprobs", 0, 0), -1)
    assert differences(whole, changed(("meta_info", "output_token_logprobs", 0, 0), -1.0)) == []


def test_a_missing_volatile_key_is_a_difference() -> None:
    without = copy.deepcopy(ANSWER)
    del without["meta_info"]["id"]
    assert differences(ANSWER, without) == ["$.meta_info.id: missing"]
