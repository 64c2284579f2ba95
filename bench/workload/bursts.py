"""Generated arrivals: a seeded Poisson process whose rate steps between a base and a burst value."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workload.traces import Trace, TraceError, TraceRequest


class LengthKind(enum.Enum):
    """Distributions of prompt and output lengths."""

    FIXED = "fixed"
    UNIFORM = "uniform"
    LOGNORMAL = "lognormal"


_SYNTAX = {
    LengthKind.FIXED: "fixed:TOKENS",
    LengthKind.UNIFORM: "uniform:LEAST:MOST",
    LengthKind.LOGNORMAL: "lognormal:MEDIAN:SIGMA",
}


@dataclass(frozen=True)
class LengthDistribution:
    """Token counts: fixed (first), uniform (first to second, inclusive), lognormal (median, sigma of log)."""

    kind: LengthKind
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str) -> LengthDistribution:
        """Read `fixed:TOKENS`, `uniform:LEAST:MOST` or `lognormal:MEDIAN:SIGMA`.

        Raises:
            TraceError: the text is none of these.
        """
        accepted = ", ".join(_SYNTAX.values())
        name, *parts = text.split(":")
        try:
            kind = LengthKind(name)
            numbers = [float(part) for part in parts]
        except ValueError as error:
            raise TraceError(f"length distribution is {text!r}; accepted is {accepted}") from error
        if len(numbers) != _SYNTAX[kind].count(":") or not all(math.isfinite(number) for number in numbers):
            raise TraceError(f"length distribution is {text!r}; accepted is {_SYNTAX[kind]}")
        whole = numbers if kind is not LengthKind.LOGNORMAL else []
        if numbers[0] < 1 or any(number != int(number) for number in whole):
            raise TraceError(f"length distribution is {text!r}; token counts are whole numbers of at least 1")
        if kind is LengthKind.UNIFORM and numbers[1] < numbers[0]:
            raise TraceError(f"length distribution is {text!r}; LEAST must not be above MOST")
        if kind is LengthKind.LOGNORMAL and numbers[1] < 0:
            raise TraceError(f"length distribution is {text!r}; SIGMA must not be negative")
        return cls(kind, *numbers)

    def sample(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` token counts, each at least 1."""
        values: npt.NDArray[np.int64]
        if self.kind is LengthKind.FIXED:
            values = np.full(count, int(self.first), dtype=np.int64)
        elif self.kind is LengthKind.UNIFORM:
            values = rng.integers(int(self.first), int(self.second), size=count, endpoint=True)
        else:
            drawn = rng.lognormal(math.log(self.first), self.second, size=count)
            values = np.maximum(1, np.rint(drawn)).astype(np.int64)
        return [int(value) for value in values]


@dataclass(frozen=True)
class BurstSpec:
    """Arrival rates over time, and the lengths.

    The rate is `base_rate` for `burst_start_s`, then `waves` times: `burst_rate` for `burst_length_s` and
    `base_rate` for `burst_gap_s`. Rates are in requests per second.
    """

    base_rate: float
    burst_rate: float
    burst_start_s: float
    burst_length_s: float
    burst_gap_s: float
    waves: int
    prompt: LengthDistribution
    output: LengthDistribution

    def __post_init__(self) -> None:
        for name in ("base_rate", "burst_rate", "burst_start_s", "burst_length_s", "burst_gap_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise TraceError(f"{name} is {value}; accepted is a finite number, 0 or more")
        if self.waves < 0:
            raise TraceError(f"waves is {self.waves}; accepted is a whole number, 0 or more")

    def segments(self) -> list[tuple[float, float, float]]:
        """(start in s, length in s, rate in requests/s) of each stretch of constant rate."""
        parts = [(self.burst_start_s, self.base_rate)]
        parts += [(self.burst_length_s, self.burst_rate), (self.burst_gap_s, self.base_rate)] * self.waves
        segments, start_s = [], 0.0
        for length_s, rate in parts:
            segments.append((start_s, length_s, rate))
            start_s += length_s
        return segments


def generate_bursts(spec: BurstSpec, seed: int) -> Trace:
    """Draw the arrivals and lengths of `spec`; the same seed gives the same trace.

    Given their number, the arrivals of a Poisson process in an interval are independent and uniform, so each
    segment is a Poisson count and sorted uniform times.

    Raises:
        TraceError: no request falls into the time covered.
    """
    arrivals_rng, prompt_rng, output_rng = (np.random.default_rng([seed, stream]) for stream in range(3))
    arrivals_s: list[float] = []
    for start_s, length_s, rate in spec.segments():
        count = int(arrivals_rng.poisson(rate * length_s))
        arrivals_s += [start_s + float(t) for t in np.sort(arrivals_rng.uniform(0.0, length_s, size=count))]
    if not arrivals_s:
        raise TraceError(f"the generated burst holds no request: {spec}")
    prompts = spec.prompt.sample(prompt_rng, len(arrivals_s))
    outputs = spec.output.sample(output_rng, len(arrivals_s))
    requests = tuple(
        TraceRequest(arrival_s, prompt, output, ordinal)
        for ordinal, (arrival_s, prompt, output) in enumerate(zip(arrivals_s, prompts, outputs, strict=True), start=1)
    )
    source = (
        f"burst (seed {seed}: {spec.base_rate:g} req/s, {spec.waves} x {spec.burst_length_s:g} s at "
        f"{spec.burst_rate:g} req/s)"
    )
    return Trace(source, requests)
