"""The check at the end of a test run: a process that was left behind fails the run, and is killed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

DEADLINE_S = 600.0
LEAVES_A_PROCESS = """
import subprocess, sys
def test_that_leaves_a_process():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("pid", "w").write(str(child.pid))
"""
STOPS_ITS_PROCESS = LEAVES_A_PROCESS + "    child.kill()\n    child.wait()\n"


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
@pytest.mark.parametrize(("source", "status"), [(LEAVES_A_PROCESS, 1), (STOPS_ITS_PROCESS, 0)], ids=["left", "stopped"])
def test_process_left_behind(source: str, status: int, workers: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_one.py").write_text(source)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)),
            *(*workers, "test_one.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert run.returncode == status, run.stdout + run.stderr
    assert "1 passed" in run.stdout
    pid = (tmp_path / "pid").read_text()
    assert (f"left behind: {pid} " in run.stdout) is bool(status)
    assert not psutil.pid_exists(int(pid))
