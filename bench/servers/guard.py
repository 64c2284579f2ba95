"""Runs one command and lets no process of it outlive the guard's parent; used by `server.ServerProcess`.

    python guard.py LIFELINE_FD PARENT_PID GRACE_S TEMPORARY_DIRECTORY COMMAND...

The guard is the subreaper of everything the command starts: whatever a dying process leaves behind becomes
the guard's child, also from other sessions and process groups, so that nothing can slip away. It stops the
command when the lifeline closes (the parent closed it, or died in any way, SIGKILL included) or on SIGTERM:
SIGTERM to the command, after the grace SIGKILL to all that is left; when it has ended before, what is left has the
grace as well. It ends when it has no child left, with
the command's exit status, or 128 + signal number. Shared memory files that the processes had mapped and nobody
removed are removed (SGLang leaves its load snapshots behind). Only the standard library: it has to start fast.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# What the command leaves behind may still clean up: multiprocessing's resource tracker removes shared memory.
_LEAST_LEFTOVER_GRACE_S = 2.0
_KILL_DEADLINE_S = 20.0
_POLL_S = 0.5
_SHARED_MEMORY = "/dev/shm/"
CANNOT_KILL_STATUS = 125
# The longest a stop takes beyond twice the grace, with some slack.
STOP_DEADLINE_S = _LEAST_LEFTOVER_GRACE_S + _KILL_DEADLINE_S + 5.0


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def descendants(root_pid: int) -> list[int]:
    """Pids of all live descendants of a process, from /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        # A process may end while the table is read.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                # The command name is in brackets and may hold spaces and brackets itself.
                state, parent = file.read().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(entry))
    found: list[int] = []
    pending = [root_pid]
    while pending:
        below = children.get(pending.pop(), [])
        found += below
        pending += below
    return found


def shared_memory_inodes(pid: int) -> set[int]:
    """Inodes of the files below /dev/shm that a process has mapped; empty when it has ended.

    Inodes and not names: a semaphore is mapped under a temporary name that is deleted once it has its own.
    """
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
            return {int(line.split()[4]) for line in file if _SHARED_MEMORY in line}
    except (FileNotFoundError, ProcessLookupError):
        return set()


class _Guard:
    def __init__(self, lifeline_fd: int, parent_pid: int, grace_s: float) -> None:
        self._lifeline_fd = lifeline_fd
        self._parent_pid = parent_pid
        self._grace_s = grace_s
        self._status: int | None = None
        self._terminated = False
        self._stopping = False
        self._shared_memory: set[int] = set()
        # Signals wake the poll through this pipe, so none is lost between a check and the wait.
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(self, command: list[str]) -> int:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        guard_pid = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._lifeline_fd)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                # Should somebody kill the guard itself, the command goes with it.
                _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != guard_pid:  # it was killed before this was asked for
                    os._exit(1)
                os.execvp(command[0], command)
            except OSError as error:
                print(f"guard: cannot run {command[0]}: {error}", file=sys.stderr, flush=True)
                os._exit(127)
        # Looking through the mappings costs the processes a little, so less and less often: a server that
        # crashes is in most cases either young or has had its files for long.
        started_at_s, next_look_s = time.monotonic(), 1.0
        while self._reap() and not self._should_stop():
            self._wait(_POLL_S)
            if time.monotonic() - started_at_s >= next_look_s:
                self._note_shared_memory()
                next_look_s *= 2
        self._note_shared_memory()
        self._stopping = True
        if self._status is None:
            os.kill(self._pid, signal.SIGTERM)
            self._wait_for(lambda: self._status is not None, self._grace_s)
        if self._status is not None:
            self._wait_for(lambda: not self._reap(), max(self._grace_s, _LEAST_LEFTOVER_GRACE_S))
        self._wait_for(self._killed_all, _KILL_DEADLINE_S)
        self._remove_shared_memory()
        if self._reap() or self._status is None:
            print(f"guard: cannot kill {[self._pid, *descendants(os.getpid())]}", file=sys.stderr, flush=True)
            return CANNOT_KILL_STATUS
        return self._status

    def _note_shared_memory(self) -> None:
        for pid in descendants(os.getpid()):
            self._shared_memory |= shared_memory_inodes(pid)

    def _remove_shared_memory(self) -> None:
        for entry in os.scandir(_SHARED_MEMORY) if self._shared_memory else ():
            # The owner may remove it in the same moment.
            with contextlib.suppress(FileNotFoundError):
                if entry.inode() in self._shared_memory:
                    os.unlink(entry.path)

    def _on_term(self, *_: object) -> None:
        self._terminated = True

    def _should_stop(self) -> bool:
        # The lifeline may be held open by a copy in another process; a changed parent says the same.
        closed = bool(_readable([self._lifeline_fd], 0.0))
        return self._status is not None or self._terminated or closed or os.getppid() != self._parent_pid

    def _reap(self) -> bool:
        """Collect what has ended; False when no child, and so no descendant, is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code

    def _killed_all(self) -> bool:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not self._reap()

    def _wait_for(self, condition: Callable[[], bool], deadline_s: float) -> None:
        end_s = time.monotonic() + deadline_s
        while self._reap() and not condition() and time.monotonic() < end_s:
            self._wait(min(_POLL_S, max(0.0, end_s - time.monotonic())))

    def _wait(self, timeout_s: float) -> None:
        # A closed lifeline stays readable: watched while stopping, it would turn the wait into a busy loop.
        watched = [self._wake_read] if self._stopping else [self._wake_read, self._lifeline_fd]
        ready = _readable(watched, timeout_s)
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)


def _readable(files: list[int], timeout_s: float) -> set[int]:
    """Those that can be read, or are closed at their other end. Not select(), which takes no number above 1,023."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return {file for file, _ in poll.poll(timeout_s * 1000)}


def main() -> int:
    """Parse the fixed arguments and guard the command."""
    lifeline_fd, parent_pid, grace_s, tmp_dir, *command = sys.argv[1:]
    status = _Guard(int(lifeline_fd), int(parent_pid), float(grace_s)).run(command)
    if os.getppid() != int(parent_pid):
        # The parent removes the directory itself, after it has read the log in it; this one is dead.
        shutil.rmtree(tmp_dir, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
