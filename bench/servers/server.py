"""Starts a command, an inference server above all, that leaves nothing behind: no process, socket or temporary file."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
from typing_extensions import Self

from servers import guard

HOST = "127.0.0.1"
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_EPHEMERAL_PORT = 32768  # where the system does not say
_FIRST_USER_PORT, _PORT_SPAN, _PORT_TRIES = 1024, 16384, 1000
_POLL_S = 0.25
# One /health call generates a token, and answers or fails within 20 s. The last one before the deadline has some time.
_HEALTH_TIMEOUT_S, _LEAST_HEALTH_TIMEOUT_S = 25.0, 5.0


class ServerError(RuntimeError):
    """The command did not start, died, or could not be stopped. The message holds the end of its log."""


def find_free_port() -> int:
    """A TCP port on the loopback interface that nothing listens on now. Not one of those that the kernel gives away,
    where it leaves some: the schedulers of a server listen on dozens of these before the server binds its own."""
    first = int(_EPHEMERAL_PORTS.read_text().split()[0]) if _EPHEMERAL_PORTS.exists() else _FIRST_EPHEMERAL_PORT
    others = range(max(_FIRST_USER_PORT, first - _PORT_SPAN), first)
    chance = random.SystemRandom()
    for _ in range(_PORT_TRIES):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, chance.choice(others) if len(others) > _PORT_TRIES else 0))
            port: int = probe.getsockname()[1]
            return port
    raise ServerError(f"{_PORT_TRIES} ports were tried, and none is free")


class GuardedProcess:
    """One command: started, watched and stopped together with everything it started.

    The command runs below a guard (`guard.py`), in a session of its own, so that Ctrl-C at a terminal reaches
    only this process, which then stops the command in order. When this process dies, however it does, the
    guard stops the command. Its temporary files (SGLang leaves its ipc sockets there) lie in a directory of its
    own, which is removed at the stop.

    Args:
        command: argument vector.
        env: additions to this process's environment.
        log_path: file for its output; by default in the command's temporary directory, so gone after the stop.
        grace_s: seconds between SIGTERM and SIGKILL at the stop, and for what the command leaves behind when it ends.
            SGLang 0.5.17 with more than one replica waits 20 s for schedulers that have ended already, so most of a
            longer grace would be idle waiting.
        popen: what starts the guard, with the interface of `subprocess.Popen`.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        grace_s: float = 5.0,
        popen: Callable[..., Any] = subprocess.Popen,
    ) -> None:
        self._command = list(command)
        self._env = dict(env or {})
        self._given_log_path = log_path
        self._grace_s = grace_s
        self._popen = popen
        self._process: Any = None
        self._lifeline_fd: int | None = None
        self._tmp_dir: Path | None = None
        self._log_path: Path | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the command, and wait for nothing.

        Raises:
            ServerError: it is already running.
        """
        if self._process is not None:
            raise ServerError(f"{self._command[0]} has been started already")
        # Kept short: a unix socket's path has at most 107 characters.
        self._tmp_dir = Path(tempfile.mkdtemp(prefix="serve-"))
        self._log_path = self._given_log_path or self._tmp_dir / "server.log"
        read_fd, self._lifeline_fd = os.pipe()
        guarded = [
            *(sys.executable, "-I", "-S", guard.__file__),
            *(str(read_fd), str(os.getpid()), str(self._grace_s), str(self._tmp_dir)),
            *self._command,
        ]
        try:
            with self._log_path.open("ab") as log:
                self._process = self._popen(
                    guarded,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "TMPDIR": str(self._tmp_dir), **self._env},
                    pass_fds=[read_fd],
                    start_new_session=True,
                )
        except BaseException:
            self._release()
            raise
        finally:
            os.close(read_fd)

    @property
    def running(self) -> bool:
        """Whether the command's guard is alive, and so possibly the command."""
        return self._process is not None and self._process.poll() is None

    @property
    def log_path(self) -> Path:
        """File with everything the command printed."""
        if self._log_path is None:
            raise ServerError("the command has not been started, so it has no log")
        return self._log_path

    @property
    def temporary_directory(self) -> Path:
        """Where the command makes its temporary files; it is removed at the stop."""
        if self._tmp_dir is None:
            raise ServerError("the command does not run, so it has no temporary directory")
        return self._tmp_dir

    def pids(self) -> list[int]:
        """Pids of the command and all its descendants, in whatever session; empty when it does not run."""
        if self._process is None or self._process.poll() is not None:
            return []
        return guard.descendants(self._process.pid)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of its output."""
        if self._log_path is None or not self._log_path.exists():
            return "(no output)"
        text = self._log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(text[-lines:]) or "(no output)"

    def wait_end(self, deadline_s: float) -> int | None:
        """Wait until the command has ended by itself, and everything that it started; its exit status, or 128 + signal
        number. None where that is not so within the deadline."""
        if self._process is None:
            raise ServerError(f"{self._command[0]} does not run")
        try:
            return int(self._process.wait(timeout=deadline_s))
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Stop the command and remove its temporary files. Does nothing when it does not run.

        The guard ends only when no descendant is left, so its end is the proof that nothing survived.

        Raises:
            ServerError: something could not be killed.
        """
        process, tail = self._process, ""
        if process is None:
            return
        survivors = self.pids()
        if self._lifeline_fd is not None:
            os.close(self._lifeline_fd)
            self._lifeline_fd = None
        try:
            status = process.wait(timeout=2 * self._grace_s + guard.STOP_DEADLINE_S)
            if status == guard.CANNOT_KILL_STATUS:
                tail = self.log_tail()
        except subprocess.TimeoutExpired:
            tail = self.log_tail()
        self._process = None
        self._release()
        if tail:
            raise ServerError(f"of the processes {survivors} some could not be stopped:\n{tail}")

    def _release(self) -> None:
        if self._lifeline_fd is not None:
            os.close(self._lifeline_fd)
            self._lifeline_fd = None
        if self._tmp_dir is not None:
            shutil.rmtree(self._tmp_dir, ignore_errors=True)
            self._tmp_dir = None


