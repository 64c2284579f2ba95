"""What a drop and a restore take, idle and under a steady decode load, as a function of layers and bytes.

    python bench/transition.py [--layers 8,16,32,48] [--hidden 128,256] [--rounds 10] [--output FILE]

Two replicas of each tiny model. A round is, in this order:

- idle: a drop and a restore without any request;
- running: a few requests decode on each replica; a drop, and a restore. Measured is the longest gap between two
  tokens of a running request that overlaps with the order, against its ordinary gaps before and after;
- waiting: the base slots of one replica are filled until a request has to wait for memory; a drop. Measured is the
  time from the order to the first token of that request. Its prompt is longer than the base slots that are free, and
  nothing ends meanwhile, so a part of it lies in extension slots. Beside it the time to first token of such a request
  that need not wait. Then the requests that filled the memory are aborted, and a restore follows.

A restore is also measured by what comes back: its bytes against the time of the phase that copies and proves them, the
same bytes copied by one thread, and the time per token of running requests meanwhile against before.

Times are of the client: from before the HTTP call to the answer, which comes when the new slots are in the allocators.
The costs are a least-squares fit of the medians per model: fixed + per MiB of parameters freed + per layer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import exchanging
from comparison.gaps import gaps_within, longest_gap, times_per_token
from comparison.restores import plain_copy_s
from comparison.rounds import run_rounds
from comparison.transition_tables import LOADS, transition_tables
from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from servers.command import KUNSERVE_SERVER, add_server_arguments, launch_command, server_flags
from servers.server import ServerProcess, find_free_port
from servers.streams import Controls, Json, LoadError, Ordered, Stream

START_DEADLINE_S = 600.0
REPLICAS = 2
PROMPT_TOKENS = 32
STEADY_TOKENS = 30  # of every running request, before and after an order
ALL = {"groups": [list(range(REPLICAS))]}


def free_base_tokens(base_tokens: int, streams: Iterable[Stream], replica: int) -> int:
    """Base slots of `replica` that its requests leave free. The last token of a request has no slot yet."""
    return base_tokens - sum(s.prompt_tokens + s.tokens - 1 for s in streams if s.replica == replica and s.tokens)


class Bench:
    """The rounds on one model's server."""

    def __init__(self, port: int, controls: Controls, base_tokens: int, arguments: argparse.Namespace) -> None:
        self._port = port
        self._controls = controls
        self._base_tokens = base_tokens
        self._arguments = arguments
        self._chance = random.Random(arguments.seed)

    def rounds(self, number: int) -> list[Json]:
        """One round of every load; a row for each transition."""
        by_load = {
            "idle": self._idle,
            "running": self._running,
            "waiting": self._waiting,
            exchanging.LOAD: self._exchanging,
        }
        return [row for load in self._arguments.loads for row in by_load[load](number)]

    def _idle(self, number: int) -> list[Json]:
        self._controls.wait_idle()
        return [_row(number, "idle", self._controls.drop(ALL)), _row(number, "idle", self._controls.restore())]

    def _running(self, number: int) -> list[Json]:
        runners = self._start_runners()
        began_s = max(runner.times_s[0] for runner in runners)
        self._advance(runners)
        orders = []
        for order in (lambda: self._controls.drop(ALL), self._controls.restore):
            orders.append(order())
            self._advance(runners)
        gaps = [gap for runner in runners for gap in runner.gaps]
        ends_s = min(runner.times_s[-1] for runner in runners)
        rows = []
        edges_s = [began_s, *(edge for each in orders for edge in (each.ordered_s, each.answered_s)), ends_s]
        for index, each in enumerate(orders):
            before_s, after_s = edges_s[2 * index], edges_s[2 * index + 3]
            rows.append(
                _row(number, "running", each)
                | {
                    "longest_gap_s": longest_gap(gaps, each.ordered_s, each.answered_s),
                    "gaps_before_s": gaps_within(gaps, before_s, each.ordered_s),
                    "gaps_after_s": gaps_within(gaps, each.answered_s, after_s),
                    "token_s": times_per_token(gaps, each.ordered_s, each.answered_s),
                }
            )
        self._controls.abort(runners)
        self._controls.wait_idle()
        return rows

    def _waiting(self, number: int) -> list[Json]:
        waiter_tokens, replica = self._arguments.waiter_tokens, number % REPLICAS
        runners = self._start_runners()
        free = self._open(waiter_tokens, 2, replica)
        free.wait_end()
        retractions = self._controls.retractions()
        # Room for what the others generate until it is admitted, and for more than it needs until the end of the round.
        room = free_base_tokens(self._base_tokens, runners, replica) - 2 * waiter_tokens
        filler = self._open(room, waiter_tokens, replica)
        filler.wait_tokens(1)
        held = [*runners, filler]
        # Less than a waiter needs, and enough for the others to go on until the slots are there.
        while (room := free_base_tokens(self._base_tokens, held, replica)) > waiter_tokens * 5 // 6:
            filler.wait_tokens(filler.tokens + 1)
        waiter = self._open(waiter_tokens, STEADY_TOKENS, replica)
        waiter.wait_sent()
        filler.wait_tokens(filler.tokens + 2)  # a batch boundary has passed
        if waiter.tokens:
            raise LoadError(f"a request of {waiter_tokens} tokens did not wait, with {room} base slots free")
        drop = self._controls.drop(ALL)
        waiter.wait_tokens(1)
        ended = [stream for stream in held if stream.finished]
        used = self._controls.status()["replicas"][replica]["slots"]["used"]
        row = _row(number, "waiting", drop) | {
            "first_token_s": waiter.times_s[0] - drop.ordered_s,
            "ttft_without_waiting_s": free.ttft_s,
            "free_base_slots_at_order": room,
            "used_after": used,
            "retractions": self._controls.retractions() - retractions,
            "ended": len(ended),
        }
        row["served_from_extension"] = room < waiter_tokens and not row["retractions"] and not row["ended"]
        self._controls.abort([filler, waiter])
        restore = self._controls.restore()
        self._controls.abort(runners)
        self._controls.wait_idle()
        return [row, _row(number, "waiting", restore)]

    def _exchanging(self, number: int) -> list[Json]:
        runners = self._start_runners()
        row = exchanging.measure(number, self._controls, ALL, runners, self._advance)
        self._controls.abort(runners)
        self._controls.wait_idle()
        return [row]

    def _open(self, prompt_tokens: int, new_tokens: int, replica: int) -> Stream:
        prompt = [self._chance.randrange(300, 2000) for _ in range(prompt_tokens)]
        return Stream(self._port, prompt, new_tokens, replica)

    def _start_runners(self) -> list[Stream]:
        """Requests that run for the whole round, and have all begun. SGLang admits a request when all that it may
        grow to is free, so that these must be shorter than the memory."""
        each = range(self._arguments.runners)
        longest = self._arguments.context_length or self._base_tokens
        new_tokens = min(self._base_tokens // 3, longest - PROMPT_TOKENS - 1)
        runners = [self._open(PROMPT_TOKENS, new_tokens, replica) for replica in range(REPLICAS) for _ in each]
        for runner in runners:
            runner.wait_tokens(2)
        return runners

    @staticmethod
    def _advance(runners: Sequence[Stream], tokens: int = 0) -> None:
        """Until every one of them has received so many more tokens, or `STEADY_TOKENS` where those are more."""
        for runner, received in [(runner, runner.tokens) for runner in runners]:
            runner.wait_tokens(received + max(tokens, STEADY_TOKENS))


def _row(number: int, load: str, ordered: Ordered) -> Json:
    return {"round": number, "load": load, **ordered.row}


def measure_all(arguments: argparse.Namespace, output: TextIO | None) -> list[Json]:
    """All rounds on all models."""
    if arguments.model_path is not None:
        config = json.loads((arguments.model_path / "config.json").read_text(encoding="utf-8"))
        size = {"layers": config["num_hidden_layers"], "hidden": config["hidden_size"]}
        return measure(arguments.model_path, size, arguments, output)
    rows: list[Json] = []
    for layers, hidden in itertools.product(arguments.layers, arguments.hidden):
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            model = Path(directory) / "model"
            heads = max(1, hidden // 64)
            written = write_tiny_model(
                TinyModelSpec(
                    layers=layers, hidden=hidden, heads=heads, intermediate=2 * hidden, dtype=arguments.dtype
                ),
                model,
            )
            size = {"layers": layers, "hidden": hidden, "parameters": written.parameters}
            rows += measure(model, size, arguments, output)
    return rows


def measure(model: Path, size: Json, arguments: argparse.Namespace, output: TextIO | None) -> list[Json]:
    """All rounds on one model; `size` is what a row says of it."""
    rows: list[Json] = []
    port = find_free_port()
    command = launch_command(
        *(KUNSERVE_SERVER, model, port, "--dp-size", str(REPLICAS), "--kunserve", "manual"),
        *("--max-total-tokens", str(arguments.base_tokens), "--max-running-requests", "64"),
        *("--context-length", str(arguments.context_length or arguments.base_tokens), *server_flags(arguments)),
        *(exchanging.FLAGS if exchanging.LOAD in arguments.loads else ()),
    )
    # Requests are admitted by the memory that they need at once, so that it can be filled to the last slots.
    env = {"OMP_NUM_THREADS": "1", "SGLANG_INIT_NEW_TOKEN_RATIO": "0"}
    with ServerProcess(command, port=port, env=env) as server:
        try:
            server.wait_healthy(START_DEADLINE_S)
            controls = Controls(port, server.log_path)
            controls.wait_ready()
            base_tokens = min(replica["slots"]["base"] for replica in controls.status()["replicas"])
            bench = Bench(port, controls, base_tokens, arguments)
            bench.rounds(-1)  # what happens first only: compilations, caches
            for number in range(arguments.rounds):
                made = [{**size, **row} for row in bench.rounds(number)]
                loaded = max(row["freed_bytes"] for row in made)
                copy_s = plain_copy_s(loaded)
                for row in made:
                    row |= {"loaded_bytes": loaded, "plain_copy_s": copy_s} if row["action"] == "restore" else {}
                    rows.append(row)
                    if output is not None:
                        output.write(json.dumps(row) + "\n")
                print(
                    f"{size['layers']} layers, hidden {size['hidden']}: round {number} done",
                    file=sys.stderr,
                    flush=True,
                )
        except LoadError as error:
            raise LoadError(f"{error}\nThe end of the server's log:\n{server.log_tail()}") from error
    return rows


def report(rows: Sequence[Json]) -> str:
    """The tables."""
    mine = [row for row in rows if row["load"] != exchanging.LOAD]
    tables = [*(transition_tables(mine) if mine else ()), exchanging.report(rows)]
    return "\n\n".join(filter(None, tables))


def _loads(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    accepted = (*LOADS, exchanging.LOAD)
    if unknown := [name for name in names if name not in accepted]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}; accepted are {', '.join(accepted)}")
    return names


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=_numbers, default=[8, 16, 32, 48])
    parser.add_argument("--hidden", type=_numbers, default=[128, 256], help="multiples of 128")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runners", type=int, default=3, help="requests that decode on each replica")
    parser.add_argument("--base-tokens", type=int, default=2048, help="KV slots of a replica at start")
    parser.add_argument("--waiter-tokens", type=int, default=192, help="prompt of the request that waits for memory")
    parser.add_argument(
        "--loads",
        type=_loads,
        default=LOADS,
        help=f"comma-separated, of {', '.join(LOADS)}, and {exchanging.LOAD}, for which drops keep memory free; "
        "default: all but that",
    )
    parser.add_argument("--context-length", type=int, help="of the server, in tokens; default: the base slots")
    parser.add_argument("--seed", type=int, default=0)
    add_server_arguments(parser)
    parser.add_argument("--output", type=Path, help="write one JSON object per transition to this file")
    arguments = parser.parse_args()
    return run_rounds(
        "transition.py",
        arguments.output,
        lambda output: measure_all(arguments, output),
        report,
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
