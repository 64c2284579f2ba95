"""Compares systems under one load: the loads and models it is made for, and the way from system to system."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from comparison.report import SystemRun, best_stock, write_run
from comparison.systems import CEILINGS, Kind, Setup, System, ceiling_tokens, gained_tokens, measure, probe
from workload.traces import Trace, TraceError

_TERSE = {"prompt_lengths": "uniform:16:64"}


@dataclass(frozen=True)
class Profile:
    """A model, the KV slots of a replica, and bursts that overload them. Made for two replicas on two cores. A workload
    has values for options of burst.py by their names, the model among them where it needs another one."""

    model: str
    tokens: int
    workloads: Mapping[str, Mapping[str, float | int | str]]


FULL = Profile(
    "small",
    1536,
    {
        "burst": {
            **{"base_rate": 0.5, "burst_rate": 8.0, "burst_start": 5.0, "burst_length": 6.0, "burst_gap": 8.0},
            **_TERSE,
            "output_lengths": "uniform:128:256",
        },
        "waves": {
            **{"base_rate": 0.5, "burst_rate": 8.0, "burst_start": 5.0, "burst_length": 5.0, "burst_gap": 30.0},
            **_TERSE,
            **{"output_lengths": "uniform:128:256", "waves": 3},
        },
        "long": {
            **{"base_rate": 0.2, "burst_rate": 3.0, "burst_start": 5.0, "burst_length": 6.0, "burst_gap": 10.0},
            **_TERSE,
            "output_lengths": "uniform:384:768",
        },
        # Means of 180 and 140 tokens, cut at 4 times that.
        "exceeds": {
            **{"base_rate": 0.5, "burst_rate": 3.2, "burst_start": 4.0, "burst_length": 16.0, "burst_gap": 20.0},
            **{"prompt_lengths": "lognormal:109:1", "max_prompt_tokens": 720},
            **{"output_lengths": "lognormal:85:1", "max_output_tokens": 560},
            **{"model": "deep", "dtype": "bfloat16", "systems": "auto,our-ceiling"},
        },
    },
)


QUICK = Profile(
    "tiny",
    512,
    {
        "burst": {
            **{"base_rate": 1.0, "burst_rate": 16.0, "burst_start": 2.0, "burst_length": 3.0, "burst_gap": 3.0},
            **_TERSE,
            "output_lengths": "uniform:64:128",
        },
        "waves": {
            **{"base_rate": 1.0, "burst_rate": 16.0, "burst_start": 2.0, "burst_length": 3.0, "burst_gap": 10.0},
            **_TERSE,
            **{"output_lengths": "uniform:64:128", "waves": 3},
        },
        "long": {
            **{"base_rate": 0.5, "burst_rate": 6.0, "burst_start": 2.0, "burst_length": 3.0, "burst_gap": 3.0},
            **_TERSE,
            "output_lengths": "uniform:192:384",
        },
    },
)


def listed(flag: str, text: str, accepted: Sequence[str]) -> list[str]:
    """The comma-separated names in `text`.

    Raises:
        TraceError: one of them is not accepted.
    """
    names = text.split(",")
    if unknown := [name for name in names if name not in accepted]:
        raise TraceError(f"{flag}: {', '.join(unknown)}; accepted are {', '.join(accepted)}")
    return names


def compare(systems: Sequence[System], setup: Setup, trace: Trace, jsonl: Path) -> list[SystemRun]:
    """Measure all systems, one after the other; each is written to `jsonl` when it is done.

    Raises:
        ServerError: a server could not be stopped, or made no plan for the ceiling.
    """
    runs: list[SystemRun] = []
    gained: list[int] = []

    def note_gain(base_url: str) -> None:
        if not gained:
            gained.extend(gained_tokens(base_url, setup.replicas))

    for system in systems:
        if system.kind in CEILINGS:
            if not gained:
                print("ceiling     asking our server what a drop would gain", flush=True)
                probe(setup, note_gain)
            system = replace(system, tokens=ceiling_tokens(setup, gained))
            best = best_stock(runs)
            if system.kind is Kind.CEILING and best is not None:
                stock = next(each for each in systems if each.name == best.name)
                system = replace(system, load_balance_method=stock.load_balance_method)
            print(
                f"ceiling     {setup.tokens} KV slots per replica and {max(gained)} that a drop would add", flush=True
            )
        started_at_s = time.monotonic()
        print(f"{system.name:<25} starting", flush=True)
        run = measure(system, setup, trace, on_ready=note_gain if system.attached else None)
        runs.append(run)
        write_run(jsonl, run)
        took_s = time.monotonic() - started_at_s
        if run.problem:
            print(f"{system.name:<25} {run.problem}", flush=True)
        if run.results:
            print(
                f"{system.name:<25} P99 TTFT {run.p99_ttft_s:.3f} s, {run.summary.failed} failed, {took_s:.0f} s",
                flush=True,
            )
    return runs


def draw(directory: Path, runs: Sequence[SystemRun], setup: Setup, trace: Trace) -> None:
    """Write ttft.png and memory.png, if anything was measured."""
    # Imported late: it takes seconds, and a wrong option should be refused at once.
    from comparison.plots import plot_memory, plot_ttft

    title = f"{trace.source}; {setup.model_name}, {setup.replicas} replicas of {setup.tokens} KV slots"
    plot_ttft(directory / "ttft.png", runs, title)
    plot_memory(directory / "memory.png", runs, title)


def write_model(preset: str, directory: Path, dtype: str) -> str:
    """Write a random-weight model, and name it."""
    from kunserve_sgl.tiny_model import write_tiny_model
    from kunserve_sgl.tiny_model_spec import PRESETS, TinyModelSpec

    sizes = write_tiny_model(TinyModelSpec(dtype=dtype, **PRESETS[preset]), directory)
    return f"{preset} llama of {sizes.parameters / 1e6:.1f} M random parameters"
