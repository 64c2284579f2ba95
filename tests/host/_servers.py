"""The servers that tests share: how one is started, what is known while it runs, and the pool of those that run."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import requests
from _http import Endpoint, Json
from _questions import Question, ask_all
from _sabotage import OTHER_MACHINE, RANDOM_CUTS, sabotage

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from servers.command import KUNSERVE_SERVER, launch_command
from servers.server import ServerError, ServerProcess, find_free_port
from waiting import wait_until

START_DEADLINE_S = 900.0
SETTLE_DEADLINE_S = 300.0
TITLE_OF_CONTROLLER = "sglang::data_parallel_controller"
_POLL_S = 0.1
# SGLang's own leak checks, also while requests run, and at every page.
_CHECKS = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
LLAMA = TinyModelSpec(dtype="float32")

Model = TinyModelSpec | Callable[[Path], object]
"""A tiny model, or what writes another one into a directory."""


@dataclass(frozen=True)
class ServerSpec:
    """A server, by what it is started with. Tests that name equal ones share it.

    Attributes:
        flags: those of the command line, without model, host and port.
        model: what it serves; the dtype of a tiny model is said in the flags too.
        module: the command, `KUNSERVE_SERVER` or `STOCK_SERVER`.
        admin_key: the key that KunServe's routes ask for, if any.
        memory_checks: whether SGLang looks for leaks while requests run.
        sabotaged: whether `_sabotage.py` can take parts out while it runs.
        random_cuts: whether batches go through the pipeline in random pieces, not where the cost model says.
        other_machine: the replicas that say that they are on another machine than the rest.
    """

    flags: tuple[str, ...]
    model: Model = LLAMA
    module: str = KUNSERVE_SERVER
    admin_key: str | None = None
    memory_checks: bool = True
    sabotaged: bool = False
    random_cuts: bool = False
    other_machine: tuple[int, ...] = ()

    def command(self, model: Path, port: int) -> list[str]:
        """The arguments of a process that serves `model` on `port`."""
        dtype = self.model.dtype if isinstance(self.model, TinyModelSpec) else "float32"
        key = () if self.admin_key is None else ("--admin-api-key", self.admin_key)
        return launch_command(self.module, model, port, "--dtype", dtype, *self.flags, *key)

    def number(self, flag: str, default: int) -> int:
        """The number that a flag has."""
        return int(self.flags[self.flags.index(flag) + 1]) if flag in self.flags else default

    def __str__(self) -> str:
        return f"{self.module} {' '.join(self.flags)}"


@dataclass
class RunningServer:
    """A server that runs. `switches` is the directory that `_sabotage.py` looks into."""

    spec: ServerSpec
    process: ServerProcess
    model: Path
    switches: Path
    _answers: dict[tuple[Question, ...], list[list[int]]] = field(default_factory=dict)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.process.base_url, self.spec.admin_key)

    @property
    def manages_memory(self) -> bool:
        """Whether it has KunServe's routes, as it has unless KunServe is off."""
        flags = self.spec.flags
        return self.spec.module == KUNSERVE_SERVER and ("--kunserve", "off") not in itertools.pairwise(flags)

    def wait_ready(self) -> None:
        """Waits until it serves, and keeps in mind how it is at its start."""
        self.process.wait_healthy(START_DEADLINE_S)
        if self.manages_memory:
            if self.spec.number("--dp-size", 1) > 1:
                wait_until(lambda: bool(self.status()["hosts"]), "all replicas have reported")
            assert self.at_start

    @cached_property
    def at_start(self) -> list[Json]:
        """The status of the replicas before the first test."""
        replicas: list[Json] = self.status()["replicas"]
        return replicas

    def status(self) -> Json:
        """What GET /kunserve/status answers."""
        status: Json = self.endpoint.ask_for("/kunserve/status")
        return status

    def resize(self, replica: int, frames: int) -> None:
        """A resize that must succeed. The coordinator knows of it then: it plans with the memory that it knows."""
        epoch = self.status()["epoch"]
        self.endpoint.ask("/kunserve/kv", {"replica": replica, "frames": frames})
        wait_until(lambda: self.status()["epoch"] > epoch, "the coordinator knows of the resize")

    def states(self) -> list[str]:
        """The state of each replica."""
        return [replica["state"] for replica in self.status()["replicas"]]

    def restarts(self) -> list[int]:
        """How often each replica has been started again."""
        counts: dict[str, int] = self.status()["restarts"]
        return [counts[str(replica)] for replica in range(len(counts))]

    def answers_to(self, questions: Sequence[Question]) -> list[list[int]]:
        """The tokens that it answered when it was first asked these; for a server in the state of its start."""
        key = tuple(questions)
        if key not in self._answers:
            self._answers[key] = ask_all(self.endpoint, questions)
        return self._answers[key]

    def scheduler_pid(self, replica: int, rank: int | None = None) -> int:
        """The process of a rank of a replica; None where the replica has one only."""
        return self.pid_titled(f"sglang::scheduler_DP{replica}" + ("" if rank is None else f"_TP{rank}"))

    def pid_titled(self, title: str) -> int:
        """The process of that title. One that was just forked off may have the same for a moment."""
        found: list[int] = []

        def is_alone() -> bool:
            found[:] = [pid for pid in self.process.pids() if title_of(pid) == title]
            return len(found) == 1

        wait_until(is_alone, f"one process is called {title}")
        return found[0]

    def log(self) -> str:
        """All that it has printed."""
        return self.process.log_path.read_text(errors="replace")

    def require_unharmed(self) -> None:
        """Ends all requests, and raises AssertionError unless the server is as it was at its start but for its caches.

        Raises:
            ServerError: it has died.
        """
        if not self.process.running:
            raise ServerError(f"{self.spec} has died:\n{self.process.log_tail(60)}")
        assert self.endpoint.post("/abort_request", {"abort_all": True}).status_code == requests.codes.ok
        self.endpoint.wait_for_requests_inside(lambda count: count == 0, "none")
        if self.manages_memory:
            ends_at_s = time.monotonic() + SETTLE_DEADLINE_S
            while changed := self._changed_since_the_start():
                assert time.monotonic() < ends_at_s, f"{self.spec} is not as at its start: {'; '.join(changed)}"
                time.sleep(_POLL_S)

    def _changed_since_the_start(self) -> list[str]:
        status = self.status()
        found = [] if status["state"] == "normal" else [f"state: {status['state']}"]
        for before, after in zip(self.at_start, status["replicas"], strict=True):
            changed = [
                name for name in ("state", "lost", "frames", "capacity_tokens") if after.get(name) != before[name]
            ]
            found += [
                f"replica {after['id']}: {name}: {after.get(name)}, at the start {before[name]}" for name in changed
            ]
            if not changed:
                check_books(after)
        return found


