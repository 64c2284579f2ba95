"""What came of a burst on each system, and the comparison: SLO goodput, equal tokens, ratios, tables, JSONL."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workload.report import Distribution, RequestResult, Summary, summarise

SLO_FACTORS = (5.0, 10.0)
STOCK, CEILING, OUR_CEILING = "stock", "ceiling", "our-ceiling"
_QUANTILES = (("P50", "p50"), ("P90", "p90"), ("P99", "p99"), ("P99.9", "p999"), ("max", "largest"))


@dataclass(frozen=True)
class Sample:
    """One look at a running server. Tokens are one number per replica; `t_s` counts from the first arrival's time 0.

    `used_tokens` leaves out cached prefixes that can be evicted. `wanted_tokens` are those and the tokens of queued
    requests. `state` and `epoch` are KunServe's, None where it is not attached.
    """

    t_s: float
    capacity_tokens: tuple[int, ...]
    used_tokens: tuple[int, ...]
    wanted_tokens: tuple[int, ...]
    state: str | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class Order:
    """A drop or restore that the benchmark ordered: when, how the server answered, and what it says it took."""

    t_s: float
    command: str
    status: int
    message: str
    seconds: float
    pause_seconds: float
    extension_slots: int


@dataclass(frozen=True)
class Transition:
    """A change of plan as seen from outside: at `t_s`, within the time between two samples, `epoch` was new."""

    t_s: float
    epoch: int
    state: str
    capacity_tokens: int


@dataclass
class SystemRun:
    """One server of the comparison and what it did. `problem` says what kept it from being measured, if anything.

    `capacity_tokens` are the KV slots of each replica before the load; `capacity_after_tokens` those when all was
    normal again after it, known of servers that can drop.
    """

    name: str
    role: str
    command: str
    problem: str = ""
    start_s: float = 0.0
    attention_backend: str = ""
    capacity_tokens: tuple[int, ...] = ()
    capacity_after_tokens: tuple[int, ...] = ()
    unloaded: list[RequestResult] = field(default_factory=list)
    unloaded_after: list[RequestResult] = field(default_factory=list)
    results: list[RequestResult] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)
    controller_cpu_share: float | None = None
    retractions: int = 0
    missed_samples: int = 0
    normal_after_s: float | None = None
    as_at_start: bool | None = None
    metrics: tuple[str, ...] = ()

    @property
    def summary(self) -> Summary:
        return summarise(self.results)

    @property
    def p99_ttft_s(self) -> float:
        """P99 of the requests that succeeded; infinite where none did."""
        ttft = self.summary.ttft
        return float("inf") if ttft is None else ttft.p99

    @property
    def peak_capacity_tokens(self) -> int:
        return max((sum(sample.capacity_tokens) for sample in self.samples), default=sum(self.capacity_tokens))


@dataclass(frozen=True)
class Slo:
    """Limits that a request meets or misses. A request of one token has no time per output token, so no such limit;
    where the unloaded ones were all like that, `tpot_s` is None and nobody has one."""

    factor: float
    ttft_s: float
    tpot_s: float | None

    @classmethod
    def of(cls, unloaded: Sequence[RequestResult], factor: float) -> Slo:
        """`factor` times the medians of requests that had the server for themselves.

        Raises:
            ValueError: none of them succeeded.
        """
        good = [result for result in unloaded if not result.failed]
        ttft = Distribution.of(result.ttft_s for result in good if result.ttft_s is not None)
        tpot = Distribution.of(result.tpot_s for result in good if result.tpot_s is not None)
        if ttft is None:
            raise ValueError("no unloaded request succeeded, so there is no limit to derive")
        return cls(factor, factor * ttft.p50, None if tpot is None else factor * tpot.p50)

    def met_by(self, result: RequestResult) -> bool:
        if result.failed or result.ttft_s is None:
            return False
        if self.tpot_s is not None and result.tpot_s is not None and result.tpot_s > self.tpot_s:
            return False
        return result.ttft_s <= self.ttft_s


@dataclass(frozen=True)
class Goodput:
    """Requests that met the limits, as a share of all that were sent and per second of the replay."""

    share: float
    requests_per_s: float

    @classmethod
    def of(cls, results: Sequence[RequestResult], slo: Slo) -> Goodput:
        met = sum(slo.met_by(result) for result in results)
        duration_s = summarise(results).duration_s
        return cls(met / len(results), met / duration_s if duration_s > 0 else 0.0)


@dataclass(frozen=True)
class TokenComparison:
    """How many requests were answered by both, and how many of them with other tokens; examples are request numbers."""

    compared: int
    differing: int
    examples: tuple[int, ...] = ()

    @classmethod
    def of(cls, results: Iterable[RequestResult], reference: Iterable[RequestResult]) -> TokenComparison:
        expected = {result.index: result.output_ids for result in reference if _has_tokens(result)}
        both = [result for result in results if _has_tokens(result) and result.index in expected]
        differing = [result.index for result in both if result.output_ids != expected[result.index]]
        return cls(len(both), len(differing), tuple(differing[:5]))


def _has_tokens(result: RequestResult) -> bool:
    return not result.failed and len(result.output_ids) == result.output_tokens


@dataclass(frozen=True)
class Ratios:
    """One system against the best stock one, the ceiling and our own; None where that one was not measured."""

    system: str
    stock_p99_ttft_by_ours: float | None
    p99_ttft_by_ceiling: float | None
    tpot_p50_by_ceiling: float | None
    p99_ttft_by_our_ceiling: float | None
    tpot_p50_by_our_ceiling: float | None


def transitions(samples: Sequence[Sample]) -> list[Transition]:
    """The changes of plan that the samples show."""
    seen = [sample for sample in samples if sample.epoch is not None]
    return [
        Transition(after.t_s, after.epoch, after.state or "", sum(after.capacity_tokens))
        for before, after in itertools.pairwise(seen)
        if after.epoch is not None and after.epoch != before.epoch
    ]


def measured(runs: Iterable[SystemRun]) -> list[SystemRun]:
    return [run for run in runs if run.results]


def best_stock(runs: Iterable[SystemRun]) -> SystemRun | None:
    """Of the stock systems the one with the fewest failures, and of those the lowest P99 TTFT."""
    stock = [run for run in measured(runs) if run.role == STOCK]
    return min(stock, key=lambda run: (run.summary.failed, run.p99_ttft_s), default=None)


def ratios(runs: Sequence[SystemRun]) -> list[Ratios]:
    """Of every measured system that is neither the best stock one nor a ceiling."""
    stock = best_stock(runs)
    ceilings = [next((run for run in measured(runs) if run.role == role), None) for role in (CEILING, OUR_CEILING)]
    return [
        Ratios(
            run.name,
            None if stock is None else stock.p99_ttft_s / run.p99_ttft_s,
            *(ratio for ceiling in ceilings for ratio in _by_ceiling(run, ceiling)),
        )
        for run in measured(runs)
        if run.role not in (CEILING, OUR_CEILING) and run is not stock
    ]


def _by_ceiling(run: SystemRun, ceiling: SystemRun | None) -> tuple[float | None, float | None]:
    """P99 TTFT and TPOT P50 of a system, as multiples of the ceiling's."""
    if ceiling is None:
        return None, None
    tpot, limit = run.summary.tpot, ceiling.summary.tpot
    return run.p99_ttft_s / ceiling.p99_ttft_s, None if tpot is None or limit is None else tpot.p50 / limit.p50


