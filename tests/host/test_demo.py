"""The demo end to end: a recorded trace through two real replicas, and an interrupt in the middle of the start."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import demo
from comparison.compare import QUICK
from servers.guard import descendants
from servers.server import remaining

REPLAY_DEADLINE_S = 1500.0
STEP_DEADLINE_S = 600.0
# Two bursts, the second one denser, and a failed request. Scaled to fit, the requests of the second burst want four
# times what the replicas have and more; the shorter ones, which the warm-up takes, leave memory free.
COUNT, OUTPUT_TOKENS = 24, 100
ROWS = [
    *((0.1 * i, 3000 + 10 * i, 20 + i) for i in range(8)),
    *((40.0 + 0.05 * i, 300 + 12 * i * i, OUTPUT_TOKENS) for i in range(COUNT)),
    (42.0, 700, 0),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "burstgpt.csv"
    lines = [f"{time_s},GPT-4,{prompt},{output},{prompt + output},API log" for time_s, prompt, output in ROWS]
    path.write_text("\n".join(["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", *lines]) + "\n")
    return path


def demo_command(*arguments: str) -> list[str]:
    return [sys.executable, demo.__file__, *arguments]


def _accept_interrupts() -> None:
    """A test run that a shell started in the background ignores SIGINT, and so would the demo."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For temporary files: the path of a Unix socket in it must not get too long."""
    with tempfile.TemporaryDirectory(prefix="d") as directory:
        yield Path(directory)


def left_behind(directory: Path) -> list[str]:
    """What the demo forgot to remove. torch makes directories for its caches, which stay."""
    return [path.name for path in directory.iterdir() if path.name.startswith(("demo-", "serve-", "tmp"))]


@pytest.mark.server
def test_recorded_trace_with_a_drop(trace: Path, tmp_path: Path, short_directory: Path) -> None:
    output_dir, seen = tmp_path / "out" / "demo", set[int]()
    with (tmp_path / "stdout").open("w+") as stdout, (tmp_path / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            demo_command("--trace", str(trace), "--systems", "auto", "--output-dir", str(output_dir)),
            env={**os.environ, "TMPDIR": str(short_directory)},
            stdout=stdout,
            stderr=stderr,
        )
        try:
            ends_s = time.monotonic() + REPLAY_DEADLINE_S
            while process.poll() is None and time.monotonic() < ends_s:
                seen |= set(descendants(process.pid))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        out, err = (file.read() for file in (stdout, stderr) if file.seek(0) == 0)
    assert process.returncode == 0, out + err
    assert len(seen) > 2
    assert remaining(sorted(seen)) == []
    assert left_behind(short_directory) == []
    check_printed(out, err)
    lines = [json.loads(line) for line in (output_dir / "demo.jsonl").read_text().splitlines()]
    check_results([line for line in lines if line["kind"] == "request"])
    kept = (output_dir / "table.txt").read_text()
    capacities = [line for line in out.splitlines() if line.startswith("KV capacity") or line.endswith("KV slots")]
    assert len(capacities) > 2
    assert all(line in kept for line in capacities)
    assert "SLO 5x" in kept
    for picture in ("ttft.png", "memory.png"):
        assert (output_dir / picture).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in output_dir.glob("*.log")} == {"auto.log"}


def check_printed(out: str, err: str) -> None:
    for part in ("TTFT ms P50", "TPOT ms P50", "P99.9", "tok/s", "failed", "1 of 33 rows left out", "scaled"):
        assert part in out, out
    capacity = re.search(r"^KV capacity before (\d+), merged (\d+), after (\d+) tokens$", out, re.MULTILINE)
    assert capacity is not None, out
    before, merged, after = map(int, capacity.groups())
    assert merged > before == after == 2 * QUICK.tokens
    assert re.search(r"^auto +\d+\.\d s after the arrivals began: \w+, \d+ KV slots$", out, re.MULTILINE), out
    # The bar of SGLang's client in the replay, and none for the requests that are sent one after the other.
    assert f"{COUNT}/{COUNT}" in err
    assert "4/4" not in err.replace(f"{COUNT}/{COUNT}", "")
    assert "auto starting: 0 s" in err


