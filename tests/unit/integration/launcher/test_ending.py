"""The launcher's end: everybody gets an answer first, and nothing is waited for that cannot come."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.entrypoints import http_server
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import FlushCacheReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.launcher import ending, tokenizer_manager
from kunserve_sgl.integration.launcher.ending import Ending, KunserveSignalHandler, OpenCalls, warm_up
from kunserve_sgl.integration.launcher.tokenizer_manager import KunserveTokenizerManager

DEADLINE_S = 300.0


@dataclass
class Request:
    rid: str


class Watchdog:
    """SGLang's, which knows the launcher's children."""

    def __init__(self, **exit_codes: int | None) -> None:
        self._names = list(exit_codes)
        self._processes = [SimpleNamespace(exitcode=code) for code in exit_codes.values()]
        self.stopped = 0

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reasons that this process would have ended with, instead of the end."""
    found: list[str] = []
    happened = threading.Event()

    def end_now(reason: str) -> None:
        found.append(reason)
        happened.set()

    monkeypatch.setattr(ending, "end_now", end_now)
    monkeypatch.setattr(last_words, "_mine", None)
    return SimpleNamespace(reasons=found, wait=lambda: happened.wait(DEADLINE_S))


def manager(directory: Path, **exit_codes: int | None) -> Any:
    made = KunserveTokenizerManager.__new__(KunserveTokenizerManager)
    made.server_args = SimpleNamespace(kunserve_directory=str(directory), dp_size=2)
    made._subprocess_watchdog = Watchdog(**exit_codes)
    made.rid_to_state = {"a": None, "b": None}
    made.crash_dump_folder = ""
    made.tokenizer_ipc_name = None
    answered: list[tuple[str, int, str]] = []
    made.answered = answered

    def answer(message: Any) -> None:
        finish = message.finished_reason
        answered.append((message.rid, finish["status_code"], finish["message"]))

    made.answer = answer
    made.continuations = SimpleNamespace(on_sent=lambda request: None)
    made.ending = Ending(made)
    return made


def test_open_requests_are_answered_and_then_the_process_ends(tmp_path: Path, ends: Any) -> None:
    made = manager(tmp_path, scheduler_0=None, detokenizer=-9)
    KunserveSignalHandler(made).running_phase_sigquit_handler()
    KunserveSignalHandler(made).running_phase_sigquit_handler()
    reason = "detokenizer ended with exit code -9"
    assert made.answered == [(name, 503, f"the server ends: {reason}") for name in "ab"]
    assert made._subprocess_watchdog.stopped == 1
    assert ends.wait()
    assert ends.reasons == [reason]


def test_the_controllers_reason_is_the_servers(tmp_path: Path, ends: Any) -> None:
    last_words.sign_up(str(tmp_path), last_words.CONTROLLER)
    last_words.leave(TypeError("no"))
    made = manager(tmp_path, scheduler_0=0, detokenizer=None)
    made.ending.begin()
    assert ends.wait()
    assert ends.reasons == ["TypeError: no"]


def test_killed_controller_is_called_by_its_name(tmp_path: Path, ends: Any) -> None:
    made = manager(tmp_path, scheduler_0=-9, detokenizer=None)
    made.ending.begin()
    assert ends.wait()
    assert ends.reasons == ["data-parallel controller ended with exit code -9"]


def test_the_end_waits_for_answers_on_their_way(tmp_path: Path, ends: Any) -> None:
    async def run() -> None:
        made = manager(tmp_path, detokenizer=-9)
        may_end = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await may_end.wait()

        call = asyncio.ensure_future(OpenCalls(app)({"type": "http"}, None, None))
        lifespan = asyncio.ensure_future(OpenCalls(app)({"type": "lifespan"}, None, None))
        await asyncio.sleep(0)
        assert OpenCalls.count == 1, "the server's own life is no request"
        made.ending.begin()
        await asyncio.sleep(0)
        assert ends.reasons == []
        may_end.set()
        await call
        await lifespan
        assert OpenCalls.count == 0
        assert await asyncio.to_thread(ends.wait)

    asyncio.run(run())


def test_a_client_that_does_not_take_its_answer_does_not_keep_the_server(
    tmp_path: Path, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "_ANSWERS_DEADLINE_S", 0.1)
    monkeypatch.setattr(OpenCalls, "count", 1)
    manager(tmp_path, detokenizer=-9).ending.begin()
    assert ends.wait()


