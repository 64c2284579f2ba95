"""What holds for every test run: one thread for each process, the same examples, and no process left behind."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from preloaded import Preloaded

# Before anything imports torch. Tensors here are small, and the tests' processes share the cores: threads of torch that
# wait for each other cost several times what they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same examples in every run, without a limit on the time of one: `--hypothesis-profile random` looks for others.
settings.register_profile("random", deadline=None)
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

_STOP_DEADLINE_S = 120.0
_LEFT = "left_behind"
_LEFT_BY_WORKERS: pytest.StashKey[list[str]] = pytest.StashKey()


def _own_children() -> list[psutil.Process]:
    """Live descendants of this process; without helpers of the standard library, which end with it."""
    helpers = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
            if child.status() != psutil.STATUS_ZOMBIE and not any(helper in command for helper in helpers):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def _end_own_children() -> list[str]:
    """Kills the processes that this one has started and that are still alive, and names them."""
    left = _own_children()
    named = []
    for child in left:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            named.append(f"left behind: {child.pid} {' '.join(child.cmdline())[:200]}")
            child.kill()
    psutil.wait_procs(left, timeout=_STOP_DEADLINE_S)
    return named


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="run all of the matrix of faults, which takes hours")
    parser.addoption("--long", action="store_true", help="run what takes too long for every change, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what runs with --matrix or --long only."""
    for mark in ("matrix", "long"):
        if not config.getoption(f"--{mark}"):
            left_out = [item for item in items if item.get_closest_marker(mark) is not None]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.get_closest_marker(mark) is None]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing that is imported becomes garbage: looking through it again and again would take a tenth of the imports'
    time, and half of the time of many unit tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def preloaded() -> Iterator[Preloaded]:
    """The process that has imported SGLang, from which servers and programs are forked: in each process of a run that
    has some."""
    from preloaded import Preloaded

    with Preloaded() as process:
        yield process


@pytest.fixture(autouse=True, scope="module")
def _earlier_objects_are_no_garbage() -> None:
    """The same holds for what is left of the files before this one."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes what a worker of pytest-xdist found; what the exit status of a worker is does not matter there."""
    node.config.stash.setdefault(_LEFT_BY_WORKERS, []).extend(getattr(node, "workeroutput", {}).get(_LEFT, []))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the run when a process that it started is still alive, and kills it."""
    left = _end_own_children() + session.config.stash.get(_LEFT_BY_WORKERS, [])
    if not left:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_LEFT] = left
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for line in left if reporter is not None else ():
        reporter.write_line(line, red=True)
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
