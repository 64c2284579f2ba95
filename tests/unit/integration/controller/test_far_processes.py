"""Actors on other machines, as the controller follows them, without Ray: what their ranks have left is brought here,
all of it, and who is killed at whatever moment of its start ends."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import begun_requests_path
from kunserve_sgl.control.begun_requests import BegunRequests, begun_of
from kunserve_sgl.integration.attach.last_words import FAILED
from kunserve_sgl.integration.attach.node_agent import NodeAgent, sight_of
from kunserve_sgl.integration.controller.actor_process import ActorProcess

DEADLINE_S = 300.0


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of Ray, which need not be installed. `killed` are the actors that it was told to kill."""
    made: Any = ModuleType("ray")
    made.exceptions = exceptions = cast(Any, ModuleType("ray.exceptions"))
    exceptions.RayError = type("RayError", (Exception,), {})
    exceptions.ActorDiedError = type("ActorDiedError", (exceptions.RayError,), {})
    made.killed = []
    made.kill = made.killed.append
    made.get = lambda reference, timeout=None: reference
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)
    return made


def process_of(directory: Path, rank: int, cluster: Any = None, pipe: Any = None) -> ActorProcess:
    """Rank `rank` of replica 1."""
    options = KunserveOptions(kunserve_directory=str(directory))
    return ActorProcess(cluster, (options, None, 0, rank, None, None, None, 0, 1, pipe))


@pytest.mark.parametrize("first", [0, 1])
def test_what_had_been_begun_is_brought_here_whichever_rank_ends_first(tmp_path: Path, first: int) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    for directory in (there, here):
        directory.mkdir()
    agent = NodeAgent(sight_of(str(there)), {})
    node = SimpleNamespace(is_shared=False, remains=agent.remains, remove_files=agent.remove_files)
    options = [KunserveOptions(kunserve_directory=str(directory)) for directory in (there, here)]
    path_there, path_here = (begun_requests_path(each, 1, 0) for each in options)
    notes = BegunRequests(path_there)
    notes.add(["begun"])
    notes.close()
    for rank in (first, 1 - first):
        process = process_of(here, rank)
        process._node, process.pid = cast(Any, node), 17
        process._fetch_remains()
    assert begun_of(path_here, ["begun", "waits"]) == ["begun"]
    assert not Path(path_there).exists(), "nobody asks for it any more"


def test_who_is_killed_while_its_actor_is_made_ends(tmp_path: Path, ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may have no room for it, and then it never says what it is."""
    cluster = SimpleNamespace(await_node=lambda replica, is_given_up, tell: None)
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = process_of(tmp_path, 0, cluster, writer)
    actor = SimpleNamespace(__ray_ready__=SimpleNamespace(remote=lambda: None))

    def make() -> Any:
        process.kill()
        return actor

    def never(method: Any) -> Any:
        raise AssertionError("it is waited for")

    monkeypatch.setattr(process, "_make", make)
    monkeypatch.setattr(process, "_result_of", never)
    actor.get_info = None
    process.start()
    process.join(DEADLINE_S)
    assert process.exitcode == FAILED
    assert process.how_ended == "it was killed"
    assert ray.killed == [actor]
    process.close()
    for end in (reader, writer):
        end.close()
