"""A process from which servers start that do not import SGLang any more, which is most of what a start takes.

    with Preloaded() as preloaded:
        with ServerProcess(command, port=port, popen=preloaded.popen) as server: ...

Make one per test run, in the main thread: it ends with the thread that made it. `popen` takes the command of a server,
with a guard (`servers/guard.py`) or without, or of a program that needs SGLang: one that lies in `tests/host`, one of
SGLang's modules, or one in the command (`output_of`). Stock servers, and those with `--kunserve off`, are forked from a
second process, which has imported SGLang as it is; so are their children, by SGLang's own functions. What cannot start
so is started as ever: other programs, and servers whose environment differs in a variable that imported modules have
read. A `sitecustomize` in front of the Python path is imported, after SGLang.

A server is the same to a test but for one thing: its processes have no environment of their own in /proc. Tests of
starts, ends and attachment start real interpreters.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, NoReturn

from kunserve_sgl.integration.attach import fork_server, forked_process, preload
from servers import guard
from servers.command import KUNSERVE_SERVER, STOCK_SERVER

IMPORT_DEADLINE_S = 900.0
END_DEADLINE_S = 300.0
# What a server makes after the fork lies in the first. Of the other, modules want to know only whether it is there.
_OWN_VARIABLES = {"TMPDIR", "PYTEST_CURRENT_TEST"}
_PYTHON_PATH = "PYTHONPATH"
_SITE_MODULE = "sitecustomize"
# Where the file of its lifeline and its parent are in the arguments of a guard, from its own file.
_LIFELINE, _PARENT = 1, 2
_PROGRAMS = Path(__file__).with_name("host")
_INTEGER = struct.Struct("q")
_LOST = 255  # as the standard library says it


class Preloaded:
    """The process, and what starts servers from it."""

    def __init__(self, *, is_stock: bool = False) -> None:
        # Tests give it to their servers: what computes a batch must not take the cores of the others.
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._is_stock = is_stock
        self._stock: Preloaded | None = None  # where such a server has been started

    def __enter__(self) -> Preloaded:
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = [str(Path(__file__).parent), str(Path(guard.__file__).parent.parent)]
        numbers = (theirs.fileno(), os.getpid(), int(self._is_stock))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *path, *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env=self._environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self._orders = orders
        self._server = fork_server.ForkServer(orders, self._process.pid)
        try:
            said = select.poll()  # select() takes no file with a number above 1,023
            said.register(self._process.stdout, select.POLLIN)
            assert said.poll(1000 * IMPORT_DEADLINE_S), "SGLang was not imported"
            line = self._process.stdout.readline()
            assert line, "the process that imports SGLang has ended"
        except BaseException:
            self._end()
            raise
        variables_read, self._set_by_modules = json.loads(line)
        self._variables_read = frozenset(variables_read) - _OWN_VARIABLES
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._stock is not None:
            self._stock._end()
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
        pass_fds: Sequence[int] = (),
        start_new_session: bool,
    ) -> subprocess.Popen[bytes] | ForkedProcess:
        """As `subprocess.Popen` with these arguments."""
        how: dict[str, Any] = {
            **{"stdin": stdin, "stdout": stdout, "stderr": stderr, "env": env},
            **{"pass_fds": pass_fds, "start_new_session": start_new_session},
        }
        if not self._is_stock and _runs_stock(command):
            return self._unpatched().popen(command, **how)
        if (reason := self.reason_to_import_anew(command, env)) is not None:
            stdout.write(f"the tests start it as a new interpreter: {reason}\n".encode())
            stdout.flush()
            return subprocess.Popen(command, **how)
        assert (stdin, stderr, start_new_session) == (subprocess.DEVNULL, subprocess.STDOUT, True)
        reader, writer = connection.Pipe(duplex=False)
        with reader, writer:
            pid, status = self._server.fork([reader.fileno(), stdout.fileno(), *pass_fds])
            writer.send((list(command), dict(env), os.getcwd()))
        return ForkedProcess(command, pid, status)

    def _unpatched(self) -> Preloaded:
        if self._stock is None:
            self._stock = Preloaded(is_stock=True).__enter__()
        return self._stock

    def output_of(self, *program: str, deadline_s: float, is_patched: bool = True) -> str:
        """What a program prints, errors too, that needs SGLang, with all patches in it unless `is_patched` is False.
        `program` is what comes after the interpreter on a command line.

        Raises:
            AssertionError: it did not end in order.
            subprocess.TimeoutExpired: nor within the deadline; then it has been killed, with all of its session.
        """
        starter = self if is_patched else self._unpatched()
        with tempfile.TemporaryFile() as said:
            process = starter.popen(
                [sys.executable, *program],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                status = process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            said.seek(0)
            output = said.read().decode(errors="replace")
        assert status == 0, f"{program[:2]} ended with status {status}:\n{output[-4000:]}"
        return output

    def reason_to_import_anew(self, command: Sequence[str], environment: Mapping[str, str]) -> str | None:
        """Why a command cannot be forked; None where it can."""
        if not (_serves(command) or _is_program(command) or _is_of_sglang(command)):
            return "it is another program"
        seen = forked_process.seen_too_early(self._environment, environment, self._variables_read)
        # In this process modules may have set the same since.
        same = {_PYTHON_PATH, *(name for name in seen if self._set_by_modules.get(name) == environment.get(name))}
        if changed := [name for name in seen if name not in same]:
            return f"{', '.join(changed)} changed after modules had read it"
        return None


def _serves(command: Sequence[str]) -> bool:
    return any(module in command for module in (KUNSERVE_SERVER, STOCK_SERVER))


def _is_program(command: Sequence[str]) -> bool:
    return command[1] == "-c" or Path(command[1]).parent == _PROGRAMS


def _is_of_sglang(command: Sequence[str]) -> bool:
    return command[1] == "-m" and command[2].startswith("sglang.")


def _runs_stock(command: Sequence[str]) -> bool:
    """Whether it runs SGLang without anything of KunServe attached."""
    if KUNSERVE_SERVER not in command:
        return STOCK_SERVER in command
    return not preload.is_attached(command[command.index(KUNSERVE_SERVER) + 1 :])


class ForkedProcess:
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
            self.returncode = _read_exit_code(self._status)
            os.close(self._status)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


# In the process that has imported SGLang. The server's main module must be the only one.
def _read_exit_code(status: int) -> int:
    """What is in the file of a child that has ended, or whose fork server has: then it says nothing."""
    said = os.read(status, _INTEGER.size)
    return int(_INTEGER.unpack(said)[0]) if said else _LOST


_PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
from preloaded import serve
sys.exit(serve(*map(int, sys.argv[3:])))
"""


