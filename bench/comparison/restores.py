"""What bench/transition.py says of restores: how fast parameters come back, and what running requests notice of it."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from servers.streams import Json, table

_CHUNK_BYTES = 256 << 20


def plain_copy_s(size_bytes: int) -> float:
    """How long one thread takes to copy so many bytes between buffers that have memory already, as parameters have:
    the median of three times."""
    chunk = min(size_bytes, _CHUNK_BYTES)
    source, target = (torch.full((chunk,), value, dtype=torch.uint8) for value in (1, 2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times_s = []
        for _ in range(3):
            left, taken_s = size_bytes, 0.0
            while left > 0:
                part = min(left, chunk)
                began_s = time.perf_counter()
                target[:part].copy_(source[:part])
                taken_s += time.perf_counter() - began_s
                left -= part
            times_s.append(taken_s)
        return statistics.median(times_s)
    finally:
        torch.set_num_threads(threads)


def restores_table(rows: Sequence[Json]) -> str:
    """What came back how fast, and the time per token meanwhile against before, merged as well. Bytes are those of both
    replicas, which copy at the same time; the plain copy is one thread's."""
    kinds: dict[tuple[Any, ...], list[Json]] = defaultdict(list)
    for row in rows:
        if row["action"] == "restore" and row["load"] in ("idle", "running"):
            kinds[row["layers"], row["hidden"], row["load"]].append(row)
    body = []
    for (layers, hidden, load), each in sorted(kinds.items()):
        mib = statistics.median(row["loaded_bytes"] for row in each) / 2**20
        load_s = statistics.median(row["phases_ms"].get("load", 0.0) for row in each) / 1000
        copy_s = statistics.median(row["plain_copy_s"] for row in each)
        body.append(
            [
                *(f"{layers} layers, hidden {hidden}, {load}", f"{mib:.1f}"),
                *(f"{1000 * load_s:.1f}", f"{mib / load_s:.0f}" if load_s else "-"),
                *(f"{1000 * copy_s:.1f}", f"{mib / copy_s:.0f}"),
                *_tokens(each),
            ]
        )
    titles = [
        *("restore", "MiB", "load, ms", "MiB/s", "plain copy, ms", "MiB/s"),
        *("TPOT before, ms", "meanwhile", "change", "longest gap, ms", "in batches before"),
    ]
    return table(titles, body)


def _tokens(rows: Sequence[Json]) -> list[str]:
    """Time per token, all rounds together, and the longest gap of any round."""
    before = [seconds for row in rows for seconds in row.get("gaps_before_s", ())]
    meanwhile = [seconds for row in rows for seconds in row.get("token_s", ())]
    if not before or not meanwhile:
        return ["-"] * 5
    was, now = (float(np.mean(each)) for each in (before, meanwhile))
    longest = max(row["longest_gap_s"] for row in rows)
    return [
        *(f"{1000 * was:.1f}", f"{1000 * now:.1f}", f"{now / was - 1:+.1%}"),
        *(f"{1000 * longest:.1f}", f"{longest / statistics.median(before):.1f}"),
    ]
