"""Conformance with stock SGLang: /generate gives the same tokens, log-probabilities and finish reasons."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from _compare import LOGPROB_TOLERANCE, VOLATILE, differences
from _deployments import BFLOAT16, FLOAT32, Pair, using
from _http import SLOWER_STEPS_S
from _prompts import LONG_PROMPT, ODD_PROMPTS, PROMPTS, greedy, words

pytestmark = pytest.mark.server

NEW_TOKENS = 16
SEVERAL = 3  # A busy machine puts some tokens together, in the one server and the other.
# Requests of one call are spread over the replicas. In bfloat16 the size of the batch that a token is computed in
# changes its rounding, and a prefix that one replica has cached is not cached by the other one.
in_float32 = using(FLOAT32)
in_both_dtypes = using(FLOAT32, BFLOAT16)
SPREAD = VOLATILE | {"cached_tokens", "cached_tokens_details"}
ALL_LOGPROBS = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3}


def same_answer(pair: Pair, body: dict[str, Any], **options: Any) -> Any:
    """Our answer, after it was found to be stock's in every field."""
    pair.flush_caches()
    stock, ours = (endpoint.ask("/generate", body) for endpoint in pair.both)
    assert not differences(stock, ours, **options)
    return ours


@in_both_dtypes
@pytest.mark.parametrize("prompt", [*PROMPTS, *ODD_PROMPTS], ids=lambda prompt: f"{len(prompt)}-characters")
def test_greedy_answer(pair: Pair, prompt: str) -> None:
    answer = same_answer(pair, greedy(prompt))
    assert answer["meta_info"]["completion_tokens"] == len(answer["output_ids"]) == NEW_TOKENS
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": NEW_TOKENS}


@in_both_dtypes
@pytest.mark.parametrize("prompt", [PROMPTS[2], LONG_PROMPT], ids=["short", "long"])
def test_log_probabilities_of_input_and_output(pair: Pair, prompt: str) -> None:
    answer = same_answer(pair, {**greedy(prompt), **ALL_LOGPROBS}, tolerance=LOGPROB_TOLERANCE)
    info = answer["meta_info"]
    assert len(info["input_token_logprobs"]) == len(info["input_top_logprobs"]) == info["prompt_tokens"]
    assert [token for _, token, _ in info["output_token_logprobs"]] == answer["output_ids"]
    # Greedy takes a most probable token; in bfloat16 there may be two of them.
    assert [top[0][0] for top in info["output_top_logprobs"]] == [
        value for value, _, _ in info["output_token_logprobs"]
    ]


@in_both_dtypes
def test_log_probabilities_of_chosen_tokens(pair: Pair) -> None:
    body = {**greedy(PROMPTS[3]), "return_logprob": True, "token_ids_logprob": [300, 7, 2047]}
    answer = same_answer(pair, {**body, "return_text_in_logprobs": True}, tolerance=LOGPROB_TOLERANCE)
    chosen = answer["meta_info"]["output_token_ids_logprobs"]
    assert [[token for _, token, _ in position] for position in chosen] == [[300, 7, 2047]] * NEW_TOKENS


@in_both_dtypes
def test_comparison_notices_one_changed_word(pair: Pair) -> None:
    """What a wrong KV entry of one early token would do to the answer does not get past the comparison."""
    body = {**greedy(LONG_PROMPT), **ALL_LOGPROBS}
    first, rest = LONG_PROMPT.split(" ", 1)
    changed = {**body, "text": f"{first} zone {rest.split(' ', 1)[1]}"}
    stock, ours = pair.stock.ask("/generate", body), pair.ours.ask("/generate", changed)
    found = differences(stock, ours, tolerance=LOGPROB_TOLERANCE)
    assert any(line.startswith("$.output_ids[") for line in found)
    assert any(line.startswith("$.meta_info.output_token_logprobs[") for line in found)


