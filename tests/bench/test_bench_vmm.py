"""The memory bench runs, measures every operation, and fits its lines right."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "vmm.py"
SMALL = ["--backend", "host", "--frame-bytes", "65536", "--repeats", "3", "--kv-layers", "2", "--kv-row-bytes", "512"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_every_operation_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    done = run(*SMALL, "--frames", "3", "6", "12", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    names = ("map (neighbours)", "map (scattered)", "unmap (scattered)", "drop layer")
    for name in (*names, "restore layer (copy, checksum)", "grow KV (map, zero)", "shrink KV"):
        samples = result["samples_s"][name]
        assert len(samples) >= 2
        assert all(len(each) == 3 and min(each) > 0 for each in samples.values()), name
        assert set(result["lines"][name]) == {"p50", "p90"}
        assert f"\n{name}\n" in done.stdout
    assert set(result["samples_s"]["drop layer"]) == {"3", "6", "12"}
    assert result["kv_granule_tokens"] == 128
    assert all(speed > 0 for speed in result["gb_per_s"].values())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--backend", "host", "--frames", "4", "4"], "two different positive numbers"),
        (["--backend", "host", "--frames", "0", "4"], "two different positive numbers"),
        (["--backend", "host", "--repeats", "0"], "--repeats must be at least 1"),
        (["--backend", "abacus"], "invalid choice: 'abacus'"),
        (["--backend", "host", "--frame-bytes", "1000"], "positive multiple of 4096"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"](arguments)
    assert complaint in capsys.readouterr().err


def test_a_line_is_fitted_through_percentiles() -> None:
    module = runpy.run_path(str(SCRIPT))
    series = module["Series"]()
    for frames in (1, 5, 20):
        for late_us in range(100):
            series.add(frames, (7 + 3 * frames + (late_us if late_us > 60 else 0)) / 1e6)
    line = series.line(50)
    assert line.fixed_us == pytest.approx(7)
    assert line.per_frame_us == pytest.approx(3)
    assert series.percentile_us(5, 90) == pytest.approx(7 + 15 + 90)
