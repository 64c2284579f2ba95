"""Command: the checks for a GPU, F0 to F10, or the same on a CPU in small.

    python bench/gpu.py memory --cache DIR --output DIR     # F0 to F3: virtual memory, tests/gpu, kernels
    python bench/gpu.py tokens --cache DIR --output DIR     # F4 to F6: answers against stock, and through transitions
    python bench/gpu.py speed --cache DIR --output DIR      # F7 to F10: transitions, decoding, a burst, parts
    python bench/gpu.py F5 F6 --device cpu ...              # some checks only

The three together take ten minutes at most on one GPU: each check is killed at its deadline, with all that it has
started. Each command stands alone, needs no network, and stops at the first check that fails. Without a command all
checks run.

--cache keeps compiled kernels and models: what lies there from before is used. --output gets, for each check, NAME.json
and NAME.log; call_costs.json from F1 (for transition_cost.py --costs); and gpu.md, the report of all checks that have
results there, whichever command made them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_checks.catalog import COMMANDS, ENTRIES, Entry
from gpu_checks.place import CUDA, DEVICES, Place, environment
from gpu_checks.runner import Check, Status, markdown, read_runs, run_checks
from servers.machine import describe_machine

REPORT = "gpu.md"


def choose(names: Sequence[str]) -> list[Entry]:
    """The checks that are meant by names of commands and checks, in order; all of them where there is no name.

    Raises:
        ValueError: a name is neither.
    """
    wanted: set[str] = set()
    for name in names or COMMANDS:
        found = {entry.name for entry in COMMANDS.get(name, [each for each in ENTRIES if each.name == name])}
        if not found:
            accepted = ", ".join([*COMMANDS, *(entry.name for entry in ENTRIES)])
            raise ValueError(f"{name}: accepted are {accepted}")
        wanted |= found
    return [entry for entry in ENTRIES if entry.name in wanted]


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="memory, tokens, speed, or F0 to F10; default: all")
    parser.add_argument("--device", choices=DEVICES, default=CUDA, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, required=True, help="compiled kernels and models; made if missing")
    parser.add_argument("--output", type=Path, required=True, help="logs, JSON and report; made if missing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks: 0 if none failed, 1 if one did, 2 for unusable options."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        entries = choose(arguments.names)
    except ValueError as error:
        parser.error(str(error))
    # As Ctrl-C: the default action of SIGTERM would end this process without its clean-up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = Place(arguments.device, arguments.cache.resolve(), arguments.output.resolve())
    for directory in (place.cache, place.output):
        directory.mkdir(parents=True, exist_ok=True)
    about = describe_machine()
    about["device"] = place.device
    bench = Path(__file__).resolve().parent

    def command(check: Check) -> list[str]:
        where = (place.device, str(place.cache), str(place.output))
        return [sys.executable, "-m", "gpu_checks.child", check.name, *where]

    path = os.pathsep.join(filter(None, [str(bench), os.environ.get("PYTHONPATH", "")]))
    env = {**environment(place), "PYTHONPATH": path}
    runs = run_checks([entry.check(place) for entry in entries], command, env, place.output)
    every = [entry.check(place) for entry in ENTRIES]
    report = place.output / REPORT
    report.write_text(markdown(read_runs(every, place.output), every, about), encoding="utf-8")
    print(f"written to {report}", flush=True)
    return 1 if any(run.result.status is Status.FAILED for run in runs) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("gpu.py: interrupted; everything it started has been stopped", file=sys.stderr)
        sys.exit(130)
