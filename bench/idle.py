"""What an idle server costs: CPU use of replicas and controller, and the first request after a pause; ours and stock.

    python bench/idle.py [--replicas 2] [--seconds 20] [--requests 30] [--pause 2]

Both servers run one after the other with the same model and flags. CPU use is CPU time over wall time, of the
scheduler and controller processes, 100 % being one core. Latency is of one-token requests, sent alternately after a
pause and right after an answer, so that drift of the machine meets both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import requests

from kunserve_sgl.tiny_model_spec import PRESETS
from servers.command import (
    KUNSERVE_SERVER,
    STOCK_SERVER,
    add_server_arguments,
    launch_command,
    model_to_serve,
    server_flags,
)
from servers.server import ServerProcess, find_free_port

START_DEADLINE_S = 600.0
REQUEST_TIMEOUT_S = 60.0
_SETTLE_S = 5.0  # start-up work of libraries (compilation caches, garbage) is over by then
_WORKERS = ("sglang::scheduler", "sglang::data_parallel")


@dataclass(frozen=True)
class IdleCost:
    """One server's figures. Percentages are of one core; latencies in milliseconds, medians and P90."""

    server: str
    workers_cpu_percent: float
    all_cpu_percent: float
    after_pause_p50_ms: float
    after_pause_p90_ms: float
    back_to_back_p50_ms: float
    back_to_back_p90_ms: float


def cpu_percent(pids: Sequence[int], seconds: float) -> dict[str, float]:
    """CPU use of `pids` over `seconds`, by process title; processes of the same title are added up."""

    def cpu_s() -> dict[int, float]:
        return {process.pid: sum(process.cpu_times()[:2]) for process in processes}

    processes = [psutil.Process(pid) for pid in pids]
    before, started_at_s = cpu_s(), time.monotonic()
    time.sleep(seconds)
    after, elapsed_s = cpu_s(), time.monotonic() - started_at_s
    use: dict[str, float] = {}
    for process in processes:
        title = (process.cmdline() or [process.name()])[0]
        use[title] = use.get(title, 0.0) + 100 * (after[process.pid] - before[process.pid]) / elapsed_s
    return use


def worker_percent(use: dict[str, float]) -> float:
    """The part of `use` that belongs to the schedulers and the data-parallel controller."""
    workers = {title: percent for title, percent in use.items() if title.startswith(_WORKERS)}
    if not workers:
        raise RuntimeError(f"no scheduler among the processes {sorted(use)}")
    return sum(workers.values())


def latencies_ms(base_url: str, requests_each: int, pause_s: float) -> tuple[list[float], list[float]]:
    """(after a pause, right after an answer), alternating."""
    session = requests.Session()

    def one() -> float:
        started_at_s = time.perf_counter()
        answer = session.post(
            f"{base_url}/generate",
            json={"input_ids": [17, 18, 19, 20], "sampling_params": {"max_new_tokens": 1, "temperature": 0}},
            timeout=REQUEST_TIMEOUT_S,
        )
        answer.raise_for_status()
        return 1000 * (time.perf_counter() - started_at_s)

    paused, direct = [], []
    for _ in range(4):
        one()  # both replicas have compiled and cached what a request needs
    for _ in range(requests_each):
        time.sleep(pause_s)
        paused.append(one())
        direct.append(one())
    return paused, direct


def server_command(module: str, model: Path, port: int, arguments: argparse.Namespace) -> list[str]:
    """The command of a server of that module."""
    return launch_command(
        *(module, model, port, "--dp-size", str(arguments.replicas)),
        *("--max-total-tokens", "4096", "--disable-radix-cache", *server_flags(arguments)),
    )


def measure(name: str, module: str, model: Path, arguments: argparse.Namespace) -> IdleCost:
    port = find_free_port()
    command = server_command(module, model, port, arguments)
    with ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"}) as server:
        print(f"{name}: starting {module}", file=sys.stderr)
        server.wait_healthy(START_DEADLINE_S)
        paused, direct = latencies_ms(server.base_url, arguments.requests, arguments.pause)
        time.sleep(_SETTLE_S)
        use = cpu_percent(server.pids(), arguments.seconds)
    for title, percent in sorted(use.items()):
        print(f"  {title:45.45s} {percent:7.2f} %", file=sys.stderr)
    p90 = [statistics.quantiles(values, n=10)[8] for values in (paused, direct)]
    medians = [statistics.median(values) for values in (paused, direct)]
    return IdleCost(name, worker_percent(use), sum(use.values()), medians[0], p90[0], medians[1], p90[1])


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long CPU use is watched")
    parser.add_argument("--requests", type=int, default=30, help="requests of each kind")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds of idling before a request")
    add_server_arguments(parser)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = model_to_serve(arguments, PRESETS["tiny"], Path(directory) / "tiny")
        stock = measure("stock", STOCK_SERVER, model, arguments)
        ours = measure("ours", KUNSERVE_SERVER, model, arguments)
    for cost in (stock, ours):
        print(json.dumps(asdict(cost)))
    print(
        f"workers' idle CPU: stock {stock.workers_cpu_percent:.1f} %, ours {ours.workers_cpu_percent:.1f} % of a core; "
        f"first request after {arguments.pause:g} s: stock {stock.after_pause_p50_ms:.1f} ms, "
        f"ours {ours.after_pause_p50_ms:.1f} ms (P50), "
        f"difference {ours.after_pause_p50_ms - stock.after_pause_p50_ms:+.1f} ms"
    )


if __name__ == "__main__":
    main()
