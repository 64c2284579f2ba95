"""What requests may say: bad values are a 400 that names them, in the form of the route, and no replica notices."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
from _compare import LOGPROB_TOLERANCE, VOLATILE, differences
from _deployments import FLOAT32, TENSOR_PARALLEL, Pair, using
from _http import Endpoint, Json, at_once
from _prompts import PROMPTS, greedy

pytestmark = pytest.mark.server

REPLICAS = (0, 1)
BAD_REQUEST = 400
IDS = [5, 6, 7, 8, 9]
SPREAD = VOLATILE | {"cached_tokens", "cached_tokens_details"}
NEW_TOKENS = 12
TO_THE_END = {"ignore_eos": True}
LONG_ANSWER = 120
SLOW_STEP_S = 0.1  # with it a long answer takes far longer than others beside it


def native(sampling: Json | None = None, **fields: Any) -> Json:
    return {"input_ids": IDS, "sampling_params": {"max_new_tokens": 4, **(sampling or {})}, **fields}


def completion(**fields: Any) -> Json:
    return {"model": "tiny", "prompt": IDS, "max_tokens": 4, **fields}


def chat(**fields: Any) -> Json:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **fields}


def score(**fields: Any) -> Json:
    return {"model": "tiny", "query": [5, 6], "items": [[7], [8, 9]], "label_token_ids": [5, 77], **fields}


def of_session(**fields: Any) -> Json:
    return native(session_params=fields)


# What is said, and what the answer has to name. The first of each route would have ended a replica, or all of them.
REFUSED: dict[str, list[tuple[Json, str]]] = {
    "/generate": [
        (native(input_ids=[-1]), "input_ids (prompt): token id -1 at position 0"),
        (native(input_ids=[5, 1000000]), "accepted are 0 to 2047"),
        (native(input_ids=[[5, 6], [2048]]), "input_ids (prompt): token id 2048"),
        (native(input_ids=[IDS, []]), "input_ids (prompt): a prompt is empty"),
        (native(input_ids=[]), "input_ids cannot be empty"),
        ({"text": []}, "text cannot be empty"),
        (native({"stop_token_ids": [9999999], "min_new_tokens": 2}), "stop_token_ids: 9999999"),
        (native({"stop_token_ids": [-1], "min_new_tokens": 2}), "accepted are 0 to 2047"),
        (native({"logit_bias": {"-1": 1}}), "logit_bias"),
        (native({"logit_bias": {"5": 1e308}, "temperature": 1}), "logit_bias: 1e+308"),
        (native({"repetition_penalty": 1e-300, "temperature": 1}), "repetition_penalty"),
        (native({"temperature": 1e300}), "temperature"),
        (native({"top_k": 2**31, "temperature": 1}), "top_k: 2147483648"),
        (native({"min_new_tokens": 10**12, "max_new_tokens": None}), "min_new_tokens"),
        (native({"max_new_tokens": 1.5}), "sampling_params.max_new_tokens: Expected `int | null`, got `float`"),
        (native({"ignore_eos": "yes"}), "sampling_params.ignore_eos: Expected `bool | null`, got `str`"),
        (native({"json_schema": {"type": "object"}}), "sampling_params.json_schema: Expected `str | null`"),
        (native({"custom_params": {"a": {"b": {"c": 1}}}}), "sampling_params.custom_params"),
        (native({"stop": 5}), "sampling_params.stop"),
        (native({"stop": [5]}), "sampling_params.stop"),
        (native({"stop_regex": "(?<=a+)b"}), "stop_regex"),
        (native({"stream_interval": 0}), "stream_interval: 0"),
        (native({"is_normalized": True}), "is_normalized"),
        (native({"n": 0}), "n: 0 is out of range; accepted are 1 to 16384"),
        (native({"n": -1}), "n: -1"),
        (native({"n": 10**9}), "n: 1000000000"),
        (native({"n": 9000}, input_ids=[IDS, IDS]), "n: 9000 is out of range; accepted are 1 to 8192 for 2 prompts"),
        (native(return_logprob=True, token_ids_logprob=[2048]), "token_ids_logprob"),
        (native(return_logprob=True, token_ids_logprob=[-1]), "token_ids_logprob"),
        (native(return_logprob=True, top_logprobs_num=-1), "top_logprobs_num"),
        (native(return_logprob=True, top_logprobs_num=2049), "accepted are 0 to 2048"),
        (native(return_logprob=True, logprob_start_len=-2), "logprob_start_len: -2"),
        (native(input_ids=[IDS, IDS], return_logprob=[True]), "return_logprob: a list of 1"),
        (native(input_ids=[IDS, IDS], lora_path=["a"]), "lora_path: a list of 1"),
        (native(positional_embed_overrides={"a": 1}), "positional_embed_overrides"),
        (native(custom_labels={"team": "x"}), "custom_labels: 'team'"),
        (of_session(id=5), "session_params.id: Expected `str | null`, got `int`"),
        (of_session(nonsense=5), "nonsense"),
        (native(custom_logit_processor='{"callable": "00"}'), "custom_logit_processor"),
        (native(custom_logit_processor="[]"), "custom_logit_processor"),
    ],
    "/v1/completions": [
        (completion(prompt=[-1]), "input_ids (prompt): token id -1"),
        (completion(prompt=[[5], [99999]]), "input_ids (prompt): token id 99999"),
        (completion(prompt=[[5], []]), "input_ids (prompt): a prompt is empty"),
        (completion(prompt=[[]]), "Prompt cannot be empty"),
        (completion(stop_token_ids=[9999999], min_tokens=2), "stop_token_ids: 9999999"),
        (completion(logit_bias={"-1": 1}), "logit_bias"),
        (completion(logprobs=10**9), "top_logprobs_num (logprobs, top_logprobs)"),
        (completion(logprobs=-1), "logprobs"),
        (completion(n=0), "n: 0"),
        (completion(n=10**9), "n: 1000000000"),
        (completion(top_k=2**31, temperature=1), "top_k"),
        (completion(custom_params={"a": {"b": {"c": 1}}}), "custom_params"),
        (completion(custom_logit_processor='{"callable": "00"}'), "custom_logit_processor"),
    ],
    "/v1/chat/completions": [
        (chat(stop_token_ids=[-1], min_tokens=2), "stop_token_ids: -1"),
        (chat(logit_bias={"99999": 1}), "logit_bias"),
        (chat(logprobs=True, top_logprobs=10**9), "top_logprobs"),
        (chat(logprobs=True, top_logprobs=-1), "top_logprobs"),
        (chat(n=0), "n: 0 is out of range; accepted are 1 to 16384"),
        (chat(n=-1), "n: -1"),
        (chat(n=10**9), "n: 1000000000"),
        (chat(repetition_penalty=1e-300, temperature=1), "repetition_penalty"),
        (chat(stop_regex="("), "stop_regex"),
        (chat(custom_params={"a": {"b": {"c": 1}}}), "custom_params"),
        (chat(custom_logit_processor='{"callable": "00"}'), "custom_logit_processor"),
    ],
    "/v1/score": [
        (score(label_token_ids=[-1]), "label_token_ids: -1"),
        (score(label_token_ids=[2048]), "label_token_ids: 2048"),
        (score(label_token_ids=[]), "label_token_ids: the list is empty"),
        (score(query=[-1]), "input_ids (prompt): token id -1"),
        (score(items=[[5], [99999]]), "input_ids (prompt): token id 99999"),
        (score(query=[], items=[[5], []]), "input_ids (prompt): a prompt is empty"),
        (score(query_embed_overrides=[[1.0]], embed_override_token_id=5), "hidden size"),
    ],
    "/v1/responses": [({"model": "tiny", "input": "hi", "top_k": 2**31, "temperature": 1.0}, "top_k")],
    "/v1/messages": [({**chat(), "top_k": 2**31, "temperature": 1.0}, "top_k")],
    "/vertex_generate": [({"instances": [{"input_ids": [5]}, {"input_ids": []}]}, "prompt is empty")],
    "/api/generate": [
        ({"model": "tiny", "prompt": "a", "stream": False, "options": {"num_predict": 1.5}}, "max_new_tokens"),
        ({"model": "tiny", "prompt": "a", "stream": False, "options": {"top_k": 2**31}}, "top_k"),
    ],
}
STREAMED = ("/generate", "/v1/completions", "/v1/chat/completions")


def check_replicas(pair: Pair) -> None:
    """Every replica answers, and what it answers is right."""
    body = {"text": PROMPTS[2], "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS}}
    expected = pair.stock.ask("/generate", body)["output_ids"]
    for replica in REPLICAS:
        assert pair.ours.ask("/generate", {**body, "routed_dp_rank": replica})["output_ids"] == expected


@using(FLOAT32)
@pytest.mark.parametrize("route", REFUSED)
def test_bad_values_are_refused_by_name(pair: Pair, route: str) -> None:
    for body, named in REFUSED[route]:
        for replica in REPLICAS if route == "/generate" else (None,):
            where = {} if replica is None else {"routed_dp_rank": replica}
            answer = pair.ours.post(route, {**body, **where})
            assert answer.status_code == BAD_REQUEST, (body, answer.status_code, answer.text[:500])
            assert named in message_of(answer.json()), (body, answer.text[:500])
    check_replicas(pair)


@using(FLOAT32)
@pytest.mark.parametrize("route", STREAMED)
def test_bad_values_are_refused_by_name_in_streams(pair: Pair, route: str) -> None:
    """OpenAI's streams begin with the first token, so it is a 400; the native one says it in an event."""
    for body, named in REFUSED[route]:
        answer = pair.ours.post(route, {**body, "stream": True})
        if answer.status_code == BAD_REQUEST:
            said = message_of(answer.json())
        else:
            first, *_ = answer.text.split("\n\n")
            said = message_of(json.loads(first.removeprefix("data: ")))
            assert answer.text.endswith("data: [DONE]\n\n")
        assert named in said, (body, answer.text[:500])
    check_replicas(pair)


