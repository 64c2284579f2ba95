"""Conformance with stock SGLang: its own clients, and clients that send nonsense or go away."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from _compare import differences
from _deployments import CONTEXT_TOKENS, FLOAT32, Pair, using
from _prompts import PROMPTS

from preloaded import Preloaded

pytestmark = [pytest.mark.server, using(FLOAT32)]

CLIENT_DEADLINE_S = 900.0
SLOW_STEP_S = 0.05  # with it the answers would take minutes
CONCURRENCY = 32
BENCHMARK_REQUESTS = 64
BENCHMARK_INPUT_TOKENS = 64
BENCHMARK_OUTPUT_TOKENS = 16
ONE_MEGABYTE = "sound of water ".ljust(15) * (1_000_000 // 15 + 1)


def run_client(preloaded: Preloaded, *program: str) -> str:
    """What a Python client prints that must succeed; it is killed at its deadline. It is SGLang's as it is."""
    return preloaded.output_of(*program, deadline_s=CLIENT_DEADLINE_S, is_patched=False)


def assert_serves(pair: Pair) -> None:
    """Both servers still answer, and alike, and nothing is left inside."""
    body = {"text": PROMPTS[2], "sampling_params": {"temperature": 0, "max_new_tokens": 8}}
    stock, ours = (endpoint.ask("/generate", body)["output_ids"] for endpoint in pair.both)
    assert stock == ours
    for endpoint in pair.both:
        endpoint.wait_for_requests_inside(lambda count: count == 0, "none")


def test_frontend_program(pair: Pair, preloaded: Preloaded) -> None:
    """A SGLang program with gen, select and fork, alone and in a batch, gives the same on both servers."""
    program = Path(__file__).with_name("_frontend_program.py")
    output = run_client(preloaded, str(program), pair.stock.base_url, pair.ours.base_url)
    (answers,) = [line for line in output.splitlines() if line.startswith("[[")]
    stock, ours = json.loads(answers)
    assert not differences(stock, ours)
    assert len({result["opening"] for result in ours}) == 3
    assert all(result["size"] in ("small", "very large", "old") for result in ours)
    assert all(re.fullmatch(r"(19|20)\d\d", result["year"]) for result in ours)


def test_benchmark_client_at_concurrency_32(pair: Pair, preloaded: Preloaded, tmp_path: Path) -> None:
    """SGLang's bench_serving gets every answer in full, and the replicas share the work."""
    output = tmp_path / "benchmark.jsonl"
    url = urlsplit(pair.ours.base_url)
    address = ("--host", str(url.hostname), "--port", str(url.port))
    before = pair.ours.metrics()
    run_client(
        preloaded,
        *("-m", "sglang.bench_serving", "--backend", "sglang", *address),
        *("--dataset-name", "random-ids", "--tokenizer", str(pair.model), "--model", str(pair.model)),
        *("--num-prompts", str(BENCHMARK_REQUESTS), "--max-concurrency", str(CONCURRENCY), "--seed", "7"),
        *("--random-input-len", str(BENCHMARK_INPUT_TOKENS), "--random-output-len", str(BENCHMARK_OUTPUT_TOKENS)),
        *("--random-range-ratio", "1.0", "--output-file", str(output), "--output-details", "--disable-tqdm"),
    )
    after = pair.ours.metrics()
    result = json.loads(output.read_text())
    assert result["completed"] == BENCHMARK_REQUESTS
    assert result["max_concurrency"] == CONCURRENCY
    assert [error for error in result["errors"] if error] == []
    # The client takes an answer that broke off for a success, so what the server generated is counted as well.
    assert result["output_lens"] == [BENCHMARK_OUTPUT_TOKENS] * BENCHMARK_REQUESTS
    generated = after["sglang:generation_tokens_total"] - before["sglang:generation_tokens_total"]
    assert generated >= BENCHMARK_REQUESTS * BENCHMARK_OUTPUT_TOKENS
    assert_serves(pair)


def test_client_that_disconnects_in_mid_stream(pair: Pair) -> None:
    """Its request ends, instead of being generated for nobody."""
    # Two such requests are what SGLang admits to the KV cache of one replica at a time.
    new_tokens = CONTEXT_TOKENS - 500
    body = {"text": PROMPTS[3], "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}}
    for endpoint in pair.both:
        computed_before = endpoint.metrics()["sglang:realtime_tokens_total"]
        with endpoint.slowed(SLOW_STEP_S):
            streams = [endpoint.events("/generate", body) for _ in range(2)]
            for stream in streams:
                assert next(stream)["meta_info"]["finish_reason"] is None
            for stream in streams:
                stream.close()
            endpoint.wait_for_requests_inside(lambda count: count == 0, "none")
        assert endpoint.metrics()["sglang:realtime_tokens_total"] - computed_before < new_tokens
    assert_serves(pair)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": ONE_MEGABYTE, "sampling_params": {"max_new_tokens": 4}}),
        ("/v1/completions", {"model": "tiny", "prompt": ONE_MEGABYTE, "max_tokens": 4}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": ONE_MEGABYTE}]}),
    ],
    ids=["generate", "completion", "chat"],
)
def test_prompt_of_one_megabyte(pair: Pair, path: str, body: dict[str, Any]) -> None:
    stock, ours = (endpoint.post(path, body) for endpoint in pair.both)
    assert (stock.status_code, ours.status_code) == (400, 400)
    assert not differences(stock.json(), ours.json())
    assert f"longer than the model's context length ({CONTEXT_TOKENS} tokens)" in ours.text
    assert_serves(pair)


MALFORMED = [
    b'{"text": "a", ',
    b"",
    b'{"text": "\xff\xfe"}',
    b'{"text": 5}',
    b'{"sampling_params": {}}',
    b'{"input_ids": []}',
    b'{"text": "a", "sampling_params": {"max_new_tokens": -1}}',
    b'{"text": "a", "sampling_params": {"temperature": -1}}',
    b'{"prompt": 5}',
    b'{"messages": []}',
    b'{"messages": [{"role": "stranger", "content": "a"}]}',
    b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": "many"}',
]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_malformed_requests(pair: Pair, path: str) -> None:
    for data in MALFORMED:
        stock, ours = (endpoint.post_raw(path, data) for endpoint in pair.both)
        assert 400 <= stock.status_code < 500, (data, stock.text)
        assert ours.status_code == stock.status_code, (data, ours.text)
        assert not differences(stock.json(), ours.json())
    assert_serves(pair)
