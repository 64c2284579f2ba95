"""Three replicas of two ranks each, six processes, merged by messages: tokens and log probabilities of answers stay as
those of replicas by themselves."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
from _compare import LOGPROB_TOLERANCE, VOLATILE, differences
from _deployments import RANKS_3, using
from _drop import Served
from _http import at_once
from _questions import Question, make_prompt
from _servers import RunningServer

pytestmark = [pytest.mark.server, using(RANKS_3)]

ALL_LOGPROBS = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3}


def test_a_drop_of_three_replicas_of_two_ranks_changes_no_token_and_no_probability(server: RunningServer) -> None:
    chance = random.Random(31)
    # Without a prefix in common: of input log probabilities a replica gives those of the part that it computes.
    served = Served(server, [Question(make_prompt(chance, length), 12) for length in (5, 60, 150, 300)])
    bodies = [
        question.body(routed_dp_rank=replica, **ALL_LOGPROBS)
        for replica in served.replicas
        for question in served.questions
    ]

    def ask_everything() -> list[Any]:
        served.endpoint.flush_cache()
        return at_once([partial(served.endpoint.ask, "/generate", body) for body in bodies])

    at_home, sent = ask_everything(), served.orders_sent()
    served.drop({"groups": [list(served.replicas)]})
    merged = ask_everything()
    assert all(now > then for now, then in zip(served.orders_sent(), sent, strict=True))
    assert served.endpoint.ask("/kunserve/check", {})["ok"]
    served.restore()
    for answers in (merged, ask_everything()):
        assert not differences(at_home, answers, tolerance=LOGPROB_TOLERANCE, ignore_values_of=VOLATILE)
    assert [answer["output_ids"] for answer in at_home] == served.expected * len(served.replicas)
    served.check_as_at_start()
