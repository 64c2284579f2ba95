"""Restores, whole, in part and by force, while requests run: answers are those from before any drop, and afterwards
everything is as it was before the drop."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import requests
from _deployments import LLAMA, MOE, RANKS, SAFEGUARDS, SAFEGUARDS_BASE_TOKENS, Deployment, using
from _drop import Clients, Served
from _http import Json
from _questions import Question, ask, ask_all, make_prompt, make_questions
from _servers import RunningServer

from waiting import wait_until

pytestmark = pytest.mark.server

QUESTIONS = make_questions(24, seed=3)
ANSWERS_PER_PHASE = 4
STREAM_TOKENS = 140
SLOW_STEP_S = 0.08  # with it the streams outlive what goes on beside them
SLOWER_STEP_S = 0.15  # with it answers of 60 tokens do
LITTLE_SLOWER_STEP_S = 0.02  # with it a client reads tokens as they come, long before the last one
LONG_PROMPT_TOKENS = 900  # most of what a replica of SAFEGUARDS has room for, so that answers are short
PAIR = [[0, 1]]
WHOLE: dict[Deployment, Json] = {
    LLAMA: {"groups": PAIR},
    MOE: {"groups": [[0, 1, 2]], "layers": [0, 0, 0, 1, 2]},
    RANKS: {"groups": PAIR},
}


@pytest.fixture
def served(server: RunningServer) -> Served:
    return Served(server, QUESTIONS)


def is_whole(served: Served) -> bool:
    """Whether POST /kunserve/check finds everything as it should be, the checksums of the parameters too."""
    return bool(served.endpoint.ask("/kunserve/check", {})["ok"])


def memory_and_plan(served: Served) -> Json:
    """When nothing runs; without the number of the plan."""
    served.endpoint.flush_cache()
    return {**served.plan_and_memory(), "epoch": None}


def dropped_layer(served: Served, replica: int) -> int:
    hosts: list[int] = served.status()["hosts"][replica]
    return next(layer for layer, host in enumerate(hosts) if host != replica)


def long_streams(served: Served) -> tuple[list[Iterator[Json]], list[list[int]]]:
    """One of each replica, and what they have to answer."""
    chance = random.Random(29)
    questions = [Question(make_prompt(chance, 60), STREAM_TOKENS, replica) for replica in served.replicas]
    expected = ask_all(served.endpoint, questions)
    return [served.endpoint.events("/generate", question.body()) for question in questions], expected


@using(*WHOLE)
def test_all_is_as_before_the_drop_after_restores_under_load(served: Served, deployment: Deployment) -> None:
    before = memory_and_plan(served)
    streams, expected = long_streams(served)
    with Clients(served) as clients, served.endpoint.slowed(SLOW_STEP_S):
        firsts = [next(stream) for stream in streams]
        clients.during("dropping", lambda: served.drop(WHOLE[deployment]))
        clients.phase = "merged"
        clients.wait_for_answers(ANSWERS_PER_PHASE)
        part = {"groups": WHOLE[deployment]["groups"], "layers": {"0": [dropped_layer(served, 0)]}}
        planned = served.endpoint.ask("/kunserve/plan", {"action": "restore", **part})
        merged = served.status()
        answer = clients.during("restoring a part", lambda: served.endpoint.ask("/kunserve/restore", part))
        assert answer["message"] == "partly restored"
        after = served.status()
        assert after["hosts"] == planned["plan"]["hosts"] != merged["hosts"]
        assert after["state"] == "merged"
        lost = sum(replica["capacity_tokens"] for replica in merged["replicas"])
        lost -= sum(replica["capacity_tokens"] for replica in after["replicas"])
        assert planned["message"] == (f"would give up {lost} tokens")
        clients.phase = "merged in part"
        clients.wait_for_answers(ANSWERS_PER_PHASE)
        assert is_whole(served)
        clients.during("restoring", served.restore)
        clients.phase = "parted"
        clients.wait_for_answers(ANSWERS_PER_PHASE)
        assert is_whole(served)
    ends = [list(stream)[-1] for stream in streams]
    assert [end["output_ids"] for end in ends] == expected
    assert [end["meta_info"]["num_retractions"] for end in ends] == [0] * len(ends)
    assert all(first["meta_info"]["completion_tokens"] < STREAM_TOKENS for first in firsts)
    assert memory_and_plan(served) == before
    assert is_whole(served)
    served.check_as_at_start()


@using(LLAMA)
def test_tokens_that_are_to_stay_stay_and_what_came_back_can_be_dropped_again(served: Served) -> None:
    gained = served.drop(WHOLE[LLAMA])["extension_slots"]
    base = sum(replica["capacity_tokens"] for replica in served.at_start)
    served.endpoint.ask("/kunserve/restore", {"groups": PAIR, "tokens": gained // 3})
    kept = sum(replica["capacity_tokens"] for replica in served.status()["replicas"]) - base
    assert gained // 3 <= kept < gained
    assert ask_all(served.endpoint, served.questions) == served.expected
    again = served.drop({"groups": PAIR})
    assert kept + again["extension_slots"] >= gained * 9 // 10
    assert ask_all(served.endpoint, served.questions) == served.expected
    assert is_whole(served)
    served.restore()
    served.check_as_at_start()


@using(LLAMA)
def test_what_makes_no_sense_is_refused_and_changes_nothing(served: Served) -> None:
    served.drop(WHOLE[LLAMA])
    before = served.plan_and_memory()
    layer = dropped_layer(served, 0)
    kept = next(i for i in range(4) if served.status()["hosts"][0][i] == 0)
    for body, status, part in (
        (
            {"layers": {"0": [kept]}},
            400,
            f"layers: [{kept}] of replica 0; accepted are those that the last merge dropped",
        ),
        ({"layers": {"0": [layer, 17]}}, 400, "layers: [17] of replica 0; accepted are"),
        ({"layers": {"2": [layer]}}, 400, "layers: there is no replica 2; accepted: 0 to 1"),
        ({"layers": [0, 0, 1, 1]}, 400, "layers: [0, 0, 1, 1] is not an object"),
        ({"tokens": 10**7}, 409, "tokens: 10000000 cannot stay when a layer comes back; at most"),
        ({"tokens": 0}, 400, "tokens: 0; accepted"),
        ({"force": "yes"}, 400, "force: 'yes'; accepted: true or false"),
    ):
        for path, more in (("/kunserve/restore", {}), ("/kunserve/plan", {"action": "restore"})):
            answer = served.endpoint.post(path, {"groups": PAIR, **body, **more})
            assert answer.status_code == status, (body, answer.text)
            assert part in answer.json()["error"]["message"]
    assert served.plan_and_memory() == before
    served.restore()


@using(LLAMA, RANKS)
def test_a_restore_that_forces_does_not_wait_and_answers_stay_equal(served: Served, deployment: Deployment) -> None:
    chance = random.Random(31)
    base = served.slots(0)["base"]
    questions = [Question(make_prompt(chance, 500), 60, 0) for _ in range(base // 500 + 1)]
    expected = ask_all(served.endpoint, questions)
    served.endpoint.flush_cache()
    before = memory_and_plan(served)
    served.drop(WHOLE[deployment])
    with ThreadPoolExecutor(len(questions)) as clients:
        with served.endpoint.slowed(SLOWER_STEP_S):
            answers = [clients.submit(served.endpoint.ask, "/generate", question.body()) for question in questions]
            wait_until(lambda: served.slots(0)["used"] > base, "what runs has no room in the base slots")
            restored = served.endpoint.ask("/kunserve/restore", {"groups": PAIR, "force": True})
            assert not all(answer.done() for answer in answers)
        ended = [answer.result() for answer in answers]
    assert restored["message"] == "restored"
    assert [each["output_ids"] for each in ended] == expected
    retractions = [each["meta_info"]["num_retractions"] for each in ended]
    assert sum(retractions) > 0, "nobody had to give way"
    assert 0 in retractions, "all had to give way, though some had room"
    assert memory_and_plan(served) == before
    assert is_whole(served)
    assert ask_all(served.endpoint, served.questions) == served.expected


@using(SAFEGUARDS)
def test_limits_beyond_what_is_left_are_cut_when_slots_go_at_once(server: RunningServer) -> None:
    """One that has not come so far yet gets what there is room for; one that has more ends with its next token."""
    served = Served(server, QUESTIONS[:8])
    prompt = make_prompt(random.Random(37), LONG_PROMPT_TOKENS)
    room = SAFEGUARDS_BASE_TOKENS - len(prompt) - 2
    expected = ask(served.endpoint, Question(prompt, room, 0))
    other = make_prompt(random.Random(38), LONG_PROMPT_TOKENS)
    expected_other = ask(served.endpoint, Question(other, room, 1))
    before = memory_and_plan(served)
    served.drop({"groups": PAIR})
    question = Question(prompt, room + 200, 0)
    with served.endpoint.slowed(LITTLE_SLOWER_STEP_S):
        longer = served.endpoint.events("/generate", question.body())
        while next(longer)["meta_info"]["completion_tokens"] <= room + 5:
            pass
        served.endpoint.ask_to_slow_down(SLOWER_STEP_S)
        shorter = served.endpoint.events("/generate", replace(question, prompt=other, replica=1).body())
        next(shorter)
        refused = served.endpoint.post("/kunserve/restore", {"groups": PAIR, "layers": {"0": [99]}})
        assert refused.status_code == requests.codes.bad_request
        served.endpoint.ask("/kunserve/restore", {"groups": PAIR, "force": True})
    *_, end = longer
    assert end["meta_info"]["finish_reason"] == {"type": "length", "length": len(end["output_ids"])}
    assert room + 5 < len(end["output_ids"]) < question.answer_tokens
    assert end["output_ids"][:room] == expected
    *_, end = shorter
    assert end["meta_info"]["finish_reason"] == {"type": "length", "length": room}
    assert end["output_ids"] == expected_other
    assert memory_and_plan(served) == before
    assert is_whole(served)
