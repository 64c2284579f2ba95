"""Automatic mode on a real server: waves of requests that do not fit, and what the server does about them by itself."""

from __future__ import annotations

import itertools
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from _drop import START_DEADLINE_S, Json, Question, ask, make_prompt, server_process, wait_until
from _http import CALL_DEADLINE_S, Endpoint

from long_run.answers import Answer, Api, Outcome, Request, ended
from long_run.ending_model import write_ending_model
from long_run.requests import KINDS, Sizes
from servers.server import ServerProcess

pytestmark = pytest.mark.server

BASE_TOKENS = 1024
REQUESTS = 40  # of 100 to 290 tokens each: several times what both replicas have room for
WAVES = 3
RESTORE_DEADLINE_S = 120.0
MIN_STAY_S = 1.0
COOL_DOWN_S = 2.0
# The stay doubles with each drop soon after a restore.
LONGEST_STAY_S = MIN_STAY_S * 2**WAVES
CHATTING_CLIENTS = 3
SHORT_TOKENS = 40
_METRIC = re.compile(r"^(kunserve:\w+)\{(.*)\} (\S+)$", re.MULTILINE)


def make_questions() -> list[Question]:
    chance = random.Random(7)
    return [Question(make_prompt(chance, chance.randrange(60, 200)), chance.randrange(40, 90)) for _ in range(REQUESTS)]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = tmp_path_factory.mktemp("models") / "ending"
    write_ending_model(model)
    flags = ("--dp-size", "2", "--kunserve", "auto", "--kunserve-min-stay", str(MIN_STAY_S))
    flags += ("--kunserve-cool-down", str(COOL_DOWN_S), "--tool-call-parser", "qwen25")
    # More than merged replicas have memory for: what SGLang fills in as a limit is then all of that.
    flags += ("--context-length", str(4 * BASE_TOKENS))
    with server_process(model, *flags, base_tokens=BASE_TOKENS) as process:
        process.wait_healthy(START_DEADLINE_S)
        yield process


def status_of(endpoint: Endpoint) -> Json:
    status: Json = endpoint.get("/kunserve/status").json()
    return status


def metrics_of(endpoint: Endpoint) -> dict[tuple[str, str], float]:
    """Our metrics by name and labels, the model's name left out."""
    found = {}
    for name, labels, value in _METRIC.findall(endpoint.get("/metrics").text):
        others = ",".join(sorted(label for label in labels.split(",") if not label.startswith("model_name")))
        found[name, others] = float(value)
    return found


def decisions_in(process: ServerProcess) -> list[str]:
    """Drops and restores that the log tells of, in order; of several in a row, for more and more layers, one."""
    found = re.findall(r"KunServe auto: (drop|restore) ", process.log_path.read_text(errors="replace"))
    return [kind for kind, _ in itertools.groupby(found)]


def test_waves_are_absorbed_and_the_memory_comes_back(process: ServerProcess) -> None:
    endpoint = Endpoint(process.base_url)
    wait_until(lambda: bool(status_of(endpoint)["hosts"]), "all replicas have reported")
    questions = make_questions()
    expected = [ask(endpoint, question) for question in questions]
    at_start = status_of(endpoint)
    assert decisions_in(process) == [], "one request at a time is no reason to drop"
    assert at_start["state"] == "normal"

    for wave in range(1, WAVES + 1):
        began_s = time.monotonic()
        with ThreadPoolExecutor(REQUESTS) as clients:
            answers = list(clients.map(lambda question: ask(endpoint, question), questions))
        assert answers == expected
        wait_until(
            lambda: decisions_in(process)[-1] == "restore" and status_of(endpoint)["state"] == "normal",
            "restored by itself",
            RESTORE_DEADLINE_S,
        )
        assert time.monotonic() - began_s >= MIN_STAY_S
        assert decisions_in(process) == ["drop", "restore"] * wave, "it dropped in each wave, and nothing flapped"

    # Longer than any stay: what happens now would happen for ever.
    time.sleep(LONGEST_STAY_S)
    assert decisions_in(process) == ["drop", "restore"] * WAVES
    endpoint.flush_cache()
    at_end = status_of(endpoint)
    assert at_end["hosts"] == at_start["hosts"]
    for before, after in zip(at_start["replicas"], at_end["replicas"], strict=True):
        assert after["frames"] == before["frames"]
        assert after["capacity_tokens"] == before["capacity_tokens"] == BASE_TOKENS
        assert after["slots"] == {**before["slots"], "used": 0, "cached": 0}
        assert after["load_reports"]["count"] > 0
    text = process.log_path.read_text(errors="replace")
    assert "Traceback" not in text
    assert re.search(r"KunServe auto: drop .*replica \d needs \d+ tokens now .* has 1024.*the pipeline costs", text)


