"""A process that forks children on order, in the state in which it was forked off itself.

A starter forks its fork server off while it has one thread; from then on that process only waits. It forks a child for
every order that comes through a socket, and says with which exit code the child has ended. When the starter ends, in
whatever way, the kernel kills its fork server, and with that the children.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import NoReturn

from kunserve_sgl import exits
from kunserve_sgl.errors import TransientError

_INTEGER = struct.Struct("q")
_TITLE = "kunserve::fork_server"
_PR_SET_PDEATHSIG = 1
_ANSWER_DEADLINE_S = 30.0
_MOST_FILES = 64  # with one order
# Threads that their library expects to be missing after a fork.
_HARMLESS_THREADS = {"jemalloc_bg_thd"}


class ForkServerError(TransientError):
    """Says that the fork server could not do what it was asked for."""


class ForkServer:
    """Orders children, at the starter's end."""

    def __init__(self, orders: socket.socket, pid: int) -> None:
        """`orders` is the other end of the socket that the process `pid` serves."""
        self._orders = orders
        self._pid = pid

    @classmethod
    def start(cls, run_child: Callable[[Sequence[int]], int]) -> ForkServer:
        """Forks one off this process. Its children call `run_child` with the files of their order, and end with the
        exit code that it returns. Raises ForkServerError where this process has threads that a child would miss."""
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        starter = os.getpid()
        _flush()
        pid = os.fork()
        if pid == 0:
            orders.close()
            run_forked(lambda: serve(theirs, starter, run_child))
        theirs.close()
        server = cls(orders, pid)
        # A thread that the fork itself has ended is one of a library that prepares for forks.
        if threads := _other_threads():
            server.end()
            raise ForkServerError(f"this process has other threads: {', '.join(threads)}")
        return server

    def fork(self, files: Sequence[int]) -> tuple[int, int]:
        """Starts a child that gets copies of these files. Returns its pid, and a file that brings its exit code as the
        standard library's fork server says it. Raises ForkServerError, OSError."""
        status, status_write = os.pipe()
        try:
            socket.send_fds(self._orders, [b"fork"], [status_write, *files])
        finally:
            os.close(status_write)
        if connection.wait([status], _ANSWER_DEADLINE_S) and (pid := os.read(status, _INTEGER.size)):
            return _INTEGER.unpack(pid)[0], status
        os.close(status)
        raise ForkServerError("the fork server has not started a process")

    def end(self) -> None:
        """Ends the fork server and its children. Raises ForkServerError where the system does not end it in time."""
        self._orders.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        if not exits.is_gone_in_time(lambda: not os.waitpid(self._pid, os.WNOHANG)[0]):
            raise ForkServerError(
                f"the fork server, process {self._pid}, does not end within {exits.EXIT_DEADLINE_S:g} s"
            )


def serve(orders: socket.socket, starter: int, run_child: Callable[[Sequence[int]], int]) -> int:
    """Makes this process, a child of `starter`, the fork server for what comes through `orders`. Returns the exit code
    for this process."""
    return _Loop(orders, starter, run_child).run()


class _Loop:
    def __init__(self, orders: socket.socket, starter: int, run_child: Callable[[Sequence[int]], int]) -> None:
        self._orders = orders
        self._starter = starter
        self._run_child = run_child
        self._statuses: dict[int, int] = {}  # where the exit codes of the children go, by pid

    def run(self) -> int:
        _end_with(self._starter)
        _set_title()
        # A child that fails tells its parent by SIGQUIT, and means its starter.
        quit_before = signal.signal(signal.SIGQUIT, lambda *_: os.kill(self._starter, signal.SIGQUIT))
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # at a terminal it goes to all; the starter decides
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._wake = os.pipe()
        for end in self._wake:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake[1])
        # A new interpreter goes on ignoring what is ignored, as in a server that a shell runs in the background.
        quits = signal.SIG_IGN if quit_before is signal.SIG_IGN else signal.SIG_DFL
        self._handlers = {signal.SIGQUIT: quits, signal.SIGCHLD: signal.SIG_DFL, signal.SIGINT: interrupt}
        poll = select.poll()  # select() takes no file with a number above 1,023
        for file in (self._orders.fileno(), self._wake[0]):
            poll.register(file, select.POLLIN)
        while True:
            ready = {file for file, _ in poll.poll()}
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake[0], 4096)
            self._tell_ends()
            if self._orders.fileno() in ready:
                message, files, _, _ = socket.recv_fds(self._orders, 16, _MOST_FILES)
                if not message:
                    return 0
                self._fork(files)

    def _fork(self, files: Sequence[int]) -> None:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            run_forked(lambda: self._be_child(server, *files))
        self._statuses[pid] = files[0]
        _tell(files[0], pid)
        for file in files[1:]:
            os.close(file)

    def _tell_ends(self) -> None:
        for pid, status in list(self._statuses.items()):
            ended, how = os.waitpid(pid, os.WNOHANG)
            if ended:
                _tell(status, os.waitstatus_to_exitcode(how))
                os.close(self._statuses.pop(pid))

    def _be_child(self, server: int, status: int, *files: int) -> int:
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        _end_with(server)
        self._orders.close()
        for file in (*self._wake, status, *self._statuses.values()):
            os.close(file)
        exit_code = self._run_child(files)
        atexit._run_exitfuncs()  # as at the end of an interpreter
        return exit_code


def run_forked(function: Callable[[], int]) -> NoReturn:
    """Is all that a process does that has just been forked: it never goes back to what it was forked from."""
    exit_code = 1
    try:
        exit_code = function()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            _flush()
        os._exit(exit_code)


def _flush() -> None:
    """Writes out what has been printed, which each fork would print again."""
    sys.stdout.flush()
    sys.stderr.flush()


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the starter does not want to know any more
        os.write(status, _INTEGER.pack(number))


def _set_title() -> None:
    import setproctitle  # SGLang's

    setproctitle.setproctitle(_TITLE)


def _other_threads() -> list[str]:
    """Returns the names of this process's threads but its first."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return sorted({(task / "comm").read_text().strip() for task in tasks} - _HARMLESS_THREADS)


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it had ended before
        os._exit(1)
