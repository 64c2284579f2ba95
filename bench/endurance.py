"""A long run in automatic mode: bursts that do not fit and quiet times, with OpenAI clients of all shapes.

    python bench/endurance.py                 # 30 minutes
    python bench/endurance.py --minutes 2     # a smoke run

A server of two replicas of a tiny model on the CPU, in float32, with SGLang's strict checks for leaks. Clients ask for
chats and completions, with and without a limit, whole and streamed, with tools, several answers, log probabilities,
stop strings and JSON schemas (some slow to compile); some go away in the middle, abort, or send what makes no sense;
others use /generate, also in batches. In a burst many do so at once; in a quiet time one to three have short chats
without `max_tokens`, one after the other.

What has to be so, else the exit code is 1 and a list says what is not: layers are dropped in each burst and back at
the end of each quiet time; every request has its answer, or the error that it should have, within --deadline; greedy
answers are those that the idle server gave before the first burst; memory and plan at rest are as at the start; the
processes' memory and open files do not grow; the log tells of no error.

Writes to --output-dir: endurance.json, table.txt and the server's log.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import requests
from tqdm import tqdm

from long_run import command
from long_run.answers import Outcome
from long_run.command import begin, bounds_of, tell
from long_run.load import COOL_DOWN_S, Load
from long_run.report import Cycle, Run, as_json, failures, format_tables
from long_run.watch import StateWatch, flush, holdings, memory_of, status_of
from servers.command import KUNSERVE_SERVER, add_server_arguments, launch_command, server_flags
from servers.server import ServerProcess

_WATCH_INTERVAL_S = 0.25
_LEAST_CYCLES = 2


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(
        prog="endurance.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of load (%(default)s); at least two cycles are run"
    )
    parser.add_argument("--seed", type=int, help="of requests and times; default: one by chance, which is printed")
    parser.add_argument("--burst", type=float, nargs=2, default=(20.0, 30.0), metavar="S", help="from, to (20 30)")
    parser.add_argument("--quiet", type=float, nargs=2, default=(20.0, 30.0), metavar="S", help="from, to (20 30)")
    parser.add_argument("--clients", type=int, default=24, help="in a burst (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="KV slots per replica (%(default)s)")
    parser.add_argument("--answers", type=int, default=5, help="known answers of each kind (%(default)s)")
    parser.add_argument("--deadline", type=float, default=180.0, help="s for one answer (%(default)s)")
    parser.add_argument("--most-growth", type=float, default=64.0, help="MiB, of all processes (%(default)s)")
    parser.add_argument("--most-files", type=int, default=16, help="open ones more, of all processes (%(default)s)")
    add_server_arguments(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("out/endurance"), help="made if missing (%(default)s)")
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: Namespace) -> None:
    """Ends with status 2 where an option cannot be used."""
    for name, least in (("clients", 1), ("tokens", 512), ("answers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; accepted is {least} or more")
    for name in ("burst", "quiet"):
        low, high = getattr(args, name)
        if not 0 < low <= high:
            parser.error(f"--{name} is {low:g} {high:g}; accepted are two numbers above 0, the smaller one first")
    if args.minutes <= 0 or args.deadline <= 0:
        parser.error("--minutes and --deadline: accepted are numbers above 0")


class Progress:
    """A bar over the seconds of the run, with what goes on."""

    def __init__(self, seconds: float, load: Load, watch: StateWatch, clock: Callable[[], float]) -> None:
        self.phase = ""
        self._seconds = seconds
        self._load = load
        self._watch = watch
        self._clock = clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _show(self) -> None:
        every_s = 1.0 if sys.stderr.isatty() else 15.0
        form = "{desc} {percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f} s{postfix}"
        with tqdm(total=round(self._seconds), file=sys.stderr, bar_format=form, mininterval=0) as bar:
            while not self._ended.wait(every_s):
                results = list(self._load.results)
                bad = sum(result.outcome is not Outcome.RIGHT for result in results)
                state = self._watch.looks[-1].state if self._watch.looks else "?"
                bar.set_description_str(self.phase, refresh=False)
                bar.set_postfix_str(f"{state}, {len(results)} answers, {bad} failed", refresh=False)
                bar.n = min(round(self._seconds), round(self._clock()))
                bar.refresh()


def server_command(model: Path, port: int, args: Namespace) -> list[str]:
    """The server's argument vector."""
    return launch_command(
        *(KUNSERVE_SERVER, model, port, "--dp-size", "2", "--kunserve", "auto"),
        *("--max-total-tokens", str(args.tokens), "--context-length", "4096", "--chunked-prefill-size", "256"),
        *("--max-running-requests", "32", "--enable-metrics", "--kunserve-min-stay", "2"),
        *("--kunserve-cool-down", f"{COOL_DOWN_S:g}"),
        # A random model would fill the places where JSON may have white space with it for ever.
        *("--constrained-json-disable-any-whitespace", "--tool-call-parser", "qwen25", *server_flags(args)),
    )


def run_cycles(server: ServerProcess, load: Load, run: Run, args: Namespace, seed: int) -> None:
    """Bursts and quiet times until the time is over; what is seen goes into `run`. Ends early with the server."""
    began_s = time.monotonic()

    def clock() -> float:
        return time.monotonic() - began_s

    load.clock = clock
    seconds, chance, number = 60 * args.minutes, Random(f"{seed} times"), 0
    with (
        StateWatch(server.base_url, clock, _WATCH_INTERVAL_S) as watch,
        Progress(seconds, load, watch, clock) as progress,
    ):
        run.looks, run.missed_looks, run.results = watch.looks, watch.missed, load.results
        while number < _LEAST_CYCLES or clock() + args.burst[0] + args.quiet[0] < seconds:
            number += 1
            burst_s = clock()
            progress.phase = f"burst {number}"
            burst_ends_s = burst_s + chance.uniform(*args.burst)
            load.burst(number, lambda ends_s=burst_ends_s: clock() < ends_s)
            quiet_s = clock()
            progress.phase = f"quiet {number}"
            load.quiet(number, quiet_s + chance.uniform(*args.quiet))
            if not server.running:
                run.problems.append(f"the server ended in cycle {number}")
                return
            end_s = clock()
            try:
                problem = flush(server.base_url)
                memory = memory_of(status_of(server.base_url))
            except requests.RequestException as error:
                run.problems.append(f"the server answered nothing at the end of cycle {number}: {error}"[:300])
                return
            run.cycles.append(Cycle(number, burst_s, quiet_s, end_s, memory, holdings(server), problem))
        progress.phase = "again"
        load.ask_all(number + 1, "idle")


def measure(server: ServerProcess, args: Namespace, seed: int) -> Run:
    """The run against a server that has been started. Raises ServerError as `begin`."""
    at_start, load = begin(server, args, seed)
    run = Run(at_start, bounds_of(args))
    run_cycles(server, load, run, args, seed)
    return run


def write(run: Run, args: Namespace, about: dict[str, str]) -> list[str]:
    """Print and write tables and JSON; the list of what is not as it should be."""
    run.log = (args.output_dir / "server.log").read_text(encoding="utf-8", errors="replace")
    found = failures(run)
    (args.output_dir / "endurance.json").write_text(json.dumps(as_json(run, about)), encoding="utf-8")
    tell(args, about, format_tables(run), found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run it: 0 if all is as it should be, 1 if not, 2 for unusable options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return command.run("endurance", args, server_command, measure, write)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("endurance.py: interrupted; everything it started has been stopped", file=sys.stderr)
        sys.exit(130)
