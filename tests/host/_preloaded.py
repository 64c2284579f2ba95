"""A process from which servers start that do not import SGLang any more: a start takes a fraction of the time.

    with Preloaded() as preloaded:
        with ServerProcess(command, port=port, popen=preloaded.popen) as server: ...

Make one per test run, in the main thread: it ends with the thread that made it. `popen` takes any command. What cannot
start so is started as ever: other programs than `python -m kunserve_sgl.launch_server`, servers with `--kunserve off`,
and such whose environment differs in a variable that imported modules have read.

A server is the same to a test but for one thing: its processes have no environment of their own in /proc, and a
`sitecustomize` is not imported again. Tests of starts, ends, attachment and memory start real interpreters.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection
from types import TracebackType
from typing import Any, NoReturn

from kunserve_sgl.integration.attach import fork_server, forked_process, preload

MODULE = "kunserve_sgl.launch_server"
IMPORT_DEADLINE_S = 300.0
END_DEADLINE_S = 20.0
# Each server has its own, for what it makes after the fork.
_OWN_VARIABLES = {"TMPDIR"}


class Preloaded:
    """The process, and what starts servers from it."""

    def __init__(self) -> None:
        # Tests give it to their servers: what computes a batch must not take the cores of the others.
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> Preloaded:
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env=self._environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._orders = orders
        self._server = fork_server.ForkServer(orders, self._process.pid)
        if not select.select([self._process.stdout], [], [], IMPORT_DEADLINE_S)[0]:
            self._end()
            raise TimeoutError(f"SGLang was not imported within {IMPORT_DEADLINE_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            self._end()
            raise RuntimeError("the process that imports SGLang has ended")
        self._variables_read = frozenset(json.loads(line)) - _OWN_VARIABLES
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._orders.close()
        self._process.kill()
        self._process.communicate(timeout=END_DEADLINE_S)

    def popen(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: Any,
        stderr: int,
        env: Mapping[str, str],
        pass_fds: Sequence[int],
        start_new_session: bool,
    ) -> subprocess.Popen[bytes] | ForkedServer:
        """As `subprocess.Popen` with these arguments."""
        if not self._can_fork(command, env):
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=env,
                pass_fds=pass_fds,
                start_new_session=start_new_session,
            )
        assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
        reader, writer = connection.Pipe(duplex=False)
        with reader, writer:
            pid, status = self._server.fork([reader.fileno(), stdout.fileno(), *pass_fds])
            # The guard of a server is told who its parent is, and stops when that has changed.
            told = [str(self._process.pid) if each == str(os.getpid()) else each for each in command]
            writer.send((told, dict(env), os.getcwd(), list(pass_fds), start_new_session))
        return ForkedServer(command, pid, status)

    def _can_fork(self, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        if MODULE not in command or not preload.is_attached(command[command.index(MODULE) + 1 :]):
            return False
        return not forked_process.seen_too_early(self._environment, environment, self._variables_read)


class ForkedServer:
    """What of `subprocess.Popen` those need who start servers."""

    def __init__(self, command: Sequence[str], pid: int, status: int) -> None:
        self.args = command
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not connection.wait([self._status], timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = fork_server.read_exit_code(self._status)
            os.close(self._status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# In the process that has imported SGLang


def _main() -> int:
    orders, starter = map(int, sys.argv[1:])
    print(json.dumps(sorted(preload.import_all())), flush=True)
    return fork_server.serve(socket.socket(fileno=orders), starter, _run_child)


def _run_child(files: Sequence[int]) -> int:
    """Becomes what `subprocess.Popen` would have started."""
    order, output, *passed = files
    with connection.Connection(order, writable=False) as reader:
        command, environment, directory, numbers, new_session = reader.recv()
    if new_session:
        os.setsid()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.modules["numpy"].random.seed()  # type: ignore[attr-defined]
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    for file, number in zip(passed, numbers, strict=True):
        if file != number:
            os.dup2(file, number)
            os.close(file)
    os.execvp = _exec  # type: ignore[assignment]  # the guard of a server starts it so
    return _run_python(command)


def _exec(file: str, command: Sequence[str]) -> NoReturn:
    """As `os.execvp`, but Python goes on in this interpreter."""
    assert file == sys.executable
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fork_server.run_forked(lambda: _run_python(command))


def _run_python(command: Sequence[str]) -> int:
    """Runs what the interpreter would run: a module, or a script."""
    arguments: list[str] = [*command[1:]]
    while arguments[0] in ("-I", "-S"):
        arguments.pop(0)
    run: Callable[..., Any] = runpy.run_path
    options: dict[str, Any] = {}
    if arguments[0] == "-m":
        arguments.pop(0)
        run, options = runpy.run_module, {"alter_sys": True}
    sys.argv = arguments
    try:
        run(arguments[0], run_name="__main__", **options)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


if __name__ == "__main__":
    sys.exit(_main())
