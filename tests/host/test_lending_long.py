"""A request 19 times longer than what its replica has room for, in the memory of another: the answer is that of a stock
server with one big replica."""

from __future__ import annotations

import random

import pytest
import requests
from _deployments import FLOAT32, Pair, using
from _questions import Question, ask, make_prompt

pytestmark = [pytest.mark.server, using(FLOAT32)]

LENDER, BORROWER = 1, 0
TIMES_LONGER = 19
ANSWER_TOKENS = 40


def test_a_request_19_times_longer_than_its_replica_is_answered_in_lent_memory(pair: Pair) -> None:
    ours = pair.ours
    pair.flush_caches()
    slots, frames = (pair.server.at_start[BORROWER][what] for what in ("slots", "frames"))
    own = slots["per_granule"]
    length = TIMES_LONGER * own
    question = Question(make_prompt(random.Random(19), length - ANSWER_TOKENS), ANSWER_TOKENS, BORROWER)
    expected = ask(pair.stock, Question(question.prompt, ANSWER_TOKENS))
    given = {BORROWER: slots["base"] // own - 1, LENDER: TIMES_LONGER}
    for replica, granules in given.items():
        pair.server.resize(replica, -granules * frames["per_granule"])
    try:
        assert pair.server.status()["replicas"][BORROWER]["capacity_tokens"] == own
        assert ours.post("/generate", question.body()).status_code == requests.codes.bad_request
        ours.ask("/kunserve/lend", {"from": LENDER, "to": BORROWER, "tokens": length})
        assert ask(ours, question) == expected
        used = pair.server.status()["replicas"][BORROWER]["slots"]
        assert used["cached"] > length - ANSWER_TOKENS - own, "it did not use what was lent"
        assert ours.ask("/kunserve/check", {})["ok"]
        ours.ask("/kunserve/restore", {})
    finally:
        for replica, granules in given.items():
            pair.server.resize(replica, granules * frames["per_granule"])