def title_of(pid: int) -> str:
    """What the process calls itself; nothing once it has ended."""
    try:
        return (psutil.Process(pid).cmdline() or [""])[0]
    except psutil.NoSuchProcess:
        return ""


def check_books(replica: Json) -> None:
    """Every frame of a replica is somewhere, and every slot too; `replica` is its part of the status."""
    frames, slots = replica["frames"], replica["slots"]
    assert frames["parameters"] + frames["kv"] + frames["lent"] + frames["free"] == frames["total"], frames
    assert slots["base"] + slots["extension"] == replica["capacity_tokens"], slots


@dataclass
class ServerPool:
    """Runs the servers that a test asks for and stops all others; those that the next test needs too go on running.

    `popen` starts their processes, with the interface of `subprocess.Popen`.
    """

    directory: Path
    popen: Callable[..., Any] = subprocess.Popen
    _running: dict[ServerSpec, RunningServer] = field(default_factory=dict)
    _models: dict[Model, Path] = field(default_factory=dict)

    def model(self, model: Model) -> Path:
        """The directory of a model, which is written when it is first asked for."""
        if model not in self._models:
            path = self._models[model] = self.directory / f"model-{len(self._models)}"
            if isinstance(model, TinyModelSpec):
                write_tiny_model(model, path)
            else:
                model(path)
        return self._models[model]

    def running(self, *specs: ServerSpec) -> list[RunningServer]:
        """The servers of `specs`, started unless they run, after all others have been stopped."""
        self._stop([spec for spec, server in self._running.items() if spec not in specs or not server.process.running])
        started = [self._start(spec) for spec in specs if spec not in self._running]
        try:
            for server in started:
                server.wait_ready()
        except BaseException:
            self._stop([server.spec for server in started])
            raise
        return [self._running[spec] for spec in specs]

    def require_unharmed(self) -> None:
        """Raises what is wrong with a server, if anything is, and stops that server: the next test gets a new one."""
        for spec, server in list(self._running.items()):
            try:
                server.require_unharmed()
            except BaseException:
                self._stop([spec])
                raise

    def stop_all(self) -> None:
        """Stops every server."""
        self._stop(list(self._running))

    def logs(self) -> Mapping[str, str]:
        """The end of the output of every server, by its command."""
        return {str(spec): server.process.log_tail() for spec, server in self._running.items()}

    def _start(self, spec: ServerSpec) -> RunningServer:
        port = find_free_port()
        model, switches = self.model(spec.model), self.directory / f"switches-{port}"
        switches.mkdir()
        if spec.random_cuts:
            (switches / RANDOM_CUTS).touch()
        if spec.other_machine:
            (switches / OTHER_MACHINE).write_text(" ".join(map(str, spec.other_machine)))
        env = {"OMP_NUM_THREADS": "1", **(_CHECKS if spec.memory_checks else {})}
        env |= sabotage(switches) if spec.sabotaged or spec.random_cuts or spec.other_machine else {}
        log = self.directory / f"{port}.log"
        # Nothing of it is waited for at its end: how servers end is what test_leftovers.py and test_ending.py are for.
        process = ServerProcess(
            spec.command(model, port), port=port, env=env, log_path=log, grace_s=0.0, popen=self.popen
        )
        server = self._running[spec] = RunningServer(spec, process, model, switches)
        process.start()
        return server

    def _stop(self, specs: list[ServerSpec]) -> None:
        if not specs:
            return
        # At once, and every one gets its stop even if another one fails.
        with ThreadPoolExecutor(max_workers=len(specs)) as threads:
            stops = [threads.submit(self._running.pop(spec).process.stop) for spec in specs]
        for stop in stops:
            stop.result()
