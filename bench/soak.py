"""A soak: drops, restores, resizes, deaths and stalls by chance, one after the other, under load with known answers.

    make soak N=100                            # or python bench/soak.py --events 100
    make soak N=1000 FLAGS="--replicas 3"
    python bench/soak.py --tp 2
    python bench/soak.py --mode auto
    python bench/soak.py --exchange on

A server of two or more replicas of a tiny model on the CPU, in float32, with SGLang's strict checks for leaks. Clients
of all shapes (those of endurance.py) ask one request after the other, all the time. Meanwhile things happen by chance:
layers are dropped, all, some, or those that are named, and restored; a KV cache is resized; scheduler processes are
killed, one or two, or stand still, for a moment or until the server ends them or leaves them out; all that also in the
middle of a drop or a restore. After half of the deaths all replicas must be there again before the next thing happens;
after the others it happens while they are started. After each of them the server checks itself (POST /kunserve/check).
After every so many events it comes to rest: no request, nothing merged. In automatic mode it also drops and restores by
itself; our orders, which still come, may find that it is busy; and there are times in which nobody asks, until it has
restored. With --exchange on KV moves to where it is read after each drop, and things happen while that is under way.
After each event the exchange must come to its end: no KV is left where it was, if there is memory for it where it is
read.

What has to be so, else the exit code is 1 and a list says what is not: every request has its answer, or the error that
it should have, within --deadline; greedy answers are those of the idle server; an order that nothing disturbs
succeeds; no check finds a difference; at rest memory and plan are as at the start, and the processes' memory and open
files do not grow (see long_run/flatness.py).

Writes to --output-dir: soak.json, table.txt and the server's log.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import requests
from tqdm import tqdm

from kunserve_sgl.args import Exchange
from long_run import command
from long_run.answers import Outcome
from long_run.command import begin, bounds_of, tell
from long_run.disturbances import Schedulers
from long_run.event_kinds import KINDS
from long_run.events import Event, Events
from long_run.load import Load
from long_run.soak_report import Rest, Soak, failures, format_tables
from long_run.watch import flush, holdings, memory_of, status_of
from servers.command import KUNSERVE_SERVER, add_server_arguments, launch_command, server_flags
from servers.server import ServerError, ServerProcess

_LONGER_S = 2.0  # that a long stall lasts than the server's patience
_DRAIN_S = 60.0  # for requests to leave the slots that go, and for layers to be read in a recovery


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(
        prog="soak.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--events", type=int, default=100, help="things that happen (%(default)s)")
    parser.add_argument("--replicas", type=int, default=2, help="data-parallel replicas (%(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of each (%(default)s)")
    parser.add_argument(
        "--mode", choices=["manual", "auto"], default="manual", help="whether it drops and restores by itself too"
    )
    parser.add_argument(
        "--exchange",
        choices=[each.value for each in Exchange],
        default="auto",
        help="--kunserve-exchange (%(default)s)",
    )
    parser.add_argument("--seed", type=int, help="of requests and events; default: one by chance, which is printed")
    parser.add_argument(
        "--kinds", type=_kinds, default=tuple(KINDS), metavar="KIND,...", help=f"of events: {', '.join(KINDS)} (all)"
    )
    parser.add_argument("--clients", type=int, default=6, help="that ask all the time (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="KV slots per replica (%(default)s)")
    parser.add_argument("--answers", type=int, default=3, help="known answers of each kind (%(default)s)")
    parser.add_argument(
        "--answers-between", type=int, default=3, help="answers from one event to the next (%(default)s)"
    )
    parser.add_argument("--rest-every", type=int, default=20, help="events from one rest to the next (%(default)s)")
    parser.add_argument("--deadline", type=float, default=240.0, help="s for one answer (%(default)s)")
    parser.add_argument("--whole", type=float, default=180.0, help="s for the replicas to be back (%(default)s)")
    parser.add_argument("--most-stall", type=float, default=3.0, help="s that a process stands still (%(default)s)")
    parser.add_argument(
        "--patience",
        type=float,
        default=12.0,
        help="s until the server ends or leaves out who stands still (%(default)s)",
    )
    parser.add_argument("--most-growth", type=float, default=96.0, help="MiB, of all processes (%(default)s)")
    parser.add_argument("--most-files", type=int, default=16, help="open ones more, of all processes (%(default)s)")
    add_server_arguments(parser)
    parser.add_argument("--output-dir", type=Path, default=Path("out/soak"), help="made if missing (%(default)s)")
    return parser


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(each.strip() for each in text.split(",")))
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(f"{unknown} are no events; accepted are {', '.join(KINDS)}")
    return kinds


def check_arguments(parser: argparse.ArgumentParser, args: Namespace) -> None:
    """Ends with status 2 where an option cannot be used."""
    least = {
        "events": 1,
        "replicas": 2,
        "tp": 1,
        "clients": 1,
        "tokens": 512,
        "answers": 1,
        "answers_between": 0,
        "rest_every": 1,
    }
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is {getattr(args, name)}; accepted is {smallest} or more")
    for name in ("deadline", "whole", "most_stall", "patience"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name):g}; accepted is a number above 0")


def server_command(model: Path, port: int, args: Namespace) -> list[str]:
    """The server's argument vector."""
    return launch_command(
        *(KUNSERVE_SERVER, model, port, "--dp-size", str(args.replicas), "--tp-size", str(args.tp)),
        *("--kunserve", args.mode, "--kunserve-min-stay", "1", "--kunserve-cool-down", "2"),
        *("--max-total-tokens", str(args.tokens), "--context-length", "4096", "--chunked-prefill-size", "256"),
        *("--max-running-requests", "32", "--kunserve-reserve-frames", "32"),
        *("--kunserve-order-timeout", str(args.patience), "--kunserve-transition-timeout", str(args.patience)),
        *("--kunserve-drain-timeout", str(_DRAIN_S), "--kunserve-exchange", args.exchange),
        # Deaths here are no sign that a replica cannot live, and nothing to wait for.
        *("--kunserve-restart-tries", str(10 * args.events + 10), "--kunserve-restart-pause", "0.1"),
        # A random model would fill the places where JSON may have white space with it for ever.
        *("--constrained-json-disable-any-whitespace", "--tool-call-parser", "qwen25", *server_flags(args)),
    )


