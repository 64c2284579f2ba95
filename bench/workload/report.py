"""Results of a replay: what is kept per request, the percentiles computed from it, and the printed table."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_ERROR_CHARS = 300


@dataclass(frozen=True)
class RequestResult:
    """One replayed request. Times are in seconds; `arrival_s` and `sent_s` count from the replay's start.

    `ttft_s` ends at the first chunk in which the server reports a generated token. `client_ttft_s` is
    SGLang's own number, which ends at the first chunk with text: later where the first tokens are no complete
    character. `itl_s` holds one gap per token after the first chunk; tokens that arrive together share their
    gap. `server_*` is what the server reported, None where it reported nothing. `error` is empty on success.
    `output_ids` are the generated tokens.
    """

    index: int
    line: int
    copy: int
    arrival_s: float
    sent_s: float
    prompt_tokens: int
    output_tokens: int
    server_prompt_tokens: int | None
    server_output_tokens: int | None
    cached_tokens: int | None
    replica: int | None
    ttft_s: float | None
    client_ttft_s: float | None
    latency_s: float | None
    itl_s: tuple[float, ...]
    error: str
    output_ids: tuple[int, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the request did not give what was asked for."""
        return bool(self.error)

    @property
    def lateness_s(self) -> float:
        """How much later than in the trace the request was sent."""
        return self.sent_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None for a single token or a failed request."""
        if self.failed or self.ttft_s is None or self.latency_s is None or self.output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Distribution:
    """Percentiles (linear interpolation between ranks, numpy's default) and maximum, in seconds."""

    count: int
    p50: float
    p90: float
    p99: float
    p999: float
    largest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """The distribution of `values`, None when there are none."""
        array = np.array(list(values), dtype=np.float64)
        if array.size == 0:
            return None
        p50, p90, p99, p999 = (float(value) for value in np.percentile(array, PERCENTILES))
        return cls(int(array.size), p50, p90, p99, p999, float(array.max()))


@dataclass(frozen=True)
class FailureGroup:
    """Failures with one cause: their number and the first text."""

    count: int
    example: str


@dataclass(frozen=True)
class Summary:
    """A replay in numbers. Latencies are of the requests that succeeded; rates are over `duration_s`.

    `duration_s` runs from the first send to the last answer; the offered rate is over the time of arrivals.
    """

    requests: int
    failures: tuple[FailureGroup, ...]
    duration_s: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    lateness: Distribution
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    arrivals_span_s: float
    sends_span_s: float
    cached_tokens: int
    per_replica: dict[int, int]

    @property
    def failed(self) -> int:
        """Number of requests that failed."""
        return sum(group.count for group in self.failures)


def summarise(results: Sequence[RequestResult]) -> Summary:
    """Compute the summary of all requests of one replay.

    Raises:
        ValueError: there is no result.
    """
    if not results:
        raise ValueError("a replay without requests has no summary")
    good = [result for result in results if not result.failed]
    first_sent_s = min(result.sent_s for result in results)
    last_end_s = max((result.sent_s + (result.latency_s or 0.0) for result in results), default=first_sent_s)
    duration_s = last_end_s - first_sent_s
    arrivals = [result.arrival_s for result in results]
    lateness = Distribution.of(result.lateness_s for result in results)
    assert lateness is not None, "there is a result, so there is a lateness"

    def rate(amount: int) -> float:
        return amount / duration_s if duration_s > 0 else 0.0

    return Summary(
        requests=len(results),
        failures=_grouped(result.error for result in results if result.failed),
        duration_s=duration_s,
        ttft=Distribution.of(result.ttft_s for result in good if result.ttft_s is not None),
        tpot=Distribution.of(result.tpot_s for result in good if result.tpot_s is not None),
        itl=Distribution.of(gap for result in good for gap in result.itl_s),
        e2e=Distribution.of(result.latency_s for result in good if result.latency_s is not None),
        lateness=lateness,
        requests_per_s=rate(len(good)),
        input_tokens_per_s=rate(sum(result.prompt_tokens for result in good)),
        output_tokens_per_s=rate(sum(result.output_tokens for result in good)),
        arrivals_span_s=max(arrivals) - min(arrivals),
        sends_span_s=max(result.sent_s for result in results) - first_sent_s,
        cached_tokens=sum(result.cached_tokens or 0 for result in good),
        per_replica=dict(sorted(Counter(r.replica for r in good if r.replica is not None).items())),
    )


def format_summary(summary: Summary) -> str:
    """The latency table and the lines below it, for a terminal of 100 columns."""
    head = f"{'':<10}" + "".join(f"{name:>11}" for name in ("P50", "P90", "P99", "P99.9", "max")) + f"{'samples':>10}"
    lines = [head]
    for name, values in (
        ("TTFT ms", summary.ttft),
        ("TPOT ms", summary.tpot),
        ("ITL ms", summary.itl),
        ("E2E ms", summary.e2e),
    ):
        if values is None:
            lines.append(f"{name:<10}{'no sample':>11}")
            continue
        cells = (values.p50, values.p90, values.p99, values.p999, values.largest)
        lines.append(f"{name:<10}" + "".join(f"{1000 * cell:>11.2f}" for cell in cells) + f"{values.count:>10}")
    lines.append(
        f"throughput  {summary.requests_per_s:.2f} requests/s, "
        f"{summary.input_tokens_per_s:.0f} input tokens/s, "
        f"{summary.output_tokens_per_s:.0f} output tokens/s over {summary.duration_s:.1f} s"
    )
    late = summary.lateness
    lines.append(
        f"arrivals    offered {_per_second(summary.requests, summary.arrivals_span_s)}, "
        f"sent {_per_second(summary.requests, summary.sends_span_s)}; lateness P50 {1000 * late.p50:.1f} ms, "
        f"P99 {1000 * late.p99:.1f} ms, max {1000 * late.largest:.1f} ms"
    )
    if summary.per_replica:
        shares = ", ".join(f"replica {replica}: {count}" for replica, count in summary.per_replica.items())
        lines.append(f"replicas    {shares}")
    lines.append(f"requests    {summary.requests} sent, {summary.failed} failed, {summary.cached_tokens} tokens cached")
    if summary.ttft is not None and summary.ttft.count < 1000:
        lines.append(f"note        P99.9 of {summary.ttft.count} requests lies between the two largest values")
    lines += [f"  failed {group.count} x: {group.example}" for group in summary.failures]
    return "\n".join(lines)


def write_results(path: Path, results: Iterable[RequestResult]) -> None:
    """Write one JSON object per request: the fields of `RequestResult`, `lateness_s` and `tpot_s`."""
    with path.open("w", encoding="utf-8") as file:
        for result in results:
            row = asdict(result) | {"lateness_s": result.lateness_s, "tpot_s": result.tpot_s}
            file.write(json.dumps(row) + "\n")


def _per_second(count: int, span_s: float) -> str:
    # One request, or all at one moment, has no rate.
    return f"{(count - 1) / span_s:.2f}/s in {span_s:.1f} s" if span_s > 0 else f"{count} at once"


def _grouped(errors: Iterable[str]) -> tuple[FailureGroup, ...]:
    """Group failures whose texts differ in numbers only (token counts, ports), most frequent first."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for error in errors:
        # A traceback says what happened in its last line.
        last_line = error.strip().splitlines()[-1]
        groups[re.sub(r"[0-9]+", "#", last_line)].append(last_line)
    return tuple(
        FailureGroup(len(texts), texts[0][:_ERROR_CHARS]) for texts in sorted(groups.values(), key=len, reverse=True)
    )
