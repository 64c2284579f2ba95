"""Replicas merge and part in every way there is while requests run: every answer is the one from before any drop."""

from __future__ import annotations

import json
import random
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from _compare import LOGPROB_TOLERANCE, VOLATILE, differences
from _deployments import FAULTS_BOTH_WAYS, FAULTS_BY_MESSAGE, LATENT, LLAMA, MOE, QWEN, RANKS, Deployment, using
from _drop import Clients, Served
from _http import Json, at_once
from _prompts import LONG_PROMPT, PROMPTS, greedy
from _questions import CLIENTS, Question, ask, ask_all, make_prompt, make_questions
from _sabotage import POISONED_TOKEN
from _servers import RunningServer

from waiting import wait_until

pytestmark = pytest.mark.server

ANSWERS_PER_PHASE = 4
MOST_ROUNDS = 20
PAIR = [[0, 1]]
NAN_TOKEN = 0  # the first of those that are NaN, which is what greedy decoding takes


@dataclass(frozen=True)
class Drops:
    """What to drop on a deployment: lists of drops, each on top of the one before, and the one of all other tests."""

    splits: tuple[tuple[Json, ...], ...]
    whole: Json


DROPS = {
    LLAMA: Drops(
        (
            ({"groups": PAIR},),
            ({"groups": PAIR, "layers": [0, 0, 0, 1]},),
            ({"groups": PAIR, "layers": [1, 0, 1, 0]},),
            ({"groups": PAIR, "layers": {"0": [0, 0, 0, 1], "1": [0, 1, 1, 1]}},),
            ({"groups": PAIR, "layers": {"1": [1, 1, 0, 0]}},),  # only one member drops; the other has memory to spare
            ({"groups": PAIR, "tokens": 300},),
        ),
        {"groups": PAIR, "layers": [1, 1, 0, 0]},
    ),
    QWEN: Drops(
        (
            ({"groups": [[0, 1, 2, 3]]},),
            ({"groups": [[0, 1], [2, 3]]}, {"groups": [[0, 1, 2, 3]]}),
            ({"groups": [[1, 2, 3]], "layers": [3, 1, 2, 1]},),
        ),
        {"groups": [[0, 1, 2, 3]], "layers": [2, 3, 0, 1]},
    ),
    MOE: Drops(
        (
            ({"groups": [[0, 1, 2]]},),
            ({"groups": [[0, 1, 2]], "layers": [2, 1, 0, 2, 1]},),
            ({"groups": [[0, 1, 2]], "layers": {"0": [0, 0, 0, 0, 1], "1": [2, 1, 1, 1, 1], "2": [2, 2, 0, 2, 2]}},),
        ),
        {"groups": [[0, 1, 2]], "layers": [0, 0, 0, 1, 2]},
    ),
    LATENT: Drops(
        (({"groups": PAIR},), ({"groups": PAIR, "layers": [1, 0, 0, 0]},)),
        {"groups": PAIR, "layers": [0, 1, 1, 0]},
    ),
    RANKS: Drops(
        (
            ({"groups": PAIR},),
            ({"groups": PAIR, "layers": {"0": [0, 0, 0, 1], "1": [0, 1, 1, 1]}},),
        ),
        {"groups": PAIR, "layers": [0, 1, 0, 1]},
    ),
}
THREE = Drops((), {"groups": [[0, 1, 2]]})
QUESTIONS = make_questions(24, seed=3)
SLOW_STEP_S = 0.1  # with it answers of 60 tokens take far longer than what goes on beside them


@pytest.fixture
def served(server: RunningServer) -> Served:
    return Served(server, QUESTIONS)


@pytest.fixture
def drops(deployment: Deployment) -> Drops:
    return DROPS.get(deployment, THREE)


