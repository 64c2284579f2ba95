"""The end of a process on another machine, as the agent of its node and Ray tell it, and what is known of it then."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import begun_requests_path
from kunserve_sgl.control.begun_requests import BegunRequests, begun_numbers, begun_of
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.attach.node_agent import Remains
from kunserve_sgl.integration.controller import actor_process
from kunserve_sgl.integration.controller.actor_process import ActorProcess, clean_up, is_far
from kunserve_sgl.integration.controller.nodes import NodeGoneError

RayError = pytest.importorskip("ray.exceptions", reason="Ray is not installed: the extra `ray`").RayError

REPLICA, INCARNATION = 1, 2
NOTHING = Remains(None, None)


@dataclass
class FakeNode:
    """A node whose agent answers as it is told, and whose answers to `end` run out."""

    says: list[Any] = field(default_factory=list)
    left: Remains = NOTHING
    number: str = "12345678"
    is_shared: bool = False
    removed: list[tuple[int, int]] = field(default_factory=list)

    def end(self, pid: int, started: str) -> bool:
        answer = self.says.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    def remains(self, replica: int, rank: int, incarnation: int) -> Remains:
        assert (replica, rank, incarnation) == (REPLICA, 0, INCARNATION)
        return self.left

    def remove_files(self, replica: int, incarnation: int) -> None:
        self.removed.append((replica, incarnation))


@dataclass
class FakeNodes:
    at_last: Any

    def at(self, number: str) -> Any:
        if isinstance(self.at_last, Exception):
            raise self.at_last
        return self.at_last


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_process, "_ASK_AGAIN_S", 0.0)


def process_on(node: FakeNode, later: Any, directory: Path) -> ActorProcess:
    options = KunserveOptions(kunserve_directory=str(directory), kunserve_incarnation=INCARNATION)
    cluster: Any = SimpleNamespace(nodes=FakeNodes(later))
    made = ActorProcess(cluster, (options, None, 0, 0, None, None, None, 0, REPLICA, None))
    made.pid, made._started = os.getpid(), "7"
    made._node = node  # type: ignore[assignment]
    return made


def known_begun(directory: Path) -> list[str]:
    options = KunserveOptions(kunserve_directory=str(directory))
    return begun_of(begun_requests_path(options, REPLICA, INCARNATION), ["a", "b"])


def known_words(directory: Path) -> str | None:
    return last_words.words_of(str(directory), last_words.scheduler_name(REPLICA, 0))


def remains(directory: Path) -> Remains:
    notes = BegunRequests(str(directory / "there"))
    notes.add(["a"])
    notes.close()
    return Remains("it had no luck", begun_numbers(str(directory / "there")))


def test_what_it_has_left_is_known_here_once_its_agent_says_that_it_has_ended(tmp_path: Path) -> None:
    node = FakeNode([False, False, True], remains(tmp_path))
    process_on(node, node, tmp_path)._await_far_end()
    assert node.says == []
    assert known_words(tmp_path) == "it had no luck"
    assert known_begun(tmp_path) == ["a"]
    assert node.removed == [(REPLICA, INCARNATION)]


def test_of_a_node_that_has_ended_nothing_is_known_and_all_may_have_begun(tmp_path: Path) -> None:
    last_words.pass_on(str(tmp_path), last_words.scheduler_name(REPLICA, 0), "of the incarnation before")
    node = FakeNode([RayError("the agent has ended")])
    process_on(node, NodeGoneError("the node has ended"), tmp_path)._await_far_end()
    assert known_words(tmp_path) is None
    assert known_begun(tmp_path) == ["a", "b"]


def test_where_only_the_agent_has_ended_another_one_is_asked(tmp_path: Path) -> None:
    node, other = FakeNode([RayError("the agent has ended")]), FakeNode([False, True], remains(tmp_path))
    process_on(node, other, tmp_path)._await_far_end()
    assert known_begun(tmp_path) == ["a"]
    assert other.removed == [(REPLICA, INCARNATION)]


def test_the_pid_of_another_machine_is_nobodys_here(tmp_path: Path) -> None:
    mine = tmp_path / "members" / str(os.getpid())
    mine.parent.mkdir()
    mine.touch()
    for is_shared in (False, True):
        process = process_on(FakeNode(is_shared=is_shared), None, tmp_path)
        assert is_far(process) is not is_shared
        process.sentinel, writer = os.pipe()
        os.close(writer)
        clean_up(str(tmp_path), process)
        assert mine.exists() is not is_shared


def test_one_that_is_killed_before_ray_has_a_place_is_not_made(tmp_path: Path) -> None:
    process = process_on(FakeNode(), None, tmp_path)
    asked: list[bool] = []

    def await_node(replica: int, is_given_up: Any, tell: Any) -> None:
        tell("Ray has no room for it")
        assert process.waits_for == "Ray has no room for it"
        process.kill()
        asked.append(is_given_up())

    process._cluster.await_node = await_node  # type: ignore[assignment]
    assert process._run() == "it was not started any more"
    assert asked == [True]
    assert process._actor is None
