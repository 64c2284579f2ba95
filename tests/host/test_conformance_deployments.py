"""Conformance with stock SGLang of what serves together: replicas, tensor-parallel ranks, requests in one batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from _compare import LOGPROB_TOLERANCE, VOLATILE, differences
from _deployments import FLOAT32, OFF, TENSOR_PARALLEL, Pair, using
from _http import Endpoint, at_once
from _prompts import LONG_PROMPT, ODD_PROMPTS, PROMPTS, greedy, words

pytestmark = pytest.mark.server

NEW_TOKENS = 16
REPLICAS = (0, 1)
# What the other requests have left in the caches of the replica decides how much is a hit.
SPREAD = VOLATILE | {"cached_tokens", "cached_tokens_details"}
FLAG = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}


def with_logprobs(text: str, **options: Any) -> dict[str, Any]:
    return greedy(text, return_logprob=True, logprob_start_len=0, top_logprobs_num=2, **options)


def mixed_calls(endpoint: Endpoint) -> list[Callable[[], Any]]:
    """Twenty calls of several kinds and lengths, of which some share a prefix."""

    def generate(body: dict[str, Any]) -> Any:
        return endpoint.ask("/generate", body)

    def stream(body: dict[str, Any]) -> Any:
        *_, last = endpoint.events("/generate", body)
        return last

    def chat(text: str) -> Any:
        messages = [{"role": "user", "content": text}]
        body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}
        return endpoint.ask("/v1/chat/completions", body)

    # Of input log-probabilities a replica gives those of the part that it computes, so these prompts must be new.
    own = [words(60, seed) for seed in range(12, 16)]
    structured = greedy(PROMPTS[2])
    structured["sampling_params"] |= {"json_schema": json.dumps(FLAG)}
    several = greedy(PROMPTS[1])
    several["sampling_params"] |= {"n": 2}
    return [
        *(partial(generate, greedy(text)) for text in (*PROMPTS, *ODD_PROMPTS[:2])),
        *(partial(generate, with_logprobs(text)) for text in own),
        *(partial(stream, greedy(f"{LONG_PROMPT} {text}")) for text in PROMPTS[1:3]),
        *(partial(chat, text) for text in PROMPTS[3:6]),
        partial(generate, structured),
        partial(generate, several),
    ]


@using(FLOAT32)
def test_concurrent_requests_are_answered_like_single_ones(pair: Pair) -> None:
    pair.flush_caches()
    alone = [call() for call in mixed_calls(pair.stock)]
    for _ in range(2):
        pair.flush_caches()
        together = at_once(mixed_calls(pair.ours))
        assert not differences(alone, together, tolerance=LOGPROB_TOLERANCE, ignore_values_of=SPREAD)


@using(OFF)
def test_kunserve_off_is_stock(pair: Pair) -> None:
    """With two tensor-parallel ranks, which is SGLang's own path of starting a replica without a controller."""
    pair.flush_caches()
    for text in PROMPTS:
        stock, ours = (endpoint.ask("/generate", with_logprobs(text)) for endpoint in pair.both)
        assert not differences(stock, ours, tolerance=LOGPROB_TOLERANCE)
    stock, ours = (endpoint.get("/server_info").json() for endpoint in pair.both)
    assert set(stock) == set(ours)
    assert (stock["tp_size"], ours["tp_size"]) == (1, 2)


@using(TENSOR_PARALLEL)
@pytest.mark.parametrize("replica", REPLICAS)
def test_tensor_parallel_replicas_answer_like_one_rank(pair: Pair, replica: int) -> None:
    pair.flush_caches()
    for text in (*PROMPTS, *ODD_PROMPTS):
        stock = pair.stock.ask("/generate", with_logprobs(text))
        ours = pair.ours.ask("/generate", with_logprobs(text, routed_dp_rank=replica))
        assert not differences(stock, ours, tolerance=LOGPROB_TOLERANCE)
        assert ours["meta_info"]["dp_rank"] == replica


@using(TENSOR_PARALLEL)
def test_tensor_parallel_replicas_serve_concurrent_requests(pair: Pair) -> None:
    pair.flush_caches()
    alone = [call() for call in mixed_calls(pair.stock)]
    together = at_once(mixed_calls(pair.ours))
    assert not differences(alone, together, tolerance=LOGPROB_TOLERANCE, ignore_values_of=SPREAD)
    replicas = {answer["meta_info"]["dp_rank"] for answer in together if "meta_info" in answer}
    assert replicas == set(REPLICAS)
    info = pair.ours.get("/server_info").json()
    assert len(set(info["scheduler_pids"])) == 4
