"""With remote attention by message nothing of another replica is mapped, whatever happens: schedulers have no file of
memory in common, and there is no socket over which descriptors could be sent. Where memory is mapped, the same look
finds it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from _deployments import BASE_TOKENS, EXCHANGE, FAULTS_BY_MESSAGE, LLAMA, using
from _drop import Served
from _questions import ask_all, make_questions
from _servers import RunningServer
from test_exchange import drop, exchange, wait_for_all
from test_lending import BORROWER, LENDER, granules, smaller
from test_recovery import kill_under_load, load_for_kill, require_as_at_start, wait_whole

pytestmark = pytest.mark.server

QUESTIONS = make_questions(12, seed=31)
LOOK_INTERVAL_S = 0.02
_SCHEDULER = re.compile(r"sglang::scheduler_DP(\d+)")
_OUR_MEMORY = "/memfd:kunserve"


def memory_of(pid: int) -> set[int]:
    """Inodes of the files of memory of ours that a process has mapped or open; none when it has ended."""
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        found.update(int(line.split()[4]) for line in lines if _OUR_MEMORY in line)
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(each).startswith(_OUR_MEMORY):
                    found.add(each.stat().st_ino)
    return found


class Watcher:
    """Looks again and again, in a thread, at what schedulers have in common."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._ends = threading.Event()
        self.shared: set[int] = set()
        self.pairs: set[tuple[int, int]] = set()  # of replicas that have some in common
        self.looks = 0

    def look(self) -> None:
        by_replica: dict[int, set[int]] = {}
        for pid in self._server.process.pids():
            with contextlib.suppress(psutil.Error):
                title = _SCHEDULER.match(" ".join(psutil.Process(pid).cmdline()[:1]))
                if title is not None:
                    by_replica.setdefault(int(title[1]), set()).update(memory_of(pid))
        for one, other in itertools.combinations(sorted(by_replica), 2):
            if shared := by_replica[one] & by_replica[other]:
                self.shared |= shared
                self.pairs.add((one, other))
        self.looks += bool(len(by_replica) > 1 and all(by_replica.values()))

    def _run(self) -> None:
        while not self._ends.wait(LOOK_INTERVAL_S):
            self.look()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(self._run)
            try:
                yield
            finally:
                self._ends.set()
            looking.result()
        assert self.looks > 0


def frame_sockets(server: RunningServer) -> list[str]:
    """Unix sockets over which frames are offered, of all servers that this one's processes have open."""
    names = []
    for pid in server.process.pids():
        with contextlib.suppress(psutil.Error):
            names += [each.laddr for each in psutil.Process(pid).net_connections("unix") if each.laddr]
    return [name for name in names if Path(name).name.startswith("frames-") and is_socket(name)]


def is_socket(name: str) -> bool:
    return stat.S_ISSOCK(os.stat(name).st_mode) if os.path.exists(name) else False


@using(LLAMA, EXCHANGE)
def test_what_replicas_have_in_common_while_they_drop_exchange_restore_and_lend(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    by_message = served.status()["replicas"][0]["remote_attention"]["by"] == "message"
    assert served.expected
    merged, lending = Watcher(server), Watcher(server)
    with merged.watching():
        drop(served)
        merged.look()  # the other looks come when they do
        assert ask_all(server.endpoint, QUESTIONS) == served.expected
        if exchange(served)["mode"] == "on":
            wait_for_all(served, remote=len(served.replicas) - 2)
            assert exchange(served)["parts_done"] > 0
            assert ask_all(server.endpoint, QUESTIONS) == served.expected
        served.restore()
    with smaller(served, LENDER, granules(served, BASE_TOKENS // 2)), lending.watching():
        answer = server.endpoint.ask("/kunserve/lend", {"from": LENDER, "to": BORROWER, "tokens": BASE_TOKENS // 4})
        assert answer["extension_slots"] > 0
        lending.look()
        assert ask_all(server.endpoint, QUESTIONS) == served.expected
        served.restore()
    assert bool(merged.shared) != by_message
    assert bool(lending.shared) != by_message
    assert bool(frame_sockets(server)) != by_message
    served.check_as_at_start()


@using(FAULTS_BY_MESSAGE)
def test_what_replicas_have_in_common_when_one_is_killed_and_comes_back(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    killed, others = 2, [0, 1]
    load = load_for_kill(server, killed, others, seed=killed)
    watcher = Watcher(server)
    with watcher.watching():
        drop(served)
        kill_under_load(server, load, killed, others, sent=signal.SIGKILL)
        wait_whole(server)
        served.wait_for_links()
    assert not watcher.shared
    assert not frame_sockets(server)
    require_as_at_start(server, served.replicas)
