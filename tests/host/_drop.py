"""For the tests of merging and parting: a server, questions with the answers from before any drop, and clients that ask
while the replicas change."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
from _http import CALL_DEADLINE_S, Endpoint

from servers.server import HOST, ServerProcess, find_free_port

START_DEADLINE_S = 400.0
BASE_TOKENS = 2048
CLIENTS = 12
# SGLang's own leak checks, also while requests run, and at every page.
CHECKS = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
_POLL_S = 0.02

Json = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A prompt in tokens, and how many tokens to answer. `replica` is who has to answer, None for anybody."""

    prompt: tuple[int, ...]
    answer_tokens: int
    replica: int | None = None

    def body(self, **options: Any) -> Json:
        sampling = {"temperature": 0, "max_new_tokens": self.answer_tokens, "ignore_eos": True}
        where = {} if self.replica is None else {"routed_dp_rank": self.replica}
        return {"input_ids": self.prompt, "sampling_params": sampling, **where, **options}


def make_prompt(chance: random.Random, tokens: int) -> tuple[int, ...]:
    return tuple(chance.randrange(300, 2000) for _ in range(tokens))


def make_questions(count: int, seed: int) -> list[Question]:
    """Prompts of 4 to 320 tokens, half of them with one of three prefixes in common; answers of 4 to 60 tokens."""
    chance = random.Random(seed)
    prefixes = [make_prompt(chance, length) for length in (40, 90, 160)]
    questions = []
    for _ in range(count):
        prefix = chance.choice(prefixes) if chance.random() < 0.5 else ()
        prompt = prefix + make_prompt(chance, int(4 * 40 ** chance.random()))
        questions.append(Question(prompt, chance.randrange(4, 60)))
    return questions


def ask(endpoint: Endpoint, question: Question) -> list[int]:
    answer: Json = endpoint.ask("/generate", question.body())
    tokens: list[int] = answer["output_ids"]
    assert len(tokens) == question.answer_tokens, answer["meta_info"]["finish_reason"]
    return tokens


def ask_all(endpoint: Endpoint, questions: Sequence[Question]) -> list[list[int]]:
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(lambda question: ask(endpoint, question), questions))


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = CALL_DEADLINE_S) -> None:
    ends_at_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends_at_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(_POLL_S)


def server_process(
    model: Path, *flags: str, base_tokens: int = BASE_TOKENS, env: Mapping[str, str] | None = None
) -> ServerProcess:
    """A server whose transitions are ordered by hand, and whose memory checks are strict. Its log lies beside the
    model."""
    port = find_free_port()
    command = [
        *(sys.executable, "-m", "kunserve_sgl.launch_server", "--model-path", str(model), "--host", HOST),
        *("--port", str(port), "--dtype", "float32", "--kunserve", "manual", "--context-length", "1024"),
        *("--max-total-tokens", str(base_tokens), "--max-running-requests", "32", "--enable-metrics"),
        *("--constrained-json-disable-any-whitespace", *flags),
    ]
    return ServerProcess(
        command, port=port, env={"OMP_NUM_THREADS": "1", **CHECKS, **(env or {})}, log_path=model / f"{port}.log"
    )


