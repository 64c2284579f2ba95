"""Four replicas on two machines that share nothing but a network: those of one machine map memory of each other and use
that of the others by messages."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from _drop import Served
from _http import Json
from _namespaces import LONG_QUESTIONS, TwoMachines, attending, on_two_machines, served_on_both
from _servers import LLAMA, START_DEADLINE_S

from kunserve_sgl.tiny_model import write_tiny_model
from waiting import wait_until

pytest.importorskip("ray", reason="Ray is not installed: the extra `ray`")

pytestmark = [pytest.mark.server, pytest.mark.long]

SPEC = on_two_machines("--dp-size", "4", "--kunserve-exchange", "off", "--kunserve-order-timeout", "10")
ALL = {"groups": [[0, 1, 2, 3]]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("namespaces") / "model"
    write_tiny_model(LLAMA, directory)
    return directory


@pytest.fixture(scope="module")
def machines(model: Path) -> Iterator[TwoMachines]:
    with TwoMachines(model.parent, model, room=2) as machines:
        yield machines


@pytest.fixture(scope="module")
def served(machines: TwoMachines, model: Path) -> Iterator[Served]:
    with served_on_both(machines, model, SPEC) as served:
        yield served


def attention(served: Served) -> list[Json]:
    return [replica["remote_attention"] for replica in served.status()["replicas"]]


def neighbours(served: Served) -> dict[int, set[int]]:
    """Of each replica those whose memory it maps. Ray says which are on one machine."""
    return {
        replica: {int(peer) for peer, way in each["peers"].items() if way == "map"}
        for replica, each in enumerate(attention(served))
    }


def require_pairs(served: Served) -> None:
    near = neighbours(served)
    assert [len(others) for others in near.values()] == [1] * 4
    assert all(replica in near[other] for replica, others in near.items() for other in others)


def test_replicas_map_memory_within_a_machine_and_send_messages_across(served: Served) -> None:
    require_pairs(served)
    near = neighbours(served)
    served.check_answers_of_all()
    served.drop(ALL)
    served.check_answers_of_all()
    asked = {(one, int(peer)) for one, each in enumerate(attention(served)) for peer in each["orders_sent"]}
    assert asked == {(one, other) for one, other in itertools.permutations(range(4), 2) if other not in near[one]}
    assert served.endpoint.post("/kunserve/check").json()["ok"]
    served.restore()
    served.check_answers_of_all()
    served.check_as_at_start()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_one_whose_memory_is_mapped_elsewhere_is_done_without_when_it_is_gone(
    served: Served, machines: TwoMachines, sent: signal.Signals
) -> None:
    server = served.server
    expected, restarts = server.answers_to(LONG_QUESTIONS), sum(server.restarts())
    served.drop(ALL)
    with attending(served) as answers:
        pid = machines.processes_of_second("SchedulerActor")[0]
        psutil.Process(pid).send_signal(sent)
        wait_until(lambda: sum(server.restarts()) > restarts, "the loss is seen")
        assert not psutil.pid_exists(pid)
    assert [answer.result() for answer in answers] == expected
    wait_until(lambda: server.states() == ["normal"] * 4, "it is back", START_DEADLINE_S)
    require_pairs(served)
    served.check_answers_of_all()
