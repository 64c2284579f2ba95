"""The KV cache of a serving replica grows and shrinks under load: answers stay stock's, the books balance."""

from __future__ import annotations

import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from servers.server import HOST, ServerProcess, find_free_port

pytestmark = pytest.mark.server

START_DEADLINE_S = 400.0
CALL_DEADLINE_S = 120.0
CLIENTS = 32
RESIZES = 50
ANSWERS_PER_RESIZE = 4
BASE_TOKENS = 3072
RESERVE_FRAMES = 512
LEAST_TOKENS, MOST_TOKENS = 1024, 4096
# SGLang's own leak checks, also while requests run, and at every page.
CHECKS = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}


@dataclass(frozen=True)
class Question:
    prompt: tuple[int, ...]
    answer_tokens: int


def make_questions(count: int, seed: int) -> list[Question]:
    """Prompts of 4 to 400 tokens, half of them with one of three long prefixes in common."""
    chance = random.Random(seed)
    prefixes = [[chance.randrange(300, 2000) for _ in range(length)] for length in (40, 120, 250)]
    questions = []
    for _ in range(count):
        prompt = list(chance.choice(prefixes)) if chance.random() < 0.5 else []
        prompt += [chance.randrange(300, 2000) for _ in range(int(4 * 40 ** chance.random()))]
        questions.append(Question(tuple(prompt), chance.randrange(4, 60)))
    return questions


def ask(base_url: str, question: Question) -> list[int]:
    body = {
        "input_ids": question.prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": question.answer_tokens, "ignore_eos": True},
    }
    answer = requests.post(f"{base_url}/generate", json=body, timeout=CALL_DEADLINE_S)
    answer.raise_for_status()
    tokens: list[int] = answer.json()["output_ids"]
    assert len(tokens) == question.answer_tokens
    return tokens


def resize(base_url: str, replica: int, frames: int) -> requests.Response:
    body = {"replica": replica, "frames": frames}
    return requests.post(f"{base_url}/kunserve/kv", json=body, timeout=CALL_DEADLINE_S)


def replicas_of(base_url: str) -> list[dict[str, Any]]:
    answer = requests.get(f"{base_url}/kunserve/status", timeout=CALL_DEADLINE_S)
    answer.raise_for_status()
    replicas: list[dict[str, Any]] = answer.json()["replicas"]
    return replicas


