"""The agent of a node: it shares the server's directory where it sees the same one, else it has one of its own, answers
for processes there, and takes the directory along when it ends."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from impatient import impatient_reaper

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import begun_requests_path
from kunserve_sgl.control.begun_requests import BegunRequests, begun_of, leave_begun
from kunserve_sgl.integration.attach.node_agent import NodeAgent, Sight, sight_of
from kunserve_sgl.integration.attach.reaper import join, start_ticks
from waiting import wait_until

# An agent that starts a process which signs up, and tells what it has to answer.
AGENT = """
import os, subprocess, sys
from kunserve_sgl.integration.attach.node_agent import NodeAgent, Sight
agent = NodeAgent(Sight("/nowhere", ()), {"curve.keys": b"secret"})
print(agent._directory, flush=True)
sys.stdin.readline()
"""
SLEEPER = """
import os, sys, time
from kunserve_sgl.integration.attach import last_words, reaper
reaper.join(sys.argv[1])
last_words.sign_up(sys.argv[1], last_words.scheduler_name(1, 0))
last_words.leave("it had no luck")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For temporary files: that of a test run in several processes may be too long for the paths of sockets."""
    with tempfile.TemporaryDirectory(prefix="d") as directory:
        yield Path(directory)


def test_who_sees_the_same_directory_shares_it(tmp_path: Path) -> None:
    seen = sight_of(str(tmp_path))
    agent = NodeAgent(seen, {"curve.keys": b"secret"})
    assert agent._directory == str(tmp_path)
    assert agent._is_shared
    assert not list(tmp_path.iterdir()), "the files are there already"


@pytest.mark.parametrize("what", [0, 1, 2, 3])
def test_a_directory_of_the_same_name_elsewhere_is_another_one(tmp_path: Path, what: int) -> None:
    """On another machine, in another container, on another disk, or one that was made later."""
    directory, seen = sight_of(str(tmp_path))
    other = Sight(directory, (*seen[:what], "other", *seen[what + 1 :]))
    assert sight_of(directory) != other
    assert sight_of(str(tmp_path / "missing")).seen == ()


def test_an_agent_answers_for_its_node_and_leaves_nothing(short_directory: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(short_directory)}
    code = impatient_reaper(tmp_path) + AGENT
    agent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with agent:
        assert agent.stdout is not None
        directory = agent.stdout.readline().strip()
        assert Path(directory).parent == short_directory
        keys = Path(directory, "curve.keys")
        assert keys.read_bytes() == b"secret"
        assert stat.S_IMODE(keys.stat().st_mode) == 0o600
        assert stat.S_IMODE(Path(directory).stat().st_mode) == 0o700
        with subprocess.Popen([sys.executable, "-c", SLEEPER, directory], stdout=subprocess.PIPE, text=True) as sleeper:
            assert sleeper.stdout is not None
            assert sleeper.stdout.readline() == "ready\n"
            agent.kill()
            agent.wait()
            wait_until(lambda: sleeper.poll() is not None, "what was there is ended")
    wait_until(lambda: not Path(directory).exists(), "the directory is gone")


def test_it_ends_processes_and_says_what_they_have_left(tmp_path: Path) -> None:
    agent = NodeAgent(sight_of(str(tmp_path)), {})
    (tmp_path / "members").mkdir()
    join(str(tmp_path))
    path = begun_requests_path(KunserveOptions(kunserve_directory=str(tmp_path)), 1, 2)
    notes = BegunRequests(path)
    notes.add(["a"])
    notes.close()
    with subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as sleeper:
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == "ready\n"
        started = start_ticks(sleeper.pid)
        assert started is not None
        assert agent.end(sleeper.pid, str(int(started) + 1), 0.0), "one that started later is another one"
        assert sleeper.poll() is None
        join(str(tmp_path))
        assert agent.end(sleeper.pid, started, 30.0)
        assert sleeper.wait() == -9
    assert [each.name for each in (tmp_path / "members").iterdir()] == [str(os.getpid())]
    words, begun = agent.remains(1, 0, 2)
    assert words == "it had no luck"
    leave_begun(str(tmp_path / "here"), begun)
    assert begun_of(str(tmp_path / "here"), ["a", "b"]) == ["a"]
    assert agent.remains(1, 1, 2) == (None, None), "only rank 0 knows of requests"
    agent.remove_files(1, 2)
    assert not Path(path).exists()
