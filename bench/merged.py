"""What a merged plan costs: throughput, TPOT and TTFT of the same server merged and not merged, and where time goes.

    python bench/merged.py [--preset small] [--rounds 7] [--output FILE]

Two replicas. For each load, rounds take turns, not merged and merged, the first of the two in turn; both serve the same
requests. The figure is the ratio merged/normal of each pair of rounds, as median with quartiles. Loads: decode only
(short prompts, long answers) and mixed (prompts of all lengths arrive while others decode), with requests for both
replicas and for one only; and long prompts for replica 0 while replica 1 decodes, whose decode steps must not be held
up: "ITL P99 of replica 1". All requests fit into the base slots, so memory makes no difference.

Where the time goes: seconds that the schedulers count, as a share of the wall time and per own batch. `own` are
own layers, `serve` those of others, `wait` is waiting for the own batch with nothing to serve, `other` is the rest of
the wall time, where SGLang schedules, samples and sends, or has nothing to do. Bubbles are wait / (own + serve + wait).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import numpy as np
import psutil

from comparison.rounds import quartiles, run_rounds
from kunserve_sgl.tiny_model_spec import PRESETS
from servers.command import KUNSERVE_SERVER, add_server_arguments, launch_command, model_to_serve, server_flags
from servers.server import ServerProcess, find_free_port
from servers.streams import Controls, Json, LoadError, Stream, table

START_DEADLINE_S = 600.0
REPLICAS = 2
ALL = {"groups": [list(range(REPLICAS))]}
LOADS = (*((kind, where) for kind in ("decode", "mixed") for where in ("both", "one")), ("long prompts", "both"))
WHAT = ("own", "serve", "wait", "send", "receive", "copy")
_TITLE = "sglang::scheduler"

Request = tuple[list[int], int]  # prompt, tokens to answer


def make_requests(kind: str, replica: int, chance: random.Random, arguments: argparse.Namespace) -> list[Request]:
    """The requests for one replica."""

    def prompt(tokens: int) -> list[int]:
        return [chance.randrange(300, 2000) for _ in range(tokens)]

    if kind == "long prompts" and replica == 0:
        return [(prompt(arguments.long_tokens), 4) for _ in range(arguments.long_requests)]
    if kind != "mixed":
        return [(prompt(8), arguments.output_tokens) for _ in range(arguments.concurrency)]
    longest = arguments.input_tokens
    return [(prompt(chance.randrange(16, longest)), chance.randrange(8, 40)) for _ in range(arguments.requests)]


def pipeline_delta(before: Json, after: Json) -> dict[str, float]:
    """Seconds by what, and the numbers of batches, that one replica's status counts from `before` to `after`."""
    begin, end = before["pipeline"], after["pipeline"]
    delta = {what: end["seconds"].get(what, 0.0) - begin["seconds"].get(what, 0.0) for what in WHAT}
    return delta | {
        "own_batches": end["own_batches_sent"] - begin["own_batches_sent"],
        "pieces": end["pieces_sent"] - begin["pieces_sent"],
        "served": end["batches_served"] - begin["batches_served"],
    }


def bubbles(seconds: Mapping[str, float]) -> float:
    """The share of the time for layers in which a replica has none to execute."""
    busy = seconds["own"] + seconds["serve"] + seconds["wait"]
    return seconds["wait"] / busy if busy else 0.0


