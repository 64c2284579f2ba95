"""Automatic mode where one replica is short of memory and the other idle: memory is lent and comes back, by itself."""

from __future__ import annotations

import os
import random
import signal
from contextlib import closing
from dataclasses import replace
from functools import partial

import pytest
from _automatic import Burst, left_as_it_was, wait_with_slower_batches
from _deployments import AUTO, AUTO_BASE_TOKENS, using
from _questions import Question, ask, make_prompt
from _servers import RunningServer

from waiting import wait_until

pytestmark = [pytest.mark.server, using(AUTO)]

BUSY, IDLE = 0, 1
# Of 155 tokens each on the average, at one replica. As they come at once, twice as much is expected: more than it has
# room for, and less than both have. Where they come so slowly that no more is expected, so many need more than it has.
REQUESTS, MOST_REQUESTS = 5, 9
LONG = Question(make_prompt(random.Random(5), 3 * AUTO_BASE_TOKENS // 4), 60)


def make_questions() -> list[Question]:
    chance = random.Random(3)
    return [
        Question(make_prompt(chance, chance.randrange(60, 80)), chance.randrange(80, 90)) for _ in range(MOST_REQUESTS)
    ]


@pytest.mark.parametrize("lender_ends", [False, True])
def test_what_one_replica_lacks_is_lent_by_an_idle_one(server: RunningServer, lender_ends: bool) -> None:
    endpoint, questions = server.endpoint, make_questions()
    expected = [ask(endpoint, question) for question in questions]
    before = server.restarts()[IDLE]
    with left_as_it_was(server) as decisions:

        def is_lent() -> bool:
            return "lend" in decisions.ordered() if lender_ends else decisions.has_lent()

        def is_answered_again(clients: Burst, times: int) -> bool:
            return is_lent() or clients.least_answers() >= times

        here = [replace(question, replica=BUSY) for question in questions]
        with Burst(endpoint, here[:REQUESTS], MOST_REQUESTS) as clients:
            for times, question in enumerate(here[REQUESTS:], start=2):
                wait_until(partial(is_answered_again, clients, times), "memory is lent, or all are answered")
                if not is_lent():
                    clients.add(question)
            wait_with_slower_batches(endpoint, is_lent, "memory is lent")
            if lender_ends:
                os.kill(server.scheduler_pid(IDLE), signal.SIGKILL)
                wait_until(lambda: server.restarts()[IDLE] > before, "the lender is started again")
        for answers, right in zip(clients.answers(), expected, strict=False):
            assert answers == [right] * len(answers)
    said = decisions.ordered()
    assert "free" in said[: said.index("lend")]  # in between it may have come back unused
    if not lender_ends:
        assert decisions.done()[-2:] == ["restore", "reuse"]


def test_a_request_longer_than_its_replica_waits_for_a_loan(server: RunningServer) -> None:
    endpoint = server.endpoint
    expected = ask(endpoint, LONG)
    per_granule = server.status()["replicas"][BUSY]["frames"]["per_granule"]
    slots = server.status()["replicas"][BUSY]["slots"]
    frames = slots["base"] // slots["per_granule"] // 2 * per_granule
    server.resize(BUSY, -frames)
    try:
        with left_as_it_was(server) as decisions:
            assert ask(endpoint, replace(LONG, replica=BUSY)) == expected
        assert "lend" in decisions.done()
        assert "drop" not in decisions.ordered()
    finally:
        server.resize(BUSY, frames)


def test_an_answer_without_a_limit_goes_on_where_there_is_room(server: RunningServer) -> None:
    """As its replica has fewer slots than at its start. The client leaves when the answer is longer than that."""
    endpoint, question = server.endpoint, Question(make_prompt(random.Random(7), 40), 200, replica=BUSY)
    expected = ask(endpoint, question)
    body = question.body(stream=True)
    body["sampling_params"]["max_new_tokens"] = None
    frames, slots = (server.status()["replicas"][BUSY][what] for what in ("frames", "slots"))
    taken = slots["base"] // slots["per_granule"] * 7 // 8 * frames["per_granule"]
    with left_as_it_was(server) as decisions:
        server.resize(BUSY, -taken)
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
            server.resize(BUSY, taken)
    said = [line for line in decisions.log().splitlines() if f"slots for now, of {AUTO_BASE_TOKENS}" in line]
    assert len(said) == 1
    assert said[0].endswith("; continued")
