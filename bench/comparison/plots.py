"""Pictures of a burst comparison: time to first token by arrival, and KV use and capacity over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed; chosen before pyplot is imported

from matplotlib import pyplot as plt

from comparison.report import SystemRun, measured, transitions

_DPI = 120


def plot_ttft(path: Path, runs: Sequence[SystemRun], title: str) -> None:
    """One point per request: when it arrived, and how long its first token took."""
    if not measured(runs):
        return
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for run, marker in zip(measured(runs), "osD^vPX*<>hp" * len(runs), strict=False):
        points = [(each.arrival_s, each.ttft_s) for each in run.results if each.ttft_s is not None and not each.failed]
        if points:
            axes.plot(*zip(*points, strict=True), marker, markersize=4, alpha=0.7, linestyle="", label=run.name)
    axes.set(xlabel="arrival (s)", ylabel="time to first token (s)", yscale="log", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def plot_memory(path: Path, runs: Sequence[SystemRun], title: str) -> None:
    """KV slots over all replicas: capacity, in use, and wanted by running and queued requests; transitions as lines."""
    shown = [run for run in measured(runs) if run.samples]
    if not shown:
        return
    figure, rows = plt.subplots(
        len(shown), 1, figsize=(10, 2.2 * len(shown) + 1), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for run, axes in zip(shown, rows[:, 0], strict=True):
        times = [sample.t_s for sample in run.samples]
        axes.step(times, [sum(s.capacity_tokens) for s in run.samples], "k", where="post", label="capacity")
        axes.plot(times, [sum(s.wanted_tokens) for s in run.samples], "C1--", label="wanted by running and queued")
        axes.fill_between(times, [sum(s.used_tokens) for s in run.samples], alpha=0.5, label="in use")
        for place, change in enumerate(transitions(run.samples)):
            axes.axvline(change.t_s, color="C3", linewidth=1)
            where = axes.get_xaxis_transform()  # x in seconds, y as a share of the height
            height = 0.97 - 0.1 * (place % 3)  # several in a row lie close together
            axes.text(change.t_s, height, f" {change.state}", color="C3", va="top", fontsize=8, transform=where)
        axes.set(ylabel="KV slots", title=run.name)
        axes.grid(alpha=0.3)
    rows[0, 0].legend(loc="upper right")
    rows[-1, 0].set_xlabel("s since the arrivals began")
    figure.suptitle(title)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
