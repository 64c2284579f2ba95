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

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import PRESETS, TinyModelSpec
from servers.machine import describe_machine
from servers.server import HOST, ServerProcess, find_free_port

START_DEADLINE_S = 600.0
MODULES = {"stock": "sglang.launch_server", "ours": "kunserve_sgl.launch_server"}


def start_s(module: str, model: Path, replicas: int) -> float:
    """Seconds from the command to the first answer."""
    port = find_free_port()
    command = [
        *(sys.executable, "-m", module, "--model-path", str(model), "--host", HOST, "--port", str(port)),
        *("--dtype", "float32", "--dp-size", str(replicas), "--max-total-tokens", "8192"),
    ]
    with ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"}) as server:
        return server.wait_healthy(START_DEADLINE_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, help="largest ratio of our time to stock's that is accepted")
    arguments = parser.parse_args()
    print("\n".join(f"{name}: {value}" for name, value in describe_machine().items()), file=sys.stderr)
    times_s: dict[str, list[float]] = {name: [] for name in MODULES}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory, "model")
        write_tiny_model(TinyModelSpec(dtype="float32", **PRESETS[arguments.preset]), model)
        for number in range(arguments.rounds):
            for name in sorted(MODULES, reverse=bool(number % 2)):
                times_s[name].append(start_s(MODULES[name], model, arguments.replicas))
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