def message_of(answer: Json) -> str:
    """The error in the form of any route."""
    if "meta_info" in answer:  # of a scheduler, in a native stream
        reason = answer["meta_info"]["finish_reason"]
        assert reason["status_code"] == BAD_REQUEST
        return str(reason["message"])
    error = answer.get("error", answer)
    return str(error["message"])


@using(FLOAT32)
def test_sessions_may_be_replaced_and_may_not_end_up_empty(pair: Pair) -> None:
    session = pair.ours.ask("/open_session", {"capacity_of_str_len": 1000})

    def turn(ids: list[int], **fields: Any) -> Any:
        body = native({"temperature": 0}, input_ids=ids, routed_dp_rank=0)
        return pair.ours.post("/generate", {**body, "session_params": {"id": session, **fields}})

    first = turn([300, 301, 302])
    alone = pair.stock.ask("/generate", native({"temperature": 0}, input_ids=[300, 301, 302]))
    assert first.json()["output_ids"] == alone["output_ids"]
    # All of the session: the loop that clears it ended the scheduler.
    replaced = turn([300, 301, 302], replace=True)
    assert replaced.json()["output_ids"] == alone["output_ids"]
    # What is appended loses its start token; with nothing kept before it, no token is left to compute.
    start = json.loads((pair.model / "config.json").read_text())["bos_token_id"]
    emptied = turn([start], rid=replaced.json()["meta_info"]["id"], offset=-1000)
    assert emptied.status_code == BAD_REQUEST
    assert "prompt is empty" in message_of(emptied.json())
    assert pair.ours.post("/close_session", {"session_id": session}).ok
    check_replicas(pair)


