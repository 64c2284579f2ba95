"""Processes that need the same compiled code: one compiles it, the others load it."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numba
import pytest

from kunserve_sgl.cpu_attention import compiling
from kunserve_sgl.cpu_attention.compiling import compiled_once

MODULE = """
def added(a, b):
    return a + b
"""


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose compiled code is kept beside its file."""
    (tmp_path / "of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "of_a_test", raising=False)
    import of_a_test  # type: ignore[import-not-found]

    return of_a_test.added


def _call(function: Any, ready: Any, said: Connection) -> None:
    made = compiled_once(numba.njit(cache=True)(function))
    ready.wait()
    result = made(1, 2)
    said.send((result, sum(made.stats.cache_hits.values()), sum(made.stats.cache_misses.values())))


def test_one_of_several_processes_compiles(function: Any) -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(3)
    pipes = [fork.Pipe(duplex=False) for _ in range(3)]
    children = [fork.Process(target=_call, args=(function, ready, said)) for _, said in pipes]
    for child in children:
        child.start()
    told = []
    for heard, _ in pipes:
        assert heard.poll(300)
        told.append(heard.recv())
    for child in children:
        child.join(300)
    assert sorted(told) == [(3, 0, 1), (3, 1, 0), (3, 1, 0)]


def test_who_has_the_lock_for_too_long_is_not_waited_for(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "LONGEST_S", 0.05)
    made = compiled_once(numba.njit(cache=True)(function))
    directory = Path(made.stats.cache_path)
    directory.mkdir(exist_ok=True)
    with (directory / "added.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert made(1, 2) == 3


def test_where_no_lock_can_be_made_each_compiles(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled_once(numba.njit(cache=True)(function))

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "open", refuse)
    assert made(1, 2) == 3


def test_where_files_have_no_locks_each_compiles(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS without its lock service, where NUMBA_CACHE_DIR may be."""
    made = compiled_once(numba.njit(cache=True)(function))

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert made(1, 2) == 3
