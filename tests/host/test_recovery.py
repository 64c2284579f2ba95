"""Members of a merged group are killed while all of them answer: the others answer on, with the same tokens."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import requests
from _deployments import BASE_TOKENS, FAULTS_3, FAULTS_BY_MESSAGE, FAULTS_ORDER_TIMEOUT_S, MOE, RANKS, using
from _drop import Clients, Served
from _faults import is_gone
from _http import Endpoint, Json
from _questions import Question, ask_all, make_prompt, make_questions
from _sabotage import BROKEN_HOME, BROKEN_SEGMENT
from _servers import START_DEADLINE_S, RunningServer, check_books

from waiting import wait_until

pytestmark = [pytest.mark.server]

QUESTIONS = make_questions(12, seed=12)
SLOW_STEP_S = 0.3  # with it the shortest answer takes far longer than it takes to ask for all of them


def long_questions(replicas: Sequence[int], seed: int) -> list[Question]:
    """Prompts of 5 to 300 tokens and answers of 20 to 52, in turn for each of the replicas. With the seeds that are
    used no two best tokens are nearly alike; with 1 two are, for the mixture of experts."""
    chance = random.Random(seed)
    return [
        Question(
            make_prompt(chance, chance.randrange(5, 300)),
            chance.randrange(30, 80) * 2 // 3,
            replicas[i % len(replicas)],
        )
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


def wait_whole(server: RunningServer) -> None:
    """Until all replicas are there, by themselves."""
    wait_until(lambda: set(server.states()) == {"normal"}, "all replicas are there", START_DEADLINE_S)


def require_as_at_start(server: RunningServer, replicas: Sequence[int]) -> None:
    """Those who live have the memory and the capacity that they began with, and are whole."""
    checked = {each["replica"]: each for each in server.endpoint.post("/kunserve/check", {}).json()["replicas"]}
    assert [checked[replica]["differences"] for replica in replicas] == [[] for _ in replicas]
    server.endpoint.flush_cache()
    names = ("frames", "capacity_tokens")

    def memory_of(found: Sequence[Json]) -> list[Json]:
        by_replica = {replica["id"]: replica for replica in found}
        return [{name: by_replica[replica][name] for name in names} for replica in replicas]

    at_start = memory_of(server.at_start)
    # One that comes back borrows their layers while it starts.
    wait_until(lambda: memory_of(server.status()["replicas"]) == at_start, f"replicas {replicas} have {at_start}")
    for replica in server.status()["replicas"]:
        if replica["id"] in replicas:
            check_books(replica)


def order_beside_a_start(server: RunningServer, what: str, body: Json) -> None:
    """Orders a transition that must succeed. It may have to wait: who lends parameters to a replica that is starting
    takes part in none."""
    answers: list[requests.Response] = []

    def is_taken() -> bool:
        answers.append(server.endpoint.post(f"/kunserve/{what}", body))
        return re.search(r"replica \d lends its parameters to replica \d, which is starting", answers[-1].text) is None

    wait_until(is_taken, f"the {what} is taken")
    assert answers[-1].status_code == requests.codes.ok, answers[-1].text


def load_for_kill(server: RunningServer, killed: int, others: Sequence[int], seed: int) -> list[Question]:
    """What is to run when a replica is killed; it is answered once now, while nothing is merged."""
    questions = [*long_questions(others, seed), *long_questions([killed], seed + 100)[:2]]
    server.answers_to(questions)
    return questions


def kill_under_load(
    server: RunningServer,
    questions: Sequence[Question],
    killed: int,
    others: Sequence[int],
    rank: int | None = None,
    sent: signal.Signals = signal.SIGKILL,
) -> None:
    """Every request is answered as if nothing had been; those of the one that is killed by the others."""
    endpoint, expected = server.endpoint, server.answers_to(questions)
    with ThreadPoolExecutor(len(questions)) as clients:
        with endpoint.slowed(SLOW_STEP_S):
            streams: list[Future[list[int]]] = [
                clients.submit(stream, endpoint, question, tokens)
                for question, tokens in zip(questions, expected, strict=True)
            ]
            everything = len(questions)
            endpoint.wait_for_requests_inside(lambda count: count == everything, "all of them")
            os.kill(server.scheduler_pid(killed, rank), sent)
            wait_until(lambda: {server.states()[other] for other in others} == {"normal"}, "the others have recovered")
        assert [each.result() for each in streams] == expected


@using(FAULTS_3, MOE)  # the latter sends activations
def test_others_answer_on_when_a_merged_member_is_killed(server: RunningServer) -> None:
    """They merge again among each other, before the one that was killed is back or after it, and lose another one."""
    served = Served(server, QUESTIONS)
    load, last_load = load_for_kill(server, 1, [0, 2], seed=13), load_for_kill(server, 2, [0], seed=2)
    served.drop({"groups": [[0, 1, 2]]})
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    kill_under_load(server, load, 1, [0, 2])
    require_as_at_start(server, [0, 2])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected

    # Those who are left are replicas as any others.
    order_beside_a_start(server, "drop", {"groups": [[0, 2]]})
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    order_beside_a_start(server, "restore", {})
    require_as_at_start(server, [0, 2])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected

    order_beside_a_start(server, "drop", {"groups": [[0, 2]]})
    kill_under_load(server, last_load, 2, [0])
    require_as_at_start(server, [0])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    wait_whole(server)
    if "collective" in server.spec.flags:  # another may have begun to receive a batch of the dead one, and says so
        assert "leak" not in server.log().lower()
    else:
        served.check_log()


@using(FAULTS_3)
def test_layers_come_from_a_replica_that_serves_on(server: RunningServer) -> None:
    """There is no other source: the checkpoint is gone."""
    served = Served(server, QUESTIONS)
    load = load_for_kill(server, 1, [0, 2], seed=5)
    served.drop({"groups": [[0, 1]]})
    before = len(server.log())
    elsewhere = server.model.with_name("elsewhere")
    server.model.rename(elsewhere)
    try:
        kill_under_load(server, load, 1, [0, 2])
    finally:
        elsewhere.rename(server.model)
    require_as_at_start(server, [0, 2])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    assert re.search(r"layers \[.*\] have come from replica 2", server.log()[before:])
    wait_whole(server)  # its start may have failed without the checkpoint, and is tried again


@using(FAULTS_3)
@pytest.mark.ends_server
def test_nobody_ends_where_a_layer_host_fails_in_a_batch_and_lives(server: RunningServer) -> None:
    """All members go on as replicas by themselves, the one that has failed included, with all requests."""
    served, endpoint = Served(server, QUESTIONS), server.endpoint
    served.drop({"groups": [[0, 1, 2]]})
    pids = [server.scheduler_pid(replica) for replica in range(3)]
    failing = server.switches / BROKEN_SEGMENT
    with Clients(served) as clients:
        clients.wait_for_answers(5)
        failing.with_name("new").write_text("1")
        failing.with_name("new").rename(failing)
        wait_until(lambda: set(server.states()) == {"normal"} and not failing.exists(), "all have recovered")
        clients.wait_for_answers(5)
    assert pids == [server.scheduler_pid(replica) for replica in range(3)]
    require_as_at_start(server, [0, 1, 2])
    assert "RuntimeError: this segment fails, as the test says" in server.log()
    served.drop({"groups": [[0, 1, 2]]})
    assert ask_all(endpoint, QUESTIONS) == served.expected
    served.restore()


@using(FAULTS_BY_MESSAGE)
@pytest.mark.ends_server
def test_nobody_ends_where_a_home_of_kv_fails_in_a_batch_and_lives(server: RunningServer) -> None:
    """The batch runs at home, and asks the lender for a part of its KV. The coordinator is told who has failed."""
    lender, borrower = 1, 0
    served, endpoint, chance = Served(server, QUESTIONS), server.endpoint, random.Random(9)
    load = [Question(make_prompt(chance, 150), 30, borrower) for _ in range(2 * BASE_TOKENS // 150)]
    expected = server.answers_to(load)
    pids = [server.scheduler_pid(replica) for replica in range(3)]
    per_granule = served.at_start[lender]["frames"]["per_granule"]
    granules = -(-BASE_TOKENS // 2 // served.at_start[lender]["slots"]["per_granule"])
    server.resize(lender, -granules * per_granule)
    endpoint.ask("/kunserve/lend", {"from": lender, "to": borrower, "tokens": BASE_TOKENS // 4})
    failing = server.switches / BROKEN_HOME
    with ThreadPoolExecutor(len(load)) as clients:
        with endpoint.slowed(SLOW_STEP_S):
            failing.with_name("new").write_text(str(lender))
            failing.with_name("new").rename(failing)
            streams = [clients.submit(stream, endpoint, *each) for each in zip(load, expected, strict=True)]
            wait_until(lambda: set(server.states()) == {"normal"} and not failing.exists(), "both have recovered")
        assert [each.result() for each in streams] == expected
    assert pids == [server.scheduler_pid(replica) for replica in range(3)]
    assert "RuntimeError: this home fails, as the test says" in server.log()
    assert f"replica {lender} could not execute a batch of replica {borrower}" in server.log()


@using(FAULTS_3)
def test_a_member_that_is_stopped_for_too_long_is_ended(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    load = load_for_kill(server, 1, [0, 2], seed=3)
    server.endpoint.ask("/kunserve/drop", {"groups": [[0, 1, 2]]})
    pid = server.scheduler_pid(1)
    started_s = time.monotonic()
    kill_under_load(server, load, 1, [0, 2], sent=signal.SIGSTOP)
    assert time.monotonic() - started_s > FAULTS_ORDER_TIMEOUT_S
    assert is_gone(pid)
    require_as_at_start(server, [0, 2])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    wait_whole(server)


@using(RANKS)
def test_one_rank_of_a_member_dies(server: RunningServer) -> None:
    """With tensor parallelism: all ranks of the other one leave the same batch."""
    served = Served(server, QUESTIONS)
    load = load_for_kill(server, 1, [0], seed=4)
    served.drop({"groups": [[0, 1]]})
    kill_under_load(server, load, 1, [0], rank=1)
    require_as_at_start(server, [0])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    wait_whole(server)
    assert "leak" not in server.log().lower()  # the other rank of the dead one may have said how it failed