# Requests whose log-probabilities of chosen tokens are asked for, beside others that ask for none.


@contextmanager
def running(endpoint: Endpoint, body: Json) -> Iterator[Callable[[], list[Json]]]:
    """A stream that has begun; calling what is yielded gives all that comes after."""
    events = endpoint.events("/generate", body)
    next(events)
    try:
        yield lambda: list(events)
    finally:
        events.close()


def mixed_calls(endpoint: Endpoint) -> list[Callable[[], Any]]:
    chosen = {"return_logprob": True, "token_ids_logprob": [5, 77, 1900]}
    bodies = [
        greedy(PROMPTS[0], NEW_TOKENS, sampling=TO_THE_END, **chosen),
        greedy(PROMPTS[1], NEW_TOKENS, sampling=TO_THE_END, **chosen, logprob_start_len=0),
        greedy(PROMPTS[2], NEW_TOKENS, sampling=TO_THE_END, return_logprob=True),
        greedy(
            PROMPTS[3], NEW_TOKENS, sampling=TO_THE_END, return_logprob=True, top_logprobs_num=2, logprob_start_len=0
        ),
        greedy(PROMPTS[5], NEW_TOKENS, sampling=TO_THE_END),
    ]
    scores = [score(), score(query="a", items=["b", "c"], label_token_ids=[300])]
    return [
        *(partial(endpoint.ask, "/generate", body) for body in bodies),
        *(partial(endpoint.ask, "/v1/score", body) for body in scores),
    ]