@dataclass
class Served:
    """A running server, its state at the start, and what it answered to `questions` then."""

    process: ServerProcess
    model: Path
    questions: list[Question]
    key: str | None = None  # for the routes that ask for one
    endpoint: Endpoint = field(init=False)
    at_start: list[Json] = field(init=False)
    expected: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.process.wait_healthy(START_DEADLINE_S)
        self.endpoint = Endpoint(self.process.base_url, self.key)
        wait_until(lambda: bool(self.status()["hosts"]), "all replicas have reported")
        self.at_start = self.status()["replicas"]
        self.expected = ask_all(self.endpoint, self.questions)

    @property
    def replicas(self) -> range:
        return range(len(self.at_start))

    @property
    def layers(self) -> int:
        return len(self.status()["hosts"][0])

    def status(self) -> Json:
        answer = self.endpoint.get("/kunserve/status")
        assert answer.status_code == requests.codes.ok, answer.text
        status: Json = answer.json()
        return status

    def plan_and_memory(self) -> Json:
        """The status without figures of the load: an answer may be here before the replica that gave it has reported
        that it is idle."""
        status = self.status()
        kept = {key: status[key] for key in ("state", "epoch", "hosts", "homes", "transition")}
        memory = ("frames", "slots", "capacity_tokens")
        return {**kept, "replicas": [{key: replica[key] for key in memory} for replica in status["replicas"]]}

    def slots(self, replica: int) -> dict[str, int]:
        slots: dict[str, int] = self.status()["replicas"][replica]["slots"]
        return slots

    def drop(self, body: Json) -> Json:
        """A drop that must succeed, and what the status must say then."""
        before = self.status()
        answer: Json = self.endpoint.ask("/kunserve/drop", body)
        assert answer["success"], answer
        assert answer["freed_bytes"] > 0
        assert answer["extension_slots"] > 0
        after = self.status()
        assert after["epoch"] == answer["epoch"] == before["epoch"] + 1
        for group in body["groups"]:
            for replica in group:
                assert after["replicas"][replica]["state"] == "merged"
                assert after["replicas"][replica]["group"] == sorted(group)
        for replica, hosts in enumerate(after["hosts"]):
            assert set(hosts) <= set(after["replicas"][replica]["group"])
            check_books(after["replicas"][replica])
        gained = sum(replica["capacity_tokens"] for replica in after["replicas"])
        gained -= sum(replica["capacity_tokens"] for replica in before["replicas"])
        assert gained == answer["extension_slots"]
        return answer

    def restore(self, groups: Sequence[Sequence[int]] | None = None) -> Json:
        """A restore that must succeed."""
        answer: Json = self.endpoint.ask("/kunserve/restore", {} if groups is None else {"groups": groups})
        assert answer["success"], answer
        return answer

    def check_as_at_start(self) -> None:
        """Everything is as it was before the first drop, also what every question is answered."""
        self.endpoint.flush_cache()
        status = self.status()
        assert status["state"] == "normal"
        assert status["rejected_messages"] == {}
        assert status["hosts"] == [[replica] * len(hosts) for replica, hosts in enumerate(status["hosts"])]
        for before, after in zip(self.at_start, status["replicas"], strict=True):
            assert after["frames"] == before["frames"]
            assert after["capacity_tokens"] == before["capacity_tokens"]
            assert after["slots"] == {**before["slots"], "used": 0, "cached": 0}
        assert ask_all(self.endpoint, self.questions) == self.expected
        self.check_log()

    def check_log(self) -> None:
        """No process of the server has met an error, a leak above all."""
        text = self.process.log_path.read_text(errors="replace")
        bad = [line for line in text.splitlines() if "Traceback" in line or "leak" in line.lower()]
        assert not bad, bad


def check_books(replica: Json) -> None:
    frames = replica["frames"]
    assert frames["parameters"] + frames["kv"] + frames["lent"] + frames["free"] == frames["total"]
    assert replica["slots"]["base"] + replica["slots"]["extension"] == replica["capacity_tokens"]


class Clients:
    """Clients that ask random questions until the block ends, and count the answers by what went on when they were
    asked for and when they came. An answer other than the expected one fails the block, and so does /health."""

    def __init__(self, served: Served, clients: int = CLIENTS) -> None:
        self.phase = "parted"
        self.answers: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self._served = served
        self._clients = clients
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(clients + 1)
        self._futures: list[Future[None]] = []

    def __enter__(self) -> Clients:
        self._futures = [self._pool.submit(self._ask, seed) for seed in range(self._clients)]
        self._futures.append(self._pool.submit(self._watch_health))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown()
        if kind is None:
            for client in self._futures:
                client.result()
            assert not self.wrong, f"{len(self.wrong)} of {sum(self.answers.values())} answers differ: {self.wrong[:5]}"

    def during(self, phase: str, action: Callable[[], Any]) -> Any:
        """What `action` returns; answers are counted under `phase` while it runs."""
        before, self.phase = self.phase, phase
        try:
            return action()
        finally:
            self.phase = before

    def wait_for_answers(self, count: int) -> None:
        """Until so many more have been asked for and come within the present phase."""
        key = (self.phase, self.phase)
        wanted = self.answers[key] + count
        wait_until(lambda: self.answers[key] >= wanted or any(each.done() for each in self._futures), "answers come")

    def began_and_ended(self, began: str, ended: str) -> int:
        """Answers that began while a phase of that kind was on and ended in one of that other kind."""
        return sum(n for (one, other), n in self.answers.items() if one.startswith(began) and other.startswith(ended))

    def _ask(self, seed: int) -> None:
        order = random.Random(seed)
        while not self._stop.is_set():
            index = order.randrange(len(self._served.questions))
            began = self.phase
            tokens = ask(self._served.endpoint, self._served.questions[index])
            with self._lock:
                self.answers[began, self.phase] += 1
                if tokens != self._served.expected[index]:
                    self.wrong.append(f"question {index} from {began} to {self.phase}")

    def _watch_health(self) -> None:
        while not self._stop.is_set():
            assert self._served.endpoint.get("/health").status_code == requests.codes.ok, self.phase
            self._stop.wait(0.2)
