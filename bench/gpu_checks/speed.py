"""Checks of speed: transitions (F7), decoding (F8), and a burst (F9), by the benchmarks of the same names."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpu_checks.place import CheckError, Place
from gpu_checks.runner import Result, Status, Table
from gpu_checks.serving import (
    CONTEXT_TOKENS,
    NO_GRAPHS,
    REPLICAS,
    command_of,
    device_flags,
    large,
    model_flags,
    ready_controls,
    replica_flags,
    servers,
)
from merged import Bench

_BENCH = Path(__file__).parents[1]
_CUDA_KV_TOKENS, _CPU_KV_TOKENS = 122_880, 8192
_CUDA_SIZES, _CPU_SIZES = (1, 8, 32, 64), (1, 4)
_CUDA_DECODE_KV_TOKENS, _CPU_DECODE_KV_TOKENS = 65_536, 4096
# All of the burst's tokens together are more than both replicas have at start, and less than they have after a drop.
_CUDA_BURST = {
    "tokens": 16384,
    "base-rate": 2,
    "burst-rate": 30,
    "burst-start": 2,
    "burst-length": 4,
    "burst-gap": 2,
    "prompt-lengths": "uniform:512:1024",
    "output-lengths": "uniform:128:256",
}


def _benchmark(place: Place, script: str, *options: str) -> None:
    """Runs a benchmark on the large model, with the flags of the device."""
    model = large(place)
    (_, directory, _, dtype, *more) = model_flags(place, model)
    flags = shlex.join([*more, *device_flags(place), *replica_flags(place)])
    command = [
        *(sys.executable, str(_BENCH / script), "--model-path", directory, "--dtype", dtype, *options),
        *([f"--server-flags={flags}"] if flags else []),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise CheckError(f"{script} ended with status {done.returncode}: {lines[-1] if lines else 'no output'}")


def check_transitions(place: Place) -> Result:
    """F7: what a drop and a restore take, phase by phase, without requests and while some decode."""
    rows_path = place.output / "F7.jsonl"
    tokens = _CUDA_KV_TOKENS if place.is_cuda else _CPU_KV_TOKENS
    _benchmark(
        *(place, "transition.py", "--loads", "idle,running", "--rounds", "3", "--base-tokens", str(tokens)),
        *("--context-length", str(min(tokens, CONTEXT_TOKENS)), "--output", str(rows_path)),
    )
    rows = [json.loads(line) for line in rows_path.read_text(encoding="utf-8").splitlines()][1:]
    return Result(
        Status.PASSED,
        figures={"model": large(place).name, "KV slots of each replica": str(tokens)},
        tables=[transition_table(rows)],
        data={"rows": rows},
    )


def transition_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Medians in ms by order and load, the longest pause and the longest gap between two tokens."""
    kinds: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["action"], row["load"]].append(row)
    phases = list(dict.fromkeys(name for row in rows for name in row["phases_ms"]))

    def ms(values: Sequence[float]) -> str:
        return f"{1000 * statistics.median(values):.1f}"

    body = []
    for (action, load), each in kinds.items():
        gaps = [row["longest_gap_s"] for row in each if "longest_gap_s" in row]
        body.append(
            [
                *(f"{action}, {load}", str(len(each)), ms([row["call_s"] for row in each])),
                *(f"{statistics.median(row['phases_ms'].get(name, 0.0) for row in each):.1f}" for name in phases),
                f"{1000 * max(row['pause_seconds'] for row in each):.1f}",
                f"{1000 * max(gaps):.1f}" if gaps else "-",
            ]
        )
    head = ["order, load", "n", "order to answer, ms", *phases, "longest pause", "longest gap of a request"]
    return Table("transitions, medians in ms", head, body)


def check_decoding(place: Place) -> Result:
    """F8: time per output token by the number of requests of each replica, merged and not, with graphs and without."""
    tokens = _CUDA_DECODE_KV_TOKENS if place.is_cuda else _CPU_DECODE_KV_TOKENS
    model = large(place)
    kinds = {"graphs": ()} | ({"eager": NO_GRAPHS} if place.is_cuda else {})
    commands = {f"F8-{name}": command_of(place, model, REPLICAS, tokens, *flags) for name, flags in kinds.items()}
    rows = []
    with servers(place, commands, place.start_s) as started:
        for name, server in started.items():
            how = Namespace(concurrency=0, output_tokens=0)
            bench = Bench(server, ready_controls(server), how)
            for merged in (False, True):
                for size in _CUDA_SIZES if place.is_cuda else _CPU_SIZES:
                    how.concurrency, how.output_tokens = size, 8
                    bench.round(-1, "decode", "both", merged)  # what happens first only
                    how.output_tokens = 64
                    row = bench.round(0, "decode", "both", merged)
                    rows.append({"server": name.removeprefix("F8-"), "size": size, **row})
    skipped = {} if place.is_cuda else {"graphs": "there are none on a CPU"}
    return Result(
        Status.PASSED,
        figures={"model": model.name},
        tables=[decoding_table(rows)],
        skipped=skipped,
        data={"rows": rows},
    )


def decoding_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Ms per output token, and merged over not merged."""
    found: dict[tuple[str, int], dict[bool, float]] = defaultdict(dict)
    for row in rows:
        found[row["server"], row["size"]][row["merged"]] = 1000 * row["tpot_s"]
    body = [
        [server, str(size), f"{tpot[False]:.2f}", f"{tpot[True]:.2f}", f"{tpot[True] / tpot[False]:.2f}"]
        for (server, size), tpot in found.items()
    ]
    return Table("ms per output token", ["server", "requests of each replica", "normal", "merged", "ratio"], body)


def check_burst(place: Place) -> Result:
    """F9: the time to first token in a burst, on KunServe and on stock, with as many replicas on the GPU."""
    output = place.output / "F9"
    options = ["--output-dir", str(output), "--unloaded-requests", "2", "--load-balance-method", "total_tokens"]
    if place.is_cuda:
        options += [f"--{name}={value}" for name, value in _CUDA_BURST.items()]
        options += ["--context-length", str(CONTEXT_TOKENS)]
    else:
        options.append("--quick")
    _benchmark(place, "burst.py", *options, "--systems", "stock,auto")
    runs = [json.loads(line) for line in (output / "burst.jsonl").read_text(encoding="utf-8").splitlines()]
    return Result(
        Status.PASSED,
        figures={"model": large(place).name},
        tables=[burst_table(runs)],
    )


def burst_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds to the first token and ms per output token of the requests of each system, which must all be answered."""
    requests: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["kind"] == "request":
            requests[run["system"]].append(run)
    body = []
    for system, each in requests.items():
        first = [request["ttft_s"] for request in each]
        each_token = [1000 * request["tpot_s"] for request in each if request["tpot_s"]]
        body.append(
            [
                *(system, str(len(each)), *(f"{float(np.percentile(first, p)):.3f}" for p in (50, 90, 99))),
                f"{statistics.median(each_token):.1f}",
            ]
        )
    return Table("a burst", ["system", "requests", "TTFT P50, s", "P90", "P99", "TPOT P50, ms"], body)
