"""What lent memory gives: contexts longer than their replica, and throughput of a load that all goes to one replica.

    python bench/lend.py [--parts long,fitting,lopsided] [--preset small] [--rounds 5] [--output FILE]

long: one request whose context is so many times what its replica has room for, in memory that another lends for it,
against one stock replica that has room for all of it. Each round asks both the same, and compares the tokens; for each
context memory is lent and taken back in each round.

fitting: more requests than their replica has memory for, all for replica 0, while replica 1 has none, but not more than
both have memory for: `--clients` clients ask one request after another, `--turns` each. Stock; ours where
`--lent-share` of the other's memory is lent by hand before the round; and ours in automatic mode, which finds out by
itself in each round. Ratios are those of output tokens per second and of the P99 of the time to first token to stock in
the same round.

lopsided: the same with all requests at once, and more of them than both replicas have memory for.

Servers take turns, in rotating order, and the others are stopped meanwhile.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

import numpy as np

from comparison.rounds import quartiles, run_rounds
from kunserve_sgl.tiny_model_spec import PRESETS
from servers.command import (
    KUNSERVE_SERVER,
    STOCK_SERVER,
    add_server_arguments,
    launch_command,
    model_to_serve,
    server_flags,
)
from servers.server import ServerProcess, find_free_port, others_stopped
from servers.streams import Controls, Json, LoadError, Stream, table

START_DEADLINE_S = 600.0
LENDER, BORROWER = 1, 0
LONG, FITTING, LOPSIDED = "long", "fitting", "lopsided"
STOCK, MANUAL, AUTO = "stock", "manual", "auto"
SYSTEMS = {LONG: (STOCK, MANUAL), FITTING: (STOCK, MANUAL, AUTO), LOPSIDED: (STOCK, MANUAL, AUTO)}

Prompt = list[int]


def command_of(system: str, replicas: int, tokens: int, model: Path, port: int, args: argparse.Namespace) -> list[str]:
    """The command of a server with so many KV slots per replica."""
    mode = () if system == STOCK else ("--kunserve", system)
    return launch_command(
        *(STOCK_SERVER if system == STOCK else KUNSERVE_SERVER, model, port, *mode, "--dp-size", str(replicas)),
        *("--max-total-tokens", str(tokens), "--max-running-requests", "64", "--disable-radix-cache"),
        *server_flags(args),
    )


@contextlib.contextmanager
def servers_of(part: str, model: Path, args: argparse.Namespace) -> Iterator[dict[str, ServerProcess]]:
    """The servers of a part, all ready. Of the long contexts stock has one replica, with room for the longest."""
    servers: dict[str, ServerProcess] = {}
    for system in SYSTEMS[part]:
        replicas = 1 if (part, system) == (LONG, STOCK) else 2
        tokens = args.own_tokens * (max(args.factors) + 2) if part == LONG else args.kv_tokens
        port = find_free_port()
        command = command_of(system, replicas, tokens, model, port, args)
        servers[system] = ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"})
    with contextlib.ExitStack() as running:
        for server in servers.values():
            with others_stopped(server, servers):
                running.enter_context(server)
                server.wait_healthy(START_DEADLINE_S)
        yield servers


def make_prompt(chance: random.Random, tokens: int) -> Prompt:
    return [chance.randrange(300, 2000) for _ in range(tokens)]


def ask(port: int, prompt: Prompt, new_tokens: int, replica: int | None) -> Stream:
    stream = Stream(port, prompt, new_tokens, replica)
    stream.wait_end()
    if stream.tokens != new_tokens:
        raise LoadError(f"request {stream.rid} ended after {stream.tokens} of {new_tokens} tokens")
    return stream


class LongContexts:
    """One request at a time, with a replica that has been made small and another one that has lent it the rest."""

    def __init__(self, servers: dict[str, ServerProcess], args: argparse.Namespace) -> None:
        self._servers = servers
        self._args = args
        ours = servers[MANUAL]
        self._controls = Controls(ours.port, ours.log_path)
        self._controls.wait_ready()
        replicas = self._controls.status()["replicas"]
        slots, frames = replicas[BORROWER]["slots"], replicas[BORROWER]["frames"]
        self._granule = slots["per_granule"]
        kept = max(1, args.own_tokens // self._granule)
        self.own_tokens = kept * self._granule
        most = -(-self.own_tokens * max(args.factors) // self._granule)
        for replica, granules in ((BORROWER, slots["base"] // self._granule - kept), (LENDER, most)):
            self._controls.resize(replica, -granules * frames["per_granule"])

    def round(self, number: int, system: str) -> list[Json]:
        rows = []
        for factor in self._args.factors:
            tokens = factor * self.own_tokens
            chance = random.Random(f"{number} {factor}")
            prompt = make_prompt(chance, tokens - self._args.long_answer_tokens)
            port = self._servers[system].port
            lent_s = back_s = 0.0
            if system == MANUAL:
                order = self._controls.lend(LENDER, BORROWER, tokens - self.own_tokens + self._granule)
                lent_s = order.answered_s - order.ordered_s
            stream = ask(port, prompt, self._args.long_answer_tokens, None if system == STOCK else BORROWER)
            if system == MANUAL:
                self._controls.wait_idle()
                order = self._controls.restore()
                back_s = order.answered_s - order.ordered_s
            rows.append(
                {
                    "factor": factor,
                    "tokens": tokens,
                    "ttft_s": stream.ttft_s,
                    "tpot_s": stream.tpot_s,
                    "lent_s": lent_s,
                    "back_s": back_s,
                    "token_ids": stream.token_ids,
                }
            )
        return rows


class Lopsided:
    """Clients that ask one replica, of whose requests only some fit into its memory at a time."""

    def __init__(
        self, servers: dict[str, ServerProcess], args: argparse.Namespace, clients: int = 0, turns: int = 1
    ) -> None:
        self._servers = servers
        self._args = args
        self._clients, self._turns = clients or args.requests, turns
        self._controls = {
            system: Controls(server.port, server.log_path) for system, server in servers.items() if system != STOCK
        }
        for controls in self._controls.values():
            controls.wait_ready()
        replica = self._controls[MANUAL].status()["replicas"][LENDER]
        slots, per_granule = replica["slots"], replica["frames"]["per_granule"]
        granules = int(args.lent_share * slots["base"] / slots["per_granule"])
        self._controls[MANUAL].resize(LENDER, -granules * per_granule)
        self._controls[MANUAL].lend(LENDER, BORROWER, granules * slots["per_granule"])

    def round(self, number: int, system: str) -> list[Json]:
        args, server = self._args, self._servers[system]
        controls = self._controls.get(system)
        if system == AUTO and controls is not None:
            controls.wait_capacity(2 * args.kv_tokens)  # what the last round borrowed is back
        log_bytes = len(server.log_path.read_bytes())
        chance = random.Random(number)
        count = self._clients * self._turns
        prompts = [make_prompt(chance, chance.randrange(16, args.input_tokens)) for _ in range(count)]
        began_s = time.perf_counter()
        with ThreadPoolExecutor(self._clients) as pool:
            streams = list(pool.map(lambda prompt: ask(server.port, prompt, args.output_tokens, BORROWER), prompts))
        wall_s = max(stream.times_s[-1] for stream in streams) - began_s
        log = server.log_path.read_bytes()[log_bytes:].decode(errors="replace")
        ttft_s = [stream.ttft_s for stream in streams]
        return [
            {
                "tokens_per_s": sum(stream.tokens for stream in streams) / wall_s,
                "ttft_p50_s": float(np.percentile(ttft_s, 50)),
                "ttft_p99_s": float(np.percentile(ttft_s, 99)),
                "retractions": log.count("Retract requests"),
                **{f"{act}s": log.count(f"KunServe auto: {act} [[") for act in ("lend", "drop")},
                "decided": [
                    line.partition("KunServe auto: ")[2] for line in log.splitlines() if "KunServe auto: " in line
                ],
                "token_ids": [stream.token_ids for stream in streams],
            }
        ]


PARTS: dict[str, Callable[[dict[str, ServerProcess], argparse.Namespace], LongContexts | Lopsided]] = {
    LONG: LongContexts,
    FITTING: lambda servers, args: Lopsided(servers, args, args.clients, args.turns),
    LOPSIDED: Lopsided,
}


def measure(args: argparse.Namespace, output: TextIO | None) -> list[Json]:
    rows: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        model = model_to_serve(args, PRESETS[args.preset], Path(directory) / "model")
        for part in args.parts:
            with servers_of(part, model, args) as servers:
                made = PARTS[part](servers, args)
                for number in range(-1, args.rounds):  # in the first one happens what happens once
                    turn = number % len(servers)
                    for system in (*SYSTEMS[part][turn:], *SYSTEMS[part][:turn]):
                        with others_stopped(servers[system], servers):
                            found = made.round(number, system)
                        if number < 0:
                            continue
                        for row in found:
                            rows.append({"part": part, "round": number, "system": system, **row})
                            if output is not None:
                                output.write(json.dumps(rows[-1]) + "\n")
                    print(f"{part}: round {number}", file=sys.stderr, flush=True)
    return rows


def report(rows: Sequence[Json]) -> str:
    """The tables of all parts."""
    tables = {LONG: _long_table, FITTING: _lopsided_table, LOPSIDED: _lopsided_table}
    found = {part: [row for row in rows if row["part"] == part] for part in SYSTEMS}
    return "\n\n".join(f"{part}\n{tables[part](rows)}" for part, rows in found.items() if rows)


def _in_rounds(rows: Sequence[Json], **which: object) -> list[Json]:
    chosen = [row for row in rows if all(row[name] == value for name, value in which.items())]
    return sorted(chosen, key=lambda row: row["round"])


def _long_table(rows: Sequence[Json]) -> str:
    lines = []
    for factor in sorted({row["factor"] for row in rows}):
        stock, ours = (_in_rounds(rows, factor=factor, system=system) for system in SYSTEMS[LONG])
        equal = sum(a["token_ids"] == b["token_ids"] for a, b in zip(ours, stock, strict=True))
        lines.append(
            [
                f"{factor} times, {ours[0]['tokens']} tokens",
                *(f"{statistics.median(row['ttft_s'] for row in each):.3f}" for each in (stock, ours)),
                *quartiles(ours, stock, "ttft_s"),
                *(f"{1000 * statistics.median(row['tpot_s'] for row in each):.2f}" for each in (stock, ours)),
                *quartiles(ours, stock, "tpot_s"),
                *(f"{1000 * statistics.median(row[name] for row in ours):.0f}" for name in ("lent_s", "back_s")),
                f"{equal}/{len(ours)}",
            ]
        )
    titles = ["context", "TTFT s stock", "ours", "ratio P25", "P50", "P75", "TPOT ms stock", "ours"]
    return table([*titles, "ratio P25", "P50", "P75", "lend ms", "back ms", "equal"], lines)


def _lopsided_table(rows: Sequence[Json]) -> str:
    stock = _in_rounds(rows, system=STOCK)
    lines = []
    for system in SYSTEMS[rows[0]["part"]]:
        ours = _in_rounds(rows, system=system)
        answers = [[ids for row in each for ids in row["token_ids"]] for each in (ours, stock)]
        equal = sum(a == b for a, b in zip(*answers, strict=True))
        lines.append(
            [
                system,
                f"{statistics.median(row['tokens_per_s'] for row in ours):.1f}",
                *quartiles(ours, stock, "tokens_per_s"),
                *(f"{statistics.median(row[name] for row in ours):.2f}" for name in ("ttft_p50_s", "ttft_p99_s")),
                *quartiles(ours, stock, "ttft_p99_s"),
                *(sum(row[name] for row in ours) for name in ("retractions", "lends", "drops")),
                f"{equal}/{len(answers[0])}",
            ]
        )
    titles = ["one replica of two loaded", "tok/s", "ratio P25", "P50", "P75", "TTFT P50 s", "P99 s"]
    titles += ["ratio P25", "P50", "P75"]
    return table([*titles, "retractions", "loans", "drops", "equal"], lines)


def _parts(text: str) -> tuple[str, ...]:
    if unknown := [name for name in text.split(",") if name not in SYSTEMS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; accepted are {', '.join(SYSTEMS)}")
    return tuple(text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--parts", type=_parts, default=tuple(SYSTEMS), help="comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-tokens", type=int, default=384, help="KV slots of the replica with the long request")
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 3, 6, 12, 19], help="contexts, as multiples")
    parser.add_argument("--long-answer-tokens", type=int, default=32)
    parser.add_argument("--kv-tokens", type=int, default=2048, help="KV slots per replica of the loads for one replica")
    parser.add_argument("--lent-share", type=float, default=0.75, help="of the idle replica's slots, by hand")
    parser.add_argument("--clients", type=int, default=10, help="of the load that fits into both replicas' memory")
    parser.add_argument("--turns", type=int, default=3, help="requests of each of those clients, one after another")
    parser.add_argument("--requests", type=int, default=32, help="of the lopsided load, all at once")
    parser.add_argument("--input-tokens", type=int, default=256, help="longest prompt of the loads for one replica")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each answer of the loads for one replica")
    add_server_arguments(parser)
    parser.add_argument("--output", type=Path, help="write one JSON object per round to this file")
    args = parser.parse_args()
    return run_rounds("lend.py", args.output, lambda output: measure(args, output), report)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