def check_books(replica: dict[str, Any]) -> None:
    frames, slots = replica["frames"], replica["slots"]
    assert frames["parameters"] + frames["kv"] + frames["lent"] + frames["free"] == frames["total"]
    assert slots["base"] + slots["extension"] == replica["capacity_tokens"]
    granules = -(-replica["capacity_tokens"] // slots["per_granule"])
    assert frames["kv"] == (granules + 1) * frames["per_granule"]


def start(module: str, model: Path, *flags: str) -> ServerProcess:
    port = find_free_port()
    command = [
        *(sys.executable, "-m", module, "--model-path", str(model), "--host", HOST, "--port", str(port)),
        *("--dtype", "float32", "--max-total-tokens", str(BASE_TOKENS), "--max-running-requests", str(CLIENTS)),
        *("--context-length", "1024", "--chunked-prefill-size", "256", "--enable-metrics"),
        *flags,
    ]
    return ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1", **CHECKS})


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return make_questions(80, seed=5)


@pytest.fixture(scope="module")
def expected(tiny_model: Path, questions: list[Question]) -> list[list[int]]:
    """What stock SGLang answers, one question at a time."""
    with start("sglang.launch_server", tiny_model, "--sleep-on-idle") as stock:
        stock.wait_healthy(START_DEADLINE_S)
        return [ask(stock.base_url, question) for question in questions]


@pytest.fixture(
    scope="module",
    params=[
        ("--dp-size", "2", "--kunserve", "manual"),
        ("--tp-size", "2", "--kunserve", "manual", "--page-size", "16"),
    ],
    ids=["replicas", "ranks-and-pages"],
)
def server(request: pytest.FixtureRequest, tiny_model: Path, expected: list[list[int]]) -> Iterator[ServerProcess]:
    flags = (*request.param, "--kunserve-reserve-frames", str(RESERVE_FRAMES))
    with start("kunserve_sgl.launch_server", tiny_model, *flags) as server:
        server.wait_healthy(START_DEADLINE_S)
        yield server


def test_answers_stay_equal_while_capacity_changes(
    server: ServerProcess, questions: list[Question], expected: list[list[int]]
) -> None:
    chance = random.Random(7)
    replica_count = len(replicas_of(server.base_url))
    outcomes: list[int] = []
    tokens = Counter[str]()
    answered = threading.Semaphore(0)
    stop = threading.Event()

    def change_capacity() -> None:
        while len(outcomes) < RESIZES:
            for _ in range(ANSWERS_PER_RESIZE):
                assert answered.acquire(timeout=CALL_DEADLINE_S), "the replicas stopped answering"
            # Between a third and four thirds of what the load would fill, so that tokens are moved and evicted.
            replica = replicas_of(server.base_url)[chance.randrange(replica_count)]
            granules = replica["frames"]["kv"] // replica["frames"]["per_granule"] - 1
            wanted = chance.randrange(LEAST_TOKENS, MOST_TOKENS) // replica["slots"]["per_granule"]
            if wanted == granules:
                continue
            answer = resize(server.base_url, replica["id"], (wanted - granules) * replica["frames"]["per_granule"])
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
            index = order.randrange(len(questions))
            wrong += ask(server.base_url, questions[index]) != expected[index]
            answered.release()
        return wrong

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        clients = [pool.submit(serve, seed) for seed in range(CLIENTS)]
        try:
            pool.submit(change_capacity).result()
        finally:
            stop.set()
        assert [client.result() for client in clients] == [0] * CLIENTS
    assert outcomes.count(200) >= RESIZES // 4, "too few resizes succeeded for the test to mean anything"
    assert tokens["moved"] > 0, "no live token was in the way of a resize"
    assert tokens["evicted"] > 0, "no cached token was in the way of a resize"
    for replica in replicas_of(server.base_url):
        check_books(replica)


def test_capacity_is_shown_everywhere(server: ServerProcess) -> None:
    before = replicas_of(server.base_url)[0]
    answer = resize(server.base_url, 0, -before["frames"]["per_granule"])
    assert answer.status_code == 200, answer.text
    capacity = replicas_of(server.base_url)[0]["capacity_tokens"]
    assert 0 < before["capacity_tokens"] - capacity <= before["slots"]["per_granule"]
    assert answer.json()["replica"]["capacity_tokens"] == capacity
    info = requests.get(f"{server.base_url}/server_info", timeout=CALL_DEADLINE_S).json()
    assert info["max_total_num_tokens"] == capacity
    assert capacity in [state["max_total_num_tokens"] for state in info["internal_states"]]
    metrics = requests.get(f"{server.base_url}/metrics", timeout=CALL_DEADLINE_S).text
    shown = [line for line in metrics.splitlines() if line.startswith("sglang:max_total_num_tokens{")]
    assert any(float(line.rsplit(" ", 1)[1]) == capacity for line in shown), shown


def test_what_cannot_be_is_refused_and_changes_nothing(server: ServerProcess) -> None:
    before = replicas_of(server.base_url)
    step = before[0]["frames"]["per_granule"]
    wrong = [
        (0, step + 1, 400, f"multiples of {step}"),
        (0, 0, 400, "frames"),
        (len(before), step, 400, f"accepted: 0 to {len(before) - 1}"),
        (0, step * 10_000, 409, "free"),
        (0, -step * 10_000, 409, "has to keep"),
    ]
    for replica, frames, status, part in wrong:
        answer = resize(server.base_url, replica, frames)
        assert answer.status_code == status, answer.text
        assert part in answer.json()["error"]["message"]
    for body in (
        b"[]",
        b"{",
        b'{"replica": 0}',
        b'{"replica": true, "frames": 8}',
        b'{"replica": 0, "frames": 8, "x": 1}',
    ):
        answer = requests.post(f"{server.base_url}/kunserve/kv", data=body, timeout=CALL_DEADLINE_S)
        assert answer.status_code == 400, body
        assert "accepted" in answer.json()["error"]["message"]
    after = replicas_of(server.base_url)
    assert [replica["frames"] for replica in after] == [replica["frames"] for replica in before]
