"""The KV cache of a serving replica grows and shrinks under load: answers stay stock's, the books balance."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from _deployments import LLAMA_AND_STOCK, RANKS_AND_PAGES, Pair, using
from _http import CALL_DEADLINE_S, Endpoint, Json
from _questions import ask, make_questions
from _servers import check_books

pytestmark = [pytest.mark.server, using(LLAMA_AND_STOCK, RANKS_AND_PAGES)]

CLIENTS = 32
RESIZES = 30  # or more, until tokens of both kinds have been in the way
DEADLINE_S = 600.0
ANSWERS_PER_RESIZE = 4
LEAST_TOKENS, MOST_TOKENS = 1024, 4096
QUESTIONS = make_questions(80, seed=5, prefix_tokens=(40, 120, 250))


def resize(ours: Endpoint, replica: int, frames: int) -> requests.Response:
    return ours.post("/kunserve/kv", {"replica": replica, "frames": frames})


def replicas_of(ours: Endpoint) -> list[Json]:
    replicas: list[Json] = ours.ask_for("/kunserve/status")["replicas"]
    return replicas


def check_books_and_granules(replica: Json) -> None:
    check_books(replica)
    granules = -(-replica["capacity_tokens"] // replica["slots"]["per_granule"])
    assert replica["frames"]["kv"] == (granules + 1) * replica["frames"]["per_granule"]


def resize_to_what_it_was(pair: Pair) -> None:
    for before, now in zip(pair.server.at_start, replicas_of(pair.ours), strict=True):
        if missing := before["frames"]["kv"] - now["frames"]["kv"]:
            assert resize(pair.ours, before["id"], missing).status_code == requests.codes.ok


def test_answers_stay_equal_while_capacity_changes(pair: Pair) -> None:
    expected = pair.stock_server.answers_to(QUESTIONS)
    chance = random.Random(7)
    replica_count = len(replicas_of(pair.ours))
    outcomes: list[int] = []
    tokens = Counter[str]()
    answered = threading.Semaphore(0)
    stop = threading.Event()

    def has_met_all() -> bool:
        """Whether enough resizes have succeeded for the test to mean anything, and tokens were in the way."""
        return outcomes.count(200) >= RESIZES // 4 and tokens["moved"] > 0 and tokens["evicted"] > 0

    def change_capacity() -> None:
        ends_at_s = time.monotonic() + DEADLINE_S
        while len(outcomes) < RESIZES or not has_met_all():
            assert time.monotonic() < ends_at_s, f"not within {DEADLINE_S:g} s: {outcomes}, {tokens}"
            for _ in range(ANSWERS_PER_RESIZE):
                assert answered.acquire(timeout=CALL_DEADLINE_S), "the replicas stopped answering"
            # Between a third and four thirds of what the load would fill, so that tokens are moved and evicted.
            replica = replicas_of(pair.ours)[chance.randrange(replica_count)]
            granules = replica["frames"]["kv"] // replica["frames"]["per_granule"] - 1
            wanted = chance.randrange(LEAST_TOKENS, MOST_TOKENS) // replica["slots"]["per_granule"]
            if wanted == granules:
                continue
            answer = resize(pair.ours, replica["id"], (wanted - granules) * replica["frames"]["per_granule"])
            assert answer.status_code in (200, 409), answer.text
            outcomes.append(answer.status_code)
            message = answer.json().get("message", "")
            for what, pattern in (("moved", r"(\d+) tokens moved"), ("evicted", r"(\d+) evicted")):
                if match := re.search(pattern, message):
                    tokens[what] += int(match[1])

    def serve(seed: int) -> int:
        order = random.Random(seed)
        wrong = 0
        while not stop.is_set():
            index = order.randrange(len(QUESTIONS))
            wrong += ask(pair.ours, QUESTIONS[index]) != expected[index]
            answered.release()
        return wrong

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        clients = [pool.submit(serve, seed) for seed in range(CLIENTS)]
        try:
            pool.submit(change_capacity).result()
        finally:
            stop.set()
        assert [client.result() for client in clients] == [0] * CLIENTS
    for replica in replicas_of(pair.ours):
        check_books_and_granules(replica)
    resize_to_what_it_was(pair)


def test_capacity_is_shown_everywhere(pair: Pair) -> None:
    before = replicas_of(pair.ours)[0]
    answer = resize(pair.ours, 0, -before["frames"]["per_granule"])
    assert answer.status_code == 200, answer.text
    capacity = replicas_of(pair.ours)[0]["capacity_tokens"]
    assert 0 < before["capacity_tokens"] - capacity <= before["slots"]["per_granule"]
    assert answer.json()["replica"]["capacity_tokens"] == capacity
    info = pair.ours.ask_for("/server_info")
    assert info["max_total_num_tokens"] == capacity
    assert capacity in [state["max_total_num_tokens"] for state in info["internal_states"]]
    metrics = pair.ours.get("/metrics").text
    shown = [line for line in metrics.splitlines() if line.startswith("sglang:max_total_num_tokens{")]
    assert any(float(line.rsplit(" ", 1)[1]) == capacity for line in shown), shown
    resize_to_what_it_was(pair)


def test_what_cannot_be_is_refused_and_changes_nothing(pair: Pair) -> None:
    before = replicas_of(pair.ours)
    step = before[0]["frames"]["per_granule"]
    wrong = [
        (0, step + 1, 400, f"multiples of {step}"),
        (0, 0, 400, "frames"),
        (len(before), step, 400, f"accepted: 0 to {len(before) - 1}"),
        (0, step * 10_000, 409, "free"),
        (0, -step * 10_000, 409, "has to keep"),
    ]
    for replica, frames, status, part in wrong:
        answer = resize(pair.ours, replica, frames)
        assert answer.status_code == status, answer.text
        assert part in answer.json()["error"]["message"]
    for body in (
        b"[]",
        b"{",
        b'{"replica": 0}',
        b'{"replica": true, "frames": 8}',
        b'{"replica": 0, "frames": 8, "x": 1}',
    ):
        answer = pair.ours.post_raw("/kunserve/kv", body)
        assert answer.status_code == 400, body
        assert "accepted" in answer.json()["error"]["message"]
    after = replicas_of(pair.ours)
    assert [replica["frames"] for replica in after] == [replica["frames"] for replica in before]
