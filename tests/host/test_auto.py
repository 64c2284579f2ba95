"""Automatic mode on a real server: waves of requests that do not fit, and what the server does about them by itself."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from _automatic import Burst, Decisions, wait_with_slower_batches
from _deployments import AUTO, using
from _deployments import AUTO_BASE_TOKENS as BASE_TOKENS
from _deployments import AUTO_MIN_STAY_S as MIN_STAY_S
from _http import CALL_DEADLINE_S, Endpoint, Json
from _questions import Question, ask, make_prompt
from _servers import RunningServer

from long_run.answers import Answer, Api, Outcome, Request, ended
from long_run.requests import KINDS, Sizes
from waiting import wait_until

pytestmark = [pytest.mark.server, using(AUTO)]

REQUESTS = 40  # of 100 to 290 tokens each: several times what both replicas have room for
WAVES = 3
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


def test_waves_are_absorbed_and_the_memory_comes_back(server: RunningServer) -> None:
    endpoint, decisions = server.endpoint, Decisions(server)
    endpoint.flush_cache()
    questions = make_questions()
    expected = [ask(endpoint, question) for question in questions]
    metrics_before, at_start = metrics_of(endpoint), server.status()
    assert decisions.drops_and_restores() == [], "one request at a time is no reason to drop"
    assert at_start["state"] == "normal"

    for wave in range(1, WAVES + 1):
        began_s = time.monotonic()
        with Burst(endpoint, questions) as clients:
            wait_with_slower_batches(endpoint, lambda wave=wave: decisions.has_dropped(wave), "dropped in the wave")
        for answers, right in zip(clients.answers(), expected, strict=True):
            assert answers == [right] * len(answers)
        wait_until(decisions.has_restored, "restored by itself")
        assert time.monotonic() - began_s >= MIN_STAY_S
        assert decisions.drops_and_restores() == ["drop", "restore"] * wave, "it dropped in each wave, without flapping"

    # Longer than any stay: what happens now would happen for ever.
    time.sleep(LONGEST_STAY_S)
    assert decisions.drops_and_restores() == ["drop", "restore"] * WAVES
    endpoint.flush_cache()
    # What was freed to be lent is used again; figures are as the replicas have reported them last.
    wait_until(lambda: has_memory_of(server.status(), at_start), "all memory is where it was")
    wait_until(lambda: metrics_of(endpoint)["kunserve:epoch", ""] == server.status()["epoch"], "metrics are new")
    at_end = server.status()
    assert at_end["hosts"] == at_start["hosts"]
    assert all(replica["load_reports"]["count"] > 0 for replica in at_end["replicas"])
    assert "Traceback" not in decisions.log()
    found = re.search(r"auto: drop .*replica \d needs \d+ tokens now .* has \d+.*the pipeline costs", decisions.log())
    assert found is not None
    check_metrics(metrics_before, metrics_of(endpoint), at_end["epoch"] - at_start["epoch"], decisions.failures("drop"))


def has_memory_of(status: Json, at_start: Json) -> bool:
    """Whether each replica has as much memory as it had, and none of it is in use."""
    return all(
        after["frames"] == before["frames"]
        and after["capacity_tokens"] == before["capacity_tokens"] == BASE_TOKENS
        and after["slots"] == {**before["slots"], "used": 0, "cached": 0}
        for before, after in zip(at_start["replicas"], status["replicas"], strict=True)
    )


def check_metrics(before: Metrics, after: Metrics, plans: int, failed_drops: int) -> None:
    """They tell what happened in the waves, in so many new plans. While only one replica has requests the other may
    lend to it. KV that others read goes to them where that pays, as measured, and comes home by restores of its own."""

    def grown(name: str, labels: str = "") -> float:
        return after.get((name, labels), 0) - before.get((name, labels), 0)

    def succeeded(kind: str) -> float:
        return grown("kunserve:transitions_total", f'kind="{kind}",outcome="succeeded"')

    drops, lends, restores, exchanges = map(succeeded, ("drop", "lend", "restore", "exchange"))
    homeward = restores - drops - lends
    resizes = sum(grown("kunserve:decisions_total", f'decision="{act}"') for act in ("free", "reuse"))
    assert drops >= WAVES
    assert homeward == 0 or (homeward > 0 and exchanges > 0)
    assert 0 <= plans - (restores + drops + lends + exchanges) <= resizes, "a resize may be refused"
    assert after["kunserve:state", 'state="normal"'] == 1
    assert after["kunserve:state", 'state="merged"'] == 0
    assert grown("kunserve:dropped_bytes_total") == grown("kunserve:restored_bytes_total") > 0
    assert grown("kunserve:phase_seconds_count", 'kind="drop",phase="release"') == drops
    # The end of a loan is counted as a restore, and loads nothing.
    assert grown("kunserve:phase_seconds_count", 'kind="restore",phase="load"') == drops + homeward
    assert grown("kunserve:decisions_total", 'decision="drop"') == drops + failed_drops
    for replica in (0, 1):
        who = f'replica="{replica}"'
        assert after["kunserve:capacity_tokens", who] == BASE_TOKENS
        assert after["kunserve:demand_tokens", f'part="queued",{who}'] == 0
        assert after["kunserve:group_replicas", who] == 1
        assert after["kunserve:remote_tokens", who] == 0
        # Who has dropped nothing sends none, and serves those of the other.
        assert grown("kunserve:batches_sent_total", who) + grown("kunserve:batches_served_total", who) > 0


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

        with ThreadPoolExecutor(len(CHATS)) as pool:
            try:
                with Burst(endpoint, make_questions()) as clients:
                    wait_with_slower_batches(endpoint, decisions.has_dropped, "dropped in the burst")
                    chatting = [pool.submit(chat_until_restored, kind) for kind in CHATS]
                clients.answers()
                wait_until(decisions.has_restored, "restored although clients chat")
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