def check_results(results: list[dict[str, Any]]) -> None:
    # The denser burst is what the demo chooses; its lines are 10 to 33.
    assert [result["line"] for result in results] == list(range(10, 10 + COUNT))
    assert [result["arrival_s"] for result in results] == pytest.approx([0.05 * i for i in range(COUNT)])
    assert all(result["error"] == "" for result in results)
    assert all(result["server_prompt_tokens"] == result["prompt_tokens"] for result in results)
    assert all(result["server_output_tokens"] == result["output_tokens"] == OUTPUT_TOKENS for result in results)
    # All prompts are scaled by one factor, so that the longest fits.
    recorded = [ROWS[result["line"] - 2][1] for result in results]
    factor = (QUICK.tokens // 2 - 1) / max(recorded)
    assert [result["prompt_tokens"] for result in results] == [round(factor * tokens) for tokens in recorded]
    # Sent at or after its time, and in the trace's order: later sends do not overtake.
    assert all(result["lateness_s"] >= 0 for result in results)
    sent = [result["sent_s"] for result in results]
    assert sent == sorted(sent)
    assert {result["replica"] for result in results} == {0, 1}


@pytest.mark.server
def test_interrupt_during_the_start_leaves_nothing(short_directory: Path) -> None:
    process = subprocess.Popen(
        demo_command("--output-dir", str(short_directory / "out")),
        env={**os.environ, "TMPDIR": str(short_directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_accept_interrupts,
    )
    try:
        end_s = time.monotonic() + STEP_DEADLINE_S
        # The guard, the server, and at least one process that the server started.
        while len(pids := descendants(process.pid)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end_s, f"the server has started {pids} only"
            time.sleep(0.2)  # a look takes milliseconds
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=STEP_DEADLINE_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130, out + err
    assert "interrupted" in err
    assert remaining(pids) == []
    assert left_behind(short_directory) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "/missing.csv"), "/missing.csv: cannot be read"),
        (("--window-start", "5"), "--window-start and --window-length select a part of a recorded trace"),
        (("--replicas", "1"), "--replicas is 1; accepted is 2 or more"),
        (("--systems", "stock,manual"), "--systems: manual; accepted are stock, auto, ceiling"),
        (("--output-dir", "/proc/none"), "--output-dir is /proc/none"),
    ],
)
def test_unusable_options_are_refused_before_anything_starts(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = descendants(os.getpid())  # earlier tests may have left a helper of the standard library
    with pytest.raises(SystemExit) as exit_:
        demo.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert set(descendants(os.getpid())) <= set(before)


def test_dense_trace_is_scaled_to_what_the_demo_can_serve(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:{i // 600:02}:{i // 10 % 60:02}.{i % 10},{1000 + i},{100 + i % 50}" for i in range(2000)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    args = argparse.Namespace(trace=str(path), window_start=None, window_length=None)
    trace, scaling = demo.workload(args)
    prompts = [request.prompt_tokens for request in trace.requests]
    outputs = [request.output_tokens for request in trace.requests]
    # 200 requests in the 20 s; rounding to whole tokens may add half a token each.
    assert len(prompts) == 200
    assert sum(prompts) == pytest.approx(demo.PROMPT_TOKENS_BUDGET, rel=0.01)
    assert sum(outputs) == pytest.approx(demo.OUTPUT_TOKENS_BUDGET, rel=0.01)
    assert max(prompts) + max(outputs) < QUICK.tokens
    assert "busiest 20 s" in scaling
    chosen, scaling = demo.workload(argparse.Namespace(trace=str(path), window_start=30.0, window_length=2.0))
    assert [request.line for request in chosen.requests] == list(range(302, 322))
    assert "chosen 2 s of the trace, from 30.0 s on" in scaling
    assert max(request.prompt_tokens for request in chosen.requests) == QUICK.tokens // 2 - 1
