"""Which load: the options that read, generate and shape a trace, and what they give."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from workload.bursts import BurstSpec, LengthDistribution, generate_bursts
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


def flag(name: str) -> str:
    """The command-line form of an option's name."""
    return "--" + name.replace("_", "-")
