"""Automatic mode on a real server: waves of requests that do not fit, and what the server does about them by itself."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from _deployments import AUTO, using
from _deployments import AUTO_BASE_TOKENS as BASE_TOKENS
from _deployments import AUTO_MIN_STAY_S as MIN_STAY_S
from _http import CALL_DEADLINE_S, Endpoint
from _questions import Question, ask, make_prompt
from _servers import RunningServer

from long_run.answers import Answer, Api, Outcome, Request, ended
from long_run.requests import KINDS, Sizes
from waiting import wait_until

pytestmark = [pytest.mark.server, using(AUTO)]

REQUESTS = 40  # of 100 to 290 tokens each: several times what both replicas have room for
WAVES = 3
DROP_DEADLINE_S = 120.0
RESTORE_DEADLINE_S = 120.0
# The stay doubles with each drop soon after a restore.
LONGEST_STAY_S = MIN_STAY_S * 2**WAVES
CHATS = ("chat", "chat stream", "chat n", "tools")
LEAST_CHATS = 3  # of each kind
SHORT_TOKENS = 40
_METRIC = re.compile(r"^(kunserve:\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def make_questions() -> list[Question]:
    chance = random.Random(7)
    return [Question(make_prompt(chance, chance.randrange(60, 200)), chance.randrange(40, 90)) for _ in range(REQUESTS)]


Metrics = dict[tuple[str, str], float]


def metrics_of(endpoint: Endpoint) -> Metrics:
    """Our metrics by name and labels, the model's name left out."""
    found = {}
    for name, labels, value in _METRIC.findall(endpoint.get("/metrics").text):
        others = ",".join(sorted(label for label in labels.split(",") if not label.startswith("model_name")))
        found[name, others] = float(value)
    return found


