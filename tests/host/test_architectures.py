"""For each kind of KV pool (heads, latent) a server answers with the tokens of the model's reference.

The reference is the model's implementation in transformers. The questions are asked one by one with the KV
cache resized in between, so that tokens are moved, and then all at once. `test_models.py` has the other architectures.
"""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from servers.server import HOST, ServerProcess, find_free_port

pytestmark = pytest.mark.server

START_DEADLINE_S = 400.0
CALL_DEADLINE_S = 120.0
ANSWER_TOKENS = 16


def prompts() -> list[list[int]]:
    chance = random.Random(11)
    fresh = [[chance.randrange(300, 2000) for _ in range(length)] for length in (3, 40, 130)]
    return [*fresh, fresh[2][:100] + fresh[1]]  # the last one has a prefix in the cache


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


SPECS = {name: TinyModelSpec(arch=name, dtype="float32") for name in ("qwen3_moe", "deepseek_v2")}


@pytest.mark.parametrize("name", SPECS)
def test_tokens_equal_the_reference(name: str, tmp_path: Path) -> None:
    model = tmp_path / name
    write_tiny_model(SPECS[name], model)
    expected = reference(model)
    port = find_free_port()
    command = [
        *(sys.executable, "-m", "kunserve_sgl.launch_server", "--model-path", str(model), "--host", HOST),
        *("--port", str(port), "--dtype", "float32", "--max-total-tokens", "2048", "--kunserve", "manual"),
    ]
    with ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"}) as server:
        server.wait_healthy(START_DEADLINE_S)

        def post(path: str, body: dict[str, object]) -> requests.Response:
            return requests.post(server.base_url + path, json=body, timeout=CALL_DEADLINE_S)

        def generate(prompt: list[int]) -> dict[str, Any]:
            sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
            answer = post("/generate", {"input_ids": prompt, "sampling_params": sampling})
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        step = requests.get(f"{server.base_url}/kunserve/status", timeout=CALL_DEADLINE_S).json()["replicas"][0]
        cached = 0
        for number, (prompt, tokens) in enumerate(zip(prompts(), expected, strict=True)):
            answer = generate(prompt)
            assert answer["output_ids"] == tokens
            cached += answer["meta_info"]["cached_tokens"]
            granules = -1 if number % 2 == 0 else 1
            resized = post("/kunserve/kv", {"replica": 0, "frames": granules * step["frames"]["per_granule"]})
            assert resized.status_code == 200, resized.text
        assert cached >= 100, "the last prompt did not hit the radix cache"
        with ThreadPoolExecutor(len(expected)) as clients:
            assert [answer["output_ids"] for answer in clients.map(generate, prompts())] == expected