def run_events(server: ServerProcess, load: Load, soak: Soak, args: Namespace, seed: int) -> None:
    """Everything that happens; what is seen goes into `soak`. Ends early with the server."""
    schedulers = Schedulers(server, most_stall_s=args.most_stall, long_stall_s=args.patience + _LONGER_S)
    quiet = load.silence if args.mode == "auto" else None
    events = Events(
        *(server, str(seed), args.kinds, schedulers),
        whole_deadline_s=args.whole,
        quiet=quiet,
        exchanges=args.exchange == Exchange.ON.value,
    )
    with tqdm(total=args.events, file=sys.stderr, unit="event", disable=None) as bar:
        number = 0
        while number < args.events:
            ended = threading.Event()
            clients = threading.Thread(target=_ask_until, args=(load, number, ended), daemon=True)
            clients.start()
            try:
                for _ in range(min(args.rest_every, args.events - number)):
                    number += 1
                    event = events.next(number)
                    soak.events.append(event)
                    print(_line(event), flush=True)
                    began_s = time.monotonic()
                    _wait_for_answers(server, load, args.answers_between, args.deadline)
                    soak.waited_s += time.monotonic() - began_s
                    _show(bar, event, load)
            finally:
                began_s = time.monotonic()
                ended.set()
                clients.join(2 * args.deadline)
                soak.rested_s += time.monotonic() - began_s
            if clients.is_alive():
                raise ServerError(f"after event {number} not all clients had their answers within {args.deadline:g} s")
            began_s = time.monotonic()
            soak.rests.append(_rest(server, events, number))
            soak.rested_s += time.monotonic() - began_s


def _ask_until(load: Load, cycle: int, ended: threading.Event) -> None:
    load.burst(cycle, lambda: not ended.is_set())


def _wait_for_answers(server: ServerProcess, load: Load, count: int, deadline_s: float) -> None:
    """Until so many more requests have ended: things happen between and in batches."""
    wanted, ends_s = len(load.results) + count, time.monotonic() + deadline_s
    while len(load.results) < wanted:
        if time.monotonic() > ends_s or not server.running:
            raise ServerError(f"{count} answers did not come within {deadline_s:g} s:\n{server.log_tail()}")
        time.sleep(0.05)


def _rest(server: ServerProcess, events: Events, number: int) -> Rest:
    answers = events.rest()
    problem = flush(server.base_url)
    differences = events.check()
    memory = memory_of(status_of(server.base_url))
    return Rest(number, memory, holdings(server), tuple(answers), differences, problem)


def _line(event: Event) -> str:
    whole = "" if event.whole_s is None else f", whole after {event.whole_s:.1f} s"
    whole += f", checked in {event.check_s:.2f} s"
    whole += "" if event.exchange is None or not event.exchange.begun else f", {event.exchange}"
    said = "".join(f", {status} {text}".rstrip() for status, text in event.answers)
    wrong = "".join(f"\n  DIFFERS {each}" for each in event.differences)
    return f"{event.number:4} {event.kind}: {event.what}: {event.seconds:.2f} s{said}{whole}{wrong}"


def _show(bar: tqdm, event: Event, load: Load) -> None:
    bad = sum(result.outcome is not Outcome.RIGHT for result in list(load.results))
    bar.set_description_str(event.kind, refresh=False)
    bar.set_postfix_str(f"{len(load.results)} answers, {bad} failed", refresh=False)
    bar.update(1)


def measure(server: ServerProcess, args: Namespace, seed: int) -> Soak:
    """The run against a server that has been started. Raises ServerError as `begin`."""
    at_start, load = begin(server, args, seed)
    soak = Soak(at_start, bounds_of(args), load.results)
    try:
        run_events(server, load, soak, args, seed)
    except (ServerError, requests.RequestException) as error:
        soak.problems.append(f"after {len(soak.events)} events: {error}"[:3000])
    return soak


def write(soak: Soak, args: Namespace, about: dict[str, str]) -> list[str]:
    """Print and write tables and JSON; the list of what is not as it should be."""
    if args.mode == "auto":
        soak.log = (args.output_dir / "server.log").read_text(encoding="utf-8", errors="replace")
    found = failures(soak)
    (args.output_dir / "soak.json").write_text(
        json.dumps(
            {
                "about": about,
                "failures": found,
                "events": [asdict(event) for event in soak.events],
                "rests": [asdict(rest) for rest in soak.rests],
                "results": [asdict(result) | {"outcome": result.outcome.value} for result in soak.results],
            }
        ),
        encoding="utf-8",
    )
    tell(args, about, format_tables(soak), found)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run it: 0 if all is as it should be, 1 if not, 2 for unusable options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return command.run("soak", args, server_command, measure, write)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("soak.py: interrupted; everything it started has been stopped", file=sys.stderr)
        sys.exit(130)