class Decisions:
    """The drops and restores that a server's log tells of from now on."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._begin = len(server.log())

    def log(self) -> str:
        return self._server.log()[self._begin :]

    def kinds(self) -> list[str]:
        """In order; of several in a row, for more and more layers, one. Loans, and that they are taken back, are left
        out: a restore undoes what came last."""
        found, held = [], []
        for kind in re.findall(r"KunServe auto: (lend|drop|restore) ", self.log()):
            last = kind if kind != "restore" else held.pop() if held else "drop"
            if kind != "restore":
                held.append(kind)
            if last != "lend":
                found.append(kind)
        return [kind for kind, _ in itertools.groupby(found)]

    def has_dropped_in(self, wave: int) -> bool:
        """Whether it has dropped as often as there were waves, up to this one."""
        return self.kinds().count("drop") >= wave

    def has_restored(self) -> bool:
        return self.kinds()[-1:] == ["restore"] and self._server.status()["state"] == "normal"


def ask_until(endpoint: Endpoint, is_enough: Callable[[], bool], question: Question) -> list[list[int]]:
    """The answers to a question that is asked again and again, once at least."""
    ends_at_s = time.monotonic() + DROP_DEADLINE_S
    answers = [ask(endpoint, question)]
    while not is_enough():
        assert time.monotonic() < ends_at_s, f"nothing was dropped within {DROP_DEADLINE_S:g} s"
        answers.append(ask(endpoint, question))
    return answers


def test_waves_are_absorbed_and_the_memory_comes_back(server: RunningServer) -> None:
    endpoint, decisions = server.endpoint, Decisions(server)
    endpoint.flush_cache()
    metrics_before = metrics_of(endpoint)
    questions = make_questions()
    expected = [ask(endpoint, question) for question in questions]
    at_start = server.status()
    assert decisions.kinds() == [], "one request at a time is no reason to drop"
    assert at_start["state"] == "normal"

    for wave in range(1, WAVES + 1):
        began_s = time.monotonic()
        # A machine may be through with all requests before a drop would be worth its cost.
        asking = partial(ask_until, endpoint, partial(decisions.has_dropped_in, wave))
        with ThreadPoolExecutor(REQUESTS) as clients:
            for answers, right in zip(clients.map(asking, questions), expected, strict=True):
                assert answers == [right] * len(answers)
        wait_until(decisions.has_restored, "restored by itself", RESTORE_DEADLINE_S)
        assert time.monotonic() - began_s >= MIN_STAY_S
        assert decisions.kinds() == ["drop", "restore"] * wave, "it dropped in each wave, and nothing flapped"

    # Longer than any stay: what happens now would happen for ever.
    time.sleep(LONGEST_STAY_S)
    assert decisions.kinds() == ["drop", "restore"] * WAVES
    endpoint.flush_cache()
    at_end = server.status()
    assert at_end["hosts"] == at_start["hosts"]
    for before, after in zip(at_start["replicas"], at_end["replicas"], strict=True):
        assert after["frames"] == before["frames"]
        assert after["capacity_tokens"] == before["capacity_tokens"] == BASE_TOKENS
        assert after["slots"] == {**before["slots"], "used": 0, "cached": 0}
        assert after["load_reports"]["count"] > 0
    assert "Traceback" not in decisions.log()
    found = re.search(r"auto: drop .*replica \d needs \d+ tokens now .* has 1024.*the pipeline costs", decisions.log())
    assert found is not None
    metrics = metrics_of(endpoint)
    check_metrics(metrics_before, metrics, at_end["epoch"] - at_start["epoch"])
    assert metrics["kunserve:epoch", ""] == at_end["epoch"]


def check_metrics(before: Metrics, after: Metrics, plans: int) -> None:
    """They tell what happened in the waves, in so many new plans. While only one replica has requests the other may
    lend to it."""

    def grown(name: str, labels: str = "") -> float:
        return after.get((name, labels), 0) - before.get((name, labels), 0)

    drops = grown("kunserve:transitions_total", 'kind="drop",outcome="succeeded"')
    lends = grown("kunserve:transitions_total", 'kind="lend",outcome="succeeded"')
    restores = grown("kunserve:transitions_total", 'kind="restore",outcome="succeeded"')
    resizes = sum(grown("kunserve:decisions_total", f'decision="{act}"') for act in ("free", "reuse"))
    assert drops >= WAVES
    assert restores == drops + lends
    assert 0 <= plans - (restores + drops + lends) <= resizes, "a resize may be refused"
    assert after["kunserve:state", 'state="normal"'] == 1
    assert after["kunserve:state", 'state="merged"'] == 0
    assert grown("kunserve:dropped_bytes_total") == grown("kunserve:restored_bytes_total") > 0
    assert grown("kunserve:phase_seconds_count", 'kind="drop",phase="release"') == drops
    # The end of a loan is counted as a restore, and loads nothing.
    assert grown("kunserve:phase_seconds_count", 'kind="restore",phase="load"') == drops
    assert grown("kunserve:decisions_total", 'decision="drop"') == drops
    for replica in (0, 1):
        who = f'replica="{replica}"'
        assert after["kunserve:capacity_tokens", who] == BASE_TOKENS
        assert after["kunserve:demand_tokens", f'part="queued",{who}'] == 0
        assert after["kunserve:group_replicas", who] == 1
        assert after["kunserve:remote_tokens", who] == 0
        assert grown("kunserve:batches_sent_total", who) > 0
        assert grown("kunserve:batches_served_total", who) > 0


def test_clients_that_name_no_limit_do_not_keep_the_memory(server: RunningServer) -> None:
    """OpenAI clients as most are, one of each kind: SGLang fills in all of the merged capacity as the limit of their
    answers."""
    endpoint = server.endpoint
    with Api(endpoint.base_url, CALL_DEADLINE_S) as api:
        chats = {kind: short_chats(api, kind) for kind in CHATS}
        decisions = Decisions(server)
        restored = threading.Event()

        def chat_until_restored(kind: str) -> list[tuple[Outcome, str]]:
            found = []
            for request, answer in itertools.cycle(chats[kind]):
                found.append(ended(request, api, answer))
                if restored.is_set():
                    break
            return found

        with ThreadPoolExecutor(REQUESTS + len(CHATS)) as clients:
            burst = [clients.submit(ask, endpoint, question) for question in make_questions()]
            wait_until(lambda: "drop" in decisions.kinds(), "dropped in the burst")
            chatting = [clients.submit(chat_until_restored, kind) for kind in CHATS]
            try:
                for each in burst:
                    each.result()
                wait_until(decisions.has_restored, "restored although clients chat", RESTORE_DEADLINE_S)
            finally:
                restored.set()
        answers = [answer for each in chatting for answer in each.result()]
        assert [answer for answer in answers if answer[0] is not Outcome.RIGHT] == []


def short_chats(api: Api, kind: str) -> list[tuple[Request, Answer]]:
    """Requests of one of the kinds of the endurance run, with the answers of the idle server."""
    found = []
    for seed in range(12):
        request = KINDS[kind].make(random.Random(seed), Sizes(BASE_TOKENS))
        answer = request.call(api)
        if answer.completion_tokens is not None and answer.completion_tokens <= SHORT_TOKENS:
            found.append((request, answer))
    assert len(found) >= LEAST_CHATS
    return found
