"""Automatic mode where one replica is short of memory and the other idle: memory is lent and comes back, by itself."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

import pytest
from _deployments import AUTO, AUTO_BASE_TOKENS, using
from _questions import Question, ask, make_prompt
from _servers import RunningServer

from waiting import wait_until

pytestmark = [pytest.mark.server, using(AUTO)]

BUSY, IDLE = 0, 1
# Of 155 tokens each on the average, at one replica. As they come at once, twice as much is expected: more than it has
# room for, and less than both have. Where they come so slowly that no more is expected, so many need more than it has.
REQUESTS, MOST_REQUESTS = 5, 9
DEADLINE_S = 120.0
LONG = Question(make_prompt(random.Random(5), 3 * AUTO_BASE_TOKENS // 4), 60)


def make_questions() -> list[Question]:
    chance = random.Random(3)
    return [
        Question(make_prompt(chance, chance.randrange(60, 80)), chance.randrange(80, 90)) for _ in range(MOST_REQUESTS)
    ]


def decisions(server: RunningServer, since: int) -> list[str]:
    """What the log says since then that was decided, in order."""
    marks = (line.partition("KunServe auto: ")[2] for line in server.log()[since:].splitlines())
    return [mark.split(" [[")[0] for mark in marks if " [[" in mark]


@contextmanager
def left_as_it_was(server: RunningServer) -> Iterator[int]:
    """Yields where its log ends. Afterwards all memory is where it was."""
    before = server.status()
    since = len(server.log())
    yield since

    def is_as_before() -> bool:
        server.endpoint.flush_cache()
        after = server.status()
        return after["state"] == "normal" and all(
            (new["frames"], new["capacity_tokens"]) == (old["frames"], old["capacity_tokens"])
            for old, new in zip(before["replicas"], after["replicas"], strict=True)
        )

    wait_until(is_as_before, "the memory has come back by itself", DEADLINE_S)
    assert server.endpoint.ask("/kunserve/check", {})["ok"]


@pytest.mark.parametrize("lender_ends", [False, True])
def test_what_one_replica_lacks_is_lent_by_an_idle_one(server: RunningServer, lender_ends: bool) -> None:
    endpoint, questions = server.endpoint, make_questions()
    expected = [ask(endpoint, question) for question in questions]
    before = server.restarts()[IDLE]
    with left_as_it_was(server) as since:
        killing = threading.Lock()
        ends_at_s = time.monotonic() + DEADLINE_S

        def has_happened() -> bool:
            if "lend" not in decisions(server, since):
                return False
            if lender_ends and killing.acquire(blocking=False):
                os.kill(server.scheduler_pid(IDLE), signal.SIGKILL)
            return not lender_ends or server.restarts()[IDLE] > before

        answers: list[list[list[int]]] = [[] for _ in questions]

        def ask_again(number: int) -> None:
            """Until it has happened, as a machine may be through with all requests before a loan would be worth its
            cost."""
            is_last = False
            while not is_last:
                assert time.monotonic() < ends_at_s, f"nothing was lent within {DEADLINE_S:g} s"
                is_last = has_happened()
                answers[number].append(ask(endpoint, replace(questions[number], replica=BUSY)))

        def is_answered_again(count: int) -> bool:
            return has_happened() or all(len(each) >= count for each in answers[: len(asking)])

        with ThreadPoolExecutor(MOST_REQUESTS) as clients:
            asking = [clients.submit(ask_again, number) for number in range(REQUESTS)]
            for number in range(REQUESTS, MOST_REQUESTS):
                wait_until(partial(is_answered_again, 2 + number - REQUESTS), "it has happened, or all are answered")
                if not has_happened():
                    asking.append(clients.submit(ask_again, number))
            for each in asking:
                each.result()
        for found, right in zip(answers, expected, strict=True):
            assert found == [right] * len(found)
    said = decisions(server, since)
    assert said[said.index("lend") - 1] == "free"  # before that it may have come back unused
    if not lender_ends:
        assert said[-2:] == ["restore", "reuse"]


def test_a_request_longer_than_its_replica_waits_for_a_loan(server: RunningServer) -> None:
    endpoint = server.endpoint
    expected = ask(endpoint, LONG)
    per_granule = server.status()["replicas"][BUSY]["frames"]["per_granule"]
    slots = server.status()["replicas"][BUSY]["slots"]
    frames = slots["base"] // slots["per_granule"] // 2 * per_granule
    endpoint.ask("/kunserve/kv", {"replica": BUSY, "frames": -frames})
    try:
        with left_as_it_was(server) as since:
            assert ask(endpoint, replace(LONG, replica=BUSY)) == expected
        assert "lend" in decisions(server, since)
        assert "drop" not in decisions(server, since)
    finally:
        endpoint.ask("/kunserve/kv", {"replica": BUSY, "frames": frames})


def test_an_answer_without_a_limit_goes_on_where_there_is_room(server: RunningServer) -> None:
    """As its replica has fewer slots than at its start. The client leaves when the answer is longer than that."""
    endpoint, question = server.endpoint, Question(make_prompt(random.Random(7), 40), 200, replica=BUSY)
    expected = ask(endpoint, question)
    body = question.body(stream=True)
    body["sampling_params"]["max_new_tokens"] = None
    frames, slots = (server.status()["replicas"][BUSY][what] for what in ("frames", "slots"))
    taken = slots["base"] // slots["per_granule"] * 7 // 8 * frames["per_granule"]
    with left_as_it_was(server) as since:
        endpoint.ask("/kunserve/kv", {"replica": BUSY, "frames": -taken})
        try:
            assert server.status()["replicas"][BUSY]["capacity_tokens"] < len(question.prompt) + len(expected)
            text = ""
            with closing(endpoint.events("/generate", body)) as events:
                for event in events:
                    assert event["text"].startswith(text)
                    text, tokens = event["text"], event["output_ids"]
                    if len(tokens) >= len(expected):
                        break
            assert (tokens, event["meta_info"]["dp_rank"]) == (expected, IDLE)
        finally:
            endpoint.ask("/kunserve/kv", {"replica": BUSY, "frames": taken})
    said = [line for line in server.log()[since:].splitlines() if f"slots for now, of {AUTO_BASE_TOKENS}" in line]
    assert len(said) == 1
    assert said[0].endswith("; continued")
