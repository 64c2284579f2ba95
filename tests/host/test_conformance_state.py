"""Conformance with stock SGLang: radix cache, flush, abort, health, information and metrics."""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from _compare import differences
from _deployments import CONTEXT_TOKENS, FLOAT32, KV_TOKENS, Pair, using
from _http import Endpoint
from _prompts import LONG_PROMPT, PROMPTS, greedy, words
from sglang.srt.observability import metrics_collector

pytestmark = [pytest.mark.server, using(FLOAT32)]

REPLICAS = (0, 1)
SLOW_STEP_S = 0.05  # with it an answer of 80 tokens takes far longer than an abort
OK = 200
REFUSED = 400
# Of /server_info: what one start of a server differs in from another one, and what has to do with replicas.
PER_START = {"port", "random_seed", "startup_time", "dp_size", "internal_states"}
ADDED_BY_REPLICAS = {"scheduler_pids"}


def endless(text: str, **options: Any) -> dict[str, Any]:
    """A request that runs for so long that a test can do something to it, and that would fail its deadline."""
    sampling = {"temperature": 0, "max_new_tokens": CONTEXT_TOKENS - 500, "ignore_eos": True}
    return {"text": text, "sampling_params": sampling, **options}


@pytest.mark.parametrize("replica", REPLICAS)
def test_radix_cache_hit(pair: Pair, replica: int) -> None:
    """The second request finds what the first one left, as many tokens as on stock, and answers alike."""
    pair.flush_caches()
    longer = f"{LONG_PROMPT} and {words(20, seed=9)}"
    for body in (greedy(LONG_PROMPT), greedy(LONG_PROMPT), greedy(longer)):
        stock = pair.stock.ask("/generate", body)
        ours = pair.ours.ask("/generate", {**body, "routed_dp_rank": replica})
        assert not differences(stock, ours)
        assert ours["meta_info"]["dp_rank"] == replica
    cached = ours["meta_info"]["cached_tokens"]
    assert len(LONG_PROMPT.split()) <= cached < ours["meta_info"]["prompt_tokens"]
    pair.flush_caches()
    fresh = pair.ours.ask("/generate", {**greedy(longer), "routed_dp_rank": replica})
    assert fresh["meta_info"]["cached_tokens"] == 0
    assert fresh["output_ids"] == ours["output_ids"]


def test_requests_go_to_both_replicas(pair: Pair) -> None:
    answers = [pair.ours.ask("/generate", greedy(PROMPTS[2])) for _ in range(4)]
    assert {answer["meta_info"]["dp_rank"] for answer in answers} == set(REPLICAS)
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1


def test_flush_is_refused_while_requests_run(pair: Pair) -> None:
    statuses = []
    for endpoint, replicas in ((pair.stock, [None]), (pair.ours, list(REPLICAS))):
        streams = [endpoint.events("/generate", endless(PROMPTS[2], routed_dp_rank=replica)) for replica in replicas]
        assert all(next(stream)["meta_info"]["finish_reason"] is None for stream in streams)
        statuses.append(endpoint.post("/flush_cache").status_code)
        assert all(next(stream)["meta_info"]["finish_reason"] is None for stream in streams)
        for stream in streams:
            stream.close()
        endpoint.wait_for_requests_inside(lambda count: count == 0, "none")
        assert endpoint.post("/flush_cache?timeout=30").status_code == OK
    assert statuses == [REFUSED, REFUSED]


def new_name() -> str:
    """A request id never used before: two seconds after a stream has ended SGLang aborts its id once more."""
    return uuid.uuid4().hex


def abort(endpoint: Endpoint, **which: Any) -> None:
    assert endpoint.post("/abort_request", which).status_code == OK


@pytest.mark.parametrize("everything", [False, True], ids=["one", "all"])
def test_abort_ends_a_running_request(pair: Pair, everything: bool) -> None:
    ends = []
    for endpoint in pair.both:
        name = new_name()
        stream = endpoint.events("/generate", endless(PROMPTS[3], rid=name))
        assert next(stream)["meta_info"]["id"] == name
        endpoint.wait_for_requests_inside(lambda count: count == 1, "one")
        abort(endpoint, **({"abort_all": True} if everything else {"rid": name}))
        *_, last = stream
        assert last["meta_info"]["completion_tokens"] < CONTEXT_TOKENS - 500
        ends.append(last["meta_info"]["finish_reason"])
        endpoint.wait_for_requests_inside(lambda count: count == 0, "none")
    assert not differences(*ends)
    assert ends[0]["type"] == "abort"
    assert_serves(pair)


