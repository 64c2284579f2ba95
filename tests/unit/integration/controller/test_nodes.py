"""Agents of nodes, as the controller's threads ask for them: one on each node, and no node waits for another."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kunserve_sgl.integration.controller.nodes import Nodes

DEADLINE_S = 300.0


class SlowNodes(Nodes):
    """Starts an agent on node "slow" when `may_start` is set; agents live until they are told otherwise."""

    def __init__(self) -> None:
        super().__init__(None)
        self.is_starting, self.may_start = threading.Event(), threading.Event()
        self.started: list[str] = []

    def require_alive(self, number: str) -> None: ...

    def _lives(self, node: Any) -> bool:
        return True

    def _start(self, number: str) -> Any:
        self.started.append(number)
        if number == "slow":
            self.is_starting.set()
            assert self.may_start.wait(DEADLINE_S)
        return f"agent of {number}"


@pytest.fixture
def nodes() -> SlowNodes:
    return SlowNodes()


def test_a_node_on_which_no_agent_starts_holds_up_no_other(nodes: SlowNodes) -> None:
    with ThreadPoolExecutor(3) as threads:
        try:
            slow = threads.submit(nodes.at, "slow")
            assert nodes.is_starting.wait(DEADLINE_S)
            assert threads.submit(nodes.at, "other").result(DEADLINE_S) == "agent of other"
            second = threads.submit(nodes.at, "slow")
        finally:
            nodes.may_start.set()
        assert slow.result(DEADLINE_S) == second.result(DEADLINE_S) == "agent of slow"
    assert sorted(nodes.started) == ["other", "slow"]
