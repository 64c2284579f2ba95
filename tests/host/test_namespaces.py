"""Replicas on two machines that share nothing but a network: served, merged, cut off and brought back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from _drop import Served
from _namespaces import LONG_QUESTIONS, TwoMachines, attending, on_two_machines, served_on_both
from _questions import ask_all
from _ray import process_on
from _servers import LLAMA, START_DEADLINE_S

from kunserve_sgl.tiny_model import write_tiny_model
from waiting import wait_until

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

pytestmark = [pytest.mark.server, pytest.mark.long]

SPEC = on_two_machines()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("namespaces") / "model"
    write_tiny_model(LLAMA, directory)
    return directory


@pytest.fixture(scope="module")
def machines(model: Path) -> Iterator[TwoMachines]:
    with TwoMachines(model.parent, model) as machines:
        yield machines


@pytest.fixture(autouse=True)
def mended(machines: TwoMachines) -> Iterator[None]:
    yield
    machines.cable.set()


@pytest.fixture(scope="module")
def served(machines: TwoMachines, model: Path) -> Iterator[Served]:
    with served_on_both(machines, model, SPEC) as served:
        yield served


def test_a_machine_without_the_model_ends_the_start_and_is_named(
    machines: TwoMachines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("elsewhere")
    write_tiny_model(LLAMA, directory / "model")
    with process_on(machines.ray_address, SPEC, directory / "model") as process:
        assert process.wait_end(START_DEADLINE_S) == 1
    last = (directory / "log").read_text().strip().splitlines()[-1]
    missing = f"--model-path {directory}/model: there is no such file or directory on the node"
    assert missing in last
    assert f"at {machines.second.address}; accepted" in last


def test_replicas_on_both_machines_say_their_load(served: Served) -> None:
    loads = served.endpoint.get("/v1/loads").json()["loads"]
    assert [load["dp_rank"] for load in loads] == [0, 1]
    assert all(load["max_total_num_tokens"] > 0 for load in loads)


def test_replicas_on_both_machines_are_in_the_metrics(served: Served) -> None:
    served.check_answers_of_all()

    def are_all_there() -> bool:
        text = served.endpoint.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("sglang:num_used_tokens{")]
        return all(any(f'dp_rank="{replica}"' in line for line in lines) for replica in range(2))

    wait_until(are_all_there, "what both have counted is there")


def test_replicas_on_two_machines_merge_and_come_apart(served: Served) -> None:
    served.check_merging()
    served.check_as_at_start()


def test_who_loses_the_agent_of_its_node_is_started_again_with_another(served: Served, machines: TwoMachines) -> None:
    server = served.server
    (agent,) = machines.processes_of_second("NodeAgent")
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: sum(server.restarts()) == 1, "the loss is seen")  # of whom, Ray has chosen
    wait_until(lambda: server.states() == ["normal", "normal"], "it is back", START_DEADLINE_S)
    assert "the agent of its node has ended" in server.log()
    served.check_answers_of_all()


def test_a_cable_that_is_mended_soon_ends_nothing(served: Served, machines: TwoMachines) -> None:
    server = served.server
    expected, restarts = server.answers_to(LONG_QUESTIONS), server.restarts()
    served.drop({"groups": [[0, 1]]})
    with attending(served) as answers:
        lost = machines.cable.set(loss=1.0).lost
        wait_until(lambda: machines.cable.frames().lost > lost + 3, "messages have been lost, and sent again")
        machines.cable.set()
    assert [answer.result() for answer in answers] == expected
    assert server.states() == ["merged", "merged"]
    served.restore()
    served.check_answers_of_all()
    assert server.restarts() == restarts


def test_a_machine_that_is_cut_off_while_replicas_attend_for_each_other_is_done_without_and_replaced(
    served: Served, machines: TwoMachines
) -> None:
    server = served.server
    expected = server.answers_to(LONG_QUESTIONS)
    served.drop({"groups": [[0, 1]]})
    with attending(served) as answers:
        machines.cable.set(loss=1.0)
    assert [answer.result() for answer in answers] == expected
    assert ask_all(served.endpoint, served.questions) == served.expected
    assert "normal" in server.states()
    wait_until(lambda: "Ray has no room" in str(server.status()["replicas"]), "the status says what is missing")
    machines.cable.set()
    machines.start_second()
    wait_until(lambda: server.states() == ["normal", "normal"], "it is back", START_DEADLINE_S)
    served.check_answers_of_all()
    served.drop({"groups": [[0, 1]]})
    served.check_answers_of_all()
    served.restore()
    served.check_answers_of_all()


def test_a_slow_cable_that_loses_packets_loses_no_request(served: Served, machines: TwoMachines) -> None:
    """Both ways, and each way for itself."""
    orders, restarts = served.orders_sent(), served.server.restarts()
    before = machines.cable.set(delay_s=0.005, loss=0.01)
    served.drop({"groups": [[0, 1]]})
    served.check_answers_of_all()
    assert all(now > then for now, then in zip(served.orders_sent(), orders, strict=True))
    served.restore()
    served.check_answers_of_all()
    after = machines.cable.set()
    passed_on, lost = after.passed_on - before.passed_on, after.lost - before.lost
    assert 0.005 < lost / (lost + passed_on) < 0.02
    assert lost > 10
    assert served.server.restarts() == restarts
