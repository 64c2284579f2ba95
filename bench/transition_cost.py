"""Predicts what a drop and a restore cost at real size, from the driver calls that the real code makes.

    python bench/transition_cost.py
    python bench/transition_cost.py --models Llama-3.1-8B --costs measured.json

Two replicas, of one rank each, with the real planner, steps and memory code over a driver that only counts: nothing
runs on a GPU. Printed are, for each phase at the rank that it takes longest at, the calls by kind, the longest step and
the time that a table of call costs predicts. Steps are what happens between two batches at the least. Left out are our
own code, messages, the copying and the checksums of parameters, and waiting for batches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cuda_model.costs import TABLE, CallCosts
from cuda_model.ranks import Deployment, PhaseCost
from cuda_model.shapes import SHAPES, Shape
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan, restore_plan

EXPORT = "cuMemExportToShareableHandle"
SHORT = {
    EXPORT: "export",
    "cuMemImportFromShareableHandle": "import",
    "cuMemGetAllocationPropertiesFromHandle": "owner",
    "synchronize": "sync",
}


def cost_of(
    shape: Shape, costs: CallCosts, rounds: tuple[str, ...] = ("first", "second")
) -> dict[str, dict[str, PhaseCost]]:
    """What a drop of half of the layers and the restore cost, by phase, as often as `rounds` names it."""
    with tempfile.TemporaryDirectory() as directory:
        deployment = Deployment(Path(directory), shape, costs)
        try:
            before, result = deployment.plan, {}
            for number in rounds:
                drop = drop_plan(deployment.plan, deployment.facts, DropWish(((0, 1),)))
                result[f"{number} drop"] = deployment.run(drop)
                result[f"{number} restore"] = deployment.run(restore_plan(deployment.plan, before, (0, 1)))
            return result
        finally:
            deployment.close()


def total_s(phases: dict[str, PhaseCost]) -> float:
    return sum(cost.predicted_s for cost in phases.values())


def descriptors(phases: dict[str, PhaseCost]) -> int:
    """How many file descriptors a rank sends to its peer."""
    return sum(cost.calls[EXPORT] for cost in phases.values())


def report(shape: Shape, result: dict[str, dict[str, PhaseCost]]) -> str:
    lines = [f"{shape.name}: {shape.base_tokens} KV slots, {shape.rows} request rows of {shape.context}"]
    for name, phases in result.items():
        lines.append(f"  {name}: {1e3 * total_s(phases):.1f} ms, {descriptors(phases)} descriptors")
        for phase, cost in phases.items():
            calls = ", ".join(f"{_short(call)} {count}" for call, count in sorted(cost.calls.items())) or "no calls"
            longest = f"; longest step {1e3 * cost.longest_step_s:.1f} ms: {cost.longest_step}" if cost.calls else ""
            lines.append(f"    {phase:8} {1e3 * cost.predicted_s:7.1f} ms  {calls}{longest}")
    return "\n".join(lines)


def _short(call: str) -> str:
    return SHORT.get(call, call.removeprefix("cuMem").lower())


def main(arguments: list[str] | None = None) -> int:
    names = [shape.name for shape in SHAPES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--costs", type=Path, default=TABLE, help="the table of call costs; default: %(default)s")
    parser.add_argument("--json", type=Path, help="where to write everything that is printed")
    options = parser.parse_args(arguments)
    try:
        costs = CallCosts(options.costs)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"--costs {options.costs}: {error}")
    saved: dict[str, Any] = {"costs": {name: asdict(cost) for name, cost in costs.by_call.items()}, "models": {}}
    for shape in SHAPES:
        if shape.name in options.models:
            result = cost_of(shape, costs)
            print(report(shape, result), flush=True)
            saved["models"][shape.name] = {
                name: {phase: vars(cost) for phase, cost in phases.items()} for name, phases in result.items()
            }
    if options.json is not None:
        options.json.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
