"""A request 19 times longer than what its replica has room for, in the memory of another: the answer is that of one big
replica, which is a stock server or this one before it has become small."""

from __future__ import annotations

import random

import pytest
import requests
from _deployments import FLOAT32, RANKS_3, Pair, using
from _questions import Question, ask, make_prompt
from _servers import RunningServer

pytestmark = pytest.mark.server

LENDER, BORROWER = 1, 0
TIMES_LONGER = 19
ANSWER_TOKENS = 40


def long_question(server: RunningServer) -> Question:
    length = TIMES_LONGER * server.at_start[BORROWER]["slots"]["per_granule"]
    return Question(make_prompt(random.Random(19), length - ANSWER_TOKENS), ANSWER_TOKENS, BORROWER)


def check_in_lent_memory(server: RunningServer, question: Question, expected: list[int]) -> None:
    ours = server.endpoint
    ours.flush_cache()
    slots, frames = (server.at_start[BORROWER][what] for what in ("slots", "frames"))
    own = slots["per_granule"]
    length = len(question.prompt) + ANSWER_TOKENS
    given = {BORROWER: slots["base"] // own - 1, LENDER: TIMES_LONGER}
    for replica, granules in given.items():
        server.resize(replica, -granules * frames["per_granule"])
    try:
        assert server.status()["replicas"][BORROWER]["capacity_tokens"] == own
        assert ours.post("/generate", question.body()).status_code == requests.codes.bad_request
        ours.ask("/kunserve/lend", {"from": LENDER, "to": BORROWER, "tokens": length})
        assert ask(ours, question) == expected
        used = server.status()["replicas"][BORROWER]["slots"]
        assert used["cached"] > length - ANSWER_TOKENS - own, "it did not use what was lent"
        assert ours.ask("/kunserve/check", {})["ok"]
        ours.ask("/kunserve/restore", {})
    finally:
        for replica, granules in given.items():
            server.resize(replica, granules * frames["per_granule"])


@using(FLOAT32)
def test_a_request_19_times_longer_than_its_replica_is_answered_in_lent_memory(pair: Pair) -> None:
    question = long_question(pair.server)
    pair.stock.flush_cache()
    check_in_lent_memory(pair.server, question, ask(pair.stock, Question(question.prompt, ANSWER_TOKENS)))


@using(RANKS_3)
def test_a_request_19_times_longer_than_its_replica_is_answered_by_message(server: RunningServer) -> None:
    question = long_question(server)
    server.endpoint.flush_cache()
    expected = ask(server.endpoint, question)

    def orders() -> int:
        sent: dict[str, int] = server.status()["replicas"][BORROWER]["remote_attention"]["orders_sent"]
        return sent.get(str(LENDER), 0)

    before = orders()
    check_in_lent_memory(server, question, expected)
    assert orders() > before
