"""How the launcher ends a server that cannot go on: every open request is answered with the reason, which is also the
last line of the log, and the exit code is not 0.

SGLang's way answers nobody: requests hang while it waits for core dumps of GPUs, a minute in all, and then break.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, NoReturn

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.tokenizer_manager import SignalHandler
from sglang.srt.utils import kill_process_tree
from sglang.srt.utils.cudacore_pyspy_dump_utils import (
    collect_scheduler_processes,
    pyspy_dump_schedulers,
    trigger_cuda_user_coredump,
)
from typing_extensions import override

from kunserve_sgl.integration.attach import last_words

logger = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGINT  # exit code, as a shell says it
# For answers to get to their clients. A client that does not read its answer, or a route that waits for a process that
# is gone, must not keep the server.
_ANSWERS_DEADLINE_S = 5.0
# For stacks of the schedulers, where py-spy is there; a scheduler that is stopped may keep it waiting.
_STACKS_DEADLINE_S = 10.0
_SETTLE_S = 5.0  # as SGLang, before core dumps of a GPU
_KILL_DEADLINE_S = 20.0
_POLL_S = 0.02


class OpenCalls:
    """Counts, as ASGI middleware, the HTTP requests that have not been answered to the end."""

    count = 0

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on; one of HTTP counts as open until its answer has been sent."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        OpenCalls.count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            OpenCalls.count -= 1


class Ending:
    """Ends a launcher that serves."""

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager
        self.reason: str | None = None  # once it has begun

    def begin(self) -> None:
        """Answers what is open, and lets the process end a little later, from a thread, so that the answers get out and
        nothing that hangs in the loop can keep it. It is called in the event loop."""
        if self.reason is not None:
            return
        watchdog = self._manager._subprocess_watchdog
        processes = [] if watchdog is None else list(zip(watchdog._names, watchdog._processes, strict=True))
        if watchdog is not None:
            watchdog.stop()
        arguments = self._manager.server_args
        ended = [(name, process.exitcode) for name, process in _named(processes, arguments.dp_size)]
        self.reason = last_words.reason_of_end(
            arguments.kunserve_directory, [(name, code) for name, code in ended if code], is_starting=False
        )
        logger.error("KunServe: the server ends: %s", self.reason)
        self._manager.dump_requests_before_crash()  # as long as it is known which are open
        for name in list(self._manager.rid_to_state):
            self.answer(name)
        threading.Thread(target=self._finish, name="kunserve-ending", daemon=True).start()

    def answer(self, name: str) -> None:
        """Answers one request with 503 and the reason."""
        message = f"the server ends: {self.reason}"
        finish = {"type": "abort", "status_code": int(HTTPStatus.SERVICE_UNAVAILABLE), "message": message}
        self._manager.answer(AbortReq(rid=name, finished_reason=finish))

    def _finish(self) -> None:
        assert self.reason is not None
        try:
            ends_at_s = time.monotonic() + _ANSWERS_DEADLINE_S
            while OpenCalls.count and time.monotonic() < ends_at_s:
                time.sleep(_POLL_S)
            time.sleep(_POLL_S)  # what has been written last leaves with the loop's next round
            _diagnose()
        finally:
            end_now(self.reason)


class KunserveSignalHandler(SignalHandler):  # type: ignore[misc]
    """Begins the end on SIGQUIT, which says that a child has failed; SGLang's watchdog sends it too, when a child has
    ended."""

    @override
    def running_phase_sigquit_handler(self, signum: Any = None, frame: Any = None) -> None:
        self.tokenizer_manager.ending.begin()


def end_on_sigquit_during_start(directory: str, children: Sequence[tuple[str, Any]], replicas: int) -> None:
    """Lets SIGQUIT end the start with the reason, until the server takes requests. `children` may grow."""

    def end(signum: Any = None, frame: Any = None) -> None:
        end_now(f"the server has not started: {reason_of_failed_start(directory, children, replicas)}")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGQUIT, end)


def warm_up(server_args: Any) -> bool:
    """Sends SGLang's first requests, as its `execute_warmup_func`, and tells whether they succeeded. Where one fails,
    SGLang would kill this process: without an exit code that says so, and with nothing but the client's traceback as
    the reason."""
    from sglang.srt.entrypoints import http_server

    def end(pid: int) -> None:
        reason = last_words.first_words(server_args.kunserve_directory) or "the log says more"
        end_now(f"the server has not started: its first request has failed: {reason}")

    kill = http_server.kill_process_tree
    http_server.kill_process_tree = end
    try:
        return bool(http_server._execute_server_warmup(server_args))
    finally:
        http_server.kill_process_tree = kill


def reason_of_failed_start(directory: str, children: Sequence[tuple[str, Any]], replicas: int) -> str:
    """Returns what the child that failed first has left, or how it ended. `children` have SGLang's names."""
    ended = [(name, child.exitcode) for name, child in _named(children, replicas) if child.exitcode]
    return last_words.reason_of_end(directory, ended, is_starting=True)


def end_now(reason: str) -> NoReturn:
    """Ends all children and this process; the reason is the last line that any of them writes."""
    end_with(last_words.FAILED, f"KunServe: {reason}")


def end_with(exit_code: int, last_line: str | None = None) -> NoReturn:
    """Ends all children and this process. What lies on the disk or in shared memory is the reaper's."""
    try:
        try:
            kill_process_tree(os.getpid(), include_parent=False, wait_timeout=_KILL_DEADLINE_S)
        except RuntimeError as error:
            logger.error("KunServe: %s", error)
        if last_line is not None:
            _silence_other_threads()
            logger.error("%s", last_line)
    finally:
        last_words.end_process(exit_code)


def _silence_other_threads() -> None:
    """From now on only this thread logs, for the rest of the process: the HTTP server still answers requests."""
    loggers = [
        logging.root,
        *(each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)),
    ]
    for handler in {handler for each in loggers for handler in each.handlers}:
        handler.acquire()


def _named(processes: Sequence[tuple[str, Any]], replicas: int) -> list[tuple[str, Any]]:
    """Gives children our names: with several replicas, what SGLang calls its first scheduler is the controller."""
    return [(last_words.CONTROLLER if replicas > 1 and name == "scheduler_0" else name, p) for name, p in processes]


def _diagnose() -> None:
    """Writes down what SGLang writes down before it ends: stacks of the schedulers that are left and, only where there
    are GPUs that can have them, core dumps."""
    schedulers = collect_scheduler_processes()
    dumps_cores = (
        envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.get()
        and torch.cuda.is_available()
        and os.environ.get("CUDA_ENABLE_USER_TRIGGERED_COREDUMP") == "1"
    )
    if schedulers and dumps_cores:
        time.sleep(_SETTLE_S)
    if schedulers and envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.get():
        stacks = threading.Thread(target=pyspy_dump_schedulers, kwargs={"scheduler_only": True}, daemon=True)
        stacks.start()
        stacks.join(_STACKS_DEADLINE_S)
    if schedulers and dumps_cores:
        trigger_cuda_user_coredump(scheduler_only=True)
        seconds = envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS.get()
        logger.info("KunServe: waits %g s for core dumps of the GPUs", seconds)
        time.sleep(seconds)
