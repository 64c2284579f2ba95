"""Automatic mode as tests see it: what it has decided, and a load that goes on until it acts.

When it acts, and what it does first, is up to the machine: it compares how long requests would wait with what a
transition takes, both as measured, by reports that each come when a replica gets to it.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType

from _http import Endpoint
from _questions import Question, ask
from _servers import RunningServer

from waiting import wait_until

DEADLINE_S = 600.0
_POLL_S = 0.05
# Batches get slower every so often, from the first time to the second one, until something has happened.
_SLOWER_EVERY_S = 5.0
_FIRST_BATCH_S, _LONGEST_BATCH_S = 0.02, 1.0
_ORDERED = re.compile(r"KunServe auto: (free|lend|reuse|drop|restore) \[\[")
_FAILED = re.compile(r"KunServe auto: next (free|lend|reuse|drop|restore) in ")


class Decisions:
    """What a server's log tells of its automatic mode from now on."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._begin = len(server.log())

    def log(self) -> str:
        """What it has printed since."""
        return self._server.log()[self._begin :]

    def ordered(self) -> list[str]:
        """All that was ordered, in order."""
        return _ORDERED.findall(self.log())

    def done(self) -> list[str]:
        """The same without what has failed, which is ordered again."""
        found: list[str] = []
        for line in self.log().splitlines():
            if match := _ORDERED.search(line):
                found.append(match[1])
            elif (match := _FAILED.search(line)) and match[1] in found:
                # One thing at a time: it is the last one of its kind.
                del found[len(found) - 1 - found[::-1].index(match[1])]
        return found

    def failures(self, act: str) -> int:
        """How often something was ordered in vain."""
        return _FAILED.findall(self.log()).count(act)

    def drops_and_restores(self) -> list[str]:
        """In order; of several in a row, for more and more layers, one. Loans, and that they are taken back, are left
        out: a restore undoes what came last."""
        found, held = [], []
        for act in self.done():
            if act in ("lend", "drop"):
                held.append(act)
            undone = held.pop() if act == "restore" and held else act
            if act == "drop" or (act == "restore" and undone != "lend"):
                found.append(act)
        return [act for act, _ in itertools.groupby(found)]

    def has_lent(self) -> bool:
        """Whether memory has been lent, and that is over."""
        return self._is_over(lambda: "lend" in self.done())

    def has_dropped(self, times: int = 1) -> bool:
        """Whether so many drops, with a restore between any two, are over."""
        return self._is_over(lambda: self.drops_and_restores().count("drop") >= times)

    def has_restored(self) -> bool:
        """Whether all that was dropped has come back."""
        return self.drops_and_restores()[-1:] == ["restore"] and self._server.status()["state"] == "normal"

    def _is_over(self, condition: Callable[[], bool]) -> bool:
        """Whether it holds of what is done, and did not only seem to while that was under way."""
        return condition() and self._server.status()["transition"] is None and condition()


@contextmanager
def left_as_it_was(server: RunningServer) -> Iterator[Decisions]:
    """Yields what is decided from now on. Afterwards all memory is where it was."""
    before = server.status()
    yield Decisions(server)

    def is_as_before() -> bool:
        server.endpoint.post("/flush_cache?timeout=1")  # refused while a replica starts
        after = server.status()
        return after["state"] == "normal" and all(
            (new["frames"], new["capacity_tokens"]) == (old["frames"], old["capacity_tokens"])
            for old, new in zip(before["replicas"], after["replicas"], strict=True)
        )

    wait_until(is_as_before, "the memory has come back by itself")
    assert server.endpoint.ask("/kunserve/check", {})["ok"]


def wait_with_slower_batches(endpoint: Endpoint, condition: Callable[[], object], what: str) -> None:
    """Returns when `condition` holds, about something that automatic mode does if requests would wait for long.
    Batches get slower and slower meanwhile, so however fast the machine is, and whatever transitions have taken on it,
    they do in the end."""
    began_s = slower_s = time.monotonic()
    batch_s = 0.0
    try:
        while not condition():
            now_s = time.monotonic()
            assert now_s - began_s < DEADLINE_S, f"not within {DEADLINE_S:g} s: {what}"
            if now_s - slower_s >= _SLOWER_EVERY_S and batch_s < _LONGEST_BATCH_S:
                slower_s, batch_s = now_s, min(_LONGEST_BATCH_S, max(_FIRST_BATCH_S, 2 * batch_s))
                endpoint.ask_to_slow_down(batch_s)
            time.sleep(_POLL_S)
    finally:
        if batch_s:
            endpoint.ask_to_slow_down(None)


class Burst:
    """Clients that each ask a question again and again, once at least, until the block ends, and all have their
    answers."""

    def __init__(self, endpoint: Endpoint, questions: Sequence[Question], most_clients: int | None = None) -> None:
        self._endpoint = endpoint
        self._ends = threading.Event()
        self._pool = ThreadPoolExecutor(most_clients or len(questions))
        self._clients: list[tuple[list[list[int]], Future[None]]] = []
        for question in questions:
            self.add(question)

    def __enter__(self) -> Burst:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._ends.set()
        self._pool.shutdown()

    def add(self, question: Question) -> None:
        """One more client."""
        answers: list[list[int]] = []
        self._clients.append((answers, self._pool.submit(self._ask_again, question, answers)))

    def least_answers(self) -> int:
        """How many each client has got at least. Raises what a client has met."""
        for _, client in self._clients:
            if client.done():
                client.result()
        return min(len(answers) for answers, _ in self._clients)

    def answers(self) -> list[list[list[int]]]:
        """Those of each client, after the block."""
        for _, client in self._clients:
            client.result()
        return [answers for answers, _ in self._clients]

    def _ask_again(self, question: Question, answers: list[list[int]]) -> None:
        while not answers or not self._ends.is_set():
            answers.append(ask(self._endpoint, question))
