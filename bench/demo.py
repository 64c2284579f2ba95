"""`make demo`: the comparison of burst.py in small, a burst or a recorded trace on three systems with a tiny model.

One after the other, each with the same arrivals and prompts, through SGLang's own benchmark client:

    stock     sglang.launch_server of this environment
    auto      KunServe: drops parameters when the memory for requests gets short, and restores them afterwards
    ceiling   stock with the KV memory that such a drop would give at no cost

With --ray the replicas of KunServe are actors on as many nodes of Ray, all on this machine, which reach each other by
messages only; stock stays without Ray.

Printed are the latencies of all three, and when KunServe changed the KV capacity to what. --output-dir gets that and
the tables of burst.py (table.txt), the pictures (ttft.png, memory.png), a line per request (demo.jsonl) and the logs.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from comparison.compare import QUICK, compare, draw, listed, write_model
from comparison.report import (
    CEILING,
    SystemRun,
    TokenComparison,
    best_stock,
    format_table,
    measured,
    ratios,
    transitions,
    write_summary,
)
from comparison.systems import Kind, Setup, systems_of
from servers.machine import describe_machine
from servers.ray_nodes import ray_nodes
from servers.server import ServerError
from servers.streams import table
from workload.bursts import generate_bursts
from workload.load import BURST, DEFAULT_SEED, burst_spec, describe
from workload.report import Distribution
from workload.trace_files import read_trace
from workload.traces import ShapeOptions, Trace, TraceError, busiest_window, shape

SYSTEMS = (Kind.STOCK, Kind.AUTO, Kind.CEILING)
CONTEXT_TOKENS = 2048
# What two replicas of the model get through in the time of a demo on two cores; a trace is scaled to it.
PROMPT_TOKENS_BUDGET = 40_000
OUTPUT_TOKENS_BUDGET = 8_000
REQUESTS_BUDGET = 500
_WINDOW_S = 20.0
_LOAD_BALANCE_METHOD = "total_tokens"
_UNLOADED_REQUESTS = 4
_POLL_S = 0.1
_START_DEADLINE_S = 900.0
_REQUEST_TIMEOUT_S = 600.0
_SETTLE_S = 120.0
_TABLE, _LINES = "table.txt", "demo.jsonl"
_PICTURES = ("ttft.png", "memory.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo: 0 if every request succeeded, 1 if one failed or a server did, 2 for unusable options."""
    parser = argparse.ArgumentParser(
        prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = ",".join(kind.value for kind in SYSTEMS)
    parser.add_argument("--trace", default=BURST, metavar="PATH|burst", help="what to replay (%(default)s)")
    parser.add_argument("--window-start", type=float, help="seconds into the trace; default: its busiest part")
    parser.add_argument("--window-length", type=float, help=f"seconds of the trace to replay ({_WINDOW_S:g})")
    parser.add_argument("--replicas", type=int, default=2, help="data-parallel replicas, 2 or more (%(default)s)")
    parser.add_argument("--systems", default=names, help="comma-separated, to run fewer (%(default)s)")
    parser.add_argument("--ray", action="store_true", help="auto: each replica on a node of Ray of its own")
    parser.add_argument("--output-dir", type=Path, default=Path("out/demo"), help="made if missing (%(default)s)")
    args = parser.parse_args(argv)
    started_at_s = time.monotonic()
    try:
        trace, scaling = workload(args)
        kinds = [Kind(name) for name in listed("--systems", args.systems, names.split(","))]
        if args.replicas < 2:
            raise TraceError(f"--replicas is {args.replicas}; accepted is 2 or more, as a drop takes two")
        prepare(args.output_dir)
    except TraceError as error:
        parser.error(str(error))
    # As Ctrl-C: the default action of SIGTERM would end this process without its clean-up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    about = describe_machine()
    try:
        with tempfile.TemporaryDirectory(prefix="demo-") as directory, ExitStack() as stack:
            print("model       writing a tiny model", flush=True)
            setup = make_setup(args, Path(directory) / "model")
            if args.ray:
                print(f"ray         starting {args.replicas} nodes", flush=True)
                setup = on_ray(setup, stack.enter_context(ray_nodes(args.replicas)).address)
            head = (
                f"servers     {setup.model_name}, {setup.replicas} replicas of {setup.tokens} KV slots\n"
                f"scaled      {scaling}\n{describe(trace)}"
            )
            print(head, flush=True)
            systems = systems_of(kinds, [_LOAD_BALANCE_METHOD], setup.tokens)
            runs = compare(systems, setup, trace, args.output_dir / _LINES)
    except ServerError as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 1
    write_summary(args.output_dir / _LINES, runs, about)
    text = report(runs)
    lines = [*(f"{name:<11} {value}" for name, value in about.items()), head, "", text, "", format_table(runs)]
    (args.output_dir / _TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(args.output_dir, runs, setup, trace)
    print(f"\n{text}\n")
    print(f"took        {time.monotonic() - started_at_s:.0f} s; all servers have been stopped")
    print(f"written     to {args.output_dir}: {_TABLE}, {', '.join(_PICTURES)}, {_LINES} and a log per server")
    return 1 if any(run.problem or run.summary.failed or _not_restored(run) for run in runs) else 0


def workload(args: Namespace) -> tuple[Trace, str]:
    """The trace to replay, and in one line what was scaled.

    Raises:
        TraceError: the file or an option cannot be used.
    """
    if args.trace == BURST:
        if args.window_start is not None or args.window_length is not None:
            raise TraceError("--window-start and --window-length select a part of a recorded trace; give --trace PATH")
        generated = generate_bursts(burst_spec(QUICK.workloads["burst"]), DEFAULT_SEED)
        return shape(generated, ShapeOptions()), "nothing; the burst was made for this model"
    recorded = read_trace(Path(args.trace))
    length_s = _WINDOW_S if args.window_length is None else args.window_length
    window = ShapeOptions(args.window_start or 0.0, length_s)
    if args.window_start is None:
        window = ShapeOptions(busiest_window(recorded, length_s), length_s)
    requests = shape(recorded, window).requests[:REQUESTS_BUDGET]
    # Half of a replica's KV slots for each, less what rounding may add.
    longest = min(QUICK.tokens, CONTEXT_TOKENS) // 2 - 1
    prompts = [request.prompt_tokens for request in requests]
    outputs = [request.output_tokens for request in requests]
    prompt_scale = min(1.0, longest / max(prompts), PROMPT_TOKENS_BUDGET / sum(prompts))
    output_scale = min(1.0, longest / max(outputs), OUTPUT_TOKENS_BUDGET / sum(outputs))
    options = ShapeOptions(
        window.window_start_s,
        length_s,
        limit=REQUESTS_BUDGET,
        prompt_scale=prompt_scale,
        output_scale=output_scale,
    )
    which = "busiest" if args.window_start is None else "chosen"
    return shape(recorded, options), (
        f"the {which} {length_s:g} s of the trace, from {window.window_start_s:.1f} s on, at its own speed; prompts x "
        f"{prompt_scale:.3f} and outputs x {output_scale:.3f}, so that a tiny model on two cores can follow"
    )


def prepare(output_dir: Path) -> None:
    """Make the directory, without results of an earlier run.

    Raises:
        TraceError: it cannot be written to.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name in (_TABLE, _LINES, *_PICTURES):
            (output_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise TraceError(f"--output-dir is {output_dir}; accepted is a directory to write to ({error})") from error


def make_setup(args: Namespace, model: Path) -> Setup:
    """What all systems share; writes the model to the directory `model`."""
    return Setup(
        model=model,
        model_name=write_model(QUICK.model, model, "float32"),
        replicas=args.replicas,
        tokens=QUICK.tokens,
        context_tokens=CONTEXT_TOKENS,
        seed=DEFAULT_SEED,
        server_flags=("--dtype", "float32"),
        poll_s=_POLL_S,
        start_deadline_s=_START_DEADLINE_S,
        request_timeout_s=_REQUEST_TIMEOUT_S,
        settle_s=_SETTLE_S,
        unloaded_requests=_UNLOADED_REQUESTS,
        log_dir=args.output_dir,
        show_progress=True,
    )


def on_ray(setup: Setup, address: str) -> Setup:
    """The same with the replicas of KunServe on the nodes of a cluster of Ray, which share a machine by chance only."""
    flags = ("--use-ray", "--nnodes", str(setup.replicas), "--kunserve-control", "network")
    flags += ("--kunserve-remote-attention", "message")
    return replace(setup, our_flags=flags, environment=(("RAY_ADDRESS", address),))


def report(runs: Sequence[SystemRun]) -> str:
    """The table of latencies, the ratio to stock, and the transitions with the KV capacity, for 120 columns."""
    lines = [f"problem     {run.name}: {run.problem}" for run in runs if run.problem]
    done = measured(runs)
    if done:
        percentiles = ("P90", "P99", "P99.9")
        titles = ["", "TTFT ms P50", *percentiles, "TPOT ms P50", *percentiles, "req/s", "tok/s", "failed", "peak KV"]
        lines += [table(titles, [_row(run) for run in done]), ""]
        lines += [
            f"failed      {run.name}: {each.count} x {each.example}" for run in done for each in run.summary.failures
        ]
    stock = best_stock(runs)
    for run in done:
        if run is stock or run.role == CEILING:
            continue
        if stock is not None:
            (ratio,) = (each.stock_p99_ttft_by_ours for each in ratios(runs) if each.system == run.name)
            tokens = TokenComparison.of(run.results, stock.results)
            same = f"{tokens.compared - tokens.differing} of {tokens.compared}"
            lines.append(f"ratio       P99 TTFT of {stock.name} / P99 TTFT of {run.name}: {ratio:.1f}")
            lines.append(f"answers     {same} of {run.name} have the tokens of {stock.name}")
        lines += _capacities(run)
    return "\n".join(lines)


def _row(run: SystemRun) -> list[object]:
    summary = run.summary
    rates = (f"{summary.requests_per_s:.2f}", f"{summary.output_tokens_per_s:.0f}")
    return [
        run.name,
        *_milliseconds(summary.ttft, 0),
        *_milliseconds(summary.tpot, 1),
        *(*rates, summary.failed, run.peak_capacity_tokens),
    ]


def _milliseconds(values: Distribution | None, digits: int) -> list[str]:
    if values is None:
        return ["-"] * 4
    return [f"{1000 * value:.{digits}f}" for value in (values.p50, values.p90, values.p99, values.p999)]


def _capacities(run: SystemRun) -> list[str]:
    """What KunServe did to the KV capacity of all replicas, as the samples show it."""
    changes = transitions(run.samples)
    before = sum(run.capacity_tokens)
    if not changes:
        return [
            f"{run.name:<11} nothing was dropped: the requests did not need more KV memory than the {before} tokens"
        ]
    lines = [
        f"{run.name:<11} {change.t_s:.1f} s after the arrivals began: {change.state}, {change.capacity_tokens} KV slots"
        for change in changes
    ]
    after = f"after {sum(run.capacity_after_tokens)}"
    if _not_restored(run):
        after = f"not restored within {_SETTLE_S:g} s after the last answer"
    return [*lines, f"KV capacity before {before}, merged {run.peak_capacity_tokens}, {after} tokens"]


def _not_restored(run: SystemRun) -> bool:
    """Whether a system that dropped or lent has not become normal again, or has not its memory back."""
    return bool(transitions(run.samples)) and (run.normal_after_s is None or run.as_at_start is False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("demo.py: interrupted; everything it started has been stopped", file=sys.stderr)
        sys.exit(130)
