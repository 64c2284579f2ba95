"""What clients see when a replica dies: from the kill to the next token of each request, and to full strength.

    python bench/failure.py [--rounds 5] [--scenarios alone,merged,one_of_three] [--output FILE]

Each scenario is a server of replicas of a tiny model, in manual mode:

- alone: two replicas, each by itself; replica 1 is killed;
- merged: two replicas that share one set of the layers' parameters; replica 1 is killed;
- one_of_three: replicas 0 and 1 share layers, replica 2 is by itself; replica 1 is killed.

A round: every replica gets a few streamed greedy requests. When all of them run, the scheduler process of replica 1
gets SIGKILL. Measured is, for each request, the time from then to its next token (none comes where it is lost), and the
time until all replicas are there again and NORMAL. A request's tokens must be those that the idle server gave to
the same prompt; if not, the exit code is 1.

Requests are told apart by whose they were: of the replica that died, of those merged with it, and of others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil

from comparison.rounds import run_rounds
from kunserve_sgl.tiny_model_spec import PRESETS
from servers.command import KUNSERVE_SERVER, add_server_arguments, launch_command, model_to_serve, server_flags
from servers.server import ServerError, ServerProcess, find_free_port
from servers.streams import Controls, Json, LoadError, Stream, table

_START_DEADLINE_S = 600.0
_WHOLE_DEADLINE_S = 300.0
_EXIT_DEADLINE_S = 30.0
_POLL_S = 0.02
VICTIM = 1


@dataclass(frozen=True)
class Scenario:
    """Replicas, and those of them that are merged, the one that dies included if it is."""

    replicas: int
    merged: tuple[int, ...] = ()

    def role_of(self, replica: int) -> str:
        """Whose requests those of `replica` are when the victim dies."""
        if replica == VICTIM:
            return "of the dead"
        return "merged with it" if replica in self.merged else "of others"


SCENARIOS = {
    "alone": Scenario(2),
    "merged": Scenario(2, (0, 1)),
    "one_of_three": Scenario(3, (0, 1)),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(
        prog="failure.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--scenarios", type=_scenarios, default=tuple(SCENARIOS), help=f"{','.join(SCENARIOS)} (all)")
    parser.add_argument("--rounds", type=int, default=5, help="deaths in each scenario (%(default)s)")
    parser.add_argument("--requests", type=int, default=3, help="of each replica (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of a request (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=120, help="of a request (%(default)s)")
    parser.add_argument("--before", type=int, default=8, help="tokens of each request before the kill (%(default)s)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="sizes of the model (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="KV slots per replica (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    add_server_arguments(parser)
    parser.add_argument("--output", type=Path, help="a line of JSON per request")
    return parser


def _scenarios(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(each.strip() for each in text.split(",")))
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise argparse.ArgumentTypeError(f"{unknown} are no scenarios; accepted are {', '.join(SCENARIOS)}")
    return names


def check_arguments(parser: argparse.ArgumentParser, args: Namespace) -> None:
    """Ends with status 2 where an option cannot be used."""
    for name in ("rounds", "requests", "prompt_tokens", "before"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; accepted is 1 or more")
    if args.new_tokens <= args.before + 1:
        parser.error(f"--new-tokens is {args.new_tokens}; accepted is more than --before {args.before} and one")


def server_command(model: Path, port: int, args: Namespace, scenario: Scenario) -> list[str]:
    """The server's argument vector."""
    return launch_command(
        *(KUNSERVE_SERVER, model, port, "--dp-size", str(scenario.replicas), "--kunserve", "manual"),
        *("--max-total-tokens", str(args.tokens), "--max-running-requests", "32", *server_flags(args)),
    )


