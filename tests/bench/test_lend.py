"""What the benchmark of lent memory reports, and the commands of its servers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import lend

ARGS = argparse.Namespace(dtype="float32", server_flags=[])


def long_row(number: int, system: str, factor: int, ttft_s: float, tokens: list[int]) -> dict[str, Any]:
    times = {"ttft_s": ttft_s, "tpot_s": 0.01, "lent_s": 0.02, "back_s": 0.03}
    return (
        {"part": "long", "round": number, "system": system, "factor": factor, "tokens": 100 * factor}
        | times
        | {"token_ids": tokens}
    )


def lopsided_row(number: int, system: str, tokens_per_s: float, **changes: Any) -> dict[str, Any]:
    row = {"part": "lopsided", "round": number, "system": system, "tokens_per_s": tokens_per_s}
    counts = {"ttft_p50_s": 1.0, "ttft_p99_s": 2.0, "retractions": 0, "lends": 0, "drops": 0}
    return row | counts | {"token_ids": [[1, 2], [3, 4]]} | changes


def cells(report: str, first: str) -> list[str]:
    (line,) = [line for line in report.splitlines() if line.startswith(first)]
    return line.removeprefix(first).split()


def test_long_contexts_are_compared_round_by_round_whatever_the_order() -> None:
    rows = [
        long_row(0, "stock", 2, 1.0, [1]),
        long_row(0, "manual", 2, 2.0, [1]),
        long_row(1, "manual", 2, 9.0, [1]),
        long_row(1, "stock", 2, 3.0, [2]),
        long_row(2, "stock", 2, 5.0, [3]),
        long_row(2, "manual", 2, 5.0, [3]),
    ]
    found = cells(lend.report(rows), "2 times, 200 tokens")
    assert found[:5] == ["3.000", "5.000", "1.500", "2.000", "2.500"]
    assert found[-3:] == ["20", "30", "2/3"]


def test_a_lopsided_load_is_compared_with_stock_in_the_same_round() -> None:
    rows = []
    for number, stock in enumerate((10.0, 20.0, 40.0)):
        rows.append(lopsided_row(number, "auto", 1.5 * stock, lends=1, drops=number, token_ids=[[1, 2], [3, 5]]))
        rows.append(lopsided_row(number, "stock", stock, retractions=2))
        rows.append(lopsided_row(number, "manual", 2 * stock))
    report = lend.report(rows)
    assert cells(report, "stock") == [
        "20.0",
        "1.000",
        "1.000",
        "1.000",
        "1.00",
        "2.00",
        *3 * ["1.000"],
        "6",
        "0",
        "0",
        "6/6",
    ]
    assert cells(report, "manual")[:4] == ["40.0", "2.000", "2.000", "2.000"]
    assert cells(report, "auto")[2] == "1.500"
    assert cells(report, "auto")[-4:] == ["0", "3", "3", "3/6"]


def test_each_part_has_a_table_of_its_own() -> None:
    rows = [lopsided_row(0, system, 10.0) for system in ("stock", "manual", "auto")]
    rows += [row | {"part": "fitting", "tokens_per_s": 30.0, "ttft_p99_s": 3.0} for row in rows]
    fitting, lopsided = lend.report(rows).split("\n\n")
    assert fitting.startswith("fitting\n")
    assert [cells(fitting, "auto")[0], cells(lopsided, "auto")[0]] == ["30.0", "10.0"]


def test_only_ours_have_the_flags_of_kunserve() -> None:
    stock = lend.command_of("stock", 1, 500, Path("/model"), 7, ARGS)
    auto = lend.command_of("auto", 2, 100, Path("/model"), 7, ARGS)
    assert "sglang.launch_server" in stock
    assert "--kunserve" not in stock
    assert auto[auto.index("--kunserve") + 1] == "auto"
    assert auto[auto.index("--dp-size") + 1] == "2"
    assert auto[auto.index("--max-total-tokens") + 1] == "100"


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="short; accepted are long, fitting, lopsided"):
        lend._parts("long,short")
