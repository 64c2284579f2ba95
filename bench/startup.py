"""How long a server takes until it answers, ours against stock SGLang with the same model and flags.

    python bench/startup.py [--preset tiny|small] [--replicas 2] [--rounds 5] [--limit 0.6]

Each round starts both, one after the other, in alternating order. A start ends with the first answer to /health, for
which a server generates a token. The ratio is that of the medians; above `--limit` the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

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
from servers.server import ServerProcess, find_free_port

START_DEADLINE_S = 600.0
MODULES = {"stock": STOCK_SERVER, "ours": KUNSERVE_SERVER}


def server_command(module: str, model: Path, port: int, arguments: argparse.Namespace) -> list[str]:
    """The command of a server of that module."""
    return launch_command(
        *(module, model, port, "--dp-size", str(arguments.replicas), "--max-total-tokens", "8192"),
        *server_flags(arguments),
    )


def start_s(module: str, model: Path, arguments: argparse.Namespace) -> float:
    """Seconds from the command to the first answer."""
    port = find_free_port()
    command = server_command(module, model, port, arguments)
    with ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"}) as server:
        return server.wait_healthy(START_DEADLINE_S)


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, help="largest ratio of our time to stock's that is accepted")
    add_server_arguments(parser)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    print("\n".join(f"{name}: {value}" for name, value in describe_machine().items()), file=sys.stderr)
    times_s: dict[str, list[float]] = {name: [] for name in MODULES}
    with tempfile.TemporaryDirectory() as directory:
        model = model_to_serve(arguments, PRESETS[arguments.preset], Path(directory, "model"))
        for number in range(arguments.rounds):
            for name in sorted(MODULES, reverse=bool(number % 2)):
                times_s[name].append(start_s(MODULES[name], model, arguments))
                print(f"round {number + 1}, {name}: {times_s[name][-1]:.1f} s", file=sys.stderr, flush=True)
    medians_s = {name: statistics.median(times) for name, times in times_s.items()}
    ratio = medians_s["ours"] / medians_s["stock"]
    for name, times in times_s.items():
        print(f"{name}: median {medians_s[name]:.1f} s, {min(times):.1f} to {max(times):.1f} s", file=sys.stderr)
    print(f"ratio of the medians: {ratio:.2f}", file=sys.stderr)
    print(json.dumps({"times_s": times_s, "medians_s": medians_s, "ratio": ratio}))
    return int(arguments.limit is not None and ratio > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