def test_requests_that_come_while_the_server_ends_are_answered_too(
    tmp_path: Path, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = manager(tmp_path, detokenizer=-9)
    sent: list[Any] = []
    monkeypatch.setattr(TokenizerManager, "_dispatch_to_scheduler", lambda self, message: sent.append(message))
    monkeypatch.setattr(tokenizer_manager, "_REQUESTS", (Request,))
    monkeypatch.setattr(tokenizer_manager, "_BATCHES", (list,))
    one, two = Request("c"), Request("d")

    async def run() -> None:
        made._dispatch_to_scheduler(one)
        assert sent == [one]
        made.ending.begin()
        made.answered.clear()
        made._dispatch_to_scheduler(one)
        made._dispatch_to_scheduler([one, two])
        assert made.answered == []  # SGLang has to find them first
        await asyncio.sleep(0)
        made._dispatch_to_scheduler(FlushCacheReqInput())

    asyncio.run(run())
    assert [name for name, *_ in made.answered] == ["c", "c", "d"]
    assert len(sent) == 2
    assert ends.wait()


def test_core_dumps_are_waited_for_where_there_is_a_gpu_that_may_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(ending, "collect_scheduler_processes", lambda: ["a scheduler"])
    monkeypatch.setattr(ending, "pyspy_dump_schedulers", lambda scheduler_only: done.append("stacks"))
    monkeypatch.setattr(ending, "trigger_cuda_user_coredump", lambda scheduler_only: done.append("core"))
    monkeypatch.setattr(time, "sleep", lambda seconds: done.append(f"{seconds:g} s"))
    monkeypatch.setenv("CUDA_ENABLE_USER_TRIGGERED_COREDUMP", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ending._diagnose()
    assert done == ["stacks"]
    done.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ending._diagnose()
    assert done == ["5 s", "stacks", "core", "60 s"]
    done.clear()
    monkeypatch.setattr(ending, "collect_scheduler_processes", list)
    ending._diagnose()
    assert done == []


def test_requests_are_dumped_without_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = manager(tmp_path)
    asked: list[tuple[bool, bool]] = []

    def dump(self: Any) -> None:
        asked.append((envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.get(), envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.get()))

    monkeypatch.setattr(TokenizerManager, "dump_requests_before_crash", dump)
    made.dump_requests_before_crash()
    assert asked == [(False, False)]
    assert envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.get()


@pytest.mark.parametrize("words", ["RuntimeError: no driver", None])
def test_a_failed_first_request_ends_the_start_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: Any, words: str | None
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(http_server, "kill_process_tree", killed.append)
    if words is not None:
        last_words.sign_up(str(tmp_path), "replica 1 rank 0")
        last_words.leave(words)

    def first_request(server_args: Any) -> bool:
        http_server.kill_process_tree(os.getpid())
        return False

    monkeypatch.setattr(http_server, "_execute_server_warmup", first_request)
    assert not warm_up(SimpleNamespace(kunserve_directory=str(tmp_path)))
    why = "the log says more" if words is None else f"replica 1 rank 0: {words}"
    assert ends.reasons == [f"the server has not started: its first request has failed: {why}"]
    http_server.kill_process_tree(5)
    assert killed == [5]


def test_a_first_request_that_succeeds_ends_nothing(monkeypatch: pytest.MonkeyPatch, ends: Any) -> None:
    monkeypatch.setattr(http_server, "_execute_server_warmup", lambda server_args: True)
    assert warm_up(SimpleNamespace(kunserve_directory=""))
    assert not ends.reasons


def end_while_others_log(fd: int) -> None:
    """In a process of its own: the other threads have all the time to write behind the last line."""
    stream = os.fdopen(fd, "w")

    def write(text: str) -> None:
        os.write(fd, text.encode())
        if "the reason" in text:
            time.sleep(0.3)

    stream.write = write  # type: ignore[assignment,method-assign]
    access = logging.getLogger("uvicorn.access")
    access.setLevel(logging.INFO)
    for logger in (logging.root, access):
        logger.handlers = [logging.StreamHandler(stream)]
    access.propagate = False
    logged = threading.Event()

    def answer() -> None:
        while True:
            access.info("an answer")
            logged.set()
            time.sleep(0.001)

    threading.Thread(target=answer, daemon=True).start()
    logged.wait(DEADLINE_S)
    ending.end_with(3, "the reason")


def test_the_reason_is_the_last_line_although_requests_are_still_answered() -> None:
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            end_while_others_log(write_fd)
        finally:
            os._exit(1)
    os.close(write_fd)
    with os.fdopen(read_fd) as output:
        lines = output.read().splitlines()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert lines[0] == "an answer"
    assert lines[-1] == "the reason"