class Bench:
    def __init__(self, server: ServerProcess, controls: Controls, arguments: argparse.Namespace) -> None:
        self._server = server
        self._controls = controls
        self._arguments = arguments
        self._is_merged = False

    def set_merged(self, merged: bool) -> None:
        if merged != self._is_merged:
            if merged:
                self._controls.drop(ALL)
            else:
                self._controls.restore()
            self._is_merged = merged

    def round(self, number: int, kind: str, where: str, merged: bool) -> Json:
        """One round. The same number gives the same requests."""
        self.set_merged(merged)
        self._controls.wait_idle()
        replicas = range(REPLICAS if where == "both" else 1)
        chance = random.Random(number)
        work = {replica: make_requests(kind, replica, chance, self._arguments) for replica in replicas}
        before, cpu_s = self._controls.status()["replicas"], self._cpu_s()
        began_s = time.perf_counter()
        streams = self._serve(work)
        wall_s = max(stream.times_s[-1] for stream in streams) - began_s
        after = self._controls.status()["replicas"]
        gaps = [end - begin for stream in streams for begin, end in stream.gaps]
        return {
            "round": number,
            "kind": kind,
            "where": where,
            "merged": merged,
            "wall_s": wall_s,
            "output_tokens_per_s": sum(stream.tokens for stream in streams) / wall_s,
            "total_tokens_per_s": sum(stream.tokens + stream.prompt_tokens for stream in streams) / wall_s,
            "tpot_s": statistics.median(stream.tpot_s for stream in streams),
            "ttft_s": statistics.median(stream.ttft_s for stream in streams),
            "ttft_p99_s": float(np.percentile([stream.ttft_s for stream in streams], 99)),
            "itl_p50_s": statistics.median(gaps),
            "itl_p99_s": float(np.percentile(gaps, 99)),
            "last_itl_p99_s": float(
                np.percentile(
                    [end - begin for each in streams if each.replica == replicas[-1] for begin, end in each.gaps], 99
                )
            ),
            "scheduler_cpu_s": self._cpu_s() - cpu_s,
            "tpot_s_of": [
                statistics.median(stream.tpot_s for stream in streams if stream.replica == replica)
                for replica in replicas
            ],
            "first_wave_sent_within_s": self._first_wave_span_s(streams),
            "replicas": [pipeline_delta(*each) for each in zip(before, after, strict=True)],
        }

    def _serve(self, work: Mapping[int, Sequence[Request]]) -> list[Stream]:
        """Sends everything, so many requests of each replica at a time."""

        def ask(replica: int, request: Request) -> Stream:
            stream = Stream(self._server.port, *request, replica)
            stream.wait_end()
            if stream.tokens != request[1]:
                raise LoadError(f"request {stream.rid} ended after {stream.tokens} of {request[1]} tokens")
            return stream

        pools = [ThreadPoolExecutor(self._arguments.concurrency) for _ in work]
        try:
            asked = [
                pool.submit(ask, replica, request)
                for pool, (replica, each) in zip(pools, work.items(), strict=True)
                for request in each
            ]
            return [future.result() for future in asked]
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def _first_wave_span_s(self, streams: Sequence[Stream]) -> float:
        """From the first request sent to the last one that did not have to wait for another: what a client without
        enough processor time adds."""
        sent = {
            replica: sorted(stream.sent_s for stream in streams if stream.replica == replica)
            for replica in {stream.replica for stream in streams}
        }
        first = [each[: self._arguments.concurrency] for each in sent.values()]
        return max(each[-1] for each in first) - min(each[0] for each in first)

    def _cpu_s(self) -> float:
        processes = [psutil.Process(pid) for pid in self._server.pids()]
        return sum(sum(p.cpu_times()[:2]) for p in processes if (p.cmdline() or [""])[0].startswith(_TITLE))


def measure(arguments: argparse.Namespace, output: TextIO | None) -> list[Json]:
    rows: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        model = model_to_serve(arguments, PRESETS[arguments.preset], Path(directory) / "model")
        port = find_free_port()
        command = launch_command(
            *(KUNSERVE_SERVER, model, port, "--dp-size", str(REPLICAS), "--kunserve", "manual"),
            *("--max-total-tokens", str(arguments.kv_tokens), "--max-running-requests", "64"),
            *server_flags(arguments),
        )
        with ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"}) as server:
            try:
                server.wait_healthy(START_DEADLINE_S)
                controls = Controls(port, server.log_path)
                controls.wait_ready()
                bench = Bench(server, controls, arguments)
                for merged in (False, True):
                    for kind, where in arguments.loads:
                        bench.round(-1, kind, where, merged)  # what happens first only
                for number in range(arguments.rounds):
                    for kind, where in arguments.loads:
                        for merged in (False, True) if number % 2 == 0 else (True, False):
                            row = {
                                "preset": arguments.preset,
                                "model": str(arguments.model_path or ""),
                                **bench.round(number, kind, where, merged),
                            }
                            rows.append(row)
                            if output is not None:
                                output.write(json.dumps(row) + "\n")
                        pair = {row["merged"]: row["output_tokens_per_s"] for row in rows[-2:]}
                        print(
                            f"round {number} {kind} {where}: normal {pair[False]:.1f}, merged {pair[True]:.1f} tok/s",
                            file=sys.stderr,
                            flush=True,
                        )
            except LoadError as error:
                raise LoadError(f"{error}\nThe end of the server's log:\n{server.log_tail()}") from error
    return rows


