"""Tries to start replicas again, with processes and pipes that the test holds, and a clock that it moves."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.attach.process import ATTACHED_KEY
from kunserve_sgl.integration.controller import replica_start
from kunserve_sgl.integration.controller.replica_start import ReplicaStart, start_replica
from kunserve_sgl.integration.controller.restarts import LEAST_START_DEADLINE_S, Restarts
from open_files import open_files


@dataclass(eq=False)
class Process:
    pid: int = 1
    is_killed: bool = False
    is_closed: bool = False
    waits_for: str | None = None
    has_lost_node: bool = False

    def kill(self) -> None:
        self.is_killed = True

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Socket:
    is_closed: bool = False

    def setsockopt(self, option: int, value: int) -> None: ...

    def close(self, linger: int) -> None:
        assert linger == 0, "nobody takes what was not delivered"
        self.is_closed = True


@dataclass
class Home:
    """A controller of two replicas with two ranks each. What it is told is in `said`."""

    now_s: float = 1000.0
    living: set[int] = field(default_factory=set)
    takes_back: bool = True
    refusal: str = ""
    cannot_start: str = ""
    said: list[tuple[int, str, bool]] = field(default_factory=list)
    starts: list[ReplicaStart] = field(default_factory=list)
    writers: list[list[Any]] = field(default_factory=list)
    back: list[ReplicaStart] = field(default_factory=list)
    from_others: list[bool] = field(default_factory=list)

    def has_living(self, replica: int) -> bool:
        return replica in self.living

    def start(self, replica: int, incarnation: int, from_others: bool) -> ReplicaStart:
        self.from_others.append(from_others)
        if self.cannot_start:
            raise TransientError(self.cannot_start)
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        self.writers.append([writer for _, writer in pipes])
        processes = [Process(), Process()]
        self.starts.append(ReplicaStart(replica, incarnation, Socket(), processes, [each for each, _ in pipes], "/"))
        return self.starts[-1]

    def take_back(self, start: ReplicaStart) -> bool:
        if self.refusal:
            raise TransientError(self.refusal)
        if self.takes_back:
            self.back.append(start)
        return self.takes_back

    def say(self, replica: int, what: str, is_for_good: bool) -> None:
        self.said.append((replica, what, is_for_good))


@pytest.fixture
def home() -> Iterator[Home]:
    made = Home()
    yield made
    for writers in made.writers:
        for writer in writers:
            writer.close()


def restarts_at(home: Home, tries: int = 3) -> Restarts:
    return Restarts(home, 2, tries, 60.0, 1.0, lambda: home.now_s)


def pass_time(home: Home, restarts: Restarts) -> None:
    deadline_s = restarts.next_deadline_s()
    assert deadline_s is not None
    home.now_s = deadline_s
    restarts.on_tick()


def report(home: Home, restarts: Restarts, said: dict[str, Any] | None = None) -> None:
    """Both ranks of the latest start are ready."""
    for writer in home.writers[-1]:
        writer.send({ATTACHED_KEY: "scheduler"} if said is None else said)
    restarts.on_files(restarts.files)
    restarts.on_tick()


def end_processes(home: Home, restarts: Restarts, how: str = "ended with exit code -9") -> None:
    """Of the latest start, one after the other."""
    for process in home.starts[-1].processes:
        restarts.on_start_ended(process, how)


def test_a_replica_is_started_when_all_of_its_processes_have_ended_and_taken_back_when_all_are_ready(
    home: Home,
) -> None:
    restarts = restarts_at(home)
    home.living = {1}
    restarts.on_lost(1, "it ended")
    assert restarts.is_coming_back(1)
    assert not restarts.is_coming_back(0)
    pass_time(home, restarts)
    assert restarts.next_deadline_s() is None, "the end of the other rank is waited for, and that is told"
    assert not home.starts
    home.living = set()
    restarts.on_tick()
    (start,) = home.starts
    assert (start.replica, start.incarnation, restarts.incarnation(1)) == (1, 1, 1)
    assert [restarts.rank_of(process) for process in restarts.processes] == [(1, 0), (1, 1)]
    assert restarts.rank_of(Process()) is None
    home.writers[-1][0].send({ATTACHED_KEY: "scheduler"})
    restarts.on_files([restarts.files[0]])
    restarts.on_tick()
    assert not home.back
    home.takes_back = False  # as while a transition of others runs, which takes as long as it likes
    home.writers[-1][1].send({ATTACHED_KEY: "scheduler"})
    restarts.on_files(restarts.files)
    restarts.on_tick()
    assert restarts.next_deadline_s() is None
    assert restarts.is_coming_back(1)
    home.takes_back = True
    restarts.on_tick()
    assert home.back == [start]
    restarts.on_lost(1, "it ended again")
    home.takes_back = False
    pass_time(home, restarts)
    assert home.from_others == [True, True]
    end_processes(home, restarts)
    pass_time(home, restarts)
    assert home.from_others == [True, True, False]
    home.takes_back = True
    report(home, restarts)
    assert not restarts.is_any_coming_back
    assert not restarts.processes
    assert restarts.status() == {0: 0, 1: 3}
    assert home.said[:2] == [
        (1, "it ended; it is started again in 1 s, try 1 of 3", False),
        (1, "it ended; it is being started again, try 1 of 3", False),
    ]


def test_who_fails_is_tried_again_later_and_given_up_in_the_end(home: Home) -> None:
    restarts = restarts_at(home)
    files = open_files()
    restarts.on_lost(0, "it ended")
    for _ in range(3):
        pass_time(home, restarts)
        start = home.starts[-1]
        one, other = start.processes
        home.writers[-1][0].close()
        restarts.on_files(restarts.files[:1])
        assert not start.is_ready
        restarts.on_start_ended(one, "ended with exit code 1: it has no model")
        assert other.is_killed
        assert restarts.is_any_coming_back
        assert not one.is_closed
        restarts.on_start_ended(other, "ended with exit code -9")
        assert one.is_closed
        assert other.is_closed
        assert start.socket.is_closed
        home.writers.pop()[1].close()
    assert [start.incarnation for start in home.starts] == [1, 2, 3]
    assert home.from_others == [True, False, False], "what has failed once is tried by itself"
    assert not restarts.is_any_coming_back
    assert home.said[-1] == (
        0,
        "given up: ended 4 times in 7 s; the last one: ended with exit code 1: it has no model",
        True,
    )
    restarts.on_tick()
    assert restarts.next_deadline_s() is None
    assert open_files() <= files


def test_a_start_that_takes_too_long_is_ended(home: Home) -> None:
    restarts = restarts_at(home)
    restarts.on_lost(0, "it ended")
    pass_time(home, restarts)
    at_s = home.now_s
    pass_time(home, restarts)
    assert home.now_s == at_s + LEAST_START_DEADLINE_S
    assert all(process.is_killed for process in home.starts[0].processes)
    end_processes(home, restarts)
    assert home.said[-1][1].startswith("it was not ready within 300 s; it is started again in 2 s")


def test_a_start_that_is_not_attached_is_ended(home: Home) -> None:
    restarts = restarts_at(home)
    restarts.on_lost(0, "it ended")
    pass_time(home, restarts)
    report(home, restarts, {"status": "ready"})
    assert all(process.is_killed for process in home.starts[0].processes)
    assert not home.back


def test_who_is_not_what_it_was_is_given_up_at_once(home: Home) -> None:
    restarts = restarts_at(home)
    restarts.on_lost(0, "it ended")
    pass_time(home, restarts)
    home.refusal = "it has other parameters"
    report(home, restarts)
    assert all(process.is_killed for process in home.starts[0].processes)
    end_processes(home, restarts)
    assert home.said[-1] == (0, "given up: it has other parameters", True)
    assert not restarts.is_any_coming_back


def test_who_cannot_even_be_started_is_tried_again(home: Home) -> None:
    restarts = restarts_at(home)
    home.cannot_start = "no process can be forked"
    restarts.on_lost(0, "it ended")
    pass_time(home, restarts)
    assert "it could not be started: no process can be forked; it is started again in 2 s" in home.said[-1][1]
    home.cannot_start = ""
    pass_time(home, restarts)
    report(home, restarts)
    assert len(home.back) == 1


def test_turned_off_nobody_comes_back(home: Home) -> None:
    restarts = restarts_at(home, tries=0)
    restarts.on_lost(0, "it ended")
    assert not restarts.is_any_coming_back
    assert restarts.next_deadline_s() is None
    assert not home.said


def test_a_start_that_ray_has_no_room_for_waits_without_a_deadline_and_says_so(home: Home) -> None:
    restarts = restarts_at(home)
    restarts.on_lost(0, "it ended")
    pass_time(home, restarts)
    process = home.starts[0].processes[1]
    process.waits_for = "Ray has no room for it"
    restarts.on_tick()
    assert home.said[-1] == (0, "it ended; Ray has no room for it, try 1 of 3", False)
    assert restarts.next_deadline_s() is None
    count = len(home.said)
    home.now_s += 10 * LEAST_START_DEADLINE_S
    restarts.on_tick()
    assert len(home.said) == count, "it is said once"
    process.waits_for = None
    restarts.on_tick()
    assert home.said[-1] == (0, "it ended; it is being started again, try 1 of 3", False)
    assert restarts.next_deadline_s() == home.now_s + LEAST_START_DEADLINE_S
    report(home, restarts)
    assert not restarts.is_any_coming_back


def test_a_start_whose_node_ends_is_no_try_and_the_next_one_asks_the_others_as_well(home: Home) -> None:
    restarts = restarts_at(home, tries=1)
    restarts.on_lost(0, "it ended")
    for _ in range(3):
        pass_time(home, restarts)
        home.starts[-1].processes[1].has_lost_node = True  # the other rank may be seen to have ended first
        end_processes(home, restarts, "its node ended")
        assert home.said[-1] == (0, "its node ended; it is started again in 1 s, try 1 of 1", False)
    pass_time(home, restarts)
    assert home.from_others == [True] * 4
    assert restarts.incarnation(0) == 4
    report(home, restarts)
    assert not restarts.is_any_coming_back


@dataclass
class Ports:
    scheduler_input_ipc_name: str = ""
    nccl_port: int = 0


def test_ranks_that_were_started_before_a_start_failed_are_killed_and_then_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    socket, waits = Socket(), list[list[bool]]()
    monkeypatch.setattr(replica_start, "requests_socket", lambda *of: (socket, "ipc://requests"))
    monkeypatch.setattr(replica_start, "await_exits", lambda some: waits.append([each.is_killed for each in some]))
    controller = SimpleNamespace(
        server_args=SimpleNamespace(kunserve_directory="/"),
        port_args=Ports(),
        scheduler_procs=[],
        max_total_num_tokens=1,
        max_req_input_len=1,
        starts=contextlib.nullcontext,
    )

    def launch(*of: Any) -> None:
        controller.scheduler_procs += [Process(), Process()]
        raise OSError("no memory for a third one")

    controller.launch_tensor_parallel_group = launch
    with pytest.raises(OSError, match="for a third one"):
        start_replica(controller, 1, 1, {})
    assert waits == [[True, True]]
    assert socket.is_closed
    assert controller.scheduler_procs == []
