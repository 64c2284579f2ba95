"""Attention on a CPU against SGLang's torch_native, in one process on one model runner: the kernel, and decode steps.

    python bench/attention.py [--dtype bfloat16 float32] [--batch 16] [--context 300] [--steps 32]

Kernel: one call per decoder layer of the model, so that keys and values come from memory as in serving, for a grid of
batch sizes and contexts. Step: the whole forward pass and sampling of SGLang's model runner, two copies of the same
requests, one per backend. Both parts alternate between the backends call by call, so that drift of the machine meets
both alike; figures are medians. Tokens of the two copies are compared. Needs a machine without an accelerator.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch: one thread, as one replica of several on a machine has. Set it to measure with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import PRESETS, TinyModelSpec

STOCK, OURS = "torch_native", "kunserve_host"
_WARM_UP_CALLS = 3


@dataclass(frozen=True)
class KernelTimes:
    """Medians of one decode call of all layers, milliseconds."""

    dtype: str
    batch: int
    context: int
    stock_ms: float
    ours_ms: float

    @property
    def ratio(self) -> float:
        return self.stock_ms / self.ours_ms


@dataclass(frozen=True)
class StepTimes:
    """Medians of one decode step of the model, milliseconds; whether both copies generated the same tokens."""

    dtype: str
    batch: int
    context: int
    steps: int
    stock_ms: float
    ours_ms: float
    stock_prefill_ms: float
    ours_prefill_ms: float
    tokens_compared: int
    tokens_different: int

    @property
    def ratio(self) -> float:
        return self.stock_ms / self.ours_ms


def timed_ms(call: Callable[[], Any]) -> tuple[float, Any]:
    started_at_s = time.perf_counter()
    result = call()
    return 1000 * (time.perf_counter() - started_at_s), result


class Bench:
    """One SGLang model runner with both attention backends over its pools."""

    def __init__(self, model: Path, dtype: str, slots: int) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.benchmark import one_batch
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.runtime_context import publish
        from sglang.srt.server_args import PortArgs, prepare_server_args

        from kunserve_sgl.integration.cpu_platform import attention

        attention.register()
        flags = ["--model-path", str(model), "--dtype", dtype, "--attention-backend", OURS]
        arguments = prepare_server_args(
            [*flags, "--max-total-tokens", str(slots), "--disable-overlap-schedule", "--log-level", "error"]
        )
        publish(arguments, role="scheduler")
        self.one_batch = one_batch
        self.dtype = dtype
        self.runner = one_batch.load_model(arguments, PortArgs.init_new(arguments), gpu_id=0, tp_rank=0)[0].torch_runner
        self.backends = {STOCK: TorchNativeAttnBackend(self.runner), OURS: self.runner.attn_backend}

    def alternate(self, rounds: int, call: Callable[[str], None]) -> dict[str, list[float]]:
        """Times `call(backend)` for both backends, `rounds` times each, each time the other one first."""
        times: dict[str, list[float]] = {name: [] for name in self.backends}
        for number in range(_WARM_UP_CALLS + rounds):
            for name in list(self.backends)[:: 1 if number % 2 else -1]:
                elapsed_ms, _ = timed_ms(lambda name=name: call(name))
                if number >= _WARM_UP_CALLS:
                    times[name].append(elapsed_ms)
        return times

    @torch.no_grad()
    def kernel(self, batch: int, context: int, rounds: int) -> KernelTimes:
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        layers = [module for module in self.runner.model.modules() if isinstance(module, RadixAttention)]
        pool, table = self.runner.token_to_kv_pool, self.runner.req_to_token_pool.req_to_token
        rows = torch.arange(1, batch + 1)
        slots = torch.randperm(pool.size)[: batch * context] + 1  # a pool in use for a while is not in order
        table[rows, :context] = slots.view(batch, context).to(table.dtype)
        for layer in layers:
            for buffer in (pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)):
                buffer[slots] = torch.randn(len(slots), *buffer.shape[1:]).to(buffer.dtype)
        lengths = torch.full((batch,), context)
        forward_batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=batch,
            input_ids=torch.zeros(batch, dtype=torch.int64),
            req_pool_indices=rows,
            seq_lens=lengths,
            out_cache_loc=slots[:batch],
            seq_lens_sum=batch * context,
        )
        queries = [
            torch.randn(batch, layer.tp_q_head_num * layer.qk_head_dim).to(self.runner.dtype) for layer in layers
        ]

        def call(name: str) -> None:
            backend = self.backends[name]
            backend.init_forward_metadata(forward_batch)
            for layer, query in zip(layers, queries, strict=True):
                backend.forward(query, None, None, layer, forward_batch, save_kv_cache=False)

        times = self.alternate(rounds, call)
        return KernelTimes(self.dtype, batch, context, *(statistics.median(times[name]) for name in (STOCK, OURS)))

    def steps(self, batch: int, context: int, steps: int) -> StepTimes:
        runner = self.runner
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()
        state: dict[str, tuple[torch.Tensor, Any]] = {}
        tokens: dict[str, list[list[int]]] = {name: [] for name in self.backends}
        prefill_ms = {}

        def prefill(name: str) -> None:
            runner.attn_backend = self.backends[name]
            next_tokens, _, scheduled = self.one_batch.extend(self.requests(batch, context), runner)
            state[name] = next_tokens, scheduled
            tokens[name].append(next_tokens.tolist())

        def decode(name: str) -> None:
            runner.attn_backend = self.backends[name]
            next_tokens, scheduled = state[name]
            for request, token in zip(scheduled.reqs, next_tokens.tolist(), strict=True):
                request.output_ids.append(token)
            next_tokens, _ = self.one_batch.decode(next_tokens, scheduled, runner)
            state[name] = next_tokens, scheduled
            tokens[name].append(next_tokens.tolist())

        for name in self.backends:
            prefill_ms[name], _ = timed_ms(lambda name=name: prefill(name))
        times = self.alternate(steps, decode)
        pairs = [
            (left, right)
            for of_stock, of_ours in zip(tokens[STOCK], tokens[OURS], strict=True)
            for left, right in zip(of_stock, of_ours, strict=True)
        ]
        return StepTimes(
            self.dtype,
            batch,
            context,
            steps,
            statistics.median(times[STOCK]),
            statistics.median(times[OURS]),
            prefill_ms[STOCK],
            prefill_ms[OURS],
            len(pairs),
            sum(left != right for left, right in pairs),
        )

    def requests(self, batch: int, context: int) -> list[Any]:
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        generator = torch.Generator().manual_seed(0)
        requests = []
        for number in range(batch):
            ids = array(
                "q", torch.randint(5, self.runner.model_config.vocab_size, (context,), generator=generator).tolist()
            )
            sampling = SamplingParams(temperature=0, max_new_tokens=context)
            request = Req(rid=str(number), origin_input_text="", origin_input_ids=ids, sampling_params=sampling)
            request.full_untruncated_fill_ids = request.origin_input_ids
            request.logprob_start_len = -1
            request.set_extend_range(0, context)
            requests.append(request)
        return requests


def measure(model: Path, dtype: str, arguments: argparse.Namespace) -> tuple[list[KernelTimes], StepTimes]:
    """Everything for one dtype. Call it in a process of its own: SGLang's global state is made once per process."""
    grid = [(batch, context) for batch in arguments.grid_batch for context in arguments.grid_context]
    steps_slots = 2 * arguments.batch * (arguments.context + arguments.steps + _WARM_UP_CALLS + 2)
    bench = Bench(model, dtype, max([steps_slots, *(batch * context + 1 for batch, context in grid)]))
    kernels = [bench.kernel(batch, context, arguments.rounds) for batch, context in grid]
    return kernels, bench.steps(arguments.batch, arguments.context, arguments.steps)