@in_both_dtypes
@pytest.mark.parametrize("prompt", [PROMPTS[3], ODD_PROMPTS[0]], ids=["ascii", "unicode"])
def test_stream_is_the_answer_in_increments(pair: Pair, prompt: str) -> None:
    whole = same_answer(pair, greedy(prompt))
    for endpoint in pair.both:
        for step_s in SLOWER_STEPS_S:
            endpoint.flush_cache()
            with endpoint.slowed(step_s):
                events = list(endpoint.events("/generate", greedy(prompt)))
            if len(events) > SEVERAL:
                break
        assert not differences(whole, events[-1])
        texts = [event["text"] for event in events]
        assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
        counts = [event["meta_info"]["completion_tokens"] for event in events]
        assert counts == sorted(set(counts))
        assert len(events) > SEVERAL
        assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)


@in_both_dtypes
def test_stop_strings(pair: Pair) -> None:
    text = same_answer(pair, greedy(PROMPTS[4]))["text"]
    middle = len(text) // 2
    stop = text[middle : middle + 4]
    cut = same_answer(pair, greedy(PROMPTS[4], sampling={"stop": ["no such text", stop]}))
    assert cut["text"] == text[: text.index(stop)]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = same_answer(pair, greedy(PROMPTS[4], sampling={"stop": stop, "no_stop_trim": True}))
    assert kept["text"].startswith(cut["text"] + stop)
    events = list(pair.ours.events("/generate", greedy(PROMPTS[4], sampling={"stop": [stop]})))
    assert events[-1]["text"] == cut["text"]


@in_both_dtypes
def test_stop_token_ids(pair: Pair) -> None:
    tokens = same_answer(pair, greedy(PROMPTS[5]))["output_ids"]
    stop = tokens[NEW_TOKENS // 2]
    cut = same_answer(pair, greedy(PROMPTS[5], sampling={"stop_token_ids": [stop]}))
    assert cut["output_ids"] == tokens[: tokens.index(stop) + 1]
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


@in_both_dtypes
@pytest.mark.parametrize(
    "sampling",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 1},
        {"frequency_penalty": -1.9, "presence_penalty": -1.0},
        {"repetition_penalty": 0.5},
        {"min_new_tokens": 12, "stop_regex": "[aeiou]"},
        {"logit_bias": {"300": 40.0}, "max_new_tokens": 6},
        {"skip_special_tokens": False, "logit_bias": {"2": 40.0}, "max_new_tokens": 6},
        {"ignore_eos": True, "logit_bias": {"3": 40.0}, "max_new_tokens": 6},
        {"logit_bias": {"3": 40.0}},
    ],
    ids=str,
)
def test_sampling_parameters(pair: Pair, sampling: dict[str, Any]) -> None:
    changed = same_answer(pair, greedy(PROMPTS[3], sampling=sampling))
    plain = pair.stock.ask("/generate", greedy(PROMPTS[3]))
    assert changed["output_ids"] != plain["output_ids"]


@in_float32
def test_several_answers_to_one_prompt(pair: Pair) -> None:
    answers = same_answer(pair, greedy(PROMPTS[4], sampling={"n": 3}), ignore_values_of=SPREAD)
    assert len(answers) == 3
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1


@in_float32
def test_batch_of_prompts(pair: Pair) -> None:
    body = {"text": list(PROMPTS), "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
    answers = same_answer(pair, body, ignore_values_of=SPREAD)
    assert len({tuple(answer["output_ids"]) for answer in answers}) == len(PROMPTS)


@in_both_dtypes
def test_token_ids_as_prompt(pair: Pair) -> None:
    text = words(30, seed=11)
    tokens = pair.stock.ask("/tokenize", {"model": "tiny", "prompt": text})["tokens"]
    by_tokens = same_answer(pair, {"input_ids": tokens, "sampling_params": greedy("")["sampling_params"]})
    assert not differences(same_answer(pair, greedy(text)), by_tokens)