class ServerProcess(GuardedProcess):
    """A command that is a server. It must contain the host and `port`, where it is to listen on the loopback interface.
    Further arguments are those of `GuardedProcess`."""

    def __init__(self, command: Sequence[str], *, port: int, **details: Any) -> None:
        super().__init__(command, **details)
        self.port = port
        self.base_url = f"http://{HOST}:{port}"

    def wait_healthy(
        self, deadline_s: float, *, path: str = "/health", on_wait: Callable[[float], None] | None = None
    ) -> float:
        """Wait until `path` answers 200 and return the seconds that took.

        `on_wait` is called with the seconds waited, a few times a second, to show progress.

        Raises:
            ServerError: the server ended, or does not answer 200 within the deadline.
        """
        started_at_s = time.monotonic()
        last_answer = "no connection"
        while (waited_s := time.monotonic() - started_at_s) < deadline_s:
            if not self.running:
                status = None if self._process is None else self._process.returncode
                raise ServerError(f"the server ended with status {status} during start:\n{self.log_tail()}")
            if on_wait is not None:
                on_wait(waited_s)
            try:
                left_s = max(_LEAST_HEALTH_TIMEOUT_S, deadline_s - waited_s)
                answer = requests.get(self.base_url + path, timeout=min(_HEALTH_TIMEOUT_S, left_s))
                if answer.status_code == requests.codes.ok:
                    return time.monotonic() - started_at_s
                last_answer = f"status {answer.status_code}"
            except requests.ConnectionError:
                last_answer = "no connection"
            except requests.Timeout:
                last_answer = "no answer in time"
            time.sleep(_POLL_S)
        raise ServerError(f"the server is not healthy after {deadline_s:g} s ({last_answer}):\n{self.log_tail()}")


def remaining(pids: Sequence[int]) -> list[int]:
    """Those of `pids` that still exist and are no zombies; to check a stop from outside."""
    alive = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[0]
            if state != "Z":
                alive.append(pid)
    return alive


@contextlib.contextmanager
def others_stopped(server: ServerProcess, servers: Mapping[str, ServerProcess]) -> Iterator[None]:
    """While the block runs, only `server` gets the machine."""
    pids = [pid for other in servers.values() if other is not server for pid in other.pids()]
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
