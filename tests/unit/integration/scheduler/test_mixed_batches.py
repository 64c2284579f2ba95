"""Requests that decode go along with a prefill while their replica is merged: SGLang's own batches and slots."""

from __future__ import annotations

import json

import pytest

from unit.integration.imported import Imported

# Two requests of 3 and 4 tokens run, and a prefill of 5 comes. Prints what is to be run, and what still runs.
_PROGRAM = """
import json, sys
from array import array
from types import SimpleNamespace

import torch
from sglang.srt.managers.schedule_batch import NextBatchPlan, Req, ScheduleBatch
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from kunserve_sgl.integration.cpu_platform.attention import _use_torch_helpers
from kunserve_sgl.integration.runner.elastic_allocator import make_elastic_allocator
from kunserve_sgl.integration.scheduler.mixed_batches import mix

case, slots = sys.argv[1], int(sys.argv[2])
_use_torch_helpers()
set_global_server_args_for_scheduler(ServerArgs(model_path="none", device="cpu", attention_backend="kunserve_host"))
kvcache = SimpleNamespace(device="cpu")
allocator = make_elastic_allocator(
    slots, 1, first_slot=1, device="cpu", dtype=torch.float32, kvcache=kvcache, need_sort=False
)
rows = ReqToTokenPool(8, 64, "cpu", enable_memory_saver=False)
tree = RadixCache(
    CacheInitParams(disable=False, req_to_token_pool=rows, token_to_kv_pool_allocator=allocator, page_size=1)
)
model = SimpleNamespace(is_encoder_decoder=False, vocab_size=100, is_multimodal=case == "multimodal")


def begin(*lengths):
    requests = []
    for length in lengths:
        sampling = SamplingParams(max_new_tokens=8)
        sampling.normalize(None)
        request = Req(str(length), "", array("q", range(10 * length, 11 * length)), sampling)
        request.init_next_round_input(tree)
        request.set_extend_range(0, length)
        requests.append(request)
    batch = ScheduleBatch.init_new(requests, rows, allocator, tree, model, True, SpeculativeAlgorithm.NONE)
    batch.prepare_for_extend()
    return batch


running = begin(3, 4)
if case != "results pending":
    for request in running.reqs:
        request.output_ids.append(7)
prefill = begin(5)
prefill.return_logprob = case == "logprobs"
scheduler = SimpleNamespace(
    runtime=SimpleNamespace(plan=SimpleNamespace(is_pipelined=case != "at home")),
    layers=SimpleNamespace(device=torch.device("cuda" if case == "on cuda" else "cpu")),
    enable_lora=case == "lora",
    model_config=model,
)
plan = mix(scheduler, NextBatchPlan(batch_to_run=prefill, running_batch=running))
made = plan.batch_to_run
print(json.dumps({
    "mode": made.forward_mode.name,
    "requests": [request.rid for request in made.reqs],
    "decoding": [request.rid for request in made.decoding_reqs or ()],
    "lengths": made.seq_lens_cpu.tolist(),
    "cached": made.prefix_lens,
    "new": made.extend_lens,
    "slots": made.out_cache_loc.tolist(),
    "rows": [rows.req_to_token[row, :n].tolist() for row, n in zip(made.req_pool_indices, made.seq_lens_cpu)],
    "running": [request.rid for request in plan.running_batch.reqs],
    "free": allocator.available_size(),
}))
"""


@pytest.mark.parametrize("case", ["results processed", "results pending"])
def test_what_runs_gets_its_next_token_by_the_prefill(imported: Imported, case: str) -> None:
    """SGLang's count of cached tokens is right in one of the two cases only."""
    made = json.loads(imported.run(_PROGRAM, case, "14"))
    assert made == {
        "mode": "MIXED",
        "requests": ["5", "3", "4"],
        "decoding": ["3", "4"],
        "lengths": [5, 4, 5],
        "cached": [0, 3, 4],
        "new": [5, 1, 1],
        "slots": [8, 9, 10, 11, 12, 13, 14],
        "rows": [[8, 9, 10, 11, 12], [1, 2, 3, 13], [4, 5, 6, 7, 14]],
        "running": [],
        "free": 0,
    }


@pytest.mark.parametrize(
    ("case", "slots"),
    [("no room", 13), ("at home", 64), ("on cuda", 64), ("lora", 64), ("multimodal", 64), ("logprobs", 64)],
)
def test_the_prefill_stays_alone(imported: Imported, case: str, slots: int) -> None:
    made = json.loads(imported.run(_PROGRAM, case, str(slots)))
    assert (made["mode"], made["requests"], made["running"]) == ("EXTEND", ["5"], ["3", "4"])
    assert made["free"] == slots - 12
