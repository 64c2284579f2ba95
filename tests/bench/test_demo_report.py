"""What the demo prints of its runs, and how it shows that it waits."""

from __future__ import annotations

import io
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from _burst_runs import a_run, a_sample, failed

import demo
from comparison.compare import QUICK
from comparison.report import SystemRun
from kunserve_sgl.args import RemoteAttentionBy, add_kunserve_arguments, way_to_peers
from servers.progress import WaitProgress


def stock_run() -> SystemRun:
    return a_run("stock total_tokens", "stock", [20.0] * 4)


def auto_run() -> SystemRun:
    """Merged from second 1 on, normal again at second 9."""
    run = a_run("auto", "ours", [0.25, 0.5, 0.5, 0.5], 0.0123)
    states = [(0.0, 0, "normal", 100), (1.0, 1, "merged", 321), (8.0, 1, "merged", 321), (9.0, 2, "normal", 100)]
    run.samples = [a_sample(*state) for state in states]
    run.normal_after_s, run.capacity_after_tokens = 2.0, (100, 100)
    return run


def rows_of(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_the_report_compares_with_stock_and_shows_the_capacity() -> None:
    auto = auto_run()
    auto.results[1] = replace(auto.results[1], output_ids=(7, 8, 0))
    text = demo.report([stock_run(), auto, a_run("ceiling", "ceiling", [0.125] * 4)])
    first = {line.split("  ")[0]: line.split()[-12:] for line in text.splitlines()[1:4]}
    assert first["stock total_tokens"][:4] == ["20000"] * 4
    assert first["auto"][0] == "500"
    assert first["auto"][4:8] == ["12.3"] * 4
    assert first["auto"][-2:] == ["0", "642"]
    assert first["ceiling"][-1] == "200"
    assert "P99 TTFT of stock total_tokens / P99 TTFT of auto: 40.0" in text
    assert "answers     3 of 4 of auto have the tokens of stock total_tokens" in text
    changes = [line for line in text.splitlines() if line.endswith("KV slots")]
    assert [line.split()[1:] for line in changes] == [
        "1.0 s after the arrivals began: merged, 642 KV slots".split(),
        "9.0 s after the arrivals began: normal, 200 KV slots".split(),
    ]
    assert "KV capacity before 200, merged 642, after 200 tokens" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_run_without_a_drop_is_said_to_have_none() -> None:
    calm = a_run("auto", "ours", [0.5] * 4)
    calm.samples, calm.normal_after_s = [a_sample(0.0, 0, "normal"), a_sample(1.0, 0, "normal")], 0.0
    text = demo.report([stock_run(), calm])
    assert "auto        nothing was dropped" in text
    assert "than the 200 tokens" in text
    assert "merged" not in text


def test_what_is_not_restored_is_said_to_be_so() -> None:
    auto = auto_run()
    auto.normal_after_s, auto.capacity_after_tokens = None, ()
    assert "merged 642, not restored within 120 s after the last answer" in demo.report([stock_run(), auto])


def test_the_report_names_what_failed() -> None:
    auto = auto_run()
    auto.results.append(failed(4))
    broken = SystemRun("stock total_tokens", "stock", "", problem="the server did not start: no port")
    text = demo.report([broken, auto])
    rows = rows_of(text)
    assert "the server did not start: no port" in " ".join(rows["problem"])
    assert rows["failed"][1:3] == ["1", "x"]
    assert "ratio" not in rows
    assert demo.report([broken]).splitlines() == ["problem     stock total_tokens: the server did not start: no port"]


def test_nodes_of_one_machine_reach_each_other_by_messages_only(tmp_path: Path) -> None:
    parser = ArgumentParser()
    add_kunserve_arguments(parser)
    setup = demo.make_setup(Namespace(replicas=2, output_dir=tmp_path), tmp_path / "model")
    flags = demo.on_ray(setup, "127.0.0.1:6379").our_flags
    asked, _ = parser.parse_known_args(flags)
    way = way_to_peers(asked.kunserve_remote_attention, asked.kunserve_control)
    assert way is RemoteAttentionBy.MESSAGE


def test_the_burst_wants_more_than_there_is() -> None:
    trace, scaling = demo.workload(Namespace(trace="burst", window_start=None, window_length=None))
    wanted = sum(request.prompt_tokens + request.output_tokens for request in trace.requests)
    assert wanted > 2 * 2 * QUICK.tokens
    assert max(request.prompt_tokens + request.output_tokens for request in trace.requests) < QUICK.tokens
    assert "nothing" in scaling
    assert f"at {QUICK.workloads['burst']['burst_rate']:g} req/s" in trace.source


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_waiting_is_shown_in_place_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with WaitProgress("auto starting") as progress:
        progress(0.2)
        progress(1.4)
    assert terminal.getvalue() == "\rauto starting: 0 s \rauto starting: 1 s \n"


def test_waiting_is_a_line_now_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with WaitProgress("auto starting") as progress:
        for waited_s in (0.0, 5.0, 10.5, 15.0, 21.0):
            progress(waited_s)
    assert log.getvalue().splitlines() == [f"auto starting: {seconds} s" for seconds in (0, 10, 21)]
