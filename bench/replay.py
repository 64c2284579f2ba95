"""Command: replays a recorded trace or a generated burst through SGLang's benchmark client."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workload.bursts import BurstSpec, LengthDistribution, generate_bursts
from workload.report import RequestResult, format_summary, summarise, write_results
from workload.trace_files import TraceFormat, read_trace
from workload.traces import DEFAULT_HASH_BLOCK_TOKENS, ShapeOptions, Trace, TraceError, shape

BURST = "burst"
DEFAULT_SEED = 42
# The generator's flags and their defaults. The parser's default is None, to see which were given.
_BURST_DEFAULTS: dict[str, float | int | str] = {
    "base_rate": 1.0,
    "burst_rate": 10.0,
    "burst_start": 5.0,
    "burst_length": 5.0,
    "burst_gap": 5.0,
    "waves": 1,
    "prompt_lengths": "uniform:64:256",
    "output_lengths": "uniform:16:64",
}
_FILE_FLAGS = ("format", "skip_malformed", "hash_block_tokens")
# Options of the client that contradict a replay, by the name they have in its parsed arguments.
_REFUSED_CLIENT_OPTIONS = {
    "backend": "prompts are token ids for SGLang's /generate",
    "dataset_name": "the dataset is the trace",
    "dataset_path": "the dataset is the trace",
    "num_prompts": "use --limit",
    "request_rate": "arrivals are the trace's; use --time-scale",
    "use_trace_timestamps": "arrival times are always kept",
    "max_concurrency": "it would delay arrivals",
    "disable_ignore_eos": "output lengths are the trace's",
    "disable_stream": "without streaming there is no time to first token",
}


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


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that read, generate and shape a trace."""
    recorded = parser.add_argument_group("recorded trace")
    recorded.add_argument("--format", choices=[f.value for f in TraceFormat], help="default: seen from its first line")
    recorded.add_argument("--skip-malformed", action="store_true", default=None, help="count such rows and go on")
    recorded.add_argument(
        "--hash-block-tokens", type=int, help=f"tokens per Mooncake hash id ({DEFAULT_HASH_BLOCK_TOKENS})"
    )
    chosen = parser.add_argument_group("what to replay (window, upscaling, limit, scales, clamps, in this order)")
    chosen.add_argument("--window-start", type=float, default=0.0, help="seconds after the first row")
    chosen.add_argument("--window-length", type=float, help="seconds of trace time; default: to the end")
    chosen.add_argument("--upscale", type=int, default=1, metavar="N", help="send N requests per arrival")
    chosen.add_argument("--limit", type=int, help="send at most this many requests")
    chosen.add_argument("--time-scale", type=float, default=1.0, help="factor on the gaps; 0.5 is twice as fast")
    chosen.add_argument("--length-scale", type=float, default=1.0, help="factor on all lengths")
    chosen.add_argument("--prompt-scale", type=float, help="factor on prompt lengths; default: --length-scale")
    chosen.add_argument("--output-scale", type=float, help="factor on output lengths; default: --length-scale")
    chosen.add_argument("--max-prompt-tokens", type=int, help="cut longer prompts, and say how many")
    chosen.add_argument("--max-output-tokens", type=int, help="cut longer outputs, and say how many")
    burst = parser.add_argument_group("generated burst (--trace burst)")
    help_texts = {
        "base_rate": "requests/s outside of bursts",
        "burst_rate": "requests/s in a burst",
        "burst_start": "seconds before the first burst",
        "burst_length": "seconds per burst",
        "burst_gap": "seconds at the base rate after each burst",
        "waves": "number of bursts",
        "prompt_lengths": "fixed:TOKENS, uniform:LEAST:MOST or lognormal:MEDIAN:SIGMA",
        "output_lengths": "as --prompt-lengths",
    }
    for name, default in _BURST_DEFAULTS.items():
        burst.add_argument(flag(name), type=type(default), help=f"{help_texts[name]} ({default})")


def flag(name: str) -> str:
    """The command-line form of an option's name."""
    return "--" + name.replace("_", "-")


