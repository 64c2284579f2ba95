"""Compares what two servers answered: one recursive comparison of JSON values, which lists every difference."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

LOGPROB_TOLERANCE = 1e-4
"""Natural-log units. Far above float32 rounding, far below what a wrong KV entry or a wrong weight changes."""

VOLATILE = frozenset(
    {
        # Names and times of one request.
        "id",
        "created",
        "e2e_latency",
        "queue_time",
        "forward_entry_time",
        "prefill_finished_time",
        "request_received_ts",
        "api_server_dispatch_finish_ts",
        "request_finished_ts",
        "response_sent_to_client_ts",
        "decode_throughput",
        # The replica that answered: there is one on one side and there are two on the other.
        "dp_rank",
    }
)
"""Keys whose values differ between any two requests. They must be there on both sides all the same."""


def differences(
    expected: Any,
    actual: Any,
    *,
    tolerance: float = 0.0,
    ignore_values_of: Collection[str] = VOLATILE,
    path: str = "$",
) -> list[str]:
    """Every place where `actual` is not what `expected` is; empty when they are equal.

    Numbers may differ by `tolerance` if one of them is a float; everything else, types included, must be equal.
    Of the keys in `ignore_values_of` only the presence is compared.
    """
    options: dict[str, Any] = {"tolerance": tolerance, "ignore_values_of": ignore_values_of}
    if isinstance(expected, dict) and isinstance(actual, dict):
        found = [f"{path}.{key}: missing" for key in expected if key not in actual]
        found += [f"{path}.{key}: unexpected, {_short(actual[key])}" for key in actual if key not in expected]
        for key in expected:
            if key in actual and key not in ignore_values_of:
                found += differences(expected[key], actual[key], path=f"{path}.{key}", **options)
        return found
    if isinstance(expected, list) and isinstance(actual, list):
        found = []
        if len(expected) != len(actual):
            found.append(f"{path}: {len(actual)} elements instead of {len(expected)}")
        for index, (one, other) in enumerate(zip(expected, actual, strict=False)):
            found += differences(one, other, path=f"{path}[{index}]", **options)
        return found
    if _are_numbers(expected, actual):
        if expected == actual or abs(expected - actual) <= tolerance:
            return []
        if math.isnan(expected) and math.isnan(actual):
            return []
    elif type(expected) is type(actual) and expected == actual:
        return []
    return [f"{path}: {_short(actual)} instead of {_short(expected)}"]


def _are_numbers(one: Any, other: Any) -> bool:
    kinds = {type(one), type(other)}
    return float in kinds and kinds <= {int, float}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