def slos(runs: Sequence[SystemRun]) -> list[Slo]:
    """The limits for all systems: from the unloaded pass of the best stock one, else of the first measured one."""
    reference = best_stock(runs) or next(iter(measured(runs)), None)
    return [] if reference is None else [Slo.of(reference.unloaded, factor) for factor in SLO_FACTORS]


def format_table(runs: Sequence[SystemRun]) -> str:
    """The tables and the lines below them, for a terminal of 120 columns."""
    done = measured(runs)
    lines = [_problem_line(run) for run in runs if run.problem]
    if not done:
        return "\n".join([*lines, "no system was measured"])
    width = max(len(run.name) for run in runs) + 2
    for title, values, unit in (("TTFT s", "ttft", 1.0), ("TPOT ms", "tpot", 1000.0)):
        lines += ["", f"{title:<{width}}" + "".join(f"{name:>11}" for name, _ in _QUANTILES) + f"{'unloaded P50':>15}"]
        for run in done:
            cells = _cells(getattr(run.summary, values), unit)
            alone = _cells(getattr(summarise(run.unloaded), values) if run.unloaded else None, unit)[0]
            lines.append(f"{run.name:<{width}}" + "".join(f"{cell:>11}" for cell in cells) + f"{alone:>15}")
    limits, stock = slos(runs), best_stock(runs)
    reference = (stock or done[0]).results
    heads = [f"SLO {slo.factor:g}x" for slo in limits]
    lines += [
        "",
        f"{'':<{width}}"
        + "".join(f"{head:>9}{'good/s':>8}" for head in heads)
        + "".join(
            f"{head:>11}" for head in ("req/s", "out tok/s", "seconds", "failed", "retracted", "other tok", "peak KV")
        ),
    ]
    for run in done:
        goodputs = [Goodput.of(run.results, slo) for slo in limits]
        summary, tokens = run.summary, TokenComparison.of(run.results, reference)
        rates = (f"{summary.requests_per_s:.2f}", f"{summary.output_tokens_per_s:.0f}", f"{summary.duration_s:.1f}")
        different = f"{tokens.differing}/{tokens.compared}"
        counts = (*rates, str(summary.failed), str(run.retractions), different, str(run.peak_capacity_tokens))
        lines.append(
            f"{run.name:<{width}}"
            + "".join(f"{100 * each.share:>8.1f}%{each.requests_per_s:>8.2f}" for each in goodputs)
            + "".join(f"{cell:>11}" for cell in counts)
        )
    lines.append("")
    for slo in limits:
        tpot = "" if slo.tpot_s is None else f" and TPOT at most {1000 * slo.tpot_s:.1f} ms"
        lines.append(
            f"{f'SLO {slo.factor:g}x':<12}TTFT at most {slo.ttft_s:.3f} s{tpot}: {slo.factor:g} times the unloaded P50 "
            f"of {(stock or done[0]).name}"
        )
    lines.append(
        f"other tok   requests answered with other tokens than by {(stock or done[0]).name}, of those compared"
    )
    lines.append("peak KV     the most KV slots over all replicas that were seen")
    count = min(len(run.results) for run in done)
    if count < 1000:
        lines.append(f"note        P99.9 of {count} requests lies between the two largest values")
    backends = {run.name: run.attention_backend for run in done}
    lateness = {run.name: f"{1000 * run.summary.lateness.p99:.0f}" for run in done}
    controllers = {
        run.name: f"{100 * run.controller_cpu_share:.0f} %" for run in done if run.controller_cpu_share is not None
    }
    lines += [
        f"attention   {_by_name(backends)}",
        f"lateness    of sending, P99 in ms: {_by_name(lateness)}",
        f"controller  of the replicas, share of one core during the replay: {_by_name(controllers)}",
    ]
    lines += [line for run in done for line in _run_notes(run)]
    if stock is not None:
        lines.append(f"best stock  {stock.name} (P99 TTFT {stock.p99_ttft_s:.3f} s)")
    lines += [_ratio_line(each, width) for each in ratios(runs)]
    return "\n".join(lines)


