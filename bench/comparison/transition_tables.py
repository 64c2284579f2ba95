"""What bench/transition.py says of drops and restores: how long each takes, what waiting and running requests notice,
and the cost by layers and bytes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comparison.gaps import milliseconds
from comparison.restores import restores_table
from servers.streams import Json, table

LOADS = ("idle", "running", "waiting")


@dataclass(frozen=True)
class Cost:
    """seconds = fixed_s + per_byte_s * bytes + per_layer_s * layers."""

    fixed_s: float
    per_byte_s: float
    per_layer_s: float

    @classmethod
    def fit(cls, samples: Sequence[tuple[int, int, float]]) -> Cost | None:
        """From (bytes, layers, seconds) by least squares; None where the samples do not tell the parts apart."""
        matrix = np.array([[1.0, size / 2**20, layers] for size, layers, _ in samples])
        if len(samples) < 3 or np.linalg.matrix_rank(matrix) < 3:
            return None
        parts, *_ = np.linalg.lstsq(matrix, np.array([seconds for *_, seconds in samples]), rcond=None)
        return cls(float(parts[0]), float(parts[1]) / 2**20, float(parts[2]))


def transition_tables(rows: Sequence[Json]) -> list[str]:
    """The tables of some rows; a row is a transition."""
    kinds: dict[tuple[Any, ...], list[Json]] = defaultdict(list)
    for row in rows:
        kinds[row["action"], row["load"], row["layers"], row["hidden"]].append(row)
    freed = {key[2:]: each[0]["freed_bytes"] for key, each in kinds.items() if key[0] == "drop"}
    names = list(dict.fromkeys(name for row in rows for name in row["phases_ms"]))
    body = []
    for (action, load, layers, hidden), each in sorted(kinds.items(), key=lambda kind: kind[0]):
        phases = [statistics.median(row["phases_ms"].get(name, 0.0) for row in each) for name in names]
        body.append(
            [
                *(f"{action} {load}", layers, hidden, f"{freed[layers, hidden] / 2**20:.1f}", len(each)),
                *(milliseconds([row["call_s"] for row in each], p) for p in (50, 90, 100)),
                milliseconds([row["seconds"] for row in each]),
                *(f"{ms:.1f}" for ms in phases),
                *(milliseconds([row["pause_seconds"] for row in each], p) for p in (50, 100)),
            ]
        )
    titles = [
        *("order to answer, ms", "layers", "hidden", "MiB", "n", "P50", "P90", "max", "server"),
        *names,
        *("pause P50", "max"),
    ]
    return [
        table(titles, body),
        _first_tokens(kinds),
        _pauses(kinds),
        restores_table(rows),
        _costs(kinds, freed),
    ]


def _first_tokens(kinds: dict[tuple[Any, ...], list[Json]]) -> str:
    body = []
    for (action, load, layers, hidden), each in sorted(kinds.items(), key=lambda kind: kind[0]):
        if (action, load) == ("drop", "waiting"):
            proven = [row for row in each if row["served_from_extension"]]
            first = [row["first_token_s"] for row in proven]
            free = [row["ttft_without_waiting_s"] for row in proven]
            body.append(
                [
                    *(f"{layers} layers, hidden {hidden}", f"{len(proven)}/{len(each)}"),
                    *(milliseconds(first, p) for p in (50, 90, 100)),
                    milliseconds(free),
                ]
            )
    titles = ["order to first token from extension, ms", "proven", "P50", "P90", "max", "TTFT if memory is free"]
    return table(titles, body)


def _pauses(kinds: dict[tuple[Any, ...], list[Json]]) -> str:
    body = []
    for (action, load, layers, hidden), each in sorted(kinds.items(), key=lambda kind: kind[0]):
        if load == "running":
            before = [gap for row in each for gap in row["gaps_before_s"]]
            after = [gap for row in each for gap in row["gaps_after_s"]]
            longest = [row["longest_gap_s"] for row in each]
            batch = max(statistics.median(before), statistics.median(after))
            body.append(
                [
                    *(f"{action}: {layers} layers, hidden {hidden}", *(milliseconds(before, p) for p in (50, 99, 100))),
                    *(milliseconds(after, p) for p in (50, 99, 100)),
                    *(milliseconds(longest, p) for p in (50, 100)),
                    *(f"{value / batch - 1:.1f}" for value in (statistics.median(longest), max(longest))),
                ]
            )
    titles = [
        *("gaps between tokens, ms", "before P50", "P99", "max", "after P50", "P99", "max"),
        *("at the switch P50", "max", "pause in batches P50", "max"),
    ]
    return table(titles, body)


def _costs(kinds: dict[tuple[Any, ...], list[Json]], freed: dict[tuple[Any, ...], int]) -> str:
    body = []
    for action in ("drop", "restore"):
        for load in LOADS:
            each = {key[2:]: rows for key, rows in kinds.items() if key[:2] == (action, load)}
            samples = [
                (freed[model], model[0], statistics.median(row["call_s"] for row in rows))
                for model, rows in each.items()
            ]
            cost = Cost.fit(samples)
            if cost is None:
                return "costs: not fitted; needed are three or more models that differ in layers and in bytes per layer"
            off = [abs(cost.fixed_s + cost.per_byte_s * b + cost.per_layer_s * n - s) for b, n, s in samples]
            body.append(
                [
                    *(f"{action} {load}", f"{1000 * cost.fixed_s:.1f}", f"{1000 * cost.per_byte_s * 2**20:.3f}"),
                    *(f"{1000 * cost.per_layer_s:.3f}", f"{1000 * max(off):.1f}"),
                ]
            )
    return table(["cost of order to answer, ms", "fixed", "per MiB", "per layer", "largest residual"], body)
