"""Request traces as values: arrivals and lengths, and the selection and scaling of what is replayed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

DEFAULT_HASH_BLOCK_TOKENS = 512


class TraceError(ValueError):
    """A trace, or an option that shapes it, cannot be used. The message says where and what is accepted."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One arrival.

    `arrival_s` is relative to the first row while reading and to the first replayed request after `shape`.
    `line` is the row's line in the file, or the ordinal of a generated request; with `copy` it identifies the
    request, so the same row always gets the same prompt. `hash_ids` name the prompt's leading blocks
    (Mooncake): equal leading ids mean equal leading tokens.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    line: int
    copy: int = 0
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival, where they came from, and a note for everything left out or changed.

    `hash_block_tokens` is the length of the block a hash id stands for; it scales with the prompts.
    """

    source: str
    requests: tuple[TraceRequest, ...]
    notes: tuple[str, ...] = ()
    hash_block_tokens: float = DEFAULT_HASH_BLOCK_TOKENS

    @property
    def span_s(self) -> float:
        """Seconds between the first and the last arrival; 0 for fewer than two requests."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0


@dataclass(frozen=True)
class ShapeOptions:
    """What to replay of a trace, in this order: window, upscaling, limit, time scale, length scale, clamp.

    Attributes:
        window_start_s: start of the window, seconds of trace time after its first row.
        window_length_s: length of the window in seconds of trace time; None means to the end.
        upscale: requests sent per recorded arrival, each with a prompt of its own.
        limit: largest number of requests sent; None means all.
        time_scale: factor on the gaps between arrivals; 0.5 replays twice as fast.
        prompt_scale, output_scale: factors on the lengths; results are rounded, and at least 1 token.
        max_prompt_tokens, max_output_tokens: longer ones are cut to this, and counted in the notes.
    """

    window_start_s: float = 0.0
    window_length_s: float | None = None
    upscale: int = 1
    limit: int | None = None
    time_scale: float = 1.0
    prompt_scale: float = 1.0
    output_scale: float = 1.0
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("time_scale", "prompt_scale", "output_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TraceError(f"{name} is {value}; accepted is a finite number above 0")
        if not math.isfinite(self.window_start_s) or self.window_start_s < 0:
            raise TraceError(
                f"window_start_s is {self.window_start_s}; accepted is a finite number of seconds, 0 or more"
            )
        if self.window_length_s is not None and not (math.isfinite(self.window_length_s) and self.window_length_s > 0):
            raise TraceError(
                f"window_length_s is {self.window_length_s}; accepted is a finite number of seconds above 0"
            )
        for name in ("upscale", "limit", "max_prompt_tokens", "max_output_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TraceError(f"{name} is {value}; accepted is a whole number of at least 1")


def shape(trace: Trace, options: ShapeOptions) -> Trace:
    """The part of `trace` to replay, scaled; the first request of the result arrives at 0.

    Raises:
        TraceError: nothing is left.
    """
    end_s = math.inf if options.window_length_s is None else options.window_start_s + options.window_length_s
    # Rows before the first one exist only in files out of order; they belong to a window that starts at 0.
    start_s = options.window_start_s if options.window_start_s > 0 else -math.inf
    selected = [request for request in trace.requests if start_s <= request.arrival_s < end_s]
    if not selected:
        raise TraceError(
            f"{trace.source}: no request arrives in the window [{options.window_start_s}, {end_s}) s; the trace has "
            f"{len(trace.requests)} requests in {trace.span_s:.1f} s"
        )
    copied = [replace(request, copy=copy) for request in selected for copy in range(options.upscale)]
    limited = copied[: options.limit]
    notes = list(trace.notes)
    if len(limited) < len(copied):
        notes.append(f"{len(copied) - len(limited)} of {len(copied)} requests left out by the limit")
    origin_s = limited[0].arrival_s
    cut_prompts = cut_outputs = 0
    shaped = []
    for request in limited:
        prompt_tokens = _scaled_tokens(request.prompt_tokens, options.prompt_scale)
        output_tokens = _scaled_tokens(request.output_tokens, options.output_scale)
        if options.max_prompt_tokens is not None and prompt_tokens > options.max_prompt_tokens:
            prompt_tokens, cut_prompts = options.max_prompt_tokens, cut_prompts + 1
        if options.max_output_tokens is not None and output_tokens > options.max_output_tokens:
            output_tokens, cut_outputs = options.max_output_tokens, cut_outputs + 1
        shaped.append(
            replace(
                request,
                arrival_s=(request.arrival_s - origin_s) * options.time_scale,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
            )
        )
    if cut_prompts:
        notes.append(f"{cut_prompts} prompts cut to {options.max_prompt_tokens} tokens")
    if cut_outputs:
        notes.append(f"{cut_outputs} outputs cut to {options.max_output_tokens} tokens")
    return replace(
        trace,
        requests=tuple(shaped),
        notes=tuple(notes),
        hash_block_tokens=trace.hash_block_tokens * options.prompt_scale,
    )


def busiest_window(trace: Trace, length_s: float) -> float:
    """Start (seconds of trace time) of the first window of `length_s` that has the most arrivals."""
    arrivals = [request.arrival_s for request in trace.requests]
    best_start_s, best_count, end = arrivals[0], 0, 0
    for begin, start_s in enumerate(arrivals):
        while end < len(arrivals) and arrivals[end] < start_s + length_s:
            end += 1
        if end - begin > best_count:
            best_start_s, best_count = start_s, end - begin
    return max(best_start_s, 0.0)


def _scaled_tokens(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))