@using(*DROPS)
def test_answers_stay_equal_while_replicas_merge_and_part(served: Served, drops: Drops) -> None:
    wanted = {
        *(("parted", "merged"), ("dropping", "merged"), ("merged", "merged")),
        *(("merged", "parted"), ("restoring", "parted")),
    }
    missing = wanted
    with Clients(served) as clients:
        for _ in range(MOST_ROUNDS):  # which requests begin in the moment of a transition is chance
            for split in drops.splits:
                clients.wait_for_answers(ANSWERS_PER_PHASE // 2)
                for drop in split:
                    clients.during("dropping", partial(served.drop, drop))
                    clients.phase = f"merged {drop}"
                    clients.wait_for_answers(ANSWERS_PER_PHASE)
                # So few clients fit into the base slots, so that restoring need not wait for all to end.
                clients.during("restoring", served.restore)
                clients.phase = "parted"
            clients.wait_for_answers(ANSWERS_PER_PHASE // 2)
            missing = {each for each in wanted if not clients.began_and_ended(*each)}
            if not missing:
                break
    assert not missing, clients.answers
    assert served.status()["state"] == "normal"


@using(*DROPS)
def test_streams_and_aborts_across_a_drop_and_a_restore(served: Served, drops: Drops) -> None:
    chance = random.Random(13)
    questions = [Question(make_prompt(chance, 60), 60, replica) for replica in served.replicas]
    expected = ask_all(served.endpoint, questions)
    for change in (partial(served.drop, drops.whole), served.restore):
        names = [uuid.uuid4().hex for _ in questions]
        streams = [served.endpoint.events("/generate", question.body()) for question in questions]
        victims = [
            served.endpoint.events("/generate", replace(question, answer_tokens=900).body(rid=name))
            for question, name in zip(questions, names, strict=True)
        ]
        with served.endpoint.slowed(SLOW_STEP_S):
            for stream in (*streams, *victims):
                next(stream)
            change()
            for name in names:
                assert served.endpoint.post("/abort_request", {"rid": name}).status_code == 200
        for stream, tokens in zip(streams, expected, strict=True):
            *_, last = stream
            assert last["output_ids"] == tokens
        for victim in victims:
            *_, last = victim
            assert last["meta_info"]["finish_reason"]["type"] == "abort"


@using(*DROPS)
def test_cached_prefixes_are_hit_while_merged_and_after(served: Served, drops: Drops, deployment: Deployment) -> None:
    """Those cached before the drop, those cached in slots that the drop brought, and after the restore."""
    chance = random.Random(17)
    replica, before = served.replicas[-1], 3
    base = served.slots(replica)["base"]
    questions = [Question(make_prompt(chance, 200), 2, replica) for _ in range(base // 200 + 3)]
    expected = ask_all(served.endpoint, questions)
    served.endpoint.flush_cache()
    assert ask_all(served.endpoint, questions[:before]) == expected[:before]
    served.drop(drops.whole)

    def cached_tokens() -> list[int]:
        answers = [served.endpoint.ask("/generate", question.body()) for question in questions]
        assert [answer["output_ids"] for answer in answers] == expected
        return [answer["meta_info"]["cached_tokens"] for answer in answers]

    page_size = deployment.ours.number("--page-size", 1)
    whole = 199 // page_size * page_size  # the last token is always computed
    assert cached_tokens() == [whole] * before + [0] * (len(questions) - before)
    assert served.slots(replica)["cached"] > base, "nothing is cached in the new slots"
    assert cached_tokens() == [whole] * len(questions)
    served.restore()
    # By then some have no room any more. Backwards, so that those that stayed are not evicted before they are hit.
    questions.reverse()
    expected.reverse()
    assert sum(cached_tokens()) > 0


@using(*DROPS)
def test_requests_that_have_no_room_start_in_the_new_slots(served: Served, drops: Drops) -> None:
    chance = random.Random(37)  # of these prompts no two best tokens are nearly alike
    longest = 220 + 30
    questions = [Question(make_prompt(chance, 220), 30, 0) for _ in range(22)]
    expected = ask_all(served.endpoint, questions)
    served.endpoint.flush_cache()
    base = served.slots(0)["base"]
    assert len(questions) * longest > 2 * base

    def is_full() -> bool:
        load = served.endpoint.get("/v1/loads").json()["loads"][0]
        return load["num_waiting_reqs"] > 0 and served.slots(0)["used"] > base - 2 * longest

    with ThreadPoolExecutor(len(questions)) as clients:
        with served.endpoint.slowed(SLOW_STEP_S):
            answers = [clients.submit(ask, served.endpoint, question) for question in questions]
            wait_until(is_full, "requests wait for room")
            served.drop(drops.whole)
            wait_until(lambda: served.slots(0)["used"] > base, "the new slots are used")
        assert [answer.result() for answer in answers] == expected
    served.restore()
    assert ask_all(served.endpoint, questions[:3]) == expected[:3]


@using(LLAMA)
def test_a_request_that_waits_for_memory_starts_though_none_ends(served: Served, drops: Drops) -> None:
    chance = random.Random(23)
    served.endpoint.flush_cache()
    # Two of them take nearly all base slots of replica 0, and run for long.
    running = [Question(make_prompt(chance, 890), 80, 0) for _ in range(2)]
    waiting = Question(make_prompt(chance, 300), 2, 0)
    expected = ask_all(served.endpoint, (*running, waiting))
    served.endpoint.flush_cache()

    def waits() -> bool:
        return bool(served.endpoint.get("/v1/loads").json()["loads"][0]["num_waiting_reqs"] > 0)

    with ThreadPoolExecutor(3) as clients, served.endpoint.slowed(SLOW_STEP_S):
        streams = [served.endpoint.events("/generate", question.body()) for question in running]
        for stream in streams:
            next(stream)
        with served.endpoint.slowed(3 * SLOW_STEP_S):
            last = clients.submit(ask, served.endpoint, waiting)
            wait_until(waits, "it waits for room")
            served.drop(drops.whole)
            assert last.result() == expected[-1]
            still = served.endpoint.get("/v1/loads").json()["loads"][0]["num_running_reqs"]
            assert still >= 2, "it had to wait until another one ended"
    for stream, tokens in zip(streams, expected[:2], strict=True):
        *_, end = stream
        assert end["output_ids"] == tokens
    served.restore()


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["small", "large"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
LOGPROBS = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 3}
NOT_COMPARED = VOLATILE | {"cached_tokens", "cached_tokens_details"}


@using(*DROPS, FAULTS_BY_MESSAGE, FAULTS_BOTH_WAYS)
def test_what_can_be_asked_of_a_request(served: Served, drops: Drops, deployment: Deployment) -> None:
    text = served.endpoint.ask("/generate", greedy(PROMPTS[4]))["text"]
    stop = text[len(text) // 2 :][:4]
    bodies = [
        {**greedy(LONG_PROMPT), **LOGPROBS},
        {**greedy(PROMPTS[2]), **LOGPROBS},
        {**greedy(PROMPTS[3]), "return_logprob": True},
        greedy(PROMPTS[3], sampling={"n": 3}),
        greedy(list(PROMPTS[:4]), new_tokens=8),
        greedy(PROMPTS[4], sampling={"stop": ["no such text", stop]}),
        greedy(PROMPTS[2], new_tokens=80, sampling={"json_schema": json.dumps(SCHEMA)}),
        greedy(PROMPTS[1], new_tokens=1),
        greedy(PROMPTS[3], new_tokens=0),
    ]
    calls = [
        partial(served.endpoint.ask, "/generate", {**body, "routed_dp_rank": replica})
        for replica in served.replicas
        for body in bodies
    ]

    # SGLang forgets penalties where batches are joined, so that these answers depend on what runs beside them.
    penalized = greedy(PROMPTS[3], sampling={"frequency_penalty": -1.9, "presence_penalty": -1.0})
    alone = [
        partial(served.endpoint.ask, "/generate", {**penalized, "routed_dp_rank": replica})
        for replica in served.replicas
    ]

    def ask_everything() -> list[Any]:
        served.endpoint.flush_cache()
        return at_once(calls) + at_once(alone)

    before = ask_everything()
    served.drop(drops.whole)
    merged = ask_everything()
    if deployment in (LATENT, RANKS, FAULTS_BY_MESSAGE, FAULTS_BOTH_WAYS):
        assert all(sent > 0 for sent in served.orders_sent())
    served.restore()
    for after in (merged, ask_everything()):
        assert not differences(before, after, tolerance=LOGPROB_TOLERANCE, ignore_values_of=NOT_COMPARED)
    assert before[5]["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert json.loads(before[6]["text"])["kind"] in ("small", "large")


@using(LLAMA)
def test_endpoints_while_merged(served: Served, drops: Drops) -> None:
    served.drop(drops.whole)
    assert served.endpoint.get("/health").status_code == 200
    assert served.endpoint.get("/health_generate").status_code == 200
    info = served.endpoint.get("/server_info").json()
    capacities = [replica["capacity_tokens"] for replica in served.status()["replicas"]]
    assert sorted(state["max_total_num_tokens"] for state in info["internal_states"]) == sorted(capacities)
    assert ask_all(served.endpoint, served.questions[:4]) == served.expected[:4]
    served.endpoint.flush_cache()
    assert [replica["slots"]["cached"] for replica in served.status()["replicas"]] == [0, 0]
    for mode in ("in_place", "retract"):
        with ThreadPoolExecutor(CLIENTS) as clients:
            with served.endpoint.slowed(SLOW_STEP_S):
                answers = [clients.submit(ask, served.endpoint, question) for question in served.questions[:CLIENTS]]
                served.endpoint.wait_for_requests_inside(lambda count: count > 0, "some")
                served.endpoint.ask("/pause_generation", {"mode": mode})
                assert served.status()["state"] == "merged"
                served.endpoint.ask("/continue_generation", {})
            assert [answer.result() for answer in answers] == served.expected[:CLIENTS]
    served.restore()


@using(LLAMA)
def test_memory_and_weights_are_left_alone_while_merged(served: Served, drops: Drops) -> None:
    by_name = {"name": "model.layers.3.self_attn.o_proj.weight", "truncate_size": 4}
    from_disk = {"model_path": str(served.model)}
    weights = served.endpoint.ask("/get_weights_by_name", by_name)
    assert len(weights) == len(served.replicas)
    assert weights[0]
    step = served.status()["replicas"][0]["frames"]["per_granule"]
    served.drop(drops.whole)
    assert served.endpoint.ask("/get_weights_by_name", by_name) == weights
    refused = served.endpoint.post("/update_weights_from_disk", from_disk)
    assert refused.status_code == 400
    assert "/kunserve/restore" in refused.json()["message"]
    for frames in (step, -step):
        answer = served.endpoint.post("/kunserve/kv", {"replica": 0, "frames": frames})
        assert answer.status_code == 409
        assert "merged" in answer.json()["error"]["message"]
    assert ask_all(served.endpoint, served.questions[:8]) == served.expected[:8]
    served.restore()
    assert served.endpoint.ask("/update_weights_from_disk", from_disk)["success"]
    assert served.endpoint.ask("/get_weights_by_name", by_name) == weights
    epoch = served.status()["epoch"]
    served.endpoint.ask("/kunserve/kv", {"replica": 0, "frames": step})
    served.endpoint.ask("/kunserve/kv", {"replica": 0, "frames": -step})
    wait_until(lambda: served.status()["epoch"] == epoch + 2, "the coordinator knows of both")
    # The checksums of the new weights are the right ones: what comes back is compared with them.
    served.drop(drops.whole)
    served.restore()
    assert ask_all(served.endpoint, served.questions[:8]) == served.expected[:8]


@using(LLAMA)
def test_what_makes_no_sense_is_refused_and_changes_nothing(served: Served, drops: Drops) -> None:
    before = served.plan_and_memory()
    wrong: list[tuple[Json, str]] = [
        ({}, "groups"),
        ({"groups": []}, "groups"),
        ({"groups": [[0]]}, "two or more"),
        ({"groups": [[0, 2]]}, "accepted: 0 to 1"),
        ({"groups": [[0, 0]]}, "twice"),
        ({"groups": PAIR, "tokens": 0}, "tokens"),
        ({"groups": PAIR, "tokens": 5, "layers": [0, 0, 1, 1]}, "layers and tokens"),
        ({"groups": PAIR, "layers": [0, 0, 1]}, "accepted: 4"),
        ({"groups": PAIR, "layers": [0, 0, 1, 2]}, "layers: there is no replica 2; accepted: 0 to 1"),
        ({"groups": PAIR, "layers": {"0": [0, 0, 0, 0]}}, "share nothing"),
        ({"groups": PAIR, "layers": {"2": [0, 0, 1, 1]}}, "replica 2"),
        ({"groups": PAIR, "layer": [0, 0, 1, 1]}, "unknown fields layer"),
    ]
    for body, part in wrong:
        for path in ("/kunserve/plan", "/kunserve/drop"):
            answer = served.endpoint.post(path, body)
            assert answer.status_code == 400, (body, answer.text)
            assert part in answer.json()["error"]["message"]
    cannot_be: list[tuple[str, Json, str]] = [
        ("/kunserve/drop", {"groups": PAIR, "tokens": 10**6}, "at most"),
        ("/kunserve/restore", {}, "no replicas are merged"),
    ]
    for path, body, part in cannot_be:
        answer = served.endpoint.post(path, body)
        assert answer.status_code == 409, answer.text
        assert part in answer.json()["error"]["message"]
    planned = served.endpoint.ask("/kunserve/plan", drops.whole)
    assert served.plan_and_memory() == before
    done = served.drop(drops.whole)
    for key in ("epoch", "freed_bytes", "extension_slots"):
        assert done[key] == planned[key]
    assert served.status()["hosts"] == planned["plan"]["hosts"]
    again = served.endpoint.post("/kunserve/drop", drops.whole)
    assert again.status_code in (400, 409), again.text
    assert served.status()["epoch"] == done["epoch"]
    served.restore()


@using(RANKS)
def test_a_request_that_is_nan_by_itself_is_answered_as_at_home(
    server: RunningServer, served: Served, drops: Drops
) -> None:
    """Ranks tell it from an answer of a home of KV that one of them lacks."""
    beside = served.questions[:8]
    asked = {token for question in beside for token in question.prompt}
    answered = {token for tokens in served.expected[:8] for token in tokens}
    token = next(token for token in range(300, 2000) if token not in asked | answered)
    poisoned = [Question((token, *beside[0].prompt), 4, replica) for replica in served.replicas]
    new = server.switches / "new"
    new.write_text(str(token))
    switch = new.rename(server.switches / POISONED_TOKEN)
    try:
        at_home = ask_all(served.endpoint, [*poisoned, *beside])
        assert at_home[: len(poisoned)] == [[NAN_TOKEN] * 4] * len(poisoned)
        assert at_home[len(poisoned) :] == served.expected[:8]
        served.endpoint.flush_cache()
        served.drop(drops.whole)
        before = served.orders_sent()
        assert ask_all(served.endpoint, [*poisoned, *beside]) == at_home
        assert all(now > then for now, then in zip(served.orders_sent(), before, strict=True))
    finally:
        switch.unlink()
    assert ask_all(served.endpoint, beside) == served.expected[:8]
    served.restore()


@using(LLAMA, LATENT, RANKS)
def test_kv_that_lies_elsewhere_is_attended_to_there_or_through_mapped_memory(
    served: Served, drops: Drops, deployment: Deployment
) -> None:
    by_message = deployment is not LLAMA

    def orders() -> list[Json]:
        reports = [replica["remote_attention"] for replica in served.status()["replicas"]]
        way = "message" if by_message else "map"
        assert [report["by"] for report in reports] == [way, way]
        others = [{str(1 - replica): way} for replica in served.replicas]
        assert [report["peers"] for report in reports] == others
        return reports

    before = orders()
    served.drop(drops.whole)
    assert ask_all(served.endpoint, served.questions[:8]) == served.expected[:8]
    after = orders()
    for replica in served.replicas:
        peer = str(1 - replica)
        if by_message:
            sent = after[replica]["orders_sent"][peer] - before[replica]["orders_sent"].get(peer, 0)
            answered = before[1 - replica]["orders_answered"].get(str(replica), 0)
            assert sent == after[1 - replica]["orders_answered"][str(replica)] - answered > 0
            counted = rf'kunserve:remote_attention_total{{.*peer="{peer}",replica="{replica}"}} (\S+)'
            found = re.search(counted, served.endpoint.get("/metrics").text)
            assert found is not None
            assert float(found[1]) > 0
        else:
            assert "orders_sent" not in after[replica]
    served.restore()
    restored = orders()
    for replica in served.replicas if by_message else ():
        peer = str(1 - replica)
        read = restored[replica]["bytes_read"][peer] - before[replica]["bytes_read"].get(peer, 0)
        given = restored[1 - replica]["bytes_given"]
        assert read == given[str(replica)] - before[1 - replica]["bytes_given"].get(str(replica), 0) > 0


@using(*DROPS)
def test_everything_is_as_at_the_start(served: Served, drops: Drops, deployment: Deployment) -> None:
    served.drop(drops.whole)
    served.check_answers_of_all()
    served.restore()
    pipelines = [replica["pipeline"] for replica in served.status()["replicas"]]
    assert all(pipeline["own_batches_sent"] > 0 for pipeline in pipelines)
    if deployment.ours.random_cuts:  # a decode step of one request is one piece
        assert all(pipeline["pieces_sent"] > pipeline["own_batches_sent"] for pipeline in pipelines), pipelines
    served.check_as_at_start()
