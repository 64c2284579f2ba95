"""Replicas as actors on two nodes of a cluster of Ray: served, merged, killed and brought back as processes are."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from _drop import Served
from _questions import ask, ask_all, make_questions
from _ray import on_ray, served_on
from _servers import LLAMA, START_DEADLINE_S, RunningServer

from kunserve_sgl.tiny_model import write_tiny_model
from preloaded import Preloaded
from servers.ray_nodes import RayNodes, ray_nodes
from servers.server import remaining
from waiting import wait_until

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

pytestmark = pytest.mark.server

LONG_QUESTIONS = [replace(each, answer_tokens=40, replica=i % 2) for i, each in enumerate(make_questions(8, seed=22))]
SLOW_STEP_S = 1.0  # with it these take far longer than what goes on beside them


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def served(nodes: RayNodes, preloaded: Preloaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("ray")
    write_tiny_model(LLAMA, directory / "model")
    with served_on(nodes.address, on_ray(), directory / "model", preloaded.popen) as made:
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


@pytest.mark.long
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


@pytest.mark.parametrize(
    "with_workers",
    [pytest.param(True, id="all of it"), pytest.param(False, id="its raylet", marks=pytest.mark.long)],
)
def test_a_node_that_is_killed_is_done_without_until_there_is_another(
    served: Served, nodes: RayNodes, with_workers: bool
) -> None:
    server = served.server
    expected = server.answers_to(LONG_QUESTIONS)
    pids = [actor_pid(server, replica) for replica in served.replicas]
    log_begin = len(server.log())
    served.drop({"groups": [[0, 1]]})
    with ThreadPoolExecutor(len(LONG_QUESTIONS)) as clients, served.endpoint.slowed(SLOW_STEP_S):
        answers = [clients.submit(ask, served.endpoint, question) for question in LONG_QUESTIONS]
        served.endpoint.wait_for_requests_inside(lambda count: count == len(answers), "all of them")
        nodes.kill(1, with_workers=with_workers)
        wait_until(lambda: "normal" in server.states(), "the other one has recovered")
        assert not any(answer.done() for answer in answers)
    assert [answer.result() for answer in answers] == expected
    left = server.states().index("normal")
    lost = 1 - left
    assert not remaining([pids[lost]])

    # Alone it serves as one that never was merged.
    assert ask_all(served.endpoint, served.questions) == served.expected
    wait_until(lambda: "Ray has no room" in str(server.status()["replicas"][lost]), "the status says what is missing")
    assert ask_all(served.endpoint, served.questions) == served.expected

    nodes.add()
    wait_until(lambda: server.states() == ["normal", "normal"], "it is back", START_DEADLINE_S)
    assert actor_pid(server, left) == pids[left]
    log = server.log()[log_begin:]
    assert log.count(f"replica {lost} waits to be started") == 1
    # Until Ray knows that the node has ended it starts actors there, which is no try.
    assert len(set(re.findall(rf"KunServe: replica {lost}: .*, try (\d+) of", log))) == 1
    assert f"DP{lost}] KunServe: the layers have come from replica {left} (4)" in log
    served.check_merging()
    assert served.endpoint.post("/kunserve/check").json()["ok"]


@pytest.mark.long
def test_without_the_node_that_it_is_on_the_server_ends(served: Served, nodes: RayNodes) -> None:
    """Ray ends all that it has started. It is the end of the cluster, so nothing may come after it."""
    process = served.process
    nodes.kill(0, with_workers=False)
    assert process.wait_end(START_DEADLINE_S) == 1
    assert "the node of Ray that this server is on has ended" in served.server.log().strip().splitlines()[-1]
