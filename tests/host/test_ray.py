"""Replicas as actors on two nodes of a cluster of Ray: served, merged, killed and brought back as processes are."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from _drop import Served
from _questions import ask_all
from _ray import on_ray, served_on
from _servers import LLAMA, START_DEADLINE_S, RunningServer

from kunserve_sgl.tiny_model import write_tiny_model
from servers.ray_nodes import ray_nodes
from servers.server import remaining
from waiting import wait_until

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def cluster_address() -> Iterator[str]:
    with ray_nodes(2) as address:
        yield address


@pytest.fixture(scope="module")
def served(cluster_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("ray")
    write_tiny_model(LLAMA, directory / "model")
    with served_on(cluster_address, on_ray(), directory / "model") as made:
        yield made
        actors = [actor_pid(made.server, replica) for replica in (0, 1)]
    wait_until(lambda: not remaining(actors), "no actor is left")


def actor_pid(server: RunningServer, replica: int) -> int:
    """The process that serves a replica: Ray gives processes titles of its own, so its log has to tell."""
    return int(re.findall(rf"pid=(\d+)\)\S* \[[^\]]* DP{replica}\]", server.log())[-1])


def test_replicas_on_two_nodes_merge_and_come_apart(served: Served) -> None:
    served.check_merging()


def test_each_replica_says_its_load_and_has_metrics(served: Served) -> None:
    loads = served.endpoint.get("/v1/loads").json()["loads"]
    assert [load["dp_rank"] for load in loads] == [0, 1]
    text = served.endpoint.get("/metrics").text
    for replica in (0, 1):
        assert re.search(rf'^sglang:num_running_reqs{{[^}}]*dp_rank="{replica}"', text, re.MULTILINE), text[-2000:]


def test_an_actor_that_is_killed_comes_back_as_another(served: Served) -> None:
    server, pid = served.server, actor_pid(served.server, 1)
    served.drop({"groups": [[0, 1]]})
    os.kill(pid, signal.SIGKILL)
    assert ask_all(served.endpoint, served.questions) == served.expected
    wait_until(lambda: server.restarts() == [0, 1], "the loss is seen")
    wait_until(lambda: server.states() == ["normal", "normal"], "it is back", START_DEADLINE_S)
    assert actor_pid(server, 1) != pid
    served.check_answers_of_all()
    served.drop({"groups": [[0, 1]]})
    served.check_answers_of_all()
    served.restore()
    assert served.endpoint.get("/kunserve/status").status_code == requests.codes.ok
    assert Path(f"/proc/{pid}").exists() is False