def _by_name(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _problem_line(run: SystemRun) -> str:
    return f"problem     {run.name}: {run.problem}"


def _cells(values: Distribution | None, unit: float) -> list[str]:
    if values is None:
        return ["-"] * len(_QUANTILES)
    digits = 3 if unit == 1.0 else 1
    return [f"{unit * getattr(values, field):.{digits}f}" for _, field in _QUANTILES]


def _run_notes(run: SystemRun) -> list[str]:
    lines = [f"failed      {run.name}: {group.count} x {group.example}" for group in run.summary.failures]
    for order in run.orders:
        lines.append(
            f"ordered     {run.name}: {order.command} at {order.t_s:.2f} s, status {order.status}, took "
            f"{order.seconds:.3f} s with a pause of {order.pause_seconds:.3f} s, {order.extension_slots} slots"
            + ("" if order.status == 200 else f": {order.message}")
        )
    for change in transitions(run.samples):
        lines.append(
            f"transition  {run.name}: seen at {change.t_s:.2f} s, epoch {change.epoch}, {change.state}, "
            f"{change.capacity_tokens} slots"
        )
    if run.normal_after_s is not None:
        again = "as at start" if run.as_at_start else "NOT as at start"
        lines.append(
            f"restored    {run.name}: normal {run.normal_after_s:.1f} s after the last answer, memory and plan {again}"
        )
    if run.unloaded_after:
        before, after = (Distribution.of(_tpots_s(results)) for results in (run.unloaded, run.unloaded_after))
        tokens = TokenComparison.of(run.unloaded_after, run.unloaded)
        lines.append(
            f"afterwards  {run.name}: unloaded TPOT P50 {_cells(after, 1000.0)[0]} ms, {_cells(before, 1000.0)[0]} at "
            f"start; {tokens.differing} of {tokens.compared} answers differ"
        )
    if run.missed_samples:
        lines.append(f"note        {run.name}: {run.missed_samples} samples missed")
    return lines


def _tpots_s(results: Iterable[RequestResult]) -> list[float]:
    return [result.tpot_s for result in results if result.tpot_s is not None and not result.failed]


def _ratio_line(each: Ratios, width: int) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return (
        f"ratio       {each.system:<{width}} stock P99 TTFT / this {cell(each.stock_p99_ttft_by_ours)}, this / ceiling "
        f"{cell(each.p99_ttft_by_ceiling)}, this / our-ceiling {cell(each.p99_ttft_by_our_ceiling)}; TPOT P50 this / "
        f"ceiling {cell(each.tpot_p50_by_ceiling)}, this / our-ceiling {cell(each.tpot_p50_by_our_ceiling)}"
    )


def write_run(path: Path, run: SystemRun) -> None:
    """Append one JSON object per request and sample, and one for the system."""
    with path.open("a", encoding="utf-8") as file:

        def put(kind: str, values: Mapping[str, Any]) -> None:
            file.write(json.dumps({"kind": kind, "system": run.name, **values}) + "\n")

        phases = {"unloaded": run.unloaded, "request": run.results, "unloaded_after": run.unloaded_after}
        for phase, results in phases.items():
            for result in results:
                put(phase, asdict(result) | {"lateness_s": result.lateness_s, "tpot_s": result.tpot_s})
        for sample in run.samples:
            put("sample", asdict(sample))
        listed = ("unloaded", "results", "unloaded_after", "samples")
        own = {name: value for name, value in vars(run).items() if name not in listed}
        own["orders"] = [asdict(order) for order in run.orders]
        own["transitions"] = [asdict(change) for change in transitions(run.samples)]
        put("system", own | {"summary": asdict(run.summary) if run.results else None})


def write_summary(path: Path, runs: Sequence[SystemRun], about: Mapping[str, Any]) -> None:
    """Append the last line: what was run where, goodput, equal tokens and ratios."""
    stock, done, limits = best_stock(runs), measured(runs), slos(runs)
    reference = (stock or done[0]).results if done else []
    summary = {
        "kind": "summary",
        **about,
        "best_stock": None if stock is None else stock.name,
        "slo": [asdict(slo) for slo in limits],
        "goodput": {run.name: [asdict(Goodput.of(run.results, slo)) for slo in limits] for run in done},
        "tokens": {run.name: asdict(TokenComparison.of(run.results, reference)) for run in done},
        "ratios": [asdict(each) for each in ratios(runs)],
        "problem": {run.name: run.problem for run in runs if run.problem},
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(summary) + "\n")
