"""What KunServe costs while nothing is dropped: tokens/s, TTFT, TPOT, start-up time and memory, against stock SGLang.

    python bench/at_rest.py [--preset tiny|small] [--rounds 9] [--requests 32] [--concurrency 16] [--replicas 2]

Three servers: stock, ours with --kunserve off, and ours with KunServe on. All are alive in the same run and take turns,
round by round, in rotating order, with the same requests. The others are stopped meanwhile (SIGSTOP): a part of stock
SGLang spins even when it is idle, and would take a core from ours. The figures are ratios to stock and to off of the
same round, as median with quartiles. Memory is the proportional set size (PSS) of the scheduler processes, which counts
shared pages once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from kunserve_sgl.tiny_model_spec import PRESETS
from servers.command import (
    KUNSERVE_SERVER,
    STOCK_SERVER,
    add_server_arguments,
    launch_command,
    model_to_serve,
    server_flags,
)
from servers.machine import describe_machine
from servers.server import ServerProcess, find_free_port, others_stopped
from servers.streams import Stream

START_DEADLINE_S = 900.0
SERVERS = ("stock", "off", "on")


def scheduler_pss_bytes(server: ServerProcess) -> int:
    """Proportional set size of all scheduler processes of a server."""
    processes = [psutil.Process(pid) for pid in server.pids()]
    schedulers = [p for p in processes if (p.cmdline() or [""])[0].startswith("sglang::scheduler")]
    if not schedulers:
        raise RuntimeError("no scheduler process found")
    return sum(process.memory_full_info().pss for process in schedulers)


def serve_round(server: ServerProcess, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One closed-loop round. The same seed gives the same requests."""
    chance = random.Random(seed)
    prompts = [
        [chance.randrange(300, 2000) for _ in range(chance.randrange(16, arguments.input_tokens))]
        for _ in range(arguments.requests)
    ]

    def ask(prompt: list[int]) -> Stream:
        stream = Stream(server.port, prompt, arguments.output_tokens, None)
        stream.wait_end()
        return stream

    started_at_s = time.perf_counter()
    with ThreadPoolExecutor(arguments.concurrency) as pool:
        streams = list(pool.map(ask, prompts))
    wall_s = max(stream.times_s[-1] for stream in streams) - started_at_s
    ttft_s = [stream.ttft_s for stream in streams]
    return {
        "tokens_per_s": sum(stream.tokens for stream in streams) / wall_s,
        "ttft_p50_s": float(np.percentile(ttft_s, 50)),
        "ttft_p99_s": float(np.percentile(ttft_s, 99)),
        "tpot_p50_s": statistics.median(stream.tpot_s for stream in streams),
    }


def server_command(name: str, model: Path, port: int, arguments: argparse.Namespace) -> list[str]:
    """The command of one of SERVERS."""
    mode: dict[str, tuple[str, ...]] = {
        "stock": (),
        "off": ("--kunserve", "off"),
        "on": ("--kunserve", "auto" if arguments.replicas > 1 else "manual"),
    }
    return launch_command(
        *(STOCK_SERVER if name == "stock" else KUNSERVE_SERVER, model, port, *mode[name]),
        *("--dp-size", str(arguments.replicas), "--max-total-tokens", str(arguments.kv_tokens), "--sleep-on-idle"),
        *("--disable-radix-cache", "--max-running-requests", "64", *server_flags(arguments)),
    )


def start(name: str, model: Path, arguments: argparse.Namespace) -> ServerProcess:
    port = find_free_port()
    command = server_command(name, model, port, arguments)
    return ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"})


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    machine = describe_machine()  # the load before the start is a part of it
    with tempfile.TemporaryDirectory() as directory:
        model = model_to_serve(arguments, PRESETS[arguments.preset], Path(directory) / "model")
        start_s = {}
        for name in SERVERS:  # each by itself
            with start(name, model, arguments) as server:
                start_s[name] = server.wait_healthy(START_DEADLINE_S)
        servers = {name: start(name, model, arguments) for name in SERVERS}
        with contextlib.ExitStack() as running:
            for server in servers.values():
                with others_stopped(server, servers):
                    running.enter_context(server)
                    server.wait_healthy(START_DEADLINE_S)
            pss = {name: scheduler_pss_bytes(server) for name, server in servers.items()}
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
            for server in servers.values():
                with others_stopped(server, servers):
                    serve_round(server, -1, arguments)
            for number in range(arguments.rounds):
                turn = number % len(SERVERS)
                for name in (*SERVERS[turn:], *SERVERS[:turn]):
                    with others_stopped(servers[name], servers):
                        rounds[name].append(serve_round(servers[name], number, arguments))
                line = ", ".join(f"{name} {rounds[name][-1]['tokens_per_s']:.1f} tok/s" for name in servers)
                print(f"round {number}: {line}", file=sys.stderr)
    return {
        "p50": {n: {what: statistics.median(r[what] for r in rounds[n]) for what in rounds[n][0]} for n in servers},
        "on/stock p25 p50 p75": ratios(rounds["on"], rounds["stock"]),
        "on/off p25 p50 p75": ratios(rounds["on"], rounds["off"]),
        "scheduler_pss_bytes": pss,
        "healthy_after_s": start_s,
        "rounds": arguments.rounds,
        "preset": arguments.preset,
        "replicas": arguments.replicas,
        "machine": machine,
    }


def ratios(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Quartiles of the ratios of each round."""
    return {
        what: [
            round(q, 4)
            for q in statistics.quantiles([a[what] / b[what] for a, b in zip(ours, theirs, strict=True)], n=4)
        ]
        for what in ours[0]
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--kv-tokens", type=int, default=8192, help="KV slots per replica")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=32, help="requests per round")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=128, help="longest prompt")
    parser.add_argument("--output-tokens", type=int, default=48)
    add_server_arguments(parser)
    return parser


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: quartiles need 2 or more")
    result = measure(arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
