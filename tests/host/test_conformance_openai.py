"""Conformance with stock SGLang: the OpenAI endpoints give the same answers, whole and streamed."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from _compare import LOGPROB_TOLERANCE, differences
from _deployments import BFLOAT16, FLOAT32, Pair, using
from _http import SLOWER_STEPS_S
from _prompts import LONG_PROMPT, ODD_PROMPTS, PROMPTS

pytestmark = pytest.mark.server

in_float32 = using(FLOAT32)
in_both_dtypes = using(FLOAT32, BFLOAT16)

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
NEW_TOKENS = 16
SEVERAL = 3  # A busy machine puts some tokens together, in the one server and the other.
MODEL = "tiny"
CONVERSATION = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "A city on a river."},
    {"role": "user", "content": "Write a short story about it, please."},
]


def completion(prompt: Any, **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **options}


def chat(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": CONVERSATION, "max_tokens": NEW_TOKENS, "temperature": 0, **options}


def same_answer(pair: Pair, path: str, body: dict[str, Any]) -> Any:
    """Our answer, after it was found to be stock's in every field."""
    pair.flush_caches()
    stock, ours = (endpoint.ask(path, body) for endpoint in pair.both)
    assert not differences(stock, ours, tolerance=LOGPROB_TOLERANCE)
    return ours


def same_stream(pair: Pair, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Our events, after they were found to tell the same as stock's.

    How many tokens come in one event depends on how fast the server is, so the texts are compared when joined.
    """
    for step_s in SLOWER_STEPS_S:
        pair.flush_caches()
        with pair.stock.slowed(step_s), pair.ours.slowed(step_s):
            stock, ours = (list(endpoint.events(path, body)) for endpoint in pair.both)
        assert not differences(joined(stock), joined(ours))
        if len(ours) > SEVERAL:
            break
    return ours


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the events of a stream tell, by the index of the answer: its text, why it ended; and the usage."""
    texts: dict[str, str] = {}
    reasons: dict[str, Any] = {}
    for choice in itertools.chain.from_iterable(event["choices"] for event in events):
        index = str(choice["index"])
        piece = choice["delta"].get("content") if "delta" in choice else choice["text"]
        texts[index] = texts.get(index, "") + (piece or "")
        if choice["finish_reason"] is not None:
            assert index not in reasons, "a finish reason came twice"
            reasons[index] = choice["finish_reason"]
    usages = [event["usage"] for event in events if event.get("usage")]
    return {"texts": texts, "finish_reasons": reasons, "usage": stated(usages[-1]) if usages else None}


def stated(usage: dict[str, Any]) -> dict[str, Any]:
    """The usage without the fields that say nothing: streams leave them out."""
    return {name: value for name, value in usage.items() if value is not None}


@in_both_dtypes
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[3], LONG_PROMPT, *ODD_PROMPTS], ids=len)
def test_completion(pair: Pair, prompt: str) -> None:
    answer = same_answer(pair, COMPLETIONS, completion(prompt))
    assert answer["usage"]["completion_tokens"] == NEW_TOKENS
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"]


@in_both_dtypes
def test_completion_log_probabilities(pair: Pair) -> None:
    answer = same_answer(pair, COMPLETIONS, completion(PROMPTS[4], logprobs=3, echo=True))
    values = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert len(values) == answer["usage"]["total_tokens"]
    assert all(value < 0 for value in values[1:])
    assert answer["choices"][0]["text"].startswith(PROMPTS[4])


@in_both_dtypes
def test_completion_stream(pair: Pair) -> None:
    whole = same_answer(pair, COMPLETIONS, completion(PROMPTS[4]))
    events = same_stream(pair, COMPLETIONS, completion(PROMPTS[4], stream_options={"include_usage": True}))
    assert joined(events) == {
        "texts": {"0": whole["choices"][0]["text"]},
        "finish_reasons": {"0": "length"},
        "usage": stated(whole["usage"]),
    }
    assert len(events) > SEVERAL


@in_float32
def test_completions_of_several_prompts(pair: Pair) -> None:
    answer = same_answer(pair, COMPLETIONS, completion(list(PROMPTS)))
    assert len({choice["text"] for choice in answer["choices"]}) == len(PROMPTS)
    streamed = joined(same_stream(pair, COMPLETIONS, completion(list(PROMPTS))))
    assert streamed["texts"] == {str(choice["index"]): choice["text"] for choice in answer["choices"]}


@in_float32
def test_several_completions_of_one_prompt(pair: Pair) -> None:
    answer = same_answer(pair, COMPLETIONS, completion(PROMPTS[3], n=3))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in answer["choices"]}) == 1


@in_both_dtypes
def test_completion_stop(pair: Pair) -> None:
    text = same_answer(pair, COMPLETIONS, completion(PROMPTS[5]))["choices"][0]["text"]
    middle = len(text) // 2
    stop = text[middle : middle + 4]
    cut = same_answer(pair, COMPLETIONS, completion(PROMPTS[5], stop=[stop]))["choices"][0]
    assert cut["text"] == text[: text.index(stop)]
    assert (cut["finish_reason"], cut["matched_stop"]) == ("stop", stop)


@in_both_dtypes
def test_chat(pair: Pair) -> None:
    answer = same_answer(pair, CHAT, chat())
    assert answer["usage"]["completion_tokens"] == NEW_TOKENS
    assert answer["choices"][0]["message"]["role"] == "assistant"
    other = same_answer(pair, CHAT, chat(messages=CONVERSATION[1:]))
    assert other["choices"][0]["message"]["content"] != answer["choices"][0]["message"]["content"]


@in_both_dtypes
def test_chat_log_probabilities(pair: Pair) -> None:
    answer = same_answer(pair, CHAT, chat(logprobs=True, top_logprobs=3))
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == NEW_TOKENS
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] < 0 for token in content)


@in_both_dtypes
def test_chat_stream(pair: Pair) -> None:
    whole = same_answer(pair, CHAT, chat())
    events = same_stream(pair, CHAT, chat(stream_options={"include_usage": True}))
    assert joined(events) == {
        "texts": {"0": whole["choices"][0]["message"]["content"]},
        "finish_reasons": {"0": "length"},
        "usage": stated(whole["usage"]),
    }
    assert len(events) > SEVERAL


@in_float32
def test_several_chat_answers(pair: Pair) -> None:
    answer = same_answer(pair, CHAT, chat(n=3, stop=["e"]))
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(texts) == 3
    assert len(set(texts)) == 1
    streamed = joined(same_stream(pair, CHAT, chat(n=3, stop=["e"])))
    assert list(streamed["texts"].values()) == texts
    assert list(streamed["finish_reasons"].values()) == ["stop"] * 3


@in_both_dtypes
def test_chat_json_schema(pair: Pair) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = same_answer(pair, CHAT, chat(response_format=wanted, max_tokens=200))
    value = json.loads(answer["choices"][0]["message"]["content"])
    assert set(value) == {"city", "large"}
    assert value["city"] in ("Paris", "Rome")
    assert type(value["large"]) is bool
    streamed = joined(same_stream(pair, CHAT, chat(response_format=wanted, max_tokens=200)))
    assert json.loads(streamed["texts"]["0"]) == value


@in_float32
def test_models(pair: Pair) -> None:
    stock, ours = (endpoint.get("/v1/models").json() for endpoint in pair.both)
    assert not differences(stock, ours)
