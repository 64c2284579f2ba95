"""The benchmark of divided attention measures each of its steps, and what it compares is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import remote_attention

SMALL = ["--batch", "3", "--context", "20", "90", "--layers", "2", "--rounds", "2"]


def measured(path: Path, *arguments: str) -> list[dict[str, Any]]:
    remote_attention.main([*SMALL, *arguments, "--json", str(path)])
    found = json.loads(path.read_text())
    assert [(each["batch"], each["context"]) for each in found] == [(3, 20), (3, 90)]
    assert all(each["largest_difference"] < 1e-5 for each in found)
    return found


def test_every_step_is_measured(tmp_path: Path) -> None:
    for each in measured(tmp_path / "half.json"):
        positive = ("_us", "_bytes", "_per_s")
        assert all(value > 0 for name, value in each.items() if name.endswith(positive) and name != "lost_step_us")
        assert each["lost_step_us"] >= 0, "a part may be attended to meanwhile"
        assert each["order_bytes"] == 3 * 8 * 64 * 4
        entries = 3 * ((each["context"] - 1) // 2)
        assert each["other_kv_bytes"] == entries * 2 * 2 * 64 * 4
        assert each["slots_bytes"] == 4 * (3 * 3 + 2 * entries)


def test_nothing_elsewhere_costs_no_message(tmp_path: Path) -> None:
    for each in measured(tmp_path / "none.json", "--remote-share", "0"):
        assert each["other_part_us"] == each["copies_us"] == each["message_us"] == each["map_us"] == 0
        assert each["order_bytes"] == each["answer_bytes"] == each["other_kv_bytes"] == each["lost_step_us"] == 0
        assert each["host_part_us"] > 0


def test_a_share_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        remote_attention.main([*SMALL, "--remote-share", "1.5"])
    assert ended.value.code == 2
    assert "accepted: 0 to 1" in capsys.readouterr().err
