"""What requests say is checked before a replica sees it: what passes, what is refused, and with which words."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sgl.integration.bad_request import BadRequestError
from kunserve_sgl.integration.launcher import request_checks as checks

VOCABULARY = 2048
CONTEXT = 4096
NAN = float("nan")


def sampling(**changes: Any) -> SimpleNamespace:
    values = {
        **{"stop_token_ids": None, "top_k": 1, "min_new_tokens": 0, "temperature": 1.0, "repetition_penalty": 1.0},
        **{"sampling_seed": None, "stream_interval": None, "logit_bias": None},
        **changes,
    }
    return SimpleNamespace(**values)


def logprobs(**changes: Any) -> Callable[[], None]:
    values = {"top_logprobs_num": 0, "logprob_start_len": -1, "token_ids_logprob": None, **changes}
    return lambda: checks.check_logprob_options(**values, vocab_size=VOCABULARY)


def with_sampling(**changes: Any) -> Callable[[], None]:
    return lambda: checks.check_sampling(sampling(**changes), vocab_size=VOCABULARY, context_tokens=CONTEXT)


def prompt(*tokens: int) -> Callable[[], None]:
    return lambda: checks.check_prompt(array("q", tokens), VOCABULARY)


def answers(count: Any, prompts: int = 1) -> Callable[[], bool]:
    return lambda: checks.check_answer_count({"n": count}, prompts)


@pytest.mark.parametrize(
    "check",
    [
        *(prompt(0), prompt(VOCABULARY - 1), prompt(*range(VOCABULARY)), lambda: checks.check_prompt(None, VOCABULARY)),
        *(logprobs(), logprobs(top_logprobs_num=VOCABULARY, logprob_start_len=7, token_ids_logprob=[0, 2047])),
        *(with_sampling(), with_sampling(stop_token_ids={0, 2047}, top_k=1 << 30, min_new_tokens=CONTEXT)),
        *(with_sampling(logit_bias={"5": -1e30, "6": 1e30}), with_sampling(sampling_seed=-(2**63))),
        with_sampling(repetition_penalty=2.0, temperature=0.0),
        *(
            lambda patterns=patterns: checks.check_patterns("stop_regex", patterns)
            for patterns in (None, "a+", ["", "b"])
        ),
        *(answers(1), answers(checks.MAX_ANSWERS), answers(2, 8192), answers(1, 10**6)),
        lambda: checks.check_embeddings([[0.0, 1.0], [2.0, 3.0]], 2),
        lambda: checks.check_positions("field", [0, 4], 5),
        lambda: checks.check_labels(["team"], ["team", "user"]),
    ],
)
def test_what_makes_sense_passes(check: Callable[[], object]) -> None:
    check()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (prompt(), r"input_ids \(prompt\): a prompt is empty"),
        (prompt(5, -1), r"input_ids \(prompt\): token id -1 at position 1 is out of range; accepted are 0 to 2047"),
        (prompt(5, 6, 2048), r"token id 2048 at position 2 is out of range"),
        (prompt(2**63 - 1), "token id 9223372036854775807 at position 0"),
        (logprobs(top_logprobs_num=-1), r"top_logprobs_num \(logprobs, top_logprobs\): -1 .* 0 to 2048"),
        (logprobs(top_logprobs_num=2049), "top_logprobs_num .* 2049"),
        (logprobs(logprob_start_len=-2), "logprob_start_len: -2 is out of range; accepted are -1"),
        (logprobs(token_ids_logprob=[5, 2048]), "token_ids_logprob: 2048 is no token id; accepted are 0 to 2047"),
        (logprobs(token_ids_logprob=["a"]), "token_ids_logprob: 'a' is no token id"),
        (with_sampling(stop_token_ids={9999999}), "stop_token_ids: 9999999 is no token id; accepted are 0 to 2047"),
        (with_sampling(stop_token_ids={-1}), "stop_token_ids: -1"),
        (with_sampling(top_k=1 << 31), "top_k: 2147483648 is out of range; accepted are 1 to 1073741824"),
        (with_sampling(min_new_tokens=10**12), "min_new_tokens: .* accepted are 0 to 4096"),
        (with_sampling(temperature=1e300), "temperature: 1e"),
        (with_sampling(repetition_penalty=1e-40), "repetition_penalty: 1e-40 is out of range; accepted are 1e-06 to 2"),
        (with_sampling(sampling_seed=2**63), r"sampling_seed \(seed\): 9223372036854775808 is no integer of 64 bits"),
        (with_sampling(stream_interval=0), "stream_interval: 0"),
        (with_sampling(logit_bias={"5": NAN}), "logit_bias: nan for token '5' is out of range"),
        (with_sampling(logit_bias={"5": 1e308}), r"logit_bias: 1e\+308"),
        (with_sampling(logit_bias={"5": -float("inf")}), "logit_bias: -inf"),
        (lambda: checks.check_patterns("stop_regex", "(?<=a+)b"), "stop_regex: .* is no regular .*: look-behind"),
        (lambda: checks.check_patterns("stop_regex", ["a", "("]), r"stop_regex: '\(' is no regular expression"),
        (answers(0), "n: 0 is out of range; accepted are 1 to 16384 for 1 prompt$"),
        (answers(-1), "n: -1"),
        (answers("2"), "n: '2'"),
        (answers(True), "n: True"),
        (answers(1.5), "n: 1.5"),
        (answers(10**9), "n: 1000000000 is out of range"),
        (answers(3, 8192), "n: 3 is out of range; accepted are 1 to 2 for 8192 prompts"),
        (lambda: checks.check_embeddings([], 2), "input_embeds: a prompt is empty"),
        (lambda: checks.check_embeddings([[0.0, 1.0], [2.0]], 2), "position 1 has 1 numbers; accepted are 2"),
        (lambda: checks.check_positions("field", [5], 5), "field: position 5; accepted are 0 to 4"),
        (lambda: checks.check_labels(["x"], ["team"]), "custom_labels: 'x' is no label of the metrics; .* team"),
        (lambda: checks.check_labels(["x"], ()), "custom_labels: .* accepted are none"),
        (lambda: checks.check_token_ids("f", ["9" * 10**6], VOCABULARY), r"^.{0,400}$"),
    ],
)
def test_what_would_end_a_replica_is_refused_by_name_and_range(check: Callable[[], object], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        check()


def test_no_n_is_one_and_more_than_one_is_said() -> None:
    given: dict[str, Any] = {"n": None}
    assert not checks.check_answer_count(given, 1)
    assert given == {"n": 1}
    assert not checks.check_answer_count(None, 1)
    assert checks.check_answer_count([{"n": 1}, {"n": 2}], 2)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        (("text", None, None), None),
        ((["a", "b"], None, None), 2),
        ((None, [5, 6], None), None),
        ((None, [[5], [6], []], None), 3),
        ((None, None, [[0.5, 1.5]]), None),
        ((None, None, [[[0.5], [1.5]]]), 1),
        ((None, None, None), None),
    ],
)
def test_prompts_are_counted(given: tuple[Any, Any, Any], prompts: int | None) -> None:
    assert checks.count_prompts(*given) == prompts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], None, None), "text .* empty"),
        ((5, None, None), "text: 5 is no list"),
        ((None, [], None), "input_ids .* empty"),
        ((None, "abc", None), "input_ids: 'abc' is no list"),
        ((None, ["a"], None), "input_ids: 'a' is neither a number nor a list of numbers"),
        ((None, None, []), "input_embeds .* empty"),
        ((None, None, [[]]), "input_embeds .* empty"),
        ((None, None, [5]), "input_embeds: 5 is no list"),
    ],
)
def test_calls_without_prompts_are_refused(given: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        checks.count_prompts(*given)


def test_lists_have_a_value_per_prompt() -> None:
    checks.check_lists({"top_logprobs_num": [1, 2], "return_logprob": True, "rid": None}, 2)
    with pytest.raises(BadRequestError, match="top_logprobs_num: a list of 1; accepted is one value, or 2 in a list"):
        checks.check_lists({"top_logprobs_num": [1]}, 2)
    with pytest.raises(BadRequestError, match="return_logprob: a list, but there is one prompt"):
        checks.check_lists({"return_logprob": [True]}, None)
