"""The clients of a long run: they learn the answers of an idle server, and ask for them again under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from random import Random

from long_run.answers import Answer, Api, Request, Result, ended
from long_run.requests import KINDS, Sizes
from long_run.watch import NORMAL, status_of, wait_normal
from servers.server import ServerError

_NORMAL_DEADLINE_S = 120.0
_LEARN_TRIES = 5
COOL_DOWN_S = 5.0  # of servers in automatic mode
_LIGHT_TOKENS = 150  # the longest known answer that is asked for in a quiet time
_SILENCE_POLL_S = 0.2
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.0, 0.5  # of a client in a quiet time, between an answer and its next request


class Load:
    """The clients of one server, and what they know: requests with the answers of the idle server."""

    def __init__(
        self,
        base_url: str,
        *,
        sizes: Sizes,
        answers: int,
        clients: int,
        deadline_s: float,
        seed: int,
        clock: Callable[[], float],
    ) -> None:
        """`answers` are learnt of each kind; `clients` ask in a burst, with `deadline_s` for each answer."""
        self.results: list[Result] = []
        self.clock = clock
        self._base_url = base_url
        self._answers = answers
        self._clients = clients
        self._deadline_s = deadline_s
        self._seed = seed
        self._sizes = sizes
        self._known: dict[str, list[tuple[Request, Answer]]] = {}
        self._light: list[str] = []
        self._lock = threading.Lock()
        self._may_ask = threading.Event()
        self._may_ask.set()

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Clients of a burst ask nothing new until the end of the block."""
        self._may_ask.clear()
        try:
            yield
        finally:
            self._may_ask.set()

    def learn(self, on_answer: Callable[[], object]) -> None:
        """Ask the idle server, one request after the other.

        Raises:
            ServerError: it gave no answer to one of them.
        """
        with Api(self._base_url, self._deadline_s) as api:
            for name, kind in KINDS.items():
                known = self._known.setdefault(name, [])
                for place in range(_LEARN_TRIES * self._answers):
                    request = kind.make(Random(f"{self._seed} {name} {place}"), self._sizes)
                    if not request.is_known or len(known) == self._answers:
                        break
                    if (answer := self._answer_parted(api, request)) is not None:
                        known.append((request, answer))
                        on_answer()
                else:
                    raise ServerError(f"the idle server merged its replicas for most of {name}; try another --seed")
        self._light = [name for name, kind in KINDS.items() if kind.is_light and self._short(name)]
        if not self._light:
            raise ServerError(f"no answer to a chat has at most {_LIGHT_TOKENS} tokens; try another --seed")

    def _answer_parted(self, api: Api, request: Request) -> Answer | None:
        """The answer of a server that is not merged; None where it merged for it: a random model may not find an end,
        and an answer that needs all of the memory is a reason to drop."""
        epoch = status_of(self._base_url)["epoch"]
        try:
            answer = request.call(api)
        except Exception as error:
            raise ServerError(f"the idle server did not answer {request.kind}: {error}") from error
        status = status_of(self._base_url)
        if (status["state"], status["epoch"]) == (NORMAL, epoch):
            return answer
        wait_normal(self._base_url, _NORMAL_DEADLINE_S)
        # A drop sooner after a restore would double the stay that follows.
        time.sleep(COOL_DOWN_S)
        return None

    @property
    def known_requests(self) -> int:
        """How many are asked to learn their answers."""
        chance = Random(0)
        known = sum(kind.make(chance, self._sizes).is_known for kind in KINDS.values())
        return known * self._answers

    def ask_all(self, cycle: int, phase: str) -> None:
        """Ask for all known answers again, one after the other."""
        with Api(self._base_url, self._deadline_s) as api:
            for name, pairs in self._known.items():
                for request, answer in pairs:
                    self._ask(api, cycle, phase, name, request, answer)

    def burst(self, cycle: int, goes_on: Callable[[], bool]) -> None:
        """Many clients that ask one request after the other, as long as `goes_on` says so; returns when the last one
        has its last answer."""
        names = list(KINDS)
        weights = [KINDS[name].weight for name in names]

        def client(place: int) -> None:
            chance = Random(f"{self._seed} burst {cycle} {place}")
            while goes_on():
                if not self._may_ask.wait(_SILENCE_POLL_S):
                    continue
                name = chance.choices(names, weights)[0]
                if self._known[name]:
                    request, answer = chance.choice(self._known[name])
                    self._ask(api, cycle, "burst", name, request, answer)
                else:
                    self._ask(api, cycle, "burst", name, KINDS[name].make(chance, self._sizes), None)

        with Api(self._base_url, self._deadline_s) as api:
            self._run(client, self._clients)

    def quiet(self, cycle: int, ends_s: float) -> None:
        """One to three clients with short chats, one after the other."""

        def client(place: int) -> None:
            chance = Random(f"{self._seed} quiet {cycle} {place}")
            while self.clock() < ends_s:
                name = chance.choice(self._light)
                request, answer = chance.choice(self._short(name))
                self._ask(api, cycle, "quiet", name, request, answer)
                time.sleep(chance.uniform(_LEAST_PAUSE_S, _MOST_PAUSE_S))

        with Api(self._base_url, self._deadline_s) as api:
            self._run(client, Random(f"{self._seed} quiet {cycle}").randrange(1, 4))

    def _short(self, name: str) -> list[tuple[Request, Answer]]:
        return [pair for pair in self._known[name] if (pair[1].completion_tokens or 0) <= _LIGHT_TOKENS]

    @staticmethod
    def _run(client: Callable[[int], None], clients: int) -> None:
        with ThreadPoolExecutor(clients) as threads:
            for future in [threads.submit(client, place) for place in range(clients)]:
                future.result()

    def _ask(self, api: Api, cycle: int, phase: str, name: str, request: Request, expected: Answer | None) -> None:
        began_s = self.clock()
        outcome, detail = ended(request, api, expected)
        result = Result(name, cycle, phase, began_s, self.clock() - began_s, outcome, detail)
        with self._lock:
            self.results.append(result)
