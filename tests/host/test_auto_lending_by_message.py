"""Automatic mode where one replica is short of more than another can lend: two lend, and their memory is used by
messages."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from _automatic import left_as_it_was
from _deployments import AUTO_BY_MESSAGE, LEND_BASE_TOKENS, using
from _questions import Question, ask, make_prompt
from _servers import RunningServer

pytestmark = [pytest.mark.server, using(AUTO_BY_MESSAGE)]

BUSY = 0
ANSWER_TOKENS = 40
# A lender keeps an eighth of its memory, so one cannot lend all that this takes beyond the least that a replica has.
LONG = Question(make_prompt(random.Random(9), LEND_BASE_TOKENS - 40 - ANSWER_TOKENS), ANSWER_TOKENS)


def test_a_request_longer_than_its_replica_waits_for_loans_of_several(server: RunningServer) -> None:
    endpoint = server.endpoint
    expected = ask(endpoint, LONG)
    frames, slots = (server.status()["replicas"][BUSY][what] for what in ("frames", "slots"))
    taken = (slots["base"] // slots["per_granule"] - 1) * frames["per_granule"]
    server.resize(BUSY, -taken)
    try:
        assert server.status()["replicas"][BUSY]["capacity_tokens"] == slots["per_granule"]
        sent = server.status()["replicas"][BUSY]["remote_attention"]["orders_sent"]
        with left_as_it_was(server) as decisions:
            assert ask(endpoint, replace(LONG, replica=BUSY)) == expected
            now = server.status()["replicas"][BUSY]["remote_attention"]["orders_sent"]
        assert decisions.done().count("lend") >= 2
        assert "drop" not in decisions.ordered()
        assert {peer for peer in now if now[peer] > sent.get(peer, 0)} == {"1", "2"}
    finally:
        server.resize(BUSY, taken)
