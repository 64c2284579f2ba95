"""What a replica leaves of the requests with which it had begun, however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kunserve_sgl.control import begun_requests
from kunserve_sgl.control.begun_requests import BegunRequests, begun_numbers, begun_of, leave_begun

NAMES = [f"request {number}" for number in range(20)]


def test_a_process_that_is_killed_leaves_what_it_had_begun_with(tmp_path: Path) -> None:
    path = str(tmp_path / "begun")
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        notes = BegunRequests(path)
        notes.begin_taking_in(NAMES[3])
        notes.end_taking_in()
        notes.add(NAMES[:2])
        notes.begin_taking_in(NAMES[7])
        os.write(writer, b".")
        signal.pause()
    os.read(reader, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for end in (reader, writer):
        os.close(end)
    assert begun_of(path, NAMES) == [NAMES[0], NAMES[1], NAMES[7]]
    assert begun_of(path, reversed(NAMES[:2])) == [NAMES[1], NAMES[0]]


def test_who_left_nothing_had_begun_with_nothing(tmp_path: Path) -> None:
    assert begun_of(str(tmp_path / "missing"), NAMES) == []
    BegunRequests(str(tmp_path / "begun")).close()
    assert begun_of(str(tmp_path / "begun"), [*NAMES, ""]) == []


def test_the_latest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(begun_requests, "MOST_KEPT", 4)
    notes = BegunRequests(str(tmp_path / "begun"))
    for name in NAMES[:3]:
        notes.add([name])
    for _ in range(10):  # of chunks, or in mixed batches: those take no more room
        notes.add(NAMES[:3])
    notes.add([NAMES[3]])
    assert begun_of(str(tmp_path / "begun"), NAMES) == NAMES[:4]
    notes.add(NAMES[4:6])
    assert begun_of(str(tmp_path / "begun"), NAMES) == NAMES[2:6]
    notes.add(NAMES[:1])
    assert begun_of(str(tmp_path / "begun"), NAMES) == [NAMES[0], *NAMES[3:6]]
    notes.close()


def test_what_another_machine_knew_is_known_here_or_everything_is_doubted(tmp_path: Path) -> None:
    there, here = str(tmp_path / "there"), str(tmp_path / "here")
    assert begun_numbers(there) is None
    notes = BegunRequests(there)
    notes.add(NAMES[:3])
    notes.begin_taking_in(NAMES[5])
    notes.close()
    numbers = begun_numbers(there)
    assert numbers is not None
    assert len(numbers) == 4 * 8
    leave_begun(here, numbers)
    assert begun_of(here, NAMES) == [*NAMES[:3], NAMES[5]]
    leave_begun(here, None)
    assert begun_of(here, NAMES) == list(NAMES)