def serve(orders: int, starter: int, is_stock: int) -> int:
    """Imports, says which variables of the environment that has read and set, and forks what it is told to."""
    global _is_stock
    _is_stock = bool(is_stock)
    del sys.path[:2]  # a server does not see them
    before = dict(os.environ)
    variables_read = sorted(preload.import_all(is_patched=not _is_stock))
    set_by_modules = {name: value for name, value in os.environ.items() if before.get(name) != value}
    print(json.dumps([variables_read, set_by_modules]), flush=True)
    return fork_server.serve(socket.socket(fileno=orders), starter, _run_child)


_is_stock = False  # whether this process has imported SGLang as it is


def _run_child(files: Sequence[int]) -> int:
    """Becomes what `subprocess.Popen` would have started."""
    order, output, *lifeline = files
    with connection.Connection(order, writable=False) as reader:
        command, environment, directory = reader.recv()
    if guard.__file__ in command:  # it stops when its parent is another one
        at = command.index(guard.__file__)
        command[at + _LIFELINE], command[at + _PARENT] = str(*lifeline), str(os.getppid())
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    before = _open_files() - {*lifeline}
    os.setsid()
    os.chdir(directory)
    _take_environment(environment)
    tempfile.tempdir = None
    if _is_program(command):
        sys.path.insert(0, str(_PROGRAMS))
    sys.modules["numpy"].random.seed()  # type: ignore[attr-defined]
    os.execvp = lambda _, command: _exec(command, before)  # type: ignore[assignment]  # the guard starts it so
    return _run_python(command)


def _take_environment(environment: Mapping[str, str]) -> None:
    before = os.environ.get(_PYTHON_PATH, "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    added = [each for each in environment.get(_PYTHON_PATH, "").split(os.pathsep) if each and each not in before]
    sys.path[1:1] = added
    if any(Path(each, f"{_SITE_MODULE}.py").exists() for each in added):
        sys.modules.pop(_SITE_MODULE, None)
        importlib.import_module(_SITE_MODULE)


def _open_files() -> set[int]:
    """The files of this process, but for the one that the list is read from."""
    files = {int(name) for name in os.listdir("/proc/self/fd")}
    return {file for file in files if Path(f"/proc/self/fd/{file}").is_symlink()}


def _exec(command: Sequence[str], kept: set[int]) -> NoReturn:
    """As `os.execvp`, but Python goes on in this interpreter."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for file in _open_files() - kept:
        with suppress(OSError):
            os.close(file)
    fork_server.run_forked(lambda: _run_server(command))


def _run_server(command: Sequence[str]) -> int:
    """Runs a server. The children of a stock one are forked too, which the others see to themselves."""
    if _is_stock:
        engine = sys.modules["sglang.srt.entrypoints.engine"]
        forked_process.use(forked_process.Starter(preload.import_all(is_patched=False)))
        for name in ("_launch_scheduler_processes", "_launch_detokenizer_subprocesses"):
            setattr(engine.Engine, name, classmethod(_forking(engine, getattr(engine.Engine, name).__func__)))
    return _run_python(command)


def _forking(engine: Any, launch: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with forked_process.starts_of(engine):
            return launch(*args, **kwargs)

    return call


def _run_python(command: Sequence[str]) -> int:
    """Runs what the interpreter would run: a module, a script, or the command itself."""
    arguments: list[str] = [*command[1:]]
    while arguments[0] in ("-I", "-S"):
        arguments.pop(0)
    run: Callable[..., Any] = runpy.run_path
    options: dict[str, Any] = {}
    if arguments[0] == "-m":
        arguments.pop(0)
        run, options = runpy.run_module, {"alter_sys": True}
    elif arguments[0] == "-c":
        code = compile(arguments.pop(1), "<command>", "exec")
        run, options = _run_code, {"code": code}
    sys.argv = arguments
    try:
        run(arguments[0], run_name="__main__", **options)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def _run_code(_: str, *, run_name: str, code: CodeType) -> None:
    exec(code, {"__name__": run_name})
