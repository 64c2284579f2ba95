"""Command: a burst on stock SGLang, on stock with the memory that a free drop would give, and on KunServe.

    python bench/burst.py                    # the default burst: under 10 minutes on two cores
    python bench/burst.py --quick            # a tiny model: about 2 minutes
    python bench/burst.py --workload waves   # three bursts; long: long answers
    python bench/burst.py --workload exceeds # more than even a drop makes room for: auto and our-ceiling only
    python bench/burst.py --trace FILE ...   # a recorded trace, with the options of replay.py

The systems run one after the other, each with the same arrivals, prompts, answer lengths, replicas, KV slots per
replica (--tokens) and attention backend (that of the CPU platform), greedy:

    stock     sglang.launch_server of this environment, once per --load-balance-method; the best one is compared with.
              When its KV cache is full it retracts requests and computes them again.
    hicache   the same with --enable-hierarchical-cache, where it starts
    off       kunserve_sgl.launch_server --kunserve off
    auto      --kunserve auto
    ceiling   stock with the KV slots that such a drop would give at no cost, as POST /kunserve/plan of ours says

By --systems only, to tell the effect of memory from that of everything else that differs (stock's data-parallel
controller polls without a pause, ours waits; the table has its share of a core):

    manual       --kunserve manual; the benchmark orders a drop of all that can be dropped when the burst begins
    still        --kunserve manual, and nothing is dropped
    our-ceiling  the same with the KV slots of the ceiling

Writes to --output-dir: burst.jsonl (a line per request, sample and system, and a summary), table.txt, ttft.png,
memory.png, and a log per server.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from comparison.compare import FULL, QUICK, compare, draw, listed, write_model
from comparison.report import format_table, write_summary
from comparison.systems import Kind, Setup, System, systems_of
from kunserve_sgl.tiny_model_spec import PRESETS
from servers.command import DTYPES, add_server_arguments, server_flags
from servers.machine import describe_machine
from servers.server import ServerError
from workload.load import BURST, DEFAULT_SEED, add_trace_arguments, describe, load_trace
from workload.traces import Trace, TraceError, busiest_window

_RECORDED_BURST_S = 5.0
METHODS = ("round_robin", "total_requests", "total_tokens")


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file."""
    parser = argparse.ArgumentParser(
        prog="burst.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = [kind.value for kind in Kind]
    parser.add_argument("--quick", action="store_true", help="tiny model, less memory, fewer requests and systems")
    parser.add_argument(
        "--systems", help=f"comma-separated, of {', '.join(kinds)}; default: see above, with --quick fewer"
    )
    parser.add_argument(
        "--load-balance-method",
        dest="methods",
        help=f"of stock, comma-separated, of {', '.join(METHODS)}; default: round_robin,total_tokens, with --quick one",
    )
    parser.add_argument("--workload", choices=list(FULL.workloads), help="generated load (burst)")
    parser.add_argument("--trace", default=BURST, metavar="PATH", help="a recorded trace instead")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of arrivals, lengths and prompts (%(default)s)")
    parser.add_argument("--model", choices=list(PRESETS), help="random-weight model; small has 47 M parameters")
    parser.add_argument("--replicas", type=int, default=2, help="data-parallel replicas (%(default)s)")
    parser.add_argument("--tokens", type=int, help=f"KV slots per replica ({FULL.tokens}, with --quick {QUICK.tokens})")
    parser.add_argument("--context-length", type=int, default=2048, help="of the servers, in tokens (%(default)s)")
    add_server_arguments(parser)
    parser.add_argument("--drop-at", type=float, action="append", help="s; default: when the (first) burst begins")
    parser.add_argument("--restore-at", type=float, action="append", help="s; default: after the last answer")
    parser.add_argument("--unloaded-requests", type=int, default=6, help="for the SLOs, per system (%(default)s)")
    parser.add_argument("--settle", type=float, default=30.0, help="s to wait for a restore at the end (%(default)s)")
    parser.add_argument("--poll", type=float, default=0.25, help="s between two samples (%(default)s)")
    parser.add_argument("--request-timeout", type=float, default=300.0, help="s for one answer (%(default)s)")
    parser.add_argument("--start-deadline", type=float, default=300.0, help="s for a server to start (%(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("out/burst"), help="made if missing (%(default)s)")
    add_trace_arguments(parser)
    parser.set_defaults(dtype=None)  # to see whether it was given, as with all that a workload may choose
    return parser


def choose(args: Namespace) -> tuple[Trace, list[System]]:
    """The load and the systems that the options ask for; fills in `args` what they leave open.

    Raises:
        TraceError: an option cannot be used.
    """
    profile = QUICK if args.quick else FULL
    if args.trace == BURST:
        workload = args.workload or "burst"
        if workload not in profile.workloads:
            raise TraceError(f"--workload {workload} cannot be used with --quick")
        for name, value in profile.workloads[workload].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    elif args.workload is not None:
        raise TraceError("--workload cannot be used with --trace")
    args.model = args.model or profile.model
    args.tokens = profile.tokens if args.tokens is None else args.tokens
    args.dtype = args.dtype or DTYPES[0]
    default_kinds = "stock,auto,ceiling" if args.quick else "stock,hicache,off,auto,ceiling"
    kinds = [Kind(name) for name in listed("--systems", args.systems or default_kinds, [kind.value for kind in Kind])]
    default_methods = "total_tokens" if args.quick else "round_robin,total_tokens"
    methods = listed("--load-balance-method", args.methods or default_methods, METHODS)
    for name, least in (("replicas", 2), ("tokens", 1), ("unloaded_requests", 1), ("poll", 0.01)):
        if getattr(args, name) < least:
            raise TraceError(f"--{name.replace('_', '-')} is {getattr(args, name)}; accepted is {least} or more")
    trace = load_trace(args, args.seed)
    longest = max(request.prompt_tokens + request.output_tokens for request in trace.requests)
    limit = min(args.tokens, args.context_length)
    if longest >= limit:
        raise TraceError(
            f"a request has {longest} tokens, and fewer than {limit} must do (--tokens, --context-length); see "
            "--max-prompt-tokens and --max-output-tokens"
        )
    return trace, systems_of(kinds, methods, args.tokens)


def order_times(args: Namespace, trace: Trace) -> tuple[tuple[float, str], ...]:
    """When the benchmark orders what, for the system `manual`."""
    burst_s = args.burst_length * args.time_scale if args.trace == BURST else _RECORDED_BURST_S
    drops = args.drop_at or [busiest_window(trace, burst_s)]
    return tuple(sorted([(at_s, "drop") for at_s in drops] + [(at_s, "restore") for at_s in args.restore_at or ()]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison: 0 if all was measured and no request failed, 1 if not, 2 for unusable options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    started_at_s = time.monotonic()
    try:
        trace, systems = choose(args)
    except TraceError as error:
        parser.error(str(error))
    # As Ctrl-C: the default action of SIGTERM would end this process without its clean-up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    jsonl = args.output_dir / "burst.jsonl"
    jsonl.unlink(missing_ok=True)
    about = describe_machine()
    try:
        with tempfile.TemporaryDirectory(prefix="burst-") as directory:
            setup = make_setup(args, trace, Path(directory))
            head = "\n".join(
                [
                    *(f"{name:<11} {text}" for name, text in about.items()),
                    describe(trace),
                    f"servers     {setup.model_name}, {args.dtype}, {setup.replicas} replicas of {setup.tokens} slots",
                ]
            )
            print(head, flush=True)
            runs = compare(systems, setup, trace, jsonl)
    except ServerError as error:
        print(f"burst.py: {error}", file=sys.stderr)
        return 1
    write_summary(jsonl, runs, about)
    took = f"took        {time.monotonic() - started_at_s:.0f} s; written to {args.output_dir}"
    table = "\n".join([*(f"{run.name:<25} {run.command}" for run in runs), format_table(runs), took])
    (args.output_dir / "table.txt").write_text(f"{head}\n{table}\n", encoding="utf-8")
    print(table, flush=True)
    draw(args.output_dir, runs, setup, trace)
    # HiCache is tried; it need not run here.
    needed = [run for run in runs if run.role != "hicache"]
    return 1 if any(run.problem or run.summary.failed for run in needed) else 0


def make_setup(args: Namespace, trace: Trace, directory: Path) -> Setup:
    """What all systems share; writes the model to `directory` unless a path is given."""
    model, name = args.model_path, str(args.model_path)
    if model is None:
        model = directory / "model"
        name = write_model(args.model, model, args.dtype)
    return Setup(
        model=model,
        model_name=name,
        replicas=args.replicas,
        tokens=args.tokens,
        context_tokens=args.context_length,
        seed=args.seed,
        server_flags=tuple(server_flags(args)),
        poll_s=args.poll,
        start_deadline_s=args.start_deadline,
        request_timeout_s=args.request_timeout,
        settle_s=args.settle,
        unloaded_requests=args.unloaded_requests,
        log_dir=args.output_dir,
        orders=order_times(args, trace),
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("burst.py: interrupted; everything it started has been stopped", file=sys.stderr)
        sys.exit(130)
