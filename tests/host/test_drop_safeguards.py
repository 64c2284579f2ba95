"""What keeps merged replicas right is needed: without it the tests fail. And who may order what, and what happens when
a member hangs for a while or ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import requests
from _deployments import SAFEGUARDS, using
from _deployments import SAFEGUARDS_BASE_TOKENS as BASE_TOKENS
from _deployments import SAFEGUARDS_TIMEOUT_S as TIMEOUT_S
from _drop import Served
from _http import Endpoint, Json
from _questions import Question, ask, ask_all, make_prompt, make_questions
from _sabotage import REWRITTEN_ROWS, ROW_UPDATES
from _servers import RunningServer

from waiting import wait_until

pytestmark = [pytest.mark.server, using(SAFEGUARDS)]

MERGE = {"groups": [[0, 1]], "layers": [0, 0, 1, 1]}
QUESTIONS = make_questions(24, seed=5)
LONG_PROMPT_TOKENS = 900  # most of what a replica has room for, so that answers are short
SLOW_STEP_S = 0.2  # with it an answer of 100 tokens takes far longer than what goes on beside it


@pytest.fixture
def switches(server: RunningServer) -> Path:
    return server.switches


@pytest.fixture
def served(server: RunningServer) -> Served:
    return Served(server, QUESTIONS)


@contextlib.contextmanager
def without(safeguard: str, switches: Path) -> Iterator[None]:
    (switches / safeguard).touch()
    try:
        yield
    finally:
        (switches / safeguard).unlink()


@contextlib.contextmanager
def merged(served: Served) -> Iterator[None]:
    """Without anything in the caches, and nothing left there of what was computed meanwhile."""
    served.endpoint.flush_cache()
    served.drop(MERGE)
    try:
        yield
    finally:
        served.endpoint.flush_cache()
        served.restore()


def test_a_row_update_that_is_lost_is_noticed(served: Served, switches: Path) -> None:
    with merged(served):
        assert ask_all(served.endpoint, served.questions) == served.expected
    with without(ROW_UPDATES, switches), merged(served):
        answers = ask_all(served.endpoint, served.questions)
    assert sum(one != other for one, other in zip(answers, served.expected, strict=True)) > len(answers) // 4
    with merged(served):
        assert ask_all(served.endpoint, served.questions) == served.expected


CHANCE = random.Random(29)
BEGINNING = make_prompt(CHANCE, 200)
ALIKE = [Question((*BEGINNING, 300 + last), 100, 0) for last in range(4)]
FIRST = Question(make_prompt(CHANCE, 500), 1, 0)
BRIEF_STEP_S = 0.02  # with it what follows comes before the batch ends
OTHERS = [Question(make_prompt(CHANCE, 110), 3, 0) for _ in range(16)]
OTHERS_AT_ONCE = 4  # one after the other, they would take as many batches as the answers beside them


def ask_with_rewritten_rows(endpoint: Endpoint) -> list[list[int]]:
    """Answers to questions that begin alike and are prefilled in one batch. The radix cache keeps the beginning of one
    of them and writes its slots into the rows of the rest, whose own slots are free then. Others use these while
    the answers are still being computed."""
    sampling = ALIKE[0].body()["sampling_params"]
    body = {"input_ids": [question.prompt for question in ALIKE], "sampling_params": sampling, "routed_dp_rank": 0}
    for _ in range(10):
        endpoint.flush_cache()
        with ThreadPoolExecutor(2 + OTHERS_AT_ONCE) as clients, endpoint.slowed(BRIEF_STEP_S):
            # They wait while the first one is prefilled, and come into the next batch together.
            first = clients.submit(ask, endpoint, FIRST)
            alike = clients.submit(endpoint.ask, "/generate", body)
            for other in [clients.submit(ask, endpoint, question) for question in OTHERS]:
                other.result()
            still_running = not alike.done()
            answers = alike.result()
            first.result()
        if still_running and sum(answer["meta_info"]["cached_tokens"] == 0 for answer in answers) > 1:
            return [answer["output_ids"] for answer in answers]
    raise AssertionError("two of the questions were never prefilled together")


def test_a_row_that_the_radix_cache_rewrites(served: Served, switches: Path) -> None:
    expected = ask_all(served.endpoint, ALIKE)
    with merged(served):
        assert ask_with_rewritten_rows(served.endpoint) == expected
    with without(REWRITTEN_ROWS, switches), merged(served):
        answers = ask_with_rewritten_rows(served.endpoint)
    assert answers != expected, "no row was rewritten, so the part above has shown nothing"


# Memory shrinks under requests that were admitted before

# Its grammar takes seconds to compile.
SLOW_SCHEMA = {
    "type": "object",
    "properties": {
        f"part_{part}": {
            "type": "object",
            "properties": {
                f"field_{field}": {"type": "string", "pattern": f"^[a-z]{{{part},{part + 40}}}-[0-9]{{{field},30}}$"}
                for field in range(6)
            },
        }
        for part in range(48)
    },
}


def longer_than_a_replica(served: Served) -> Question:
    """While merged there is room for it, and after a restore there is none."""
    capacity: int = served.status()["replicas"][0]["capacity_tokens"]
    assert capacity > BASE_TOKENS + 120, "the drop gains too little for this test to mean anything"
    return Question(make_prompt(random.Random(capacity), BASE_TOKENS + 60), 20, 0)


def test_a_prompt_keeps_its_slots_while_its_grammar_is_compiled(served: Served) -> None:
    """A restore waits for it, and for nobody in vain: those behind it are answered, and so is what comes later."""
    schema = json.dumps({**SLOW_SCHEMA, "title": uuid.uuid4().hex})  # nobody has its grammar
    with ThreadPoolExecutor(3) as clients:
        served.drop(MERGE)
        question = longer_than_a_replica(served)
        body = question.body()
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": 20, "json_schema": schema}
        prompt = clients.submit(served.endpoint.ask, "/generate", body)
        wait_until(lambda: served.status()["dispatch"]["replicas"]["0"]["work_tokens"] > 1000, "the prompt is there")
        restore = clients.submit(served.restore)
        behind = clients.submit(ask_all, served.endpoint, served.questions)
        answer = prompt.result()
        assert answer["meta_info"]["finish_reason"]["type"] in ("length", "stop"), answer["meta_info"]
        assert restore.result()["success"]
        assert behind.result() == served.expected
    served.check_as_at_start()
    with merged(served):
        assert served.endpoint.ask("/generate", body)["output_ids"] == answer["output_ids"]


def test_a_limit_that_nobody_named_does_not_keep_the_slots(served: Served) -> None:
    """The answer is as long as it would have been without the drop, though the replica had more room meanwhile."""
    prompt = make_prompt(random.Random(3), LONG_PROMPT_TOKENS)
    body = {**Question(prompt, 0, 0).body(), "sampling_params": {"temperature": 0, "ignore_eos": True}}
    body["sampling_params"]["max_new_tokens"] = None
    expected = served.endpoint.ask("/generate", body)["output_ids"]
    assert len(expected) == BASE_TOKENS - len(prompt) - 2
    served.endpoint.flush_cache()
    served.drop(MERGE)
    with served.endpoint.slowed(SLOW_STEP_S):
        events = served.endpoint.events("/generate", body)
        first = next(events)
        assert served.restore()["success"]
        assert served.status()["state"] == "normal"
    *_, last = events
    assert first["output_ids"] == expected[: len(first["output_ids"])]
    assert last["meta_info"]["completion_tokens"] == len(expected)
    assert last["output_ids"][-1:] == expected[-1:]
    served.check_as_at_start()


def test_a_limit_that_was_named_is_kept(served: Served) -> None:
    """The slots stay until that answer has its length; what comes meanwhile is limited as if they were gone."""
    with ThreadPoolExecutor(2) as clients:
        served.drop(MERGE)
        length = BASE_TOKENS - LONG_PROMPT_TOKENS + 60
        prompts = [make_prompt(random.Random(seed), LONG_PROMPT_TOKENS) for seed in (4, 5)]
        with served.endpoint.slowed(SLOW_STEP_S):
            events = served.endpoint.events("/generate", Question(prompts[0], length, 0).body())
            next(events)
            restore = clients.submit(served.restore)
            wait_until(lambda: served.status()["state"] == "restoring", "the restore has begun")
            cut = clients.submit(served.endpoint.ask, "/generate", Question(prompts[1], length, 1).body())
            served.endpoint.wait_for_requests_inside(lambda count: count == 2, "both")
        *_, last = events
        assert last["meta_info"]["completion_tokens"] == length
        assert restore.result()["success"]
        assert cut.result()["meta_info"]["completion_tokens"] == BASE_TOKENS - LONG_PROMPT_TOKENS - 2
    served.check_as_at_start()


def random_request(chance: random.Random, longest: int, schemas: Sequence[str]) -> Json:
    """Of any length that the merged replica may have room for, with a limit or without, with a grammar or without.
    One without a limit runs until there is no room, so it leaves little, with the memory that it may come to."""
    limit = chance.choice([None, 1, 30, 100])
    tokens = int(longest ** chance.random())
    if limit is None:
        tokens = chance.choice([BASE_TOKENS, longest]) - chance.randrange(2, 120)
    sampling: Json = {"temperature": 0, "max_new_tokens": limit}
    if chance.random() < 0.2:
        sampling["json_schema"] = chance.choice(schemas)
    elif sampling["max_new_tokens"] is not None:
        sampling["ignore_eos"] = chance.random() < 0.5
    return {"input_ids": make_prompt(chance, tokens), "sampling_params": sampling}


REQUESTS_EACH = 10  # of 8 clients, or more, until there was all that the test is about
LONGEST_S = 300.0


def test_every_request_ends(served: Served) -> None:
    """Whatever comes while memory comes and goes: an answer, or the error of a prompt that is too long for what the
    replica has in that moment. Nobody waits for ever, and nobody behind them."""
    schemas = [json.dumps({**SLOW_SCHEMA, "title": uuid.uuid4().hex}) for _ in range(2)]
    served.drop(MERGE)
    longest: int = served.status()["replicas"][0]["capacity_tokens"] - 8
    served.restore()
    step: int = served.at_start[0]["frames"]["per_granule"]
    stop = threading.Event()
    codes: Counter[int] = Counter()
    shrunk: Counter[str] = Counter()

    def is_over() -> bool:
        """Also where it is of no use to go on."""
        return min(codes[400], shrunk["restore"], shrunk["resize"]) > 0 or changes.done() or time.monotonic() > ends_s

    def serve(seed: int) -> None:
        chance, asked = random.Random(seed), 0
        while asked < REQUESTS_EACH or not is_over():
            asked += 1
            if chance.random() < 0.3:
                index = chance.randrange(len(served.questions))
                assert ask(served.endpoint, served.questions[index]) == served.expected[index]
                continue
            answer = served.endpoint.post("/generate", random_request(chance, longest, schemas))
            codes[answer.status_code] += 1
            assert answer.status_code == 200 or "exceeds the maximum allowed length" in answer.text, answer.text

    def knows_of(epoch: int) -> bool:
        return bool(served.status()["epoch"] == epoch)

    def change_memory() -> None:
        chance = random.Random(17)
        while not stop.is_set():
            if chance.random() < 0.5:
                assert served.endpoint.post("/kunserve/drop", MERGE).status_code == 200
                stop.wait(chance.random())
                shrunk["restore"] += served.endpoint.post("/kunserve/restore", {}).status_code == 200
            else:
                replica = chance.randrange(2)
                body = {"replica": replica, "frames": -step * chance.randrange(1, 4)}
                epoch = served.status()["epoch"]
                if served.endpoint.post("/kunserve/kv", body).status_code == 200:
                    shrunk["resize"] += 1
                    stop.wait(chance.random())
                    served.endpoint.ask("/kunserve/kv", {**body, "frames": -body["frames"]})
                    # Else it may refuse a drop, whose plan is of the memory that it knows.
                    wait_until(partial(knows_of, epoch + 2), "the coordinator knows of both")

    ends_s = time.monotonic() + LONGEST_S
    with ThreadPoolExecutor(9) as threads:
        changes = threads.submit(change_memory)
        try:
            for client in [threads.submit(serve, seed) for seed in range(8)]:
                client.result()
        finally:
            stop.set()
        changes.result()
    assert codes[200] > codes[400] > 0, codes
    assert shrunk["restore"] > 0, "memory never shrank under a request"
    assert shrunk["resize"] > 0
    if served.status()["state"] == "merged":
        served.restore()
    served.check_as_at_start()


def test_everything_is_as_at_the_start(served: Served) -> None:
    served.check_as_at_start()


@pytest.mark.parametrize("key", [None, "another one"])
def test_the_routes_want_the_key(served: Served, key: str | None) -> None:
    stranger = Endpoint(served.endpoint.base_url, key)
    answers = [stranger.post(f"/kunserve/{command}", MERGE) for command in ("plan", "drop", "restore", "kv")]
    answers.append(stranger.get("/kunserve/status"))
    assert {answer.status_code for answer in answers} <= {401, 403}
    assert served.status()["state"] == "normal"
    assert ask(stranger, served.questions[0]) == served.expected[0]


def test_a_member_that_hangs_for_a_while(served: Served) -> None:
    """The drop is rolled back with the reason, and a later one succeeds."""

    def phase_is(phase: str) -> bool:
        answer = served.endpoint.post("/kunserve/plan", MERGE)
        return answer.status_code == 409 and f"groups [[0, 1]] are dropping: {phase}" in answer.text

    pid = served.server.scheduler_pid(1)
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as thread:
            drop: Future[requests.Response] = thread.submit(served.endpoint.post, "/kunserve/drop", MERGE)
            wait_until(lambda: phase_is("prepare"), "the drop has begun")
            for path, body in (("/kunserve/drop", MERGE), ("/kunserve/restore", {})):
                second = served.endpoint.post(path, body)
                assert second.status_code == 409
                assert "are dropping" in second.json()["error"]["message"]
            assert ask(served.endpoint, Question((300, 301, 302), 4, 0))
            wait_until(lambda: phase_is("revert"), "the members go back")
            os.kill(pid, signal.SIGCONT)
            answer = drop.result()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert answer.status_code == 503
    # Replica 0 may have waited for what replica 1 lends it.
    assert answer.json()["message"].startswith(f"rolled back: no answer to prepare within {TIMEOUT_S:g} s from")
    assert answer.json()["message"].endswith("replica 1 rank 0")
    assert answer.json()["freed_bytes"] == answer.json()["extension_slots"] == 0
    served.check_as_at_start()
    with merged(served):
        assert ask_all(served.endpoint, served.questions) == served.expected
    served.check_as_at_start()


def test_a_replica_that_stands_still_is_named_and_left_out(served: Served) -> None:
    """It gets no requests and is in no plan, and goes on where it was."""

    def is_stalled() -> bool:
        text = served.endpoint.get("/metrics").text
        (value,) = re.findall(r'^kunserve:stalled\{.*replica="1".*\} (\S+)$', text, re.MULTILINE)
        return float(value) == 1

    question = replace(served.questions[0], replica=1)
    pid = served.server.scheduler_pid(1)
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(ask, served.endpoint, question)
            wait_until(is_stalled, "it has work and runs no batch")
            status = served.status()
            assert [replica["stalled"] for replica in status["replicas"]] == [False, True]
            assert "no batch has run for" in status["replicas"][1]["reason"]
            refused = served.endpoint.post("/kunserve/plan", MERGE)
            assert refused.status_code == 409
            assert "replica 1 makes no progress" in refused.json()["error"]["message"]
            assert ask_all(served.endpoint, served.questions) == served.expected
            assert not answer.done()
            os.kill(pid, signal.SIGCONT)
            assert answer.result() == served.expected[0]
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not is_stalled(), "it goes on")
    served.check_as_at_start()
    with merged(served):
        assert ask_all(served.endpoint, served.questions) == served.expected
    served.check_as_at_start()


@pytest.mark.ends_server
def test_a_member_that_has_ended(served: Served) -> None:
    """Its requests are answered all the same, and others are served on."""
    with ThreadPoolExecutor(2) as clients:
        questions = [Question(served.questions[0].prompt, 200, replica) for replica in (0, 1)]
        with served.endpoint.slowed(SLOW_STEP_S):
            answers = [clients.submit(ask, served.endpoint, question) for question in questions]
            served.endpoint.wait_for_requests_inside(lambda count: count == 2, "both")
            os.kill(served.server.scheduler_pid(1), signal.SIGKILL)
        kept, lost = [answer.result() for answer in answers]
    assert kept == lost
    reason = "replica 1 is degraded: replica 1 rank 0 ended with exit code -9"
    wait_until(lambda: reason in served.endpoint.post("/kunserve/plan", MERGE).text, "the loss is noticed")
    answer = served.endpoint.post("/kunserve/drop", MERGE)
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == reason
    assert [replica["state"] for replica in served.status()["replicas"]] == ["normal", "degraded"]
    assert ask_all(served.endpoint, served.questions) == served.expected
    assert served.endpoint.get("/health").status_code == 200