PLAIN = greedy("first", LONG_ANSWER, sampling=TO_THE_END)
# Each event has all log-probabilities so far: with one event per token, nearly all time would go into writing them.
WITH_LOGPROBS = greedy("second", LONG_ANSWER, sampling={**TO_THE_END, "stream_interval": 30}, return_logprob=True)


def check_mixed(pair: Pair, *besides: Json) -> None:
    """All calls at once, beside each of `besides`, answers that run all the time."""
    pair.flush_caches()
    alone = [call() for call in mixed_calls(pair.stock)]
    for beside in besides:
        *_, expected = pair.stock.events("/generate", beside)
        pair.flush_caches()
        with ExitStack() as streams:
            with pair.ours.slowed(SLOW_STEP_S):
                # One at each replica, so that whoever gets a call has another one in its batch.
                bodies = [{**beside, "routed_dp_rank": replica} for replica in REPLICAS]
                rests = [streams.enter_context(running(pair.ours, body)) for body in bodies]
                together = at_once(mixed_calls(pair.ours))
            for rest in rests:
                events = rest()
                assert events, "it had ended before the others were answered: nothing was mixed"
                assert not differences(expected, events[-1], tolerance=LOGPROB_TOLERANCE, ignore_values_of=SPREAD)
        assert not differences(alone, together, tolerance=LOGPROB_TOLERANCE, ignore_values_of=SPREAD)


@using(FLOAT32)
def test_chosen_log_probabilities_among_others(pair: Pair) -> None:
    check_mixed(pair, PLAIN, WITH_LOGPROBS)
    check_replicas(pair)


@using(FLOAT32)
def test_chosen_log_probabilities_in_one_prefill(pair: Pair) -> None:
    """Prompts of one call come to a scheduler together."""
    body = {
        "input_ids": [[300, 301, 302], [400, 401], [500, 501, 502, 503], [600]],
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS},
        "return_logprob": [True, False, True, True],
        "token_ids_logprob": [[5, 77, 1900], [5], [7, 7], [9]],
        "logprob_start_len": [0, -1, 0, -1],
        "top_logprobs_num": [0, 0, 3, 1],
    }
    per_prompt = {"input_ids", "return_logprob", "token_ids_logprob", "logprob_start_len", "top_logprobs_num"}
    pair.flush_caches()
    alone = []
    for index in range(4):
        one = {name: value[index] if name in per_prompt else value for name, value in body.items()}
        alone.append(pair.stock.ask("/generate", one))
    for replica in REPLICAS:
        pair.flush_caches()
        together = pair.ours.ask("/generate", {**body, "routed_dp_rank": replica})
        assert not differences(alone, together, tolerance=LOGPROB_TOLERANCE, ignore_values_of=SPREAD)


@using(FLOAT32, TENSOR_PARALLEL)
def test_bad_values_and_mixed_batches_while_merged(pair: Pair) -> None:
    """All ranks of a replica have to refuse the same, in launcher and scheduler."""
    dropped = pair.ours.post("/kunserve/drop", {"groups": [[0, 1]]})
    assert dropped.ok, dropped.text
    try:
        for route, refused in REFUSED.items():
            for body, _ in refused:
                assert pair.ours.post(route, body).status_code == BAD_REQUEST, body
        check_mixed(pair, WITH_LOGPROBS)
        check_replicas(pair)
    finally:
        restored = pair.ours.post("/kunserve/restore", {"groups": [[0, 1]]})
    assert restored.ok, restored.text
    check_replicas(pair)
