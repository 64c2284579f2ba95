"""A program that runs models without servers, one process forked for each: `python _model_program.py DIRECTORY...`
It prints one line of JSON per model: what is wrong, or null.

What runs is SGLang's model in KunServe's model runner: as a whole, then in ranges of layers as merged replicas run it,
and again after every layer has been dropped and restored. The logits have to be the same to the bit. Where a directory
holds weights, the tokens have to be those of the model's implementation in transformers; else the weights are random.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
import traceback
from array import array
from pathlib import Path
from typing import Any

PROMPTS = ([5, 900, 17, 300, 42, 7, 1201], [77, 13, 650, 12, 8, 1999, 4, 444, 1024, 3, 90])
STEPS = 4
DEADLINE_S = 600
FLAGS = (
    *("--dp-size", "2", "--kunserve", "manual", "--dtype", "float32", "--max-total-tokens", "512"),
    *("--skip-tokenizer-init", "--context-length", "256", "--log-level", "error"),
)


def attach_to_sglang() -> None:
    from sglang.srt.plugins import load_plugins

    from kunserve_sgl.integration.attach.attachment import Role, attach

    load_plugins()
    attach(Role.SCHEDULER)
    # What every model needs, once for all.
    import sglang.benchmark.one_batch
    import sglang.srt.models.registry  # noqa: F401


def has_weights(directory: str) -> bool:
    return Path(directory, "model.safetensors").exists()


def load(directory: str) -> Any:
    """A model runner with memory for its KV cache."""
    import torch
    from sglang.benchmark import one_batch
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.model_executor import model_runner
    from sglang.srt.server_args import PortArgs, set_global_server_args_for_scheduler

    from kunserve_sgl.integration.launcher.server_args import prepare_server_args

    torch.set_num_threads(1)
    load_format = "auto" if has_weights(directory) else "dummy"
    args = prepare_server_args(["--model-path", directory, "--load-format", load_format, *FLAGS])
    set_global_server_args_for_scheduler(args)
    one_batch.initialize_moe_config(args)
    ranks = {f"{name}_rank": 0 for name in ("tp", "pp", "dp", "attn_tp", "attn_cp", "attn_dp", "moe_ep", "moe_dp")}
    sizes = {f"{name}_size": 1 for name in ("tp", "pp", "attn_tp", "attn_cp", "attn_dp", "moe_ep", "moe_dp", "dcp")}
    runner = model_runner.ModelRunner(
        model_config=one_batch.ModelConfig.from_server_args(args),
        mem_fraction_static=args.mem_fraction_static,
        gpu_id=0,
        ps=ParallelState(**ranks, **sizes, dp_size=2, gpu_id=0),
        nccl_port=PortArgs.init_new(args).nccl_port,
        server_args=args,
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


def fill(runner: Any) -> None:
    """SGLang's own dummy weights are so small that all logits are nearly equal."""
    import torch

    generator = torch.Generator().manual_seed(3)
    for name, tensor in runner.model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            noise /= math.sqrt(tensor.shape[-1])
        tensor.data.copy_(1 + noise / 10 if "norm" in name and tensor.dim() == 1 else noise)
    for layer in range(runner.kunserve_memory.layer_count):
        runner.kunserve_memory.parameters.renew_checksum(layer)


class InRanges:
    """In place of OwnBatches: every batch runs in pieces of the model, one after the other."""

    def __init__(self, runner: Any, cuts: list[int]) -> None:
        self.runner, self.cuts = runner, cuts

    def forward(self, batch: Any) -> Any:
        from kunserve_sgl.integration.runner.layer_runner import StageTensors

        output = state = None
        for place, (start, end) in enumerate(itertools.pairwise(self.cuts), start=2):
            last = place == len(self.cuts)
            output = self.runner.run_layers(batch, state, start, end, first=state is None, last=last)
            state = None if last else StageTensors(dict(output.logits_output.tensors))
        return output


class RepeatedLayers:
    """In place of SGLang's runner of decode graphs: layers run on a static batch of `bucket` requests, and are called
    again where a graph would be replayed."""

    def __init__(self, runner: Any, bucket: int) -> None:
        import numpy as np
        import torch
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        from kunserve_sgl.integration.runner.foreign_batch import rebuild
        from kunserve_sgl.integration.runner.layer_graphs import LayerGraphs, RepeatedCalls
        from kunserve_sgl.replica.batch_shape import BatchShape

        self.runner, self.bucket, self.loads = runner, bucket, 0
        padding = np.zeros(bucket, np.int32)
        shape = BatchShape(int(ForwardMode.DECODE), padding, padding + 1, None, padding.astype(np.int64))
        self.static = rebuild(shape, runner.server_args.attention_backend, torch.device("cpu"))
        self.static.input_ids.zero_()
        self.layer_graphs = LayerGraphs(RepeatedCalls(), self, runner.layer_count, runner.run_static)
        runner.attn_backend.init_forward_metadata(self.static)
        with torch.inference_mode(), forward_context(ForwardContext(attn_backend=runner.attn_backend)):
            self.layer_graphs.capture(bucket, self.static)

    def load(self, batch: Any) -> int:
        self.loads += 1
        for name in ("req_pool_indices", "seq_lens", "out_cache_loc", "positions"):
            getattr(self.static, name)[: batch.batch_size] = getattr(batch, name)
        self.runner.attn_backend.init_forward_metadata(self.static)
        return self.bucket


