"""The process that runs a server leaves nothing behind: no process of any session, no file, no shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from servers import guard
from servers import server as server_module
from servers.server import ServerError, ServerProcess, find_free_port, remaining
from waiting import wait_until

DEADLINE_S = 300.0
SHARED_MEMORY = Path("/dev/shm")
# A daemon as hard to get at as they come: two forks, a session of its own, deaf to SIGTERM.
DAEMON = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("daemon", flush=True)
        time.sleep(600)
    os._exit(0)
"""
SLEEP = "import time; time.sleep(600)"
# Answers 503 twice, then 200.
SLOW_START = """
import http.server, sys
answers = iter([503, 503])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(next(answers, 200 if self.path == "/health" else 404))
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def python(code: str, *arguments: str, grace_s: float = 1.0) -> ServerProcess:
    port = find_free_port()
    return ServerProcess([sys.executable, "-c", code, str(port), *arguments], port=port, grace_s=grace_s)


@pytest.fixture
def shared_name() -> Iterator[str]:
    name = f"serve-test-{uuid.uuid4().hex}"
    yield name
    for path in SHARED_MEMORY.glob(f"*{name}*"):
        path.unlink()


def test_stop_gets_every_descendant_and_removes_the_files() -> None:
    process = python(DAEMON + SLEEP)
    with process:
        wait_until(lambda: "daemon" in process.log_tail(), "the daemon runs")
        wait_until(lambda: len(process.pids()) == 2, "the process between them has ended")
        pids, directory = process.pids(), process.log_path.parent
        assert len(pids) == 2
        assert directory.is_dir()
    assert remaining(pids) == []
    assert not process.running
    assert process.pids() == []
    assert not directory.exists()
    process.stop()


def test_stop_lets_the_server_end_in_order(tmp_path: Path) -> None:
    code = """
    import signal, sys, time
    def end(*_):
        open(sys.argv[2], "w").write("ended in order")
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    time.sleep(600)
    """
    said = tmp_path / "said"
    with python(textwrap.dedent(code), str(said), grace_s=DEADLINE_S) as process:
        wait_until(lambda: "ready" in process.log_tail(), "the server is ready")
        process.stop()
    assert said.read_text() == "ended in order"


def test_death_of_this_process_stops_the_server(tmp_path: Path) -> None:
    code = f"""
    import sys, time
    sys.path.insert(0, {str(Path(server_module.__file__).parents[1])!r})
    from servers.server import ServerProcess
    process = ServerProcess([sys.executable, "-c", {DAEMON + SLEEP!r}], port=1, grace_s=1.0)
    process.start()
    while "daemon" not in process.log_tail() or len(process.pids()) != 2:  # the one between them has ended
        time.sleep(0.02)
    print(process.log_path.parent, *process.pids(), flush=True)
    time.sleep(600)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        assert parent.stdout is not None
        directory, *words = parent.stdout.readline().split()
        pids = [int(word) for word in words]
        assert len(remaining(pids)) == 2
    finally:
        parent.kill()
        parent.communicate()
    wait_until(lambda: remaining(pids) == [], "the server and its daemon are gone")
    wait_until(lambda: not Path(directory).exists(), "the temporary files are gone")


def test_death_of_the_server_ends_what_it_started(tmp_path: Path) -> None:
    ends = tmp_path / "ends"
    with python(DAEMON + "while not os.path.exists(sys.argv[2]): time.sleep(0.02)\nsys.exit(3)", str(ends)) as process:
        wait_until(lambda: "daemon" in process.log_tail(), "the daemon runs")
        pids = process.pids()
        assert len(pids) >= 2
        ends.touch()
        with pytest.raises(ServerError, match=r"ended with status 3 during start:\n.*daemon"):
            process.wait_healthy(DEADLINE_S)
        assert remaining(pids) == []


def test_death_of_the_guard_ends_the_server() -> None:
    with python(SLEEP) as process:
        wait_until(lambda: len(process.pids()) == 1, "the server runs")
        (pid,) = process.pids()
        assert process._process is not None
        process._process.send_signal(signal.SIGKILL)
        wait_until(lambda: remaining([pid]) == [], "the server is gone")


def test_command_that_does_not_exist() -> None:
    with (
        ServerProcess(["/missing/command"], port=find_free_port()) as process,
        pytest.raises(ServerError, match="cannot run /missing/command"),
    ):
        process.wait_healthy(DEADLINE_S)


def test_wait_healthy() -> None:
    waits: list[float] = []
    with python(SLOW_START) as process:
        assert process.wait_healthy(DEADLINE_S, on_wait=waits.append) > 0
        assert len(waits) >= 3
        assert waits == sorted(waits)


def test_wait_healthy_has_a_deadline_and_says_what_it_saw() -> None:
    with python(SLOW_START) as process:
        process.wait_healthy(DEADLINE_S)
        with pytest.raises(ServerError, match=r"not healthy after 3 s \(status 404\)"):
            process.wait_healthy(3.0, path="/other")
    with python(SLEEP) as silent, pytest.raises(ServerError, match=r"after 0\.5 s \(no connection\)"):
        silent.wait_healthy(0.5)


def test_shared_memory_that_was_left_is_removed_and_only_that(shared_name: str) -> None:
    # A mapped file, and a semaphore, which is mapped under a name that is deleted at once.
    code = f"""
    import ctypes, mmap, os, sys, time
    with open("/dev/shm/{shared_name}-file", "w+b") as file:
        file.truncate(4096)
        mapped = mmap.mmap(file.fileno(), 4096)
    libc = ctypes.CDLL(None)
    libc.sem_open.restype = ctypes.c_void_p
    assert libc.sem_open(b"/{shared_name}-semaphore", os.O_CREAT, 0o600, 1)
    print("mapped", flush=True)
    time.sleep(600)
    """
    others = SHARED_MEMORY / f"{shared_name}-others"
    others.write_bytes(b"kept")
    with python(textwrap.dedent(code)) as process:
        wait_until(lambda: "mapped" in process.log_tail(), process.log_tail())
        assert len(list(SHARED_MEMORY.glob(f"*{shared_name}*"))) == 3
    assert list(SHARED_MEMORY.glob(f"*{shared_name}*")) == [others]


def test_temporary_files_of_the_server_are_in_its_directory() -> None:
    code = "import tempfile; print(tempfile.mkstemp()[1], flush=True);" + SLEEP
    with python(code) as process:
        wait_until(lambda: "/" in process.log_tail(), "the server made a file")
        made = Path(process.log_tail().strip())
        assert made.is_file()
    assert not made.exists()


def test_log_can_be_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = ServerProcess([sys.executable, "-c", "print('said')"], port=find_free_port(), log_path=log)
    with process:
        wait_until(lambda: not process.running, "the server ends")
    assert log.read_text() == "said\n"


def test_start_twice_is_refused() -> None:
    with python(SLEEP) as process, pytest.raises(ServerError, match="started already"):
        process.start()


def test_descendants_are_found_in_other_sessions() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], start_new_session=True)"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        wait_until(lambda: len(guard.descendants(child.pid)) == 1, "the grandchild is seen")
        assert child.pid in guard.descendants(os.getpid())
    finally:
        # The grandchild reads the same end of input.
        child.communicate(b"\n")
    assert guard.descendants(child.pid) == []
