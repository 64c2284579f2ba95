"""Command: replays a recorded trace or a generated burst through SGLang's benchmark client."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from workload.load import DEFAULT_SEED, add_trace_arguments, describe, load_trace
from workload.play import parse_client_options, replay
from workload.report import format_summary, summarise, write_results
from workload.traces import TraceError


def build_parser() -> argparse.ArgumentParser:
    """The command line of this file; what it does not know belongs to the client."""
    parser = argparse.ArgumentParser(
        prog="replay.py",
        allow_abbrev=False,
        description=__doc__,
        epilog="All other arguments go to SGLang's client, such as --base-url, --host, --port, --model, "
        "--tokenizer, --warmup-requests: see python -m sglang.benchmark.serving --help.",
    )
    parser.add_argument("--trace", required=True, metavar="PATH|burst", help="a recorded trace, or a generated burst")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of arrivals, lengths and prompts (%(default)s)")
    parser.add_argument("--output", type=Path, help="write one JSON object per request to this file")
    parser.add_argument("--request-timeout", type=float, default=600.0, help="seconds for one answer (%(default)s)")
    parser.add_argument("--keep-cache", action="store_true", help="do not flush the server's prefix cache first")
    parser.add_argument("--show-client", action="store_true", help="also print what SGLang's client prints")
    add_trace_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 if all requests succeeded, 1 if one or the replay failed, 2 for unusable options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    try:
        trace = load_trace(args, args.seed)
        if args.request_timeout <= 0:
            raise TraceError(f"--request-timeout is {args.request_timeout}; accepted is a number of seconds above 0")
        if args.output is not None and not args.output.parent.is_dir():
            raise TraceError(f"--output is {args.output}; accepted is a file in an existing directory")
        client_args = parse_client_options([*rest, "--seed", str(args.seed)])
    except TraceError as error:
        parser.error(str(error))
    print(describe(trace), flush=True)
    from workload.client import ReplayError

    try:
        results = replay(
            trace,
            client_args,
            request_timeout_s=args.request_timeout,
            keep_cache=args.keep_cache,
            show_client=args.show_client,
        )
    except ReplayError as error:
        print(f"replay.py: {error}", file=sys.stderr)
        return 1
    if args.output is not None:
        write_results(args.output, results)
    summary = summarise(results)
    print(format_summary(summary), flush=True)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
