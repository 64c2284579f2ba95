"""Processes as `multiprocessing` spawns them, forked by a fork server instead, so that nothing is imported twice.

A child has the environment, the limits and the processors of its starter as they are at its start, like a new
interpreter, and not those of the fork server. Where a variable of the environment has changed that an imported module
has read, the child is a new interpreter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from multiprocessing import connection, context, popen_forkserver, process, resource_tracker, spawn, util
from multiprocessing.reduction import ForkingPickler
from typing import Any

from kunserve_sgl.integration.attach.fork_server import ForkServer

logger = logging.getLogger(__name__)

# The loader, the interpreter and libraries read these when they start.
_READ_AT_START = ("LD_", "GLIBC_", "MALLOC_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
# The CPU platform sets it for its schedulers, and lets torch know there.
_READ_AGAIN = {"OMP_NUM_THREADS"}
_LIMITS = sorted({value for name, value in vars(resource).items() if name.startswith("RLIMIT_")})


class Starter:
    """Starts children of this process by a fork server."""

    def __init__(self, variables_read: Collection[str]) -> None:
        """`variables_read`: those of the environment that imported modules have read. Raises ForkServerError where
        this process cannot be forked."""
        self.variables_read = variables_read
        self._environment = dict(os.environ)
        self._server = ForkServer.start(_run_child)

    def reason_to_spawn(self) -> str | None:
        """Says why a child that starts now must be a new interpreter; None where it need not."""
        executable = os.fsdecode(spawn.get_executable())
        if executable != sys.executable:
            return f"it is to be run by {executable}"
        seen = seen_too_early(self._environment, os.environ, self.variables_read)
        return f"{', '.join(seen)} changed after modules had read it" if seen else None

    def fork(self, files: Sequence[int]) -> tuple[int, int]:
        """As `ForkServer.fork`."""
        return self._server.fork(files)


def seen_too_early(before: Mapping[str, str], now: Mapping[str, str], variables_read: Collection[str]) -> list[str]:
    """Returns the variables that differ between two environments, and that were read in the first one only."""
    changed = {name for name in {*before, *now} - _READ_AGAIN if before.get(name) != now.get(name)}
    return sorted(name for name in changed if name in variables_read or name.startswith(_READ_AT_START))


_starter: Starter | None = None  # of this process
_variables_read: Collection[str] | None = None  # in a forked child: as its starter had them
_inherited: Sequence[int] = ()  # in a forked child: the files that its arguments have


def use(starter: Starter) -> None:
    """Lets `starts_of` use it from now on."""
    global _starter
    _starter = starter


def use_own_starter() -> None:
    """Gives a forked child, before it has threads, a fork server for children of its own. Does nothing in a child that
    was spawned. Raises ForkServerError."""
    if _variables_read is not None:
        use(Starter(_variables_read))


@contextlib.contextmanager
def starts_of(module: Any) -> Iterator[None]:
    """Forks what `module` starts as `mp.Process` while this lasts, if this process has a starter."""
    upstream = module.mp
    if _starter is not None:
        module.mp = _Context()
    try:
        yield
    finally:
        module.mp = upstream


class _Process(context.SpawnProcess):
    @staticmethod
    def _Popen(process: Any) -> Any:
        reason = None if _starter is None else _starter.reason_to_spawn()
        if reason is not None:
            logger.info("KunServe: %s starts as a new interpreter: %s", process.name, reason)
        if _starter is None or reason is not None:
            return context.SpawnProcess._Popen(process)
        return _Popen(process)


class _Context(context.SpawnContext):
    Process = _Process


class _InheritedFile:
    """Stands for a file of the starter in the arguments of a child."""

    def __init__(self, index: int) -> None:
        self._index = index

    def detach(self) -> int:
        return _inherited[self._index]


class _Popen(popen_forkserver.Popen):
    """Handles a forked child, for `multiprocessing`. The starter has one end of two pipes: one brings the child what a
    new interpreter gets, and tells it by its end that the starter has ended; the other brings the exit code."""

    DupFd = _InheritedFile  # type: ignore[assignment]
    _fds: list[int]

    def _launch(self, process_obj: Any) -> None:
        assert _starter is not None
        context.set_spawning_popen(self)
        try:
            preparation = ForkingPickler.dumps(spawn.get_preparation_data(process_obj.name))
            pickled = ForkingPickler.dumps(process_obj)
        finally:
            context.set_spawning_popen(None)
        from_starter, to_child = connection.Pipe(duplex=False)
        with from_starter:
            tracker = resource_tracker.getfd()
            assert tracker is not None
            self.pid, self.sentinel = _starter.fork([from_starter.fileno(), tracker, *self._fds])
        self.finalizer = util.Finalize(self, _close, (to_child, self.sentinel))
        to_child.send(_Inheritance(_starter.variables_read))
        to_child.send_bytes(preparation)
        to_child.send_bytes(pickled)


def _close(to_child: Any, sentinel: int) -> None:
    to_child.close()
    os.close(sentinel)


class _Inheritance:
    """Carries what a new interpreter has of the process that starts it, besides what `multiprocessing` passes on."""

    def __init__(self, variables_read: Collection[str]) -> None:
        self.variables_read = variables_read
        self._environment = dict(os.environ)
        self._limits = {limit: resource.getrlimit(limit) for limit in _LIMITS}
        self._affinity = os.sched_getaffinity(0)

    def take(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        for limit, values in self._limits.items():
            if resource.getrlimit(limit) != values:
                resource.setrlimit(limit, values)
        os.sched_setaffinity(0, self._affinity)


def _run_child(files: Sequence[int]) -> int:
    global _starter, _variables_read, _inherited
    order, tracker, *_inherited = files
    _starter = None
    resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]  # as the standard library does
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # `random` does so itself, and torch begins with the same seed in every process
    with connection.Connection(order, writable=False) as from_starter:
        inheritance = from_starter.recv()
        inheritance.take()
        _variables_read = inheritance.variables_read
        spawn.prepare(ForkingPickler.loads(from_starter.recv_bytes()))
        child: process.BaseProcess = ForkingPickler.loads(from_starter.recv_bytes())
        return child._bootstrap(parent_sentinel=order)  # type: ignore[attr-defined, no-any-return]
