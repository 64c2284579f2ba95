"""Why a server ends, from what its processes have left and from how they ended."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kunserve_sgl import threads
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.controller import start_watch
from kunserve_sgl.integration.launcher.ending import reason_of_failed_start


@pytest.fixture(autouse=True)
def nobody_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_words, "_mine", None)


def leave(directory: Path, who: str, why: BaseException | str, at_s: int = 0) -> None:
    last_words.sign_up(str(directory), who)
    last_words.leave(why)
    os.utime(directory / "last-words" / who, (at_s, at_s))


def test_the_first_words_of_a_process_are_its_last(tmp_path: Path) -> None:
    last_words.leave("nobody has signed up")
    assert last_words.first_words(str(tmp_path)) is None
    last_words.sign_up(str(tmp_path), "replica 0 rank 1")
    assert last_words.words_of(str(tmp_path), "replica 0 rank 1") is None
    last_words.leave(ValueError("two\n  lines"))
    last_words.leave("what came of it")
    assert last_words.words_of(str(tmp_path), "replica 0 rank 1") == "ValueError: two lines"
    assert last_words.first_words(str(tmp_path)) == "replica 0 rank 1: ValueError: two lines"


def test_who_is_started_again_leaves_words_of_its_own(tmp_path: Path) -> None:
    leave(tmp_path, "replica 1 rank 0", "the first time")
    last_words.sign_up(str(tmp_path), "replica 1 rank 0")
    assert last_words.words_of(str(tmp_path), "replica 1 rank 0") is None
    last_words.leave("the second time")
    assert last_words.words_of(str(tmp_path), "replica 1 rank 0") == "the second time"


@pytest.mark.parametrize("incarnation", [0, 1])
def test_a_process_that_is_started_while_others_serve_ends_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, incarnation: int
) -> None:
    """At the first start the error goes on to SGLang, which ends the starter too."""
    ended: list[bool] = []
    monkeypatch.setattr(last_words, "end_process", lambda: ended.append(True))
    last_words.sign_up(str(tmp_path), "replica 1 rank 0")
    goes_on = contextlib.nullcontext() if incarnation else pytest.raises(ValueError, match="no model")
    with goes_on, last_words.ending_alone(SimpleNamespace(kunserve_incarnation=incarnation)):
        raise ValueError("no model")
    assert ended == [True] * incarnation
    assert last_words.words_of(str(tmp_path), "replica 1 rank 0") == "ValueError: no model"


def test_a_folder_that_is_gone_is_no_reason_to_fail(tmp_path: Path) -> None:
    last_words.sign_up(str(tmp_path), "detokenizer")
    (tmp_path / "last-words").rmdir()
    last_words.leave("the server's directory is removed at its end")


def test_own_errors_need_no_name_and_texts_are_cut(tmp_path: Path) -> None:
    leave(tmp_path, "a", TransientError("x" * 10_000))
    words = last_words.words_of(str(tmp_path), "a")
    assert words is not None
    assert set(words) == {"x"}
    assert len(words) == 1000


def test_a_failing_function_leaves_its_error_and_raises_it(tmp_path: Path) -> None:
    last_words.sign_up(str(tmp_path), "b")

    @last_words.left_by
    def divide(number: int, *, by: int) -> float:
        return number / by

    assert divide(1, by=2) == 0.5
    with pytest.raises(ZeroDivisionError):
        divide(1, by=0)
    assert last_words.words_of(str(tmp_path), "b") == "ZeroDivisionError: division by zero"


def test_reason_while_serving(tmp_path: Path) -> None:
    """A replica that has ended long ago, and without which the others went on, is not why."""
    directory = str(tmp_path)
    assert "log" in last_words.reason_of_end(directory, [], is_starting=False)
    leave(tmp_path, "replica 1 rank 0", "long ago", at_s=1)
    assert last_words.reason_of_end(directory, [("detokenizer", -9)], False) == "detokenizer ended with exit code -9"
    assert last_words.reason_of_end(directory, [], False) == "replica 1 rank 0: long ago"
    leave(tmp_path, last_words.DETOKENIZER, "no such token", at_s=2)
    assert last_words.reason_of_end(directory, [("detokenizer", 1)], False) == "detokenizer: no such token"
    leave(tmp_path, last_words.CONTROLLER, "all replicas have ended", at_s=3)
    assert last_words.reason_of_end(directory, [], False) == "all replicas have ended"


def test_reason_of_a_failed_start_is_that_of_the_first(tmp_path: Path) -> None:
    """The controller dies of what its schedulers tell it, and so may the others."""
    controller = SimpleNamespace(exitcode=None)
    children = [("scheduler_0", controller), ("detokenizer", SimpleNamespace(exitcode=None))]
    directory = str(tmp_path)
    assert "log" in reason_of_failed_start(directory, children, replicas=2)
    controller.exitcode = -3
    assert reason_of_failed_start(directory, children, 2) == "data-parallel controller ended with exit code -3"
    assert reason_of_failed_start(directory, children, 1) == "scheduler_0 ended with exit code -3"
    leave(tmp_path, "replica 1 rank 0", "out of memory", at_s=1)
    leave(tmp_path, "replica 0 rank 0", "lost its peer", at_s=2)
    assert reason_of_failed_start(directory, children, 2) == "replica 1 rank 0: out of memory"


def test_a_scheduler_that_ends_before_it_is_ready_ends_the_start(tmp_path: Path) -> None:
    processes = [SimpleNamespace(pid=7, exitcode=None)]
    reasons: list[str] = []
    with start_watch.StartWatch(str(tmp_path), processes, reasons.append):
        pass
    assert reasons == [], "all were ready"
    processes.append(SimpleNamespace(pid=8, exitcode=-9))
    with start_watch.StartWatch(str(tmp_path), processes, reasons.append) as watch:
        watch._thread.join(30)
    assert reasons == ["scheduler process 8 ended with exit code -9 before it was ready"]
    leave(tmp_path, "replica 1 rank 0", "no such file")
    assert start_watch.reason_of_lost(str(tmp_path), SimpleNamespace(pid=8, exitcode=1)) == (
        "replica 1 rank 0: no such file (scheduler process 8 ended with exit code 1 before it was ready)"
    )


def test_a_start_does_not_wait_for_ever_for_who_watched_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "END_DEADLINE_S", 0.01)
    has_seen, goes_on = threading.Event(), threading.Event()

    def end(reason: str) -> None:
        has_seen.set()
        goes_on.wait(30)

    watch = start_watch.StartWatch(str(tmp_path), [SimpleNamespace(pid=8, exitcode=-9)], end)
    with pytest.raises(TransientError, match="thread kunserve-start-watch has not ended within"), watch:
        assert has_seen.wait(30)
    goes_on.set()
    watch._thread.join(30)
    assert not watch._thread.is_alive()


def test_words_from_elsewhere_are_read_like_those_of_this_machine(tmp_path: Path) -> None:
    who = last_words.scheduler_name(1, 0)
    last_words.pass_on(str(tmp_path), who, "no room\nleft")
    assert last_words.words_of(str(tmp_path), who) == "no room left"
    last_words.pass_on(str(tmp_path), who, None)
    assert last_words.words_of(str(tmp_path), who) is None
