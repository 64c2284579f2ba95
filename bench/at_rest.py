"""What KunServe costs while nothing is dropped: output tokens/s, start-up time and memory, against stock SGLang.

    python bench/at_rest.py [--preset tiny|small] [--rounds 9] [--requests 32] [--concurrency 16] [--replicas 2]

Both servers are alive in the same run and take turns, round by round, in alternating order. The other one is stopped
meanwhile (SIGSTOP): a part of stock SGLang spins even when it is idle, and would take a core from ours. The figure is
the ratio ours/stock of each pair of rounds, as median with quartiles. Memory is the proportional set size (PSS) of the
scheduler processes, which counts shared pages once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import PRESETS, TinyModelSpec
from server import ServerProcess, find_free_port

START_DEADLINE_S = 900.0
REQUEST_TIMEOUT_S = 300.0
SERVERS = {"stock": "sglang.launch_server", "ours": "kunserve_sgl.launch_server"}


def scheduler_pss_bytes(server: ServerProcess) -> int:
    """Proportional set size of all scheduler processes of a server."""
    processes = [psutil.Process(pid) for pid in server.pids()]
    schedulers = [p for p in processes if (p.cmdline() or [""])[0].startswith("sglang::scheduler")]
    if not schedulers:
        raise RuntimeError("no scheduler process found")
    return sum(process.memory_full_info().pss for process in schedulers)


@contextlib.contextmanager
def others_stopped(server: ServerProcess, servers: Mapping[str, ServerProcess]) -> Iterator[None]:
    """While the block runs, only `server` gets the machine."""
    pids = [pid for other in servers.values() if other is not server for pid in other.pids()]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def round_tokens_per_s(server: ServerProcess, seed: int, arguments: argparse.Namespace) -> float:
    """Output tokens/s of one closed-loop round. The same seed gives the same requests."""
    chance = random.Random(seed)
    prompts = [
        [chance.randrange(300, 2000) for _ in range(chance.randrange(16, arguments.input_tokens))]
        for _ in range(arguments.requests)
    ]

    def ask(prompt: list[int]) -> int:
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": arguments.output_tokens, "temperature": 0, "ignore_eos": True},
        }
        answer = requests.post(f"{server.base_url}/generate", json=body, timeout=REQUEST_TIMEOUT_S)
        answer.raise_for_status()
        return int(answer.json()["meta_info"]["completion_tokens"])

    started_at_s = time.perf_counter()
    with ThreadPoolExecutor(arguments.concurrency) as pool:
        tokens = sum(pool.map(ask, prompts))
    return tokens / (time.perf_counter() - started_at_s)


def start(name: str, model: Path, arguments: argparse.Namespace) -> ServerProcess:
    port = find_free_port()
    command = [
        *(sys.executable, "-m", SERVERS[name], "--model-path", str(model), "--port", str(port)),
        *("--dp-size", str(arguments.replicas), "--max-total-tokens", str(arguments.kv_tokens), "--sleep-on-idle"),
        *("--dtype", arguments.dtype, "--disable-radix-cache", "--max-running-requests", "64"),
    ]
    return ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"})


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        write_tiny_model(TinyModelSpec(dtype=arguments.dtype, **PRESETS[arguments.preset]), model)
        servers = {name: start(name, model, arguments) for name in SERVERS}
        start_s = {}
        with contextlib.ExitStack() as running:
            # One after the other: two servers that start at once would slow each other down.
            for name, server in servers.items():
                with others_stopped(server, servers):
                    running.enter_context(server)
                    start_s[name] = server.wait_healthy(START_DEADLINE_S)
            pss = {name: scheduler_pss_bytes(server) for name, server in servers.items()}
            rates: dict[str, list[float]] = {name: [] for name in servers}
            for server in servers.values():
                with others_stopped(server, servers):
                    round_tokens_per_s(server, -1, arguments)
            for number in range(arguments.rounds):
                order = list(servers) if number % 2 == 0 else list(servers)[::-1]
                for name in order:
                    with others_stopped(servers[name], servers):
                        rates[name].append(round_tokens_per_s(servers[name], number, arguments))
                print(
                    f"round {number}: " + ", ".join(f"{n} {rates[n][-1]:.1f} tok/s" for n in servers), file=sys.stderr
                )
    ratios = [ours / stock for ours, stock in zip(rates["ours"], rates["stock"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "tokens_per_s_p50": {name: statistics.median(values) for name, values in rates.items()},
        "ratio_p25_p50_p75": quartiles,
        "scheduler_pss_bytes": pss,
        "healthy_after_s": start_s,
        "rounds": arguments.rounds,
        "preset": arguments.preset,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kv-tokens", type=int, default=8192, help="KV slots per replica")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=32, help="requests per round")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=128, help="longest prompt")
    parser.add_argument("--output-tokens", type=int, default=48)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: quartiles need 2 or more")
    result = measure(arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