def run(model: Path, arguments: argparse.Namespace) -> tuple[list[KernelTimes], list[StepTimes]]:
    kernels: list[KernelTimes] = []
    steps: list[StepTimes] = []
    for dtype in arguments.dtype:
        print(f"{dtype}: starting", file=sys.stderr)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            of_dtype, step = process.submit(measure, model, dtype, arguments).result()
        kernels += of_dtype
        steps.append(step)
    return kernels, steps


def report(kernels: Sequence[KernelTimes], steps: Sequence[StepTimes]) -> None:
    print("kernel, all layers   batch  context   stock ms    ours ms   stock/ours")
    for kernel in kernels:
        row = f"{kernel.batch:5d} {kernel.context:8d} {kernel.stock_ms:10.2f} {kernel.ours_ms:10.2f}"
        print(f"{kernel.dtype:18s}   {row} {kernel.ratio:10.2f} x")
    for step in steps:
        same = "yes" if step.tokens_different == 0 else f"no, {step.tokens_different} of {step.tokens_compared} differ"
        print(
            f"decode step of the model, {step.dtype}, batch {step.batch}, context {step.context}: "
            f"stock {step.stock_ms:.1f} ms, ours {step.ours_ms:.1f} ms, {step.ratio:.2f} x; "
            f"prefill {step.stock_prefill_ms:.0f} and {step.ours_prefill_ms:.0f} ms; same tokens: {same}"
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: a Llama of 47 M parameters is made)")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=16, help="of the decode steps")
    parser.add_argument("--context", type=int, default=300, help="prompt tokens before the decode steps")
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are timed")
    parser.add_argument("--grid-batch", type=int, nargs="*", default=[1, 4, 16, 32], help="of the kernel part")
    parser.add_argument("--grid-context", type=int, nargs="*", default=[64, 300, 1024], help="of the kernel part")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls per backend and grid point")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model
        if model is None:
            model = Path(directory) / "model"
            write_tiny_model(TinyModelSpec(**PRESETS["small"]), model)
        kernels, steps = run(model, arguments)
    report(kernels, steps)
    if arguments.json is not None:
        figures = {"kernel": [asdict(times) for times in kernels], "step": [asdict(times) for times in steps]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
