"""For each kind of KV pool (heads, latent) a server answers with the tokens of the model's reference.

The reference is the model's implementation in transformers. The questions are asked one by one with the KV
cache resized in between, so that tokens are moved, and then all at once. `test_models.py` has the other architectures.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _deployments import LATENT, MOE, Deployment, using
from _http import Json
from _questions import Question
from _servers import RunningServer
from transformers import AutoModelForCausalLM

from waiting import wait_until

pytestmark = pytest.mark.server

ANSWER_TOKENS = 16
CACHED_TOKENS = 100


def prompts() -> list[list[int]]:
    chance = random.Random(11)
    fresh = [[chance.randrange(300, 2000) for _ in range(length)] for length in (3, 40, 130)]
    return [*fresh, fresh[2][:CACHED_TOKENS] + fresh[1]]  # the last one has a prefix in the cache


def reference(model: Path) -> list[list[int]]:
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts():
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(ANSWER_TOKENS):
                tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


@using(MOE, LATENT)
def test_tokens_equal_the_reference(server: RunningServer, deployment: Deployment) -> None:
    expected = reference(server.model)

    def generate(prompt: list[int]) -> Json:
        found: Json = server.endpoint.ask("/generate", Question(tuple(prompt), ANSWER_TOKENS, replica=0).body())
        return found

    server.endpoint.flush_cache()
    epoch = server.status()["epoch"]
    step = server.at_start[0]["frames"]["per_granule"]
    cached = 0
    for number, (prompt, tokens) in enumerate(zip(prompts(), expected, strict=True)):
        answer = generate(prompt)
        assert answer["output_ids"] == tokens
        cached += answer["meta_info"]["cached_tokens"]
        frames = step if number % 2 else -step
        server.endpoint.ask("/kunserve/kv", {"replica": 0, "frames": frames})
    wait_until(lambda: server.status()["epoch"] == epoch + len(expected), "the coordinator knows of all")
    whole = CACHED_TOKENS - CACHED_TOKENS % deployment.ours.number("--page-size", 1)
    assert cached >= whole, "the last prompt did not hit the radix cache"
    with ThreadPoolExecutor(len(expected)) as clients:
        assert [answer["output_ids"] for answer in clients.map(generate, prompts())] == expected