def test_abort_leaves_other_requests_alone(pair: Pair) -> None:
    expected = pair.stock.ask("/generate", greedy(PROMPTS[4], 80))["output_ids"]
    for replica in REPLICAS:
        name = new_name()
        victim = pair.ours.events("/generate", endless(PROMPTS[3], rid=name, routed_dp_rank=replica))
        other = pair.ours.events("/generate", greedy(PROMPTS[4], 80, routed_dp_rank=replica))
        with pair.ours.slowed(SLOW_STEP_S):
            next(victim), next(other)
            abort(pair.ours, rid=name)
        *_, last = other
        assert last["output_ids"] == expected
        *_, aborted = victim
        assert aborted["meta_info"]["finish_reason"]["type"] == "abort"


def test_abort_of_an_unknown_request(pair: Pair) -> None:
    for endpoint in pair.both:
        abort(endpoint, rid=new_name())
    assert_serves(pair)


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
def test_health(pair: Pair, path: str) -> None:
    answers = [endpoint.get(path) for endpoint in pair.both]
    assert [(answer.status_code, answer.text) for answer in answers] == [(OK, "")] * 2


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(pair: Pair, path: str) -> None:
    stock, ours = (endpoint.get(path).json() for endpoint in pair.both)
    assert not differences(stock, ours)
    assert ours["model_path"] == str(pair.model)


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(pair: Pair, path: str) -> None:
    stock, ours = (endpoint.get(path).json() for endpoint in pair.both)
    added = set(ours) - set(stock)
    assert {name for name in added if not name.startswith("kunserve")} == ADDED_BY_REPLICAS
    assert ours["kunserve"] == "manual"
    shared = {key: value for key, value in ours.items() if key in stock}
    assert not differences(stock, shared, ignore_values_of=PER_START)
    assert (stock["dp_size"], ours["dp_size"]) == (1, 2)
    assert len(ours["internal_states"]) == len(REPLICAS)
    assert len(set(ours["scheduler_pids"])) == len(REPLICAS)
    capacities = {state["memory_usage"]["token_capacity"] for state in ours["internal_states"]}
    assert capacities == {stock["internal_states"][0]["memory_usage"]["token_capacity"]} == {KV_TOKENS}


def test_metrics(pair: Pair) -> None:
    """The same names, and the counters of requests and tokens go up by the same for the same requests."""
    counters = ("prompt_tokens_total", "generation_tokens_total", "num_requests_total", "cached_tokens_total")
    growth = []
    for endpoint in pair.both:
        list(endpoint.events("/generate", greedy(PROMPTS[2])))  # some names are there from the first stream on
        endpoint.flush_cache()
        before = endpoint.metrics()
        for text in PROMPTS:
            endpoint.ask("/generate", greedy(text, return_logprob=True))
        endpoint.ask("/generate", {"text": list(PROMPTS), "sampling_params": {"temperature": 0, "max_new_tokens": 8}})
        after = endpoint.metrics()
        growth.append({name: after[f"sglang:{name}"] - before.get(f"sglang:{name}", 0.0) for name in counters[:3]})
        assert after["sglang:num_running_reqs"] >= 0
    assert growth[0] == growth[1]
    assert growth[0]["num_requests_total"] == 2 * len(PROMPTS)
    assert growth[0]["generation_tokens_total"] == (16 + 8) * len(PROMPTS)
    stock, ours = (set(endpoint.metrics()) for endpoint in pair.both)
    assert stock <= ours
    # A counter is there from its first count on, and other tests make ours count what stock has not met.
    known = tuple(re.findall(r'"(sglang:\w+)"', Path(metrics_collector.__file__).read_text(encoding="utf-8")))
    assert [name for name in ours - stock if not name.startswith(known)] == []
    assert "sglang:token_usage" in ours


def assert_serves(pair: Pair) -> None:
    """Both servers still answer, and alike."""
    stock, ours = (endpoint.ask("/generate", greedy(PROMPTS[1])) for endpoint in pair.both)
    assert stock["output_ids"] == ours["output_ids"]
