"""Children of a fork server: they are as if spawned, end with their starter, and tell it when they fail."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from kunserve_sgl import exits
from kunserve_sgl.integration.attach import fork_server
from servers.server import remaining
from waiting import wait_until

DEADLINE_S = 300.0
# Forking needs a process without threads, which that of the tests is not.
PROGRAM = """
import json, multiprocessing, os, random, resource, signal, sys, threading, time, types
import numpy
from kunserve_sgl.integration.attach import forked_process

sgl = types.SimpleNamespace(mp=multiprocessing)  # starts processes as SGLang's modules do

def facts():
    parent = multiprocessing.parent_process()
    return {
        "forked": hasattr(sys, "imported_once"), "parent": parent.pid, "parent_is_alive": parent.is_alive(),
        "system_parent": os.getppid(), "added": os.environ.get("ADDED"), "argv": sys.argv[1:], "cwd": os.getcwd(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "cores": sorted(os.sched_getaffinity(0)),
        "random": [random.random(), float(numpy.random.rand())], "name": multiprocessing.current_process().name,
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "quit": signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL, "threads": threading.active_count(),
        "start_method": multiprocessing.get_start_method(),
    }

def report(pipe):
    pipe.send(facts())

def start(target, *arguments):
    with forked_process.starts_of(sgl):
        process = sgl.mp.Process(target=target, args=arguments)
        process.start()
        return process

def ask(target=report):
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = start(target, writer)
    answer = reader.recv()
    process.join()
    return {**answer, "exit_code": process.exitcode, "pid": process.pid}

def start_thread():
    threading.Thread(target=threading.Event().wait, daemon=True).start()

def nest(pipe):
    forked_process.use_own_starter()
    start_thread()
    pipe.send({"inner": ask(), "outer": facts(), "pid": os.getpid()})

def sleep(pipe=None):
    if pipe is not None:
        forked_process.use_own_starter()
        pipe.send([os.getpid(), start(sleep).pid])
    time.sleep(600)

def say(what):
    print(json.dumps(what), flush=True)

if __name__ == "__main__":
    sys.imported_once = True
    multiprocessing.set_start_method("spawn")
    forked_process.use(forked_process.Starter({"READ"}))
    exec(sys.argv[1])
"""


class Program:
    """Runs PROGRAM with some lines at its end; what it prints is JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path / "program.py"
        self._path.write_text(PROGRAM)

    def run(self, code: str, *, traps: str = "") -> Any:
        """`traps` are commands of a shell, about signals."""
        process = self.start(code, traps)
        output, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, errors
        assert not errors
        return json.loads(output)

    def start(self, code: str, traps: str = "") -> subprocess.Popen[str]:
        shell = ("sh", "-c", f'{traps}\nexec "$@"', "sh")
        command = [*shell, sys.executable, str(self._path), code]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


@pytest.mark.parametrize("traps", ["trap - QUIT INT", "trap '' QUIT INT"])
def test_a_child_is_as_if_it_had_been_spawned(program: Program, traps: str) -> None:
    """Though the starter has changed and has threads since it forked its fork server off."""
    answers = program.run(
        "start_thread()\n"
        "os.environ['ADDED'] = 'later'; os.chdir('/'); resource.setrlimit(resource.RLIMIT_NOFILE, (333, 444))\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "forked = [ask(), ask()]\n"
        "os.environ['READ'] = 'changed'\n"
        "say([os.getpid(), sorted(os.sched_getaffinity(0)), forked, ask()])",
        traps=traps,
    )
    starter, cores, (first, second), spawned = answers
    assert first["forked"]
    assert first["system_parent"] == second["system_parent"] != starter
    assert not spawned["forked"]
    assert spawned["system_parent"] == starter
    assert (first["added"], first["cwd"], first["files"], first["cores"]) == ("later", "/", 333, cores)
    assert not {*first["random"]} & {*second["random"]}
    own = ("forked", "system_parent", "random", "pid", "name")
    for forked in (first, second):
        assert {key: forked[key] for key in forked if key not in own} == {
            key: spawned[key] for key in spawned if key not in own
        }


@pytest.mark.parametrize("variable", ["READ", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_PROC_BIND", "OMP_NUM_THREADS"])
def test_a_variable_that_was_read_needs_a_new_interpreter(program: Program, variable: str) -> None:
    """But one, of which a rank tells torch itself."""
    is_forked = program.run(f"os.environ[{variable!r}] = '77'; say(ask()['forked'])")
    assert is_forked is (variable == "OMP_NUM_THREADS")


def test_another_executable_needs_a_new_interpreter(program: Program) -> None:
    """SGLang sets one that binds the child to a NUMA node."""
    code = (
        "script = sys.argv[0] + '.sh'; open(script, 'w').write(f'#!/bin/sh\\nexec {sys.executable} \"$@\"')\n"
        "os.chmod(script, 0o700); multiprocessing.set_executable(script); say(ask()['forked'])"
    )
    assert program.run(code) is False


def test_children_of_a_child(program: Program) -> None:
    answer = program.run("say(ask(nest))")
    assert answer["inner"]["forked"]
    assert answer["inner"]["parent"] == answer["pid"]
    assert answer["inner"]["system_parent"] != answer["outer"]["system_parent"]
    assert answer["inner"]["exit_code"] == 0


@pytest.mark.parametrize(
    ("target", "exit_code"),
    [("sys.exit(7)", 7), ("os._exit(9)", 9), ("os.kill(os.getpid(), 9)", -9), ("pass", 0)],
)
def test_exit_codes(program: Program, target: str, exit_code: int) -> None:
    code = f"child = start(exec, {f'import os, sys; {target}'!r}); child.join(); say(child.exitcode)"
    assert program.run(code) == exit_code


def test_a_child_that_raises(program: Program) -> None:
    process = program.start("child = start(exec, '1 / 0'); child.join(); say(child.exitcode)")
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert json.loads(output) == 1
    assert "ZeroDivisionError" in errors


def test_a_child_can_be_killed(program: Program) -> None:
    code = "child = start(sleep); alive = child.is_alive(); child.kill(); child.join(); say([alive, child.exitcode])"
    assert program.run(code) == [True, -signal.SIGKILL]


def test_the_end_of_the_fork_server_is_that_of_its_children(program: Program) -> None:
    code = (
        "import psutil\n"
        "child = start(sleep); psutil.Process(child.pid).parent().kill(); child.join(200)\n"
        "say([child.exitcode, child.pid])"
    )
    exit_code, pid = program.run(code)
    assert exit_code == 255
    wait_until(lambda: not remaining([pid]), "the child has ended", DEADLINE_S)


def test_a_failed_child_reaches_its_starter(program: Program) -> None:
    """SGLang's children send SIGQUIT to their parent."""
    code = (
        "got = threading.Event(); signal.signal(signal.SIGQUIT, lambda *_: got.set())\n"
        "start(exec, 'import os, signal; os.kill(os.getppid(), signal.SIGQUIT)').join(); say(got.wait(200))"
    )
    assert program.run(code) is True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_all_end_with_the_starter(program: Program, number: int) -> None:
    code = (
        "reader, writer = multiprocessing.Pipe(duplex=False)\n"
        "start(sleep, writer); say([os.getpid(), *reader.recv()]); time.sleep(600)"
    )
    with program.start(code) as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        started = {each.pid for each in psutil.Process(pids[0]).children(recursive=True)}
        assert started > {*pids[1:]}
        os.kill(pids[0], number)
        wait_until(lambda: not remaining([*started]), "all have ended", DEADLINE_S)


def test_a_fork_server_that_the_system_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with theirs, subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with monkeypatch.context() as patched:
            patched.setattr(os, "kill", lambda pid, number: None)
            patched.setattr(exits, "EXIT_DEADLINE_S", 0.01)
            with pytest.raises(fork_server.ForkServerError, match="does not end within"):
                fork_server.ForkServer(ours, process.pid).end()
        process.kill()


def test_a_process_with_threads_is_not_forked(tmp_path: Path) -> None:
    code = (
        "import threading\n"
        "from kunserve_sgl.integration.attach import forked_process, fork_server\n"
        "threading.Thread(target=threading.Event().wait, name='x', daemon=True).start()\n"
        "try:\n"
        "    forked_process.Starter(())\n"
        "except fork_server.ForkServerError as error:\n"
        "    print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert "other threads" in answer.stdout
    assert not answer.stderr
