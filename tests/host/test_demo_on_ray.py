"""The demo with the replicas on nodes of Ray: the burst makes them merge, and all answers are those of stock."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import demo

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

pytestmark = [pytest.mark.server, pytest.mark.long]

DEADLINE_S = 900.0


def test_burst_on_nodes_that_reach_each_other_by_messages_only(tmp_path: Path) -> None:
    command = [sys.executable, demo.__file__, "--ray", "--systems", "stock,auto", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^auto +\d+\.\d s after the arrivals began: merged, ", done.stdout, re.MULTILINE), done.stdout
    answers = re.search(r"^answers +(\d+) of (\d+) of auto have the tokens of stock", done.stdout, re.MULTILINE)
    assert answers is not None, done.stdout
    assert answers[1] == answers[2]
