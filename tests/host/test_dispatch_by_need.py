"""Dispatch on a real server: unpinned requests go where there is less to compute, and answers do not depend on it."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from _deployments import LATENT, LLAMA, using
from _http import Endpoint, Json
from _questions import Question, ask_all, make_prompt
from _servers import RunningServer

from waiting import wait_until

pytestmark = pytest.mark.server

REPLICAS = 2
LONG_REQUESTS = 4
LONG_ANSWER = 200
SHORT_REQUESTS = 8
BUSY_TOKENS = 960
SLOW_STEP_S = 0.05
# With it short answers have come long before there is less left of the long ones.
SLOWER_STEP_S = 0.25
LEAST_WORK = LONG_REQUESTS * LONG_ANSWER // 2  # more than all the short ones together


def work_of(endpoint: Endpoint) -> dict[str, Json]:
    work: dict[str, Json] = endpoint.ask_for("/kunserve/status")["dispatch"]["replicas"]
    return work


def has_nothing_left(endpoint: Endpoint) -> bool:
    """All requests have ended, and none is thought to be on its way for ever."""
    idle = {"work_tokens": 0, "requests_on_the_way": 0}
    return work_of(endpoint) == {str(replica): idle for replica in range(REPLICAS)}


def answer_to(endpoint: Endpoint, question: Question) -> tuple[int, list[int]]:
    """Who answered, and the tokens."""
    answer: Json = endpoint.ask("/generate", question.body())
    return answer["meta_info"]["dp_rank"], answer["output_ids"]


def make_questions() -> tuple[list[Question], list[Question]]:
    """Long answers, all from replica 0, and short ones from anybody."""
    chance = random.Random(3)
    long = [Question(make_prompt(chance, 20), LONG_ANSWER, replica=0) for _ in range(LONG_REQUESTS)]
    return long, [Question(make_prompt(chance, 5 * n), 5 + n) for n in range(1, SHORT_REQUESTS + 1)]


def answers_beside_long_ones(endpoint: Endpoint, is_busy: Callable[[], bool]) -> tuple[list[int], list[list[int]]]:
    """Who answered the short questions while replica 0 was busy, and the tokens of all answers, long ones first."""
    long, short = make_questions()
    with ThreadPoolExecutor(LONG_REQUESTS + SHORT_REQUESTS) as clients:
        with endpoint.slowed(SLOWER_STEP_S):
            long_ones = [clients.submit(answer_to, endpoint, question) for question in long]
            wait_until(is_busy, "replica 0 is busy")
            short_ones = [future.result() for future in [clients.submit(answer_to, endpoint, q) for q in short]]
        answers = [future.result() for future in long_ones] + short_ones
    assert [who for who, _ in answers[:LONG_REQUESTS]] == [0] * LONG_REQUESTS
    return [who for who, _ in short_ones], [tokens for _, tokens in answers]


@using(LLAMA)
def test_it_is_the_default_and_says_so(server: RunningServer) -> None:
    endpoint, lines = server.endpoint, server.log().splitlines()
    assert len([line for line in lines if "requests are dispatched by free memory and compute" in line]) == 1
    assert endpoint.get("/server_info").json()["kunserve_dispatch"] == "memory_and_compute"
    assert server.status()["dispatch"]["by"] == "memory_and_compute"


@using(LLAMA)
def test_idle_replicas_are_served_evenly(server: RunningServer) -> None:
    endpoint = server.endpoint
    chance = random.Random(1)
    who: Counter[int] = Counter()
    for _ in range(10):
        wait_until(lambda: has_nothing_left(endpoint), "idle")
        who[answer_to(endpoint, Question(make_prompt(chance, 10), 4))[0]] += 1
    assert who == {0: 5, 1: 5}


@using(LLAMA)
def test_short_ones_go_where_the_long_ones_are_not(server: RunningServer) -> None:
    endpoint = server.endpoint
    long, short = make_questions()
    expected = ask_all(endpoint, [*long, *short])
    endpoint.flush_cache()
    wait_until(lambda: has_nothing_left(endpoint), "idle")

    who, tokens = answers_beside_long_ones(endpoint, lambda: work_of(endpoint)["0"]["work_tokens"] > LEAST_WORK)
    assert who == [1] * SHORT_REQUESTS
    assert tokens == expected
    wait_until(lambda: has_nothing_left(endpoint), "idle again")
    assert "Traceback" not in server.log()


@using(LLAMA)
def test_requests_of_all_kinds_are_counted_once(server: RunningServer) -> None:
    """Were one missed by a replica, it would be on its way for ever."""
    endpoint = server.endpoint
    chance = random.Random(2)
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    prompt = make_prompt(chance, 30)
    with contextlib.ExitStack() as streams:
        streams.enter_context(endpoint.slowed(SLOW_STEP_S))  # both replicas are busy as long as this takes
        for replica in range(REPLICAS):
            events = endpoint.events("/generate", Question(prompt, BUSY_TOKENS, replica).body())
            next(streams.enter_context(contextlib.closing(events)))
        for _ in range(REPLICAS):  # whoever gets it drops it, being busy
            assert endpoint.get("/health_generate").status_code == requests.codes.ok
        for replica in range(REPLICAS):
            body = {"input_ids": prompt, "routed_dp_rank": replica}
            endpoint.ask("/generate", {**body, "sampling_params": {"max_new_tokens": 20, "json_schema": schema}})
            bad = endpoint.post("/generate", {**body, "sampling_params": {"json_schema": "no schema"}})
            assert bad.status_code == requests.codes.bad_request
        sampling = {"max_new_tokens": 5, "n": 3}
        endpoint.ask("/generate", {"input_ids": [prompt, prompt], "sampling_params": sampling})
        assert all(each["work_tokens"] for each in work_of(endpoint).values()), "none was idle in between"
    # leaving has aborted the streams
    wait_until(lambda: has_nothing_left(endpoint), "idle again")


@using(LATENT)
def test_methods_of_sglang_stay_what_they_are(server: RunningServer) -> None:
    endpoint = server.endpoint
    assert "requests are dispatched by SGLang's method round_robin" in server.log()
    info = endpoint.ask_for("/server_info")
    assert (info["load_balance_method"], info["kunserve_dispatch"]) == ("round_robin", "load_balance_method")
    assert server.status()["dispatch"] == {"by": "round_robin"}
    who, _ = answers_beside_long_ones(endpoint, lambda: endpoint.requests_inside() == LONG_REQUESTS)
    assert Counter(who) == {0: SHORT_REQUESTS // 2, 1: SHORT_REQUESTS // 2}
