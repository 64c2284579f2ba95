"""A replica gets KV slots in the memory of another, and gives them back: answers stay the same, and requests that are
longer than what it has itself are answered."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import requests
from _deployments import BASE_TOKENS, LLAMA, RANKS, using
from _drop import Clients, Served
from _http import Json
from _questions import Question, ask, make_prompt, make_questions
from _servers import RunningServer

pytestmark = [pytest.mark.server, using(LLAMA, RANKS)]

LENDER, BORROWER = 1, 0
TIMES_LONGER = 3
LONG = Question(make_prompt(random.Random(12), 800), 100)
QUESTIONS = [*make_questions(12, seed=11), LONG]


@pytest.fixture
def served(server: RunningServer) -> Served:
    return Served(server, QUESTIONS)


def granules(served: Served, tokens: int) -> int:
    return -(-tokens // served.at_start[0]["slots"]["per_granule"])


@contextmanager
def smaller(served: Served, replica: int, by_granules: int) -> Iterator[None]:
    """The replica has so much less slots meanwhile; the frames behind them are free."""
    frames = by_granules * served.at_start[replica]["frames"]["per_granule"]
    served.server.resize(replica, -frames)
    try:
        yield
    finally:
        served.server.resize(replica, frames)


def lend(served: Served, tokens: int) -> Json:
    before = served.status()
    body = {"from": LENDER, "to": BORROWER, "tokens": tokens}
    told = served.endpoint.ask("/kunserve/plan", {**body, "action": "lend"})
    answer: Json = served.endpoint.ask("/kunserve/lend", body)
    after = served.status()
    assert answer["extension_slots"] == told["extension_slots"] >= tokens
    assert [each["state"] for each in after["replicas"]] == ["lending"] * 2
    assert after["hosts"] == before["hosts"]
    gained = [
        b["capacity_tokens"] - a["capacity_tokens"] for a, b in zip(before["replicas"], after["replicas"], strict=True)
    ]
    assert gained == [answer["extension_slots"], 0]
    assert after["replicas"][LENDER]["frames"]["lent"] > before["replicas"][LENDER]["frames"]["lent"]
    assert served.endpoint.ask("/kunserve/check", {})["ok"]
    return answer


def test_a_request_longer_than_its_replica_is_answered_in_lent_memory(served: Served) -> None:
    length = len(LONG.prompt) + LONG.answer_tokens
    per_granule = served.at_start[BORROWER]["slots"]["per_granule"]
    own = length // TIMES_LONGER // per_granule
    here = LONG.body(routed_dp_rank=BORROWER)
    whole = granules(served, BASE_TOKENS)
    with smaller(served, BORROWER, whole - own), smaller(served, LENDER, granules(served, length)):
        refused = served.endpoint.post("/generate", here)
        assert refused.status_code == requests.codes.bad_request, refused.text
        lend(served, length)
        assert served.endpoint.ask("/generate", here)["output_ids"] == served.expected[-1]
        assert served.status()["replicas"][BORROWER]["slots"]["cached"] > own * per_granule, (
            "it did not use what was lent"
        )
        served.restore()
        assert served.status()["state"] == "normal"
    served.check_as_at_start()


def test_answers_stay_equal_while_memory_is_lent_and_taken_back(served: Served) -> None:
    with smaller(served, LENDER, granules(served, BASE_TOKENS // 2)), Clients(served) as clients:
        for _ in range(2):
            clients.wait_for_answers(3)
            clients.during("lending", lambda: lend(served, BASE_TOKENS // 4))
            clients.phase = "lent"
            clients.wait_for_answers(6)
            refused = served.endpoint.post(
                "/kunserve/kv", {"replica": LENDER, "frames": -served.at_start[0]["frames"]["per_granule"]}
            )
            assert refused.status_code == requests.codes.conflict
            assert refused.json()["error"]["message"].startswith(f"replica {LENDER} is lending; its memory is resized")
            clients.during("taking back", served.restore)
            clients.phase = "parted"
    served.check_as_at_start()
    assert ask(served.endpoint, LONG) == served.expected[-1]


def test_what_is_lent_has_to_be_free(served: Served) -> None:
    before = served.plan_and_memory()
    answer = served.endpoint.post("/kunserve/lend", {"from": LENDER, "to": BORROWER, "tokens": 10**6})
    assert answer.status_code in (requests.codes.bad_request, requests.codes.conflict)
    assert f"replica {LENDER} has " in answer.text
    assert served.plan_and_memory() == before
