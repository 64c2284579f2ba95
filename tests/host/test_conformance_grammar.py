"""Conformance with stock SGLang: constrained decoding gives the same tokens, and what the constraint asks for."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import pytest
from _compare import differences
from _deployments import BFLOAT16, FLOAT32, Pair, using
from _http import at_once
from _prompts import PROMPTS

pytestmark = pytest.mark.server

in_both_dtypes = using(FLOAT32, BFLOAT16)

# Bounded, so that a random model comes to an end: it would go on with an open string or number for ever.
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["small", "large"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "kind", "tags", "ok"],
    "additionalProperties": False,
}
DATE = r"(19|20)\d\d-[01]\d-[0-3]\d"
SENTENCE = 'root ::= "the " animal " is " ("small" | "large")\nanimal ::= "boy" | "animal" | "mother"'


def constrained(text: str, **constraint: str) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 160, **constraint}}


def same_text(pair: Pair, body: dict[str, Any]) -> str:
    """Our text, after the answers were found to be the same in every field."""
    pair.flush_caches()
    stock, ours = (endpoint.ask("/generate", body) for endpoint in pair.both)
    assert not differences(stock, ours)
    assert ours["meta_info"]["finish_reason"]["type"] == "stop"
    text: str = ours["text"]
    return text


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == PERSON["required"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 8
    assert person["kind"] in ("small", "large")
    assert 1 <= len(person["tags"]) <= 3
    assert set(person["tags"]) <= {"a", "b"}
    assert type(person["ok"]) is bool


@in_both_dtypes
@pytest.mark.parametrize("prompt", PROMPTS[2:5], ids=len)
def test_json_schema(pair: Pair, prompt: str) -> None:
    check_person(same_text(pair, constrained(prompt, json_schema=json.dumps(PERSON))))


@in_both_dtypes
def test_regular_expression(pair: Pair) -> None:
    assert re.fullmatch(DATE, same_text(pair, constrained(PROMPTS[3], regex=DATE)))


@in_both_dtypes
def test_ebnf(pair: Pair) -> None:
    text = same_text(pair, constrained(PROMPTS[3], ebnf=SENTENCE))
    assert re.fullmatch("the (boy|animal|mother) is (small|large)", text)


@using(FLOAT32)
def test_constrained_and_free_requests_in_one_batch(pair: Pair) -> None:
    """A constraint holds for its request only, also when both are decoded in the same batch."""
    bodies = [constrained(prompt, json_schema=json.dumps(PERSON)) for prompt in PROMPTS[2:5]]
    bodies += [{"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 60}} for text in PROMPTS[2:5]]

    def tokens(body: dict[str, Any]) -> Any:
        return pair.ours.ask("/generate", body)["output_ids"]

    alone = [tokens(body) for body in bodies]
    together = at_once([partial(tokens, body) for body in bodies])
    assert together == alone


@using(FLOAT32)
@pytest.mark.parametrize("constraint", [{"json_schema": "{"}, {"regex": "("}, {"ebnf": "root ::= ("}], ids=str)
def test_invalid_constraint_is_refused(pair: Pair, constraint: dict[str, str]) -> None:
    stock, ours = (endpoint.post("/generate", constrained("A", **constraint)) for endpoint in pair.both)
    assert ours.status_code == stock.status_code
    assert 400 <= ours.status_code < 500
    # The grammar library puts the time of day into its messages.
    messages = [re.sub(r"\d\d:\d\d:\d\d", "", answer.json()["error"]["message"]) for answer in (stock, ours)]
    assert messages[0] == messages[1] != ""
