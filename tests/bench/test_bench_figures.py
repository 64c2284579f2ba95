"""What the benchmarks of transitions and of merged replicas compute from what they observed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import exchanging
import merged
import overhead
import transition
from comparison import restores
from comparison.gaps import gaps_within, longest_gap, times_per_token
from comparison.restores import plain_copy_s, restores_table
from comparison.transition_tables import Cost
from servers.streams import Controls, LoadError, phases_of, table

LOG = """\
[2026-01-01 10:00:00] KunServe: transition 3 of replicas [0, 1] from epoch 4 to 5 succeeded: prepare 3.4 ms, \
switch 1.3 ms, release 4.0 ms, resume 3.7 ms; longest pause 2.1 ms, 5.0 MiB of parameters freed, 1280 slots gained
[2026-01-01 10:00:01] KunServe: transition 4 of replicas [0, 1] from epoch 5 to 6 rolled back (no answer to load \
within 30 s from replica 1 rank 0): prepare 9.9 ms, revert 1.0 ms; longest pause 2.1 ms, 0.0 MiB of parameters freed
[2026-01-01 10:00:02] KunServe: transition 5 of replicas [0, 1] from epoch 5 to 6 succeeded: prepare 8.0 ms, \
load 17.6 ms; longest pause 2.1 ms, 0.0 MiB of parameters freed, 0 slots gained
"""


def test_phases_are_those_of_the_transition_that_succeeded() -> None:
    assert phases_of(LOG, 5) == {"prepare": 3.4, "switch": 1.3, "release": 4.0, "resume": 3.7}
    assert phases_of(LOG, 6) == {"prepare": 8.0, "load": 17.6}
    with pytest.raises(LoadError, match="epoch 7"):
        phases_of(LOG, 7)


def test_transitions_are_counted_while_the_log_grows(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    path.write_text("")
    controls = Controls(1, path)
    assert controls.ended_transitions() == 0
    for at, character in enumerate(LOG, start=1):
        with path.open("a") as log:
            log.write(character)
        assert controls.ended_transitions() == LOG[:at].count("\n")
    assert controls.ended_transitions() == 3


def test_cost_is_split_into_its_parts() -> None:
    samples = [(size, layers, 0.01 + 2e-9 * size + 3e-4 * layers) for layers in (8, 48) for size in (10**6, 10**7)]
    cost = Cost.fit(samples)
    assert cost is not None
    assert (cost.fixed_s, cost.per_byte_s, cost.per_layer_s) == pytest.approx((0.01, 2e-9, 3e-4))


def test_cost_is_not_fitted_where_bytes_follow_layers() -> None:
    assert Cost.fit([(1000 * layers, layers, 0.1) for layers in (8, 16, 32, 48)]) is None
    assert Cost.fit([(1000, 8, 0.1), (5000, 16, 0.1)]) is None


def test_the_longest_gap_is_one_that_overlaps_with_the_order() -> None:
    gaps = [(0.0, 5.0), (5.0, 5.1), (5.1, 5.4), (5.4, 5.5), (6.0, 9.0)]
    assert longest_gap(gaps, 5.2, 5.45) == pytest.approx(0.3)
    assert longest_gap(gaps, 4.9, 5.05) == pytest.approx(5.0)
    assert longest_gap(gaps, 5.6, 5.9) == 0
    assert gaps_within(gaps, 5.0, 5.45) == pytest.approx([0.1, 0.3])


@dataclass
class _Stream:
    replica: int
    prompt_tokens: int
    tokens: int


def test_free_base_tokens_count_what_has_slots() -> None:
    streams = [_Stream(0, 100, 11), _Stream(0, 50, 0), _Stream(1, 500, 5)]  # the second waits, and has none
    assert transition.free_base_tokens(1000, streams, 0) == 890  # type: ignore[arg-type]


def test_times_are_those_between_two_looks() -> None:
    def status(own: float, wait: float, sent: int, served: int) -> dict[str, object]:
        seconds = {"own": own, "wait": wait}
        counts = {"own_batches_sent": sent, "pieces_sent": 3 * sent, "batches_served": served}
        return {"id": 0, "pipeline": {"seconds": seconds, **counts}}

    delta = merged.pipeline_delta(status(1.0, 0.0, 10, 5), status(4.0, 1.0, 30, 9))
    assert (delta["own"], delta["wait"], delta["serve"]) == (3.0, 1.0, 0.0)
    assert (delta["own_batches"], delta["pieces"], delta["served"]) == (20, 60, 4)
    assert merged.bubbles(delta) == 0.25


def test_columns_are_aligned() -> None:
    assert table(["a", "b"], [["long", 1], ["x", 200]]) == "a       b\nlong    1\nx     200"


def overhead_row(version: str, layers: int, merged: bool, step_cpu_s: float, number: int = 0) -> dict[str, Any]:
    return {
        "version": version,
        "layers": layers,
        "requests": 8,
        "round": number,
        "merged": merged,
        "step_cpu_s": step_cpu_s,
        "step_wall_s": 2 * step_cpu_s,
    }


def test_overhead_is_what_merging_adds_and_grows_with_layers_as_fitted() -> None:
    rows = [
        overhead_row(version, layers, merged, 0.001 + (fixed_s + 2e-6 * layers) * merged)
        for version, fixed_s in (("before", 0.002), ("this", 0.001))
        for layers in (16, 80)
        for merged in (True, False)
    ]
    lines = overhead.report(rows).splitlines()
    cells = {line.split("  ")[0]: line.split()[-7:] for line in lines if "layers" in line}
    assert cells["before, 8 requests, 80 layers"] == ["1.000", "3.160", "2.160", "2.160", "2.160", "2.00", "6.32"]
    assert cells["this, 8 requests, 16 layers"] == ["1.000", "2.032", "1.032", "1.032", "1.032", "2.00", "4.06"]
    assert [line.split()[-1] for line in lines[-2:]] == ["2.00", "2.00"]


def test_overhead_compares_merged_and_not_of_the_same_round() -> None:
    rows = [
        overhead_row("this", 16, merged, base_s + 0.001 * merged, number)
        for number, base_s in enumerate((0.001, 0.005, 0.002))
        for merged in ((True, False) if number == 1 else (False, True))
    ]
    assert overhead.report(rows).splitlines()[-1].split()[-5:-2] == ["1.000"] * 3


def test_a_token_belongs_to_the_time_in_which_it_came() -> None:
    gaps = [(0.0, 5.0), (5.0, 5.1), (5.1, 5.4), (5.4, 5.5), (6.0, 9.0)]
    assert times_per_token(gaps, 5.05, 5.45) == pytest.approx([0.1, 0.3])
    assert times_per_token(gaps, 5.6, 5.9) == []


def test_restores_are_told_by_what_came_back_and_what_requests_noticed() -> None:
    row: dict[str, Any] = {
        **{"action": "restore", "layers": 8, "hidden": 128, "loaded_bytes": 50 << 20, "plain_copy_s": 0.025},
        **{"phases_ms": {"prepare": 3.0, "load": 500.0}, "gaps_before_s": [0.02, 0.02], "token_s": [0.02, 0.022]},
    }
    rows = [
        {**row, "load": "running", "longest_gap_s": 0.025},
        {**row, "load": "running", "longest_gap_s": 0.03},
        {**row, "load": "idle"} | {"gaps_before_s": [], "phases_ms": {"prepare": 3.0}},
        {**row, "action": "drop", "load": "running"},
    ]
    _, idle, running = restores_table(rows).splitlines()
    assert running.split()[5:] == ["50.0", "500.0", "100", "25.0", "2000", "20.0", "21.0", "+5.0%", "30.0", "1.5"]
    assert idle.split()[5:] == ["50.0", "0.0", "-", "25.0", "2000", *"-----"]


def test_a_plain_copy_takes_what_its_parts_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plain_copy_s(1 << 20) > 0
    clock = itertools.count()
    monkeypatch.setattr(restores, "time", SimpleNamespace(perf_counter=partial(next, clock)))
    monkeypatch.setattr(restores, "_CHUNK_BYTES", 1 << 20)
    assert [plain_copy_s(size_bytes) for size_bytes in (1 << 20, 5 << 19)] == [1, 3]


def test_what_an_exchange_costs_is_set_against_a_plain_copy() -> None:
    row = {
        **{"load": exchanging.LOAD, "layers": 8, "hidden": 128, "parts": 8, "parts_done": 8, "moved_bytes": 64 << 20},
        **{"exchange_s": 2.0, "plain_s": 0.5, "restore_s": 0.25},
        **{"gaps_before_s": [0.01], "gaps_meanwhile_s": [0.01, 0.02], "gaps_after_s": []},
    }
    costs, seen = exchanging.report([{"load": "idle"}, row, row]).split("\n\n")
    assert costs.splitlines()[1].split() == [
        *("8", "layers,", "hidden", "128", "2", "8", "64.0", "2000.0", "2000.0", "32", "128", "250.0", "250.0")
    ]
    assert seen.splitlines()[1].split()[4:] == [*["10.0"] * 3, "15.0", "20.0", "20.0", *["-"] * 6]
    rows = [row | {"gaps_after_s": [after_s]} for after_s in (0.01, 0.02, 0.0125)]
    seen = exchanging.report(rows).split("\n\n")[1]
    assert seen.splitlines()[1].split()[-3:] == ["+20.0%", "-25.0%", "+50.0%"]
    assert exchanging.report([{"load": "idle"}]) == ""
