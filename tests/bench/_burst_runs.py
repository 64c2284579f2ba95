"""Runs of a burst comparison as values: what a server would have answered, and how its memory looked."""

from __future__ import annotations

from dataclasses import replace

from comparison.report import Sample, SystemRun
from workload.report import RequestResult


def answered(index: int, ttft_s: float, tpot_s: float = 0.01, tokens: tuple[int, ...] = (7, 8, 9)) -> RequestResult:
    """A request that arrived at second `index` and succeeded."""
    gaps = (tpot_s,) * (len(tokens) - 1)
    return RequestResult(
        index=index,
        line=index + 1,
        copy=0,
        arrival_s=float(index),
        sent_s=float(index),
        prompt_tokens=5,
        output_tokens=len(tokens),
        server_prompt_tokens=5,
        server_output_tokens=len(tokens),
        cached_tokens=0,
        replica=0,
        ttft_s=ttft_s,
        client_ttft_s=ttft_s,
        latency_s=ttft_s + sum(gaps),
        itl_s=gaps,
        error="",
        output_ids=tokens,
    )


def failed(index: int) -> RequestResult:
    return replace(answered(index, 0.001), error="the server said no")


def a_run(name: str, role: str, ttfts_s: list[float], tpot_s: float = 0.01) -> SystemRun:
    run = SystemRun(name, role, f"serve {name}", capacity_tokens=(100, 100))
    run.results = [answered(index, ttft_s, tpot_s) for index, ttft_s in enumerate(ttfts_s)]
    run.unloaded = [answered(0, 0.02, 0.004)]
    return run


def a_sample(t_s: float, epoch: int | None, state: str | None, capacity: int = 100) -> Sample:
    return Sample(t_s, (capacity, capacity), (10, 20), (10, 50), state, epoch)