def tokens_by_graphs(runner: Any, graphs: RepeatedLayers) -> list[list[int]]:
    """The tokens of all steps, with decode steps in ranges of layers that run by graphs."""
    runner.decode_cuda_graph_runner, before = graphs, runner.decode_cuda_graph_runner
    runner.own_batches = InRanges(runner, [0, 1, runner.layer_count, runner.layer_count])
    try:
        return tokens_of(generate(runner))
    finally:
        runner.decode_cuda_graph_runner, runner.own_batches = before, None


def tokens_of(logits: list[Any]) -> list[list[int]]:
    return [step.argmax(-1).tolist() for step in logits]


def generate(runner: Any) -> list[Any]:
    """The logits of all steps."""
    import torch
    from sglang.benchmark import one_batch
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    requests = []
    for number, prompt in enumerate(PROMPTS):
        tokens = array("q", prompt)
        request = Req(str(number), "", tokens, SamplingParams(temperature=0, max_new_tokens=STEPS))
        request.full_untruncated_fill_ids = tokens
        request.logprob_start_len = -1
        request.set_extend_range(0, len(tokens))
        requests.append(request)
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    with torch.inference_mode():
        tokens, logits, batch = one_batch.extend(requests, runner)
        found = [logits]
        for _ in range(STEPS):
            tokens, logits = one_batch.decode(tokens, batch, runner)
            found.append(logits)
    return found


def reference(directory: str) -> list[Any]:
    """The tokens that `generate` should choose, by step."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    columns = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(STEPS + 1):
                tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
        columns.append(tokens[len(prompt) :])
    return torch.tensor(columns).T.tolist()


def warmed_up(runner: Any) -> str | None:
    """Runs what a server with CUDA runs at start, and says what is wrong. It leaves no KV but in the sink, and takes no
    slots and no rows."""
    import torch

    from kunserve_sgl.integration.runner.layer_runner import SglangLayerRunner
    from kunserve_sgl.replica.warm_up import run_each_kind

    rows, pool, allocator = runner.req_to_token_pool, runner.token_to_kv_pool, runner.token_to_kv_pool_allocator
    runner.token_to_kv_pool_allocator.clear()

    def held() -> list[Any]:
        own = slice(pool.elastic.slots.first, pool.elastic.slots.stop)
        kv = [pool.get_key_buffer(layer)[own].clone() for layer in range(runner.model_config.num_hidden_layers)]
        own_rows = rows.req_to_token[list(rows.own_rows)].clone()
        return [*kv, own_rows, torch.tensor([allocator.available_size(), len(rows.free_slots)])]

    before = held()
    batches = run_each_kind(SglangLayerRunner(runner, rows), most_requests=4, most_tokens=64)
    if not batches or not all(torch.equal(one, other) for one, other in zip(before, held(), strict=True)):
        return f"{batches} batches of the warm-up have left something"
    return None


def check(directory: str) -> str | None:
    import torch

    from kunserve_sgl.memory.errors import LayerDroppedError
    from kunserve_sgl.memory.layer_sources import BufferSource

    runner = load(directory)
    if not has_weights(directory):
        fill(runner)
    parameters, layers = runner.kunserve_memory.parameters, range(runner.kunserve_memory.layer_count)
    whole = generate(runner)
    if not all(logits.isfinite().all() for logits in whole) or torch.equal(whole[0][0], whole[0][1]):
        return "the logits are no logits"
    if has_weights(directory) and tokens_of(whole) != reference(directory):
        return "the tokens are not those of the reference"
    if (wrong := warmed_up(runner)) is not None:
        return wrong
    copies = {}
    for layer in layers:
        parameters.require_droppable(layer)
        copies[layer] = parameters.region(layer).clone()
    for cuts in ([0, len(layers)], [0, 0, 1, 2, len(layers), len(layers)], list(range(len(layers) + 1))):
        runner.own_batches = InRanges(runner, cuts)
        if not all(torch.equal(one, other) for one, other in zip(whole, generate(runner), strict=True)):
            return f"cut at {cuts}, the logits differ"
    runner.own_batches = None
    graphs = RepeatedLayers(runner, len(PROMPTS) + 2)  # padded: other kernels may round otherwise
    if tokens_by_graphs(runner, graphs) != tokens_of(whole) or graphs.loads != STEPS:
        return f"by graphs of single layers the tokens differ, or {graphs.loads} steps were loaded"
    for layer in layers:
        parameters.drop(layer)
        try:
            generate(runner)
        except LayerDroppedError:
            pass
        else:
            return f"layer {layer} ran although it was dropped"
    for layer in layers:
        parameters.restore(layer, BufferSource(copies))
    if not all(torch.equal(one, other) for one, other in zip(whole, generate(runner), strict=True)):
        return "after all layers were dropped and restored, the logits differ"
    if tokens_by_graphs(runner, graphs) != tokens_of(whole):
        return "after all layers were dropped and restored, the graphs of before give other tokens"
    return None


def run(directory: str) -> None:
    """In a process of its own, because SGLang's state is the process's."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    signal.alarm(DEADLINE_S)
    try:
        wrong = check(directory)
    except SystemExit as error:
        wrong = f"refused with exit code {error.code}"
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what is wrong with this model
        wrong = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    print(json.dumps({"model": directory, "wrong": wrong}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    attach_to_sglang()
    for each in sys.argv[1:]:
        run(each)
