"""The reaper, with a launcher that is not SGLang: what it removes, what it must not touch, and whom it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from impatient import impatient_reaper

from kunserve_sgl.integration.attach.reaper import clean_up_after
from servers.server import remaining
from waiting import wait_until

DEADLINE_S = 300.0
SHARED_MEMORY = Path("/dev/shm")
# Starts the reaper, and a child in a session of its own that signs up and creates what SGLang would.
LAUNCHER = """
import os, pathlib, subprocess, sys, time
from kunserve_sgl.integration.attach.reaper import join, name_instance, start_reaper
directory, instance, how = sys.argv[1:]
os.mkdir(directory)
start_reaper(directory)
name_instance(directory, instance)
pathlib.Path(directory, "socket").touch()
pathlib.Path(f"/dev/shm/sglang_loads_{instance}_0.shm").touch()
child = subprocess.Popen([sys.executable, "-c", sys.argv[3], directory], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
child.wait()
time.sleep(600)
"""
CHILD = """
import os, pathlib, sys, time
from kunserve_sgl.integration.attach.reaper import join
join(sys.argv[1])
pathlib.Path(f"/dev/shm/sgl_shm_mq_{os.getpid()}_0").touch()
print("ready", flush=True)
time.sleep(600)
"""
# Has neither signed up nor asked to die with its parent.
STRANGER = "import time; print('ready', flush=True); time.sleep(600)"


def reapers_of(directory: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if any(word.endswith("reaper.py") for word in command) and str(directory) in command:
            found.append(process)
    return found


@pytest.fixture
def instance() -> Iterator[str]:
    name = uuid.uuid4().hex[:12]
    yield name
    for path in SHARED_MEMORY.glob(f"*{name}*"):
        path.unlink()


@contextlib.contextmanager
def launched(directory: Path, instance: str, child: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(directory), instance, child],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    child_pid = 0
    try:
        assert launcher.stdout is not None
        lines = [launcher.stdout.readline().split() for _ in range(2)]  # of two processes, in any order
        assert ["ready"] in lines
        ((own, started),) = [line for line in lines if line != ["ready"]]
        assert own == str(launcher.pid)
        child_pid = int(started)
        yield launcher, child_pid
    finally:
        launcher.kill()
        launcher.communicate()
        if child_pid:  # 0 would be the process group of the test run
            with contextlib.suppress(ProcessLookupError):
                os.kill(child_pid, signal.SIGKILL)


def test_everything_of_the_server_goes_and_nothing_else(tmp_path: Path, instance: str) -> None:
    directory = tmp_path / "server"
    old = SHARED_MEMORY / f"old_{instance}"
    old.touch()
    with launched(directory, instance, CHILD) as (launcher, child):
        foreign = [SHARED_MEMORY / f"foreign_{instance}0", SHARED_MEMORY / f"foreign_x{instance}"]
        for path in foreign:
            path.touch()
        segment, loads = SHARED_MEMORY / f"sgl_shm_mq_{child}_0", SHARED_MEMORY / f"sglang_loads_{instance}_0.shm"
        (reaper,) = reapers_of(directory)
        assert segment.exists()
        assert loads.exists()
        assert os.getsid(reaper.pid) != os.getsid(launcher.pid)
        assert reaper.ppid() != launcher.pid
        assert reaper.net_connections() == []
        assert {os.readlink(f"/proc/{reaper.pid}/fd/{fd}") for fd in (1, 2)} == {"/dev/null"}
        assert reaper.memory_info().rss < 20 << 20
        launcher.kill()
        # It waits for the children too: one that has signed up may still write.
        os.kill(child, 0)
        assert directory.exists()
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not directory.exists(), "the directory is gone", DEADLINE_S)
        assert not segment.exists()
        assert not loads.exists()
        assert all(path.exists() for path in (*foreign, old))
        wait_until(lambda: not reapers_of(directory), "the reaper has ended", DEADLINE_S)


@pytest.mark.parametrize("child", [CHILD, STRANGER], ids=["signed-up", "only-marked"])
def test_a_child_that_stays_is_ended(
    tmp_path: Path, instance: str, child: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "server"
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHER", impatient_reaper(tmp_path) + LAUNCHER)
    with launched(directory, instance, child) as (launcher, pid):
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not directory.exists(), "the directory is gone", DEADLINE_S)
        assert remaining([pid]) == []


def test_a_launcher_that_ends_in_order_needs_no_signal(tmp_path: Path, instance: str) -> None:
    directory = tmp_path / "server"
    code = LAUNCHER.split("child = ")[0]
    subprocess.run([sys.executable, "-c", code, str(directory), instance, ""], check=True, timeout=DEADLINE_S)
    wait_until(lambda: not directory.exists(), "the directory is gone", DEADLINE_S)
    wait_until(lambda: not reapers_of(directory), "the reaper has ended", DEADLINE_S)
    assert not list(SHARED_MEMORY.glob(f"*{instance}*"))


def test_a_process_that_has_ended_is_cleaned_up_after_while_the_others_go_on(tmp_path: Path) -> None:
    """Its files only: neither older ones of its number, nor those of others."""
    (tmp_path / "members").mkdir()
    pid, other = (f"{os.getpid()}{digit}" for digit in (1, 2))  # no process has such a number
    files = [
        SHARED_MEMORY / f"sgl_test_{number}_{what}" for number, what in ((pid, "old"), (pid, "new"), (other, "new"))
    ]
    try:
        files[0].touch()
        wait_until(lambda: is_younger(tmp_path / "clock", files[0]), "time passes")
        for name in (pid, other):
            (tmp_path / "members" / name).write_text("")
        for file in files[1:]:
            file.touch()
        clean_up_after(str(tmp_path), int(pid))
        assert [file.exists() for file in files] == [True, False, True]
        assert [path.name for path in (tmp_path / "members").iterdir()] == [other]
        clean_up_after(str(tmp_path), int(pid))  # it never signed up
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def is_younger(path: Path, other: Path) -> bool:
    path.touch()
    return path.stat().st_mtime > other.stat().st_ctime
