"""A server that is killed, at any point and in any part, leaves no process, socket or shared memory behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from _leftovers import members, shared_memory_of

from preloaded import Preloaded
from servers.command import KUNSERVE_SERVER, launch_command
from servers.server import HOST, find_free_port, remaining
from waiting import wait_until

pytestmark = pytest.mark.server

START_DEADLINE_S = 900.0
END_DEADLINE_S = 300.0
LAST_LINES = {
    "detokenizer": "detokenizer ended with exit code -9",
    "fork server": ".* ended with exit code 255",
    "schedulers": r"the server has not started: scheduler process \d+ ended with exit code -9 before it was ready",
}


@contextlib.contextmanager
def server(model: Path, temporary: Path, popen: Callable[..., Any], *flags: str) -> Iterator[tuple[Any, str]]:
    """Not a ServerProcess: its guard would clean up itself."""
    port = find_free_port()
    command = launch_command(
        *(KUNSERVE_SERVER, model, port, "--dtype", "float32", "--kunserve", "manual", "--enable-metrics", *flags),
        *("--max-total-tokens", "1024", "--context-length", "512"),
    )
    environment = {**os.environ, "TMPDIR": str(temporary)}
    if popen is subprocess.Popen:
        environment.pop("OMP_NUM_THREADS")  # as users do; the server sets it then
    with (temporary / "log").open("wb") as log:
        launcher = popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield launcher, f"http://{HOST}:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def is_healthy(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/health", timeout=25).status_code == 200
    return False


def called(name: str, processes: Sequence[psutil.Process]) -> psutil.Process:
    """The first that has this in its command line."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                return process
    raise AssertionError(f"no process is called {name}")


def schedulers_among(names: set[str], processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Both schedulers: the others that have signed up have fork servers."""
    found: list[psutil.Process] = []

    def are_found() -> bool:
        found[:] = [each for each in processes if str(each.pid) in names and not each.children()]
        return len(found) == 2

    wait_until(are_found, "two have no children")
    return found


def assert_answered_before_the_end(url: str, victim: psutil.Process) -> None:
    """Ends a process that a request needs, which nobody can answer before: the process is stopped first."""
    victim.suspend()
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4}, "stream": True}
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=END_DEADLINE_S) as answer:
        victim.kill()
        *_, last, done = [line for line in answer.iter_lines(decode_unicode=True) if line]
    assert '"status_code":503' in last.replace(" ", "")
    assert "detokenizer ended with exit code -9" in last
    assert done == "data: [DONE]"


@pytest.fixture
def temporary() -> Iterator[Path]:
    # Not below tmp_path, which is too long for a Unix socket's path.
    with tempfile.TemporaryDirectory(prefix="leftovers-") as directory:
        yield Path(directory)


@pytest.mark.parametrize(
    ("when", "victim"),
    [
        *(("starting", "launcher"), ("starting", "schedulers")),
        *(("serving", "detokenizer"), ("serving", "fork server"), ("serving", "group")),
    ],
    ids=lambda value: value,
)
def test_nothing_is_left(tiny_model: Path, temporary: Path, preloaded: Preloaded, when: str, victim: str) -> None:
    # One of them is started as users do; the others have only imported less.
    popen = subprocess.Popen if victim == "group" else preloaded.popen
    # Replicas have a controller, which waits for them to be ready.
    flags, signed_up = (("--dp-size", "2"), 5) if victim == "schedulers" else (("--tp-size", "2"), 4)
    with server(tiny_model, temporary, popen, *flags) as (launcher, url):
        if when == "serving":
            wait_until(lambda: is_healthy(url) or launcher.poll() is not None, "the server serves", START_DEADLINE_S)
            names = members(temporary)
            assert len(shared_memory_of(names)) >= 2, "SGLang makes none any more; this test proves nothing"
            assert [path for path in temporary.glob("kunserve-*/*") if path.is_socket()]
        else:
            # The launcher, the instance, the controller, and both schedulers, which have just been forked.
            wait_until(lambda: len(members(temporary)) == signed_up, "the schedulers have signed up", START_DEADLINE_S)
            names = members(temporary)
        assert "as a new interpreter" not in (temporary / "log").read_text(errors="replace")
        children = psutil.Process(launcher.pid).children(recursive=True)
        assert len(children) >= 3
        if victim == "group":
            os.killpg(launcher.pid, signal.SIGKILL)
        elif victim == "launcher":
            launcher.kill()
        elif victim == "schedulers":
            for scheduler in schedulers_among(names, children):
                scheduler.kill()
        elif victim == "fork server":
            called("fork_server", children).kill()
        else:
            assert_answered_before_the_end(url, called("detokenizer", children))
        status = launcher.wait(END_DEADLINE_S)
        if reason := LAST_LINES.get(victim):
            assert status == 1
            *_, last = (temporary / "log").read_text(errors="replace").splitlines()
            assert re.search(rf"KunServe: {reason}$", last), last
        wait_until(lambda: not list(temporary.glob("kunserve-*")), "the reaper is done", END_DEADLINE_S)
        pids = [child.pid for child in children]
        wait_until(lambda: not remaining(pids), "no process is left", END_DEADLINE_S)
        assert shared_memory_of(names) == set()
        assert not [path for path in temporary.rglob("*") if path.is_socket()]