def load_trace(args: Namespace, seed: int) -> Trace:
    """Read or generate the trace that the options ask for, and shape it.

    Raises:
        TraceError: an option or the file cannot be used.
    """
    # For a file the generator's flags would have no effect, and the other way round.
    other = _FILE_FLAGS if args.trace == BURST else tuple(_BURST_DEFAULTS)
    useless = [flag(name) for name in other if getattr(args, name) is not None]
    if useless:
        kind = "a generated burst" if args.trace == BURST else "a recorded trace"
        raise TraceError(f"{', '.join(useless)} cannot be used with --trace {args.trace}, which is {kind}")
    options = ShapeOptions(
        window_start_s=args.window_start,
        window_length_s=args.window_length,
        upscale=args.upscale,
        limit=args.limit,
        time_scale=args.time_scale,
        prompt_scale=args.length_scale if args.prompt_scale is None else args.prompt_scale,
        output_scale=args.length_scale if args.output_scale is None else args.output_scale,
        max_prompt_tokens=args.max_prompt_tokens,
        max_output_tokens=args.max_output_tokens,
    )
    if args.trace == BURST:
        return shape(generate_bursts(burst_spec(vars(args)), seed), options)
    trace = read_trace(
        Path(args.trace),
        None if args.format is None else TraceFormat(args.format),
        skip_malformed=bool(args.skip_malformed),
        hash_block_tokens=DEFAULT_HASH_BLOCK_TOKENS if args.hash_block_tokens is None else args.hash_block_tokens,
    )
    return shape(trace, options)


def describe(trace: Trace) -> str:
    """What is about to be replayed, and a line for everything that was left out or changed."""
    prompts = np.array([request.prompt_tokens for request in trace.requests])
    outputs = np.array([request.output_tokens for request in trace.requests])
    lines = [
        f"trace       {trace.source}: {len(trace.requests)} requests in {trace.span_s:.1f} s; prompts P50 "
        f"{np.median(prompts):.0f}, max {prompts.max()}, sum {prompts.sum()} tokens; outputs P50 "
        f"{np.median(outputs):.0f}, max {outputs.max()}, sum {outputs.sum()} tokens"
    ]
    return "\n".join(lines + [f"note        {note}" for note in trace.notes])


def replay(
    trace: Trace,
    client_args: Namespace,
    *,
    request_timeout_s: float,
    keep_cache: bool = False,
    show_client: bool = False,
    on_start: Callable[[], None] | None = None,
) -> list[RequestResult]:
    """Send `trace` with SGLang's client and return one result per request.

    `on_start` is called when the arrivals begin, after warm-up and flush.

    Raises:
        client.ReplayError: the replay could not be run.
        SystemExit: the client gave up (its own message has been printed).
    """
    from workload.client import Replay

    client_args.flush_cache = not keep_cache
    # The client always writes a file, and names it itself if it is given none.
    client_args.output_file = client_args.output_file or os.devnull
    # The run's part of the request ids keeps them apart from those of an earlier run on the same server.
    run = Replay(
        trace,
        seed=client_args.seed,
        request_timeout_s=request_timeout_s,
        run_name=f"replay-{uuid.uuid4().hex[:8]}",
        on_start=on_start,
    )
    printed = io.StringIO()
    with contextlib.nullcontext() if show_client else contextlib.redirect_stdout(printed):
        try:
            run.run(client_args)
        except SystemExit:
            sys.stderr.write(printed.getvalue())
            raise
    return run.results


def parse_client_options(arguments: Sequence[str]) -> Namespace:
    """Parse the client's options and refuse those that contradict a replay.

    Raises:
        TraceError: an option is refused, with the reason.
        SystemExit: the client does not know an option (it has printed why).
    """
    # The client's module takes seconds to import; a wrong option of ours should not wait for it.
    from workload.client import parse_client_args

    defaults, given = vars(parse_client_args([])), parse_client_args(arguments)
    for name, reason in _REFUSED_CLIENT_OPTIONS.items():
        if getattr(given, name) != defaults[name]:
            raise TraceError(f"{flag(name)} cannot be used in a replay: {reason}")
    return given


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


def burst_spec(options: Mapping[str, Any]) -> BurstSpec:
    """The burst of the generator's options, by their names in a parsed command line; those that are missing or None
    have their defaults.

    Raises:
        TraceError: a value cannot be used.
    """
    values: dict[str, Any] = {
        name: default if options.get(name) is None else options[name] for name, default in _BURST_DEFAULTS.items()
    }
    return BurstSpec(
        base_rate=values["base_rate"],
        burst_rate=values["burst_rate"],
        burst_start_s=values["burst_start"],
        burst_length_s=values["burst_length"],
        burst_gap_s=values["burst_gap"],
        waves=values["waves"],
        prompt=LengthDistribution.parse(values["prompt_lengths"]),
        output=LengthDistribution.parse(values["output_lengths"]),
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
