"""What a merged decode step costs beside its layers: CPU time per step and replica, with layers that compute nothing.

    python bench/overhead.py [--layers 16,32,80] [--requests 1,8,64] [--rounds 5] [--before PYTHON] [--output FILE]

Real servers of two replicas, whose model is a llama with layers that return what they get. Both replicas decode, not
merged and merged in turn. CPU time is that of a replica's process with all of its threads, which a busy machine
disturbs little. Merged less not merged is what merging costs: SGLang's own scheduling, embedding, logits and the calls
of the layers are in both. A step is one token of each of the replica's requests.

`--before` is the Python of an environment that has another version: both are measured in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import psutil
import requests

from comparison.rounds import run_rounds
from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from servers.command import KUNSERVE_SERVER, add_server_arguments, launch_command, server_flags
from servers.server import ServerProcess, find_free_port
from servers.streams import DEADLINE_S, Controls, Json, LoadError, table

START_DEADLINE_S = 600.0
REPLICAS = 2
ALL = {"groups": [list(range(REPLICAS))]}
_PROMPT_TOKENS = 8
_TITLE = "sglang::scheduler"
_PACKAGE, _ARCHITECTURE = "external_models", "LayerlessForCausalLM"  # named, because importing it takes seconds


@dataclass
class Measured:
    """A server of one version."""

    version: str
    server: ServerProcess
    controls: Controls
    is_merged: bool = False

    def set_merged(self, merged: bool) -> None:
        if merged != self.is_merged:
            if merged:
                self.controls.drop(ALL)
            else:
                self.controls.restore()
            self.is_merged = merged

    def cpu_s(self) -> float:
        """CPU seconds of all schedulers so far, to the microsecond."""
        found = [psutil.Process(pid) for pid in self.server.pids()]
        pids = [process.pid for process in found if (process.cmdline() or [""])[0].startswith(_TITLE)]
        if len(pids) != REPLICAS:
            raise LoadError(f"{len(pids)} schedulers run, not {REPLICAS}")
        return sum(time.clock_gettime(_cpu_clock_of(pid)) for pid in pids)

    def round(self, number: int, requests_each: int, tokens: int, merged: bool) -> Json:
        """One round. The same number gives the same requests."""
        self.set_merged(merged)
        self.controls.wait_idle()
        chance = random.Random(number)
        prompts = [
            [[chance.randrange(300, 2000) for _ in range(_PROMPT_TOKENS)] for _ in range(requests_each)]
            for _ in range(REPLICAS)
        ]
        before_s, began_s = self.cpu_s(), time.perf_counter()
        with ThreadPoolExecutor(REPLICAS) as pool:
            list(pool.map(lambda replica: self._ask(replica, prompts[replica], tokens), range(REPLICAS)))
        wall_s = time.perf_counter() - began_s
        return {
            "version": self.version,
            "round": number,
            "requests": requests_each,
            "merged": merged,
            "step_cpu_s": (self.cpu_s() - before_s) / tokens / REPLICAS,
            "step_wall_s": wall_s / tokens,
        }

    def _ask(self, replica: int, prompts: list[list[int]], tokens: int) -> None:
        answer = requests.post(
            f"{self.server.base_url}/generate",
            json={
                "input_ids": prompts,
                "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
                "routed_dp_rank": replica,
            },
            timeout=DEADLINE_S,
        )
        if answer.status_code != requests.codes.ok:
            raise LoadError(f"status {answer.status_code}: {answer.text[:300]}")
        made = [each["meta_info"]["completion_tokens"] for each in answer.json()]
        if made != [tokens] * len(prompts):
            raise LoadError(f"replica {replica} answered {made} tokens, not {tokens} for each of {len(prompts)}")


def write_model(layers: int, dtype: str, directory: Path) -> None:
    """Random weights, small but for what a layer needs to make room for KV; the architecture is that without layers."""
    spec = TinyModelSpec(dtype=dtype, layers=layers, hidden=64, heads=4, kv_heads=1, intermediate=256)
    write_tiny_model(spec, directory)
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text()) | {"architectures": [_ARCHITECTURE]}
    config_path.write_text(json.dumps(config))


def server_command(model: Path, port: int, arguments: argparse.Namespace) -> list[str]:
    """The command of a server with room for the most requests."""
    most = max(arguments.requests)
    slots = most * (_PROMPT_TOKENS + arguments.tokens + 8)
    return launch_command(
        *(KUNSERVE_SERVER, model, port, "--dp-size", str(REPLICAS), "--kunserve", "manual"),
        *("--max-total-tokens", str(slots), "--max-running-requests", str(2 * most), *server_flags(arguments)),
    )


@contextmanager
def serving(version: str, python: str, model: Path, arguments: argparse.Namespace) -> Iterator[Measured]:
    """A server of the version that `python` has."""
    port = find_free_port()
    command = server_command(model, port, arguments)
    here = str(Path(__file__).parent)
    env = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))),
        "SGLANG_EXTERNAL_MODEL_PACKAGE": _PACKAGE,
    }
    with ServerProcess([python, *command[1:]], port=port, env=env) as server:
        try:
            server.wait_healthy(START_DEADLINE_S)
            controls = Controls(port, server.log_path)
            controls.wait_ready()
            yield Measured(version, server, controls)
        except LoadError as error:
            raise LoadError(f"{error}\nThe end of the log of version {version}:\n{server.log_tail()}") from error


def _cpu_clock_of(pid: int) -> int:
    """What clock_getcpuclockid(3) returns on Linux: the CPU time of all threads of a process."""
    return (~pid << 3) | 2


def measure(arguments: argparse.Namespace, output: TextIO | None) -> list[Json]:
    rows: list[Json] = []
    pythons = ({"before": arguments.before} if arguments.before else {}) | {"this": sys.executable}
    most = max(arguments.requests)
    for layers in arguments.layers:
        with ExitStack() as stack:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) / "model"
            write_model(layers, arguments.dtype, model)
            servers = [
                stack.enter_context(serving(version, python, model, arguments)) for version, python in pythons.items()
            ]
            for server in servers:
                for merged in (False, True):
                    server.round(-1, most, 16, merged)  # what happens first only
            for number in range(arguments.rounds):
                for server in servers:
                    for merged in (False, True) if number % 2 == 0 else (True, False):
                        for count in arguments.requests:
                            row = {"layers": layers, **server.round(number, count, arguments.tokens, merged)}
                            rows.append(row)
                            if output is not None:
                                output.write(json.dumps(row) + "\n")
                print(f"{layers} layers, round {number}: done", file=sys.stderr, flush=True)
    return rows


def report(rows: Sequence[Json]) -> str:
    """The costs by version, requests and layers, and how they grow with layers."""
    lines, growth = [], []
    for version, count in dict.fromkeys((row["version"], row["requests"]) for row in rows):
        mine = [row for row in rows if (row["version"], row["requests"]) == (version, count)]
        costs: list[tuple[int, float]] = []
        for layers in dict.fromkeys(row["layers"] for row in mine):
            both = [
                sorted((row for row in mine if (row["layers"], row["merged"]) == (layers, merged)), key=_round_of)
                for merged in (False, True)
            ]
            costs_ms = [
                1000 * (with_["step_cpu_s"] - without["step_cpu_s"]) for without, with_ in zip(*both, strict=True)
            ]
            costs += [(layers, cost_ms) for cost_ms in costs_ms]
            lines.append(
                [
                    f"{version}, {count} requests, {layers} layers",
                    *(f"{1000 * statistics.median(row['step_cpu_s'] for row in each):.3f}" for each in both),
                    *(f"{cost_ms:.3f}" for cost_ms in np.percentile(costs_ms, (25, 50, 75))),
                    *(f"{1000 * statistics.median(row['step_wall_s'] for row in each):.2f}" for each in both),
                ]
            )
        if len({layers for layers, _ in costs}) > 1:
            per_layer_ms, _ = np.polyfit([layers for layers, _ in costs], [cost_ms for _, cost_ms in costs], 1)
            growth.append([f"{version}, {count} requests", f"{1000 * per_layer_ms:.2f}"])
    titles = ["CPU ms per step and replica", "apart", "merged", "cost P25", "P50", "P75", "wall ms apart", "merged"]
    grows = f"\n\n{table(['fitted', 'us per extra layer'], growth)}" if growth else ""
    return table(titles, lines) + grows


def _round_of(row: Json) -> int:
    return int(row["round"])


def _numbers(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}; accepted are numbers from 1 on, with commas between them")
    return tuple(map(int, text.split(",")))


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=_numbers, default=(16, 32, 80), help="of the model; default: 16,32,80")
    parser.add_argument("--requests", type=_numbers, default=(1, 8, 64), help="of each replica; default: 1,8,64")
    parser.add_argument("--tokens", type=int, default=256, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--before", metavar="PYTHON", help="of an environment that has another version, to compare with"
    )
    add_server_arguments(parser, any_model=False)
    parser.add_argument("--output", type=Path, help="write one JSON object per round to this file")
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    return run_rounds("overhead.py", arguments.output, lambda output: measure(arguments, output), report)


if __name__ == "__main__":
    sys.exit(main())
