"""For the tests of merging and parting: a server with questions and what it answered before any drop, and clients that
ask while the replicas change."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
from _http import Endpoint, Json
from _questions import CLIENTS, Question, ask, ask_all
from _servers import RunningServer, check_books

from servers.server import ServerProcess
from waiting import wait_until

HEALTH_EVERY_S = 1.0  # it takes all replicas a batch


@dataclass(frozen=True)
class Served:
    """A running server and questions to it."""

    server: RunningServer
    questions: list[Question]
    _log_begin: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.server.answers_to(self.questions)  # while nothing is merged
        object.__setattr__(self, "_log_begin", len(self.server.log()))

    @property
    def process(self) -> ServerProcess:
        return self.server.process

    @property
    def endpoint(self) -> Endpoint:
        return self.server.endpoint

    @property
    def model(self) -> Path:
        return self.server.model

    @property
    def at_start(self) -> list[Json]:
        """The status of the replicas before the first test."""
        return self.server.at_start

    @property
    def expected(self) -> list[list[int]]:
        """What the questions were answered before any drop."""
        return self.server.answers_to(self.questions)

    @property
    def replicas(self) -> range:
        return range(len(self.at_start))

    def check_answers_of_all(self) -> None:
        """Each replica answers every question as before any drop."""
        for replica in self.replicas:
            asked = [replace(question, replica=replica) for question in self.questions]
            assert ask_all(self.endpoint, asked) == self.expected

    def check_merging(self) -> None:
        """Replicas 0 and 1 merge and come apart, and answer as before all the time."""
        self.check_answers_of_all()
        self.drop({"groups": [[0, 1]]})
        self.check_answers_of_all()
        assert self.endpoint.post("/kunserve/check").json()["ok"]
        self.restore()
        self.check_answers_of_all()

    def status(self) -> Json:
        return self.server.status()

    def plan_and_memory(self) -> Json:
        """The status without figures of the load: an answer may be here before the replica that gave it has reported
        that it is idle."""
        status = self.status()
        kept = {key: status[key] for key in ("state", "epoch", "hosts", "homes", "transition")}
        memory = ("frames", "slots", "capacity_tokens")
        return {**kept, "replicas": [{key: replica[key] for key in memory} for replica in status["replicas"]]}

    def wait_for_links(self) -> None:
        """Until all links between replicas have been measured."""

        def speeds() -> list[float | None]:
            return [speed for each in self.status()["replicas"] for speed in each["link_bytes_per_second"].values()]

        count = len(self.replicas) * (len(self.replicas) - 1)
        wait_until(lambda: len(speeds()) == count and None not in speeds(), "all links are measured")
        assert min(speed or 0.0 for speed in speeds()) > 0.0

    def slots(self, replica: int) -> dict[str, int]:
        slots: dict[str, int] = self.status()["replicas"][replica]["slots"]
        return slots

    def orders_sent(self) -> list[int]:
        """Of each replica, to attend to KV elsewhere."""
        return [sum(replica["remote_attention"]["orders_sent"].values()) for replica in self.status()["replicas"]]

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
        """No process of the server has met an error since this was made, a leak above all. Tests before it may have
        killed processes."""
        lines = self.server.log()[self._log_begin :].splitlines()
        bad = [line for line in lines if "Traceback" in line or "leak" in line.lower()]
        assert not bad, bad


class Clients:
    """Clients that ask random questions until the block ends, and count the answers by what went on when they were
    asked for and when they came. An answer other than the expected one fails the block, and so does /health, which is
    asked when a phase begins and every second.

    `asks` returns the tokens, or None for an answer that is right all the same; `watches_health` is False where /health
    has to fail."""

    def __init__(
        self,
        served: Served,
        clients: int = CLIENTS,
        asks: Callable[[Endpoint, Question], list[int] | None] = ask,
        *,
        watches_health: bool = True,
    ) -> None:
        self._phase = "parted"
        self.answers: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self._served = served
        self._clients = clients
        self._asks = asks
        self._watches_health = watches_health
        self._stop = threading.Event()
        self._look = threading.Event()  # at /health
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(clients + 1)
        self._futures: list[Future[None]] = []

    @property
    def phase(self) -> str:
        """What goes on."""
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase
        self._look.set()

    def __enter__(self) -> Clients:
        self._futures = [self._pool.submit(self._ask, seed) for seed in range(self._clients)]
        if self._watches_health:
            self._futures.append(self._pool.submit(self._watch_health))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._look.set()
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
        wait_until(lambda: self.answers[key] >= wanted or not self.are_asking, "answers come")

    @property
    def are_asking(self) -> bool:
        """Whether none has failed."""
        return not any(each.done() for each in self._futures)

    def began_and_ended(self, began: str, ended: str) -> int:
        """Answers that began while a phase of that kind was on and ended in one of that other kind."""
        return sum(n for (one, other), n in self.answers.items() if one.startswith(began) and other.startswith(ended))

    def _ask(self, seed: int) -> None:
        order = random.Random(seed)
        while not self._stop.is_set():
            index = order.randrange(len(self._served.questions))
            began = self.phase
            tokens = self._asks(self._served.endpoint, self._served.questions[index])
            with self._lock:
                self.answers[began, self.phase] += 1
                if tokens is not None and tokens != self._served.expected[index]:
                    self.wrong.append(f"question {index} from {began} to {self.phase}")

    def _watch_health(self) -> None:
        while not self._stop.is_set():
            assert self._served.endpoint.get("/health").status_code == requests.codes.ok, self.phase
            self._look.wait(HEALTH_EVERY_S)
            self._look.clear()
