"""Members of a merged group are killed while all of them answer: the others answer on, with the same tokens."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from _deployments import THREE_TO_RECOVER, using
from _drop import Served
from _http import Endpoint
from _questions import Question, ask_all, make_prompt, make_questions
from _servers import RunningServer, check_books

from waiting import wait_until

pytestmark = [pytest.mark.server, using(THREE_TO_RECOVER)]

QUESTIONS = make_questions(16, seed=12)


def long_questions(replicas: Sequence[int], seed: int) -> list[Question]:
    """Prompts of 5 to 300 tokens and answers of 60 to 160, in turn for each of the replicas."""
    chance = random.Random(seed)
    return [
        Question(make_prompt(chance, chance.randrange(5, 300)), chance.randrange(60, 160), replicas[i % len(replicas)])
        for i in range(8)
    ]


def stream(endpoint: Endpoint, question: Question, expected: list[int] | None) -> list[int]:
    """The tokens of a streamed answer. Every event has all tokens so far, which never become fewer."""
    tokens: list[int] = []
    for event in endpoint.events("/generate", question.body()):
        assert (
            event["meta_info"].get("finish_reason") is None or event["meta_info"]["finish_reason"]["type"] == "length"
        )
        now = event["output_ids"]
        assert len(now) >= len(tokens)
        if expected is not None:
            assert now == expected[: len(now)]
        tokens = now
    return tokens


def kill(server: RunningServer, replica: int) -> None:
    os.kill(server.scheduler_pid(replica), signal.SIGKILL)


def states(server: RunningServer) -> list[str]:
    return [replica["state"] for replica in server.status()["replicas"]]


def require_as_at_start(server: RunningServer, replicas: Sequence[int]) -> None:
    """Those who live have the memory and the capacity that they began with."""
    server.endpoint.flush_cache()
    now = {replica["id"]: replica for replica in server.status()["replicas"]}
    for replica in replicas:
        for name in ("frames", "capacity_tokens"):
            assert now[replica][name] == server.at_start[replica][name], name
        check_books(now[replica])


def kill_under_load(server: RunningServer, killed: int, others: Sequence[int], seed: int) -> None:
    """Every request is answered as if nothing had been; those of the one that is killed by the others."""
    endpoint = server.endpoint
    questions = [*long_questions(others, seed), *long_questions([killed], seed + 100)[:2]]
    expected = ask_all(endpoint, questions)
    inside = endpoint.requests_inside()  # SGLang goes on counting those of a replica that has ended
    with ThreadPoolExecutor(len(questions)) as clients:
        with endpoint.slowed(0.02):
            streams: list[Future[list[int]]] = [
                clients.submit(stream, endpoint, question, tokens)
                for question, tokens in zip(questions, expected, strict=True)
            ]
            everything = inside + len(questions)
            endpoint.wait_for_requests_inside(lambda count: count == everything, "all of them")
            kill(server, killed)
            wait_until(lambda: states(server)[killed] == "degraded", "the death is noticed")
            wait_until(lambda: {states(server)[other] for other in others} == {"normal"}, "the others have recovered")
        assert [each.result() for each in streams] == expected


@pytest.mark.ends_server
def test_others_answer_on_when_a_merged_member_is_killed(server: RunningServer) -> None:
    """One server, on which one replica after the other ends."""
    served = Served(server, QUESTIONS)
    served.drop({"groups": [[0, 1, 2]]})
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    kill_under_load(server, 1, [0, 2], seed=1)
    require_as_at_start(server, [0, 2])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected

    # Those who are left are replicas as any others.
    server.endpoint.ask("/kunserve/drop", {"groups": [[0, 2]]})
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    served.restore()
    require_as_at_start(server, [0, 2])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected

    server.endpoint.ask("/kunserve/drop", {"groups": [[0, 2]]})
    kill_under_load(server, 2, [0], seed=2)
    require_as_at_start(server, [0])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    served.check_log()
