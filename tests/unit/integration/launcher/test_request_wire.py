"""Requests that nobody could read are refused where they are written, by the names that the client gave."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from sglang.srt.managers.io_struct import (
    SessionParams,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
    msgpack_decode,
    msgpack_encode,
)
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sgl.integration.bad_request import BadRequestError
from kunserve_sgl.integration.launcher.request_wire import check_readable, check_sampling_types

PROMPT = array("q", [5, 6, 7])


def generation(sampling_params: dict[str, Any] | None = None, **changes: Any) -> TokenizedGenerateReqInput:
    sampling = SamplingParams(**(sampling_params or {}))
    values: dict[str, Any] = {
        **{"input_text": "text", "input_ids": PROMPT, "input_embeds": None, "mm_inputs": None, "token_type_ids": None},
        **{"sampling_params": sampling, "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0},
        **{"token_ids_logprob": None, "stream": False, "time_stats": object()},
        **changes,
    }
    return TokenizedGenerateReqInput(**values)


def test_readable_requests_pass_and_stay_as_they_are() -> None:
    request = generation({"stop": ["a"], "stop_token_ids": [7], "logit_bias": {"5": 1}, "custom_params": {"a": [1]}})
    given = request.time_stats
    check_readable(request)
    assert request.time_stats is given
    assert request.input_ids is PROMPT
    check_readable(
        TokenizedEmbeddingReqInput(
            input_text="a", input_ids=PROMPT, mm_inputs=None, token_type_ids=None, sampling_params=SamplingParams()
        )
    )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (generation({"max_new_tokens": 1.5}), "sampling_params.max_new_tokens: Expected `int | null`, got `float`"),
        (generation({"stop": [5]}), "sampling_params.stop: Expected `str`, got `int`"),
        (generation({"json_schema": {"type": "object"}}), "sampling_params.json_schema: Expected `str | null`"),
        (generation({"custom_params": {"a": {"b": {"c": 1}}}}), "sampling_params.custom_params: Expected"),
        (generation({"regex": "\ud800"}), "sampling_params.regex: '\\\\ud800': 'utf-8' codec can't encode"),
        (generation({"top_k": 2**70}), "sampling_params.top_k: 1180591620717411303424: can't serialize ints"),
        (generation(session_params=SessionParams(id=5)), "session_params.id: Expected `str | null`, got `int`"),
        (generation(top_logprobs_num="a"), "^top_logprobs_num: Expected `int`, got `str`"),
        (generation(priority=2**70), "^priority: 1180591620717411303424"),
        (generation(positional_embed_overrides={"a": 1}), "^positional_embed_overrides: Expected `array | null`"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_clients_name(request_: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        check_readable(request_)
    # It would have ended who reads it, or never have been sent.
    request_.time_stats = None
    with pytest.raises((ValueError, OverflowError)):
        msgpack_decode(msgpack_encode(request_))


@pytest.mark.parametrize(
    "sampling_params",
    [
        {},
        {"temperature": None, "max_new_tokens": None, "stop_token_ids": [7, None], "n": 2},
        {"stop": "a", "stop_token_ids": [7], "logit_bias": {"5": 1, 6: 2.0}, "custom_params": {"a": [1, "b"]}},
    ],
)
def test_sampling_parameters_of_the_right_types_pass(sampling_params: dict[str, Any]) -> None:
    check_sampling_types(sampling_params)


@pytest.mark.parametrize(
    ("sampling_params", "message"),
    [
        ({"stop": 5}, "sampling_params.stop: Expected `str | array | null`, got `int`"),
        ({"stop": [5]}, r"sampling_params.stop\[0\]: Expected `str`, got `int`, in \[5\]"),
        ({"temperature": "hot"}, "sampling_params.temperature: Expected `float .*`, got `str`"),
        ({"stop_token_ids": ["a"]}, r"sampling_params.stop_token_ids\[0\]: Expected `int | null`, got `str`"),
        ({"logit_bias": {"5": "a"}}, r"sampling_params.logit_bias\[...\]: Expected `float`, got `str`"),
        ({"is_normalized": True}, "sampling_params: .* unknown field `is_normalized`"),
        ({"stop_strs": ["a"]}, "sampling_params: .* unknown field `stop_strs`; accepted are .*stop"),
        ({"nonsense": 1}, "sampling_params: .* unknown field `nonsense`; accepted are .*max_new_tokens"),
    ],
)
def test_sampling_parameters_of_other_types_are_refused(sampling_params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        check_sampling_types(sampling_params)