FIGURES = (
    ("output tok/s", "output_tokens_per_s", 1),
    ("all tok/s", "total_tokens_per_s", 1),
    ("TPOT ms", "tpot_s", 1000),
    ("ITL P99 ms", "itl_p99_s", 1000),
    ("ITL P99 ms of the last loaded replica", "last_itl_p99_s", 1000),
    ("TTFT ms", "ttft_s", 1000),
    ("TTFT P99 ms", "ttft_p99_s", 1000),
    ("scheduler CPU s", "scheduler_cpu_s", 1),
)


def report(rows: Sequence[Json]) -> str:
    """The tables: figures with the ratio merged/normal, then where the time goes."""
    loads: dict[tuple[str, str], dict[bool, list[Json]]] = defaultdict(lambda: {False: [], True: []})
    for row in rows:
        loads[row["kind"], row["where"]][row["merged"]].append(row)
    figures, times = [], []
    for (kind, where), modes in loads.items():
        normal, merged = (sorted(modes[mode], key=lambda row: row["round"]) for mode in (False, True))
        for title, name, factor in FIGURES:
            figures.append(
                [
                    f"{kind}, {where} loaded: {title}",
                    *(f"{factor * statistics.median(row[name] for row in mode):.2f}" for mode in (normal, merged)),
                    *quartiles(merged, normal, name),
                    len(merged),
                ]
            )
        times += [line for mode in (normal, merged) for line in _times(kind, where, mode)]
        late = max(row["first_wave_sent_within_s"] for mode in modes.values() for row in mode)
        figures.append([f"{kind}, {where} loaded: requests at once were sent within {1000 * late:.0f} ms", *[""] * 6])
    titles = ["medians of rounds", "normal", "merged", "ratio P25", "P50", "P75", "pairs"]
    where_titles = [
        *("share of the wall time, %", *WHAT, "other", "bubbles", "own batches", "pieces of each", "served"),
        *("ms per own batch: wall", *WHAT),
    ]
    return f"{table(titles, figures)}\n\n{table(where_titles, times)}"


def _times(kind: str, where: str, rounds: Sequence[Json]) -> list[list[str]]:
    wall_s = sum(row["wall_s"] for row in rounds)
    lines = []
    for replica in range(REPLICAS):
        parts = [row["replicas"][replica] for row in rounds]
        total = {name: sum(part[name] for part in parts) for name in parts[0]}
        known_s = sum(total[what] for what in WHAT)
        batches = total["own_batches"]
        lines.append(
            [
                f"{kind}, {where} loaded, {'merged' if rounds[0]['merged'] else 'normal'}, replica {replica}",
                *(f"{100 * total[what] / wall_s:.1f}" for what in WHAT),
                f"{100 * (1 - known_s / wall_s):.1f}",
                f"{100 * bubbles(total):.1f}",
                f"{batches:.0f}",
                f"{total['pieces'] / batches:.1f}" if batches else "-",
                f"{total['served']:.0f}",
                *(f"{1000 * s / batches:.2f}" if batches else "-" for s in (wall_s, *(total[what] for what in WHAT))),
            ]
        )
    return lines


def _loads(text: str) -> tuple[tuple[str, str], ...]:
    known = {" ".join(load): load for load in LOADS}
    if unknown := [name for name in text.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; accepted are {', '.join(known)}")
    return tuple(known[name] for name in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument(
        "--loads",
        type=_loads,
        default=LOADS,
        help=f"comma-separated, of {', '.join(map(' '.join, LOADS))}; default: all",
    )
    parser.add_argument("--rounds", type=int, default=7, help="pairs of rounds for each load")
    parser.add_argument("--concurrency", type=int, default=8, help="requests of each replica at a time")
    parser.add_argument("--output-tokens", type=int, default=64, help="of the decode-only load")
    parser.add_argument("--requests", type=int, default=24, help="of the mixed load, for each replica")
    parser.add_argument("--input-tokens", type=int, default=192, help="longest prompt of the mixed load")
    parser.add_argument("--long-requests", type=int, default=8, help="with long prompts, for replica 0")
    parser.add_argument("--long-tokens", type=int, default=1500, help="tokens of a long prompt")
    parser.add_argument("--kv-tokens", type=int, default=8192, help="KV slots per replica")
    add_server_arguments(parser)
    parser.add_argument("--output", type=Path, help="write one JSON object per round to this file")
    arguments = parser.parse_args()
    return run_rounds("merged.py", arguments.output, lambda output: measure(arguments, output), report)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