def test_metrics_tell_what_happened(process: ServerProcess) -> None:
    endpoint = Endpoint(process.base_url)
    metrics = metrics_of(endpoint)
    drops = metrics["kunserve:transitions_total", 'kind="drop",outcome="succeeded"']
    assert drops == metrics["kunserve:transitions_total", 'kind="restore",outcome="succeeded"'] >= WAVES
    assert metrics["kunserve:epoch", ""] == 2 * drops
    assert metrics["kunserve:state", 'state="normal"'] == 1
    assert metrics["kunserve:state", 'state="merged"'] == 0
    assert metrics["kunserve:dropped_bytes_total", ""] == metrics["kunserve:restored_bytes_total", ""] > 0
    assert metrics["kunserve:phase_seconds_count", 'kind="drop",phase="release"'] == drops
    assert metrics["kunserve:phase_seconds_count", 'kind="restore",phase="load"'] == drops
    assert metrics["kunserve:decisions_total", 'decision="drop"'] == drops
    for replica in (0, 1):
        who = f'replica="{replica}"'
        assert metrics["kunserve:capacity_tokens", who] == BASE_TOKENS
        assert metrics["kunserve:demand_tokens", f'part="queued",{who}'] == 0
        assert metrics["kunserve:group_replicas", who] == 1
        assert metrics["kunserve:remote_tokens", who] == 0
        assert metrics["kunserve:batches_sent_total", who] > 0
        assert metrics["kunserve:batches_served_total", who] > 0


@pytest.mark.parametrize("kind", ["chat", "chat stream", "chat n", "tools"])
def test_clients_that_name_no_limit_do_not_keep_the_memory(process: ServerProcess, kind: str) -> None:
    """OpenAI clients as most are: SGLang fills in all of the merged capacity as the limit of their answers."""
    endpoint = Endpoint(process.base_url)
    with Api(process.base_url, CALL_DEADLINE_S) as api:
        chats = short_chats(api, kind)
        drops_before = decisions_in(process).count("drop")
        restored = threading.Event()

        def chat_until_restored(place: int) -> list[tuple[Outcome, str]]:
            found = []
            for request, answer in itertools.cycle(chats[place:] + chats[:place]):
                found.append(ended(request, api, answer))
                if restored.is_set():
                    break
            return found

        with ThreadPoolExecutor(REQUESTS + CHATTING_CLIENTS) as clients:
            burst = [clients.submit(ask, endpoint, question) for question in make_questions()]
            wait_until(lambda: decisions_in(process).count("drop") > drops_before, "dropped in the burst")
            chatting = [clients.submit(chat_until_restored, place) for place in range(CHATTING_CLIENTS)]
            try:
                for each in burst:
                    each.result()
                wait_until(
                    lambda: decisions_in(process)[-1] == "restore" and status_of(endpoint)["state"] == "normal",
                    "restored although clients chat",
                    RESTORE_DEADLINE_S,
                )
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
    assert len(found) >= CHATTING_CLIENTS
    return found
