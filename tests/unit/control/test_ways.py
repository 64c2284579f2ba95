"""How each two replicas use each other's memory, where that is for each two to say."""

from __future__ import annotations

from typing import Any

import pytest
from fake_deployment import FakeDeployment

from kunserve_sgl.args import Exchange
from kunserve_sgl.control.answers import Verdict
from kunserve_sgl.control.messages import LinkSpeed, ReadSpeeds, Wanting, Welcome

MACHINES = ("a", "a", "b", "b")


def told(deployment: FakeDeployment) -> dict[int, tuple[bool, ...]]:
    """What each replica was told last of whose memory it maps."""
    return {replica: message.maps for replica, _, message in deployment.sent if isinstance(message, Welcome)}


def within(*machines: str) -> dict[int, tuple[bool, ...]]:
    return {replica: tuple(mine == other for other in machines) for replica, mine in enumerate(machines)}


def test_memory_is_mapped_within_a_machine_and_all_may_be_merged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        deployment = FakeDeployment(replicas=4, machines=MACHINES).start()
    assert told(deployment) == within(*MACHINES)
    assert deployment.coordinator.maps == tuple(within(*MACHINES).values())
    assert "memory of others is mapped between replicas 0 and 1, 2 and 3, and used by messages between" in caplog.text
    assert deployment.drop((0, 1, 2, 3)).verdict is Verdict.DONE
    assert deployment.restore().verdict is Verdict.DONE


@pytest.mark.parametrize(("by_message", "maps"), [(False, True), (True, False)])
def test_where_it_is_the_same_for_all_nobody_is_told(by_message: bool, maps: bool) -> None:
    deployment = FakeDeployment(replicas=2, by_message=by_message).start()
    assert told(deployment) == {0: (), 1: ()}
    assert deployment.coordinator.maps == ((maps, maps),) * 2


@pytest.mark.parametrize("machine", ["a", "b"])
def test_one_that_comes_back_may_be_on_another_machine(machine: str) -> None:
    """Layers are lent to it in the way that it has said, before it is taken back."""
    deployment = FakeDeployment(replicas=3, machines=("a", "a", "b")).start()
    deployment.lose(1)
    deployment.machines[1] = machine
    deployment.say(Wanting(1, 0, deployment.device(1), incarnation=1, memory_address="memory 1 0 1"))
    deployment.deliver()
    lent = {
        replica: loan.maps
        for replica, fake in enumerate(deployment.replicas)
        for loans in fake.lends.values()
        for loan in loans
    }
    assert lent == {0: machine == "a", 2: machine == "b"}
    assert told(deployment) == within("a", "a", "b")
    assert deployment.come_back(1)
    assert told(deployment) == within("a", machine, "b")


def test_kv_that_is_mapped_moves_by_how_fast_it_is_read_and_other_by_what_asking_takes() -> None:
    """What was read of memory that is mapped is a link; others are measured by themselves."""
    deployment = FakeDeployment(replicas=3, exchange=Exchange.AUTO, machines=("a", "a", "b")).start()
    for one, other in ((0, 2), (1, 2)):
        deployment.say(LinkSpeed(one, 0, other, 0, 2e9))
    for replica in range(3):
        deployment.reads[replica, 0] = tuple(ReadSpeeds(o, 1e6, 1e5, 0.05) for o in range(3) if o != replica)
    assert deployment.drop((0, 1, 2)).verdict is Verdict.DONE
    members: list[dict[str, Any]] = deployment.coordinator.status()["members"]
    speeds = [member["link_bytes_per_second"] for member in members]
    assert speeds == [{"1": 1e5, "2": 2e9}, {"0": 1e5, "2": 2e9}, {"0": 2e9, "1": 2e9}]


@pytest.mark.parametrize(("group", "leaves_spare"), [((0, 1), False), ((0, 2), True)])
def test_a_drop_leaves_frames_for_kv_that_is_used_by_messages(group: tuple[int, int], leaves_spare: bool) -> None:
    deployment = FakeDeployment(replicas=3, exchange=Exchange.AUTO, machines=("a", "a", "b")).start()
    assert deployment.coordinator._exchange.leaves_spare(group, are_apart=False) is leaves_spare


@pytest.mark.parametrize(("machines", "differ"), [("aab", True), ("aaa", False), ("abc", False)])
def test_ways_are_a_reason_to_prefer_somebody_where_they_differ(machines: str, differ: bool) -> None:
    view = FakeDeployment(replicas=3, machines=tuple(machines)).start().coordinator.view()
    assert view is not None
    assert view.links.maps == (tuple(within(*machines).values()) if differ else ())
