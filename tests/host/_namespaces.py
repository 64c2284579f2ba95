"""Two machines in small: network namespaces that a cable joins, with a node of Ray in each. What the second one has in
its directory for temporary files is its own, and so are the numbers of its processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import psutil
import pytest
from _drop import Served
from _questions import ask, make_questions
from _ray import on_ray, served_on
from _servers import ServerSpec
from typing_extensions import Self

from cable import Cable
from namespaces import Namespace, two_namespaces
from servers.ray_nodes import OBJECT_STORE_BYTES
from waiting import wait_until

LONG_QUESTIONS = [replace(question, answer_tokens=60) for question in make_questions(6, seed=22)]
_SLOW_STEP_S = 0.3  # with it these take far longer than what goes on beside them
_START_DEADLINE_S = 120.0
# So that Ray can find out in seconds that a node is away, and a node that it is alone.
_IMPATIENCE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Where only a directory and its mount are new. The model is in the directory, and has to be on both machines.
_AS_A_MACHINE = (
    'mount --bind "$1" /mnt && mount -t tmpfs tmpfs "$2" && mkdir -p "$1" && mount --move /mnt "$1" && shift 2 && '
    'exec "$@"'
)


class TwoMachines:
    """Is there while the context lasts, and `first`, where its thread is then, as are the processes that it starts.
    Skips the test where machines cannot be made."""

    cable: Cable  # between them

    def __init__(self, logs: Path, model: Path, patience: int = 3, room: int = 1) -> None:
        """`logs` gets the output of Ray; `model` is a directory that both have. A node that has not answered Ray so
        often, for 2 s each, has ended. Each has `room` for so many replicas."""
        self._env = {
            "RAY_health_check_failure_threshold": str(patience),
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(2 * patience),
        }
        self._room = str(room)
        self._port = 2048 + secrets.randbelow(4096)
        self._logs = logs
        self._model = model
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            files = tempfile.mkdtemp(prefix="ray-")  # in a short path, for sockets
            stack.callback(shutil.rmtree, files)
            network = stack.enter_context(two_namespaces())
            self.first, self.second, self.cable = network.first, network.second, network.cable
            tried = subprocess.run(
                _unshared("mount", "-t", "tmpfs", "tmpfs", "/mnt"), stderr=subprocess.PIPE, text=True
            )
            if tried.returncode:
                pytest.skip(f"machines cannot be made here: {tried.stderr.strip() or 'unshare has failed'}")
            self.ray_address = f"{self.first.address}:{self._port}"
            stack.enter_context(self.first.inside())
            head = ["--head", "--port", str(self._port), "--include-dashboard", "false", "--temp-dir", files]
            self._start("head", head, self.first)
            self.start_second()
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()

    def start_second(self) -> None:
        """Starts Ray on the second machine, and waits until it runs."""
        self._start("second", ["--address", self.ray_address], self.second)

    def processes_of_second(self, title: str) -> list[int]:
        """The processes of the second machine that have this in their titles."""
        found = []
        for pid in self.second.pids():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, and may not have been waited for yet
                found += [pid] if title in " ".join(psutil.Process(pid).cmdline()) else []
        return found

    def directories_of_second(self) -> list[Path]:
        """What servers have in the directory for temporary files of the second machine, as this one finds it."""
        raylet = max(self.processes_of_second("raylet/raylet"))
        return list(Path(f"/proc/{raylet}/root{tempfile.gettempdir()}").glob("kunserve-*"))

    def _start(self, what: str, how: Sequence[str], machine: Namespace) -> None:
        ray = [str(Path(sys.executable).with_name("ray")), "start", *how, "--block"]
        ray += ["--node-ip-address", machine.address, "--num-cpus", self._room, "--num-gpus", "0"]
        ray += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
        if machine is self.second:
            apart = _unshared("sh", "-c", _AS_A_MACHINE, "sh", str(self._model), tempfile.gettempdir(), *ray)
            ray = machine.command(apart)
        log = self._logs / f"ray-{what}-{len(self._nodes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ray,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_IMPATIENCE, **self._env},
            )
        self._nodes.append(process)

        def runs() -> bool:
            assert process.poll() is None, log.read_text(errors="replace")
            return b"Ray runtime started" in log.read_bytes()

        wait_until(runs, f"{what} runs: {log}", _START_DEADLINE_S)


def _unshared(*command: str) -> list[str]:
    return ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", *command]


def on_two_machines(*flags: str) -> ServerSpec:
    """A server with a replica on each machine."""
    return on_ray("--kunserve-control", "network", *flags)


@contextlib.contextmanager
def served_on_both(machines: TwoMachines, model: Path, spec: ServerSpec) -> Iterator[Served]:
    """Starts the server from the first machine. When it has ended nothing of it is left on the second."""
    with served_on(machines.ray_address, spec, model) as served:
        yield served
        assert machines.directories_of_second()
    wait_until(lambda: not machines.directories_of_second(), "the directory of the second machine is gone")


@contextlib.contextmanager
def attending(served: Served) -> Iterator[list[Future[list[int]]]]:
    """In the block merged replicas attend for each other, and begin to answer LONG_QUESTIONS, slowly."""
    endpoint = served.endpoint
    with ThreadPoolExecutor(len(LONG_QUESTIONS)) as clients, endpoint.slowed(_SLOW_STEP_S):
        before = served.orders_sent()
        answers = [clients.submit(ask, endpoint, question) for question in LONG_QUESTIONS]

        def have_begun() -> bool:
            return all(now > then for now, then in zip(served.orders_sent(), before, strict=True))

        wait_until(have_begun, "each attends at the other")
        assert not any(answer.done() for answer in answers)
        yield answers