class Bench:
    """The rounds of one scenario on its server."""

    def __init__(self, server: ServerProcess, scenario: Scenario, args: Namespace) -> None:
        self._server = server
        self._scenario = scenario
        self._args = args
        self._controls = Controls(server.port, server.log_path)
        chance = random.Random(args.seed)
        self._prompts = [
            [chance.randrange(300, 2000) for _ in range(args.prompt_tokens)]
            for _ in range(scenario.replicas * args.requests)
        ]
        self._expected: list[list[int]] = []

    def learn(self) -> None:
        """Asks the idle server for the answers, one after the other."""
        self._controls.wait_ready()
        for prompt in self._prompts:
            stream = Stream(self._server.port, prompt, self._args.new_tokens, 0)
            stream.wait_end()
            self._expected.append(stream.token_ids)

    def round(self, number: int) -> list[Json]:
        """One death; a row for each request."""
        if self._scenario.merged:
            self._controls.drop({"groups": [list(self._scenario.merged)]})
        owners = [place // self._args.requests for place in range(len(self._prompts))]
        streams = [
            Stream(self._server.port, prompt, self._args.new_tokens, owner)
            for prompt, owner in zip(self._prompts, owners, strict=True)
        ]
        for stream in streams:
            stream.wait_tokens(self._args.before)
        killed_s = time.perf_counter()
        self._kill()
        for stream in streams:
            stream.wait_over()
        whole_s = self._wait_whole() - killed_s
        return [
            {
                "round": number,
                "role": self._scenario.role_of(owner),
                "tokens_before": sum(each <= killed_s for each in stream.times_s),
                "next_token_s": next((each - killed_s for each in stream.times_s if each > killed_s), None),
                "error": stream.error or stream.aborted,
                "is_equal": not stream.error and stream.token_ids == expected,
                "whole_s": whole_s,
            }
            for owner, stream, expected in zip(owners, streams, self._expected, strict=True)
        ]

    def _kill(self) -> None:
        title = f"sglang::scheduler_DP{VICTIM}"
        for pid in self._server.pids():
            process = psutil.Process(pid)
            if (process.cmdline() or [""])[0].startswith(title):
                os.kill(pid, signal.SIGKILL)
                process.wait(_EXIT_DEADLINE_S)
                return
        raise ServerError(f"there is no process {title}")

    def _wait_whole(self) -> float:
        """When (`time.perf_counter()`) all replicas were there again, by themselves.

        Raises:
            LoadError: that is not so within the deadline.
        """
        ends_s, last = time.perf_counter() + _WHOLE_DEADLINE_S, ""
        while (now_s := time.perf_counter()) < ends_s:
            if not self._server.running:
                raise LoadError(f"the server has ended:\n{self._server.log_tail()}")
            status = self._controls.status()
            states = [(each["state"], each["lost"], "slots" in each) for each in status["replicas"]]
            if states == [("normal", False, True)] * self._scenario.replicas:
                return now_s
            last = str(states)
            time.sleep(_POLL_S)
        raise LoadError(f"after {_WHOLE_DEADLINE_S:g} s not all replicas are back: {last}")


def measure(args: Namespace, output: TextIO | None) -> list[Json]:
    """All rounds of all scenarios."""
    rows: list[Json] = []
    with tempfile.TemporaryDirectory(prefix="failure-") as directory:
        model = model_to_serve(args, PRESETS[args.preset], Path(directory) / "model")
        for name in args.scenarios:
            scenario, port = SCENARIOS[name], find_free_port()
            command = server_command(model, port, args, scenario)
            with ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"}) as server:
                try:
                    server.wait_healthy(_START_DEADLINE_S)
                    bench = Bench(server, scenario, args)
                    bench.learn()
                    for number in range(args.rounds):
                        for row in bench.round(number):
                            rows.append({"scenario": name, **row})
                            if output is not None:
                                output.write(json.dumps(rows[-1]) + "\n")
                        print(f"{name}: round {number} done", file=sys.stderr, flush=True)
                except LoadError as error:
                    raise LoadError(f"{error}\nThe end of the server's log:\n{server.log_tail()}") from error
    return rows


def format_table(rows: Sequence[Json]) -> str:
    """A line per scenario and role."""
    lines = []
    for name in dict.fromkeys(row["scenario"] for row in rows):
        for role in dict.fromkeys(row["role"] for row in rows if row["scenario"] == name):
            mine = [row for row in rows if (row["scenario"], row["role"]) == (name, role)]
            gaps = sorted(row["next_token_s"] for row in mine if row["next_token_s"] is not None)
            whole = sorted({row["whole_s"] for row in mine})
            lines.append(
                [
                    f"{name}, {role}",
                    len(mine),
                    sum(bool(row["error"]) for row in mine),
                    sum(row["is_equal"] for row in mine),
                    f"{statistics.median(gaps):.3f}" if gaps else "-",
                    f"{gaps[-1]:.3f}" if gaps else "-",
                    f"{statistics.median(whole):.1f}",
                    f"{whole[-1]:.1f}",
                ]
            )
    titles = ["requests", "count", "lost", "equal", "next token P50 s", "max s", "all back P50 s", "max s"]
    return table(titles, lines)


def report(rows: Sequence[Json]) -> str:
    """The table, and what is wrong."""
    return "\n".join([format_table(rows), *(f"not equal: {json.dumps(row)}" for row in rows if not row["is_equal"])])


def main(argv: Sequence[str] | None = None) -> int:
    """Run it: 0 if all answers are right, 1 if not, 2 for unusable options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows: list[Json] = []

    def measured(output: TextIO | None) -> list[Json]:
        rows.extend(measure(args, output))
        return rows

    try:
        status = run_rounds("failure.py", args.output, measured, report)
    except ServerError as error:
        print(f"failure.py: {error}", file=sys.stderr)
        return 1
    return status or int(not all(row["is_equal"] for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("failure.py: interrupted; everything it started has been stopped", file=sys.stderr)
        sys.exit(130)
