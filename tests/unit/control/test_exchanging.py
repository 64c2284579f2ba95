"""Exchanges in the background, with scripted replicas: they begin by themselves, other commands go before them, and a
restore brings all KV home first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fake_deployment import FakeDeployment, make_facts

from kunserve_sgl.args import Exchange
from kunserve_sgl.control.answers import CommandAnswer, Verdict
from kunserve_sgl.control.messages import LinkSpeed, Order, Phase, ReadSpeeds
from kunserve_sgl.policy.demand import AttentionTime, ReplicaLoad
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.exchange import remote_kv
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.partial_restore import RestoreWish
from kunserve_sgl.policy.plan import Plan, kv_moves

LAYERS_AWAY = 8  # each of two replicas has dropped half of 8 layers


def merged(**sizes: Any) -> FakeDeployment:
    deployment = FakeDeployment(exchange=Exchange.ON, **sizes).start()
    drop(deployment, *range(len(deployment.replicas)))
    return deployment


def drop(deployment: FakeDeployment, *group: int) -> None:
    """Until it is answered, and no further."""
    deployment.order_drop(group)
    while not deployment.answers:
        deployment.deliver_one()
    assert deployment.answers.pop().verdict is Verdict.DONE


def plan_of(deployment: FakeDeployment) -> Plan:
    plan = deployment.coordinator.plan
    assert plan is not None
    return plan


def exchange(deployment: FakeDeployment) -> dict[str, Any]:
    status: dict[str, Any] = deployment.coordinator.status()["exchange"]
    return status


def until(deployment: FakeDeployment, phase: Phase) -> None:
    """Until that phase has been ordered of the transition that runs, and nobody has answered."""
    while True:
        message = deployment._inboxes[0][2]
        if isinstance(message, Order) and message.phase is phase:
            return
        deployment.deliver_one()


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_kv_moves_after_a_drop(ranks: int) -> None:
    deployment = merged(ranks=ranks)
    assert exchange(deployment)["running"]
    assert exchange(deployment)["parts"] == LAYERS_AWAY
    assert deployment.state() == "merged"
    deployment.let_time_pass()
    status = exchange(deployment)
    assert not remote_kv(plan_of(deployment))
    assert (status["parts_done"], status["running"], status["last_failure"]) == (LAYERS_AWAY, False, "")
    # A layer's base KV is 4 granules of one frame.
    assert status["moved_bytes"] == LAYERS_AWAY * 4 * 4096 * ranks
    assert status["seconds"] > 0
    for each in status["replicas"].values():
        assert each == {"remote_layers": 0, "remote_bytes": 0, "away_layers": 4, "away_bytes": 4 * 4 * 4096 * ranks}
    assert deployment.phases(0)[-5:] == ["prepare", "load", "switch", "release", "resume"]
    assert deployment.coordinator.next_deadline_s() is None


def test_it_is_said_once_why_nothing_moves(caplog: pytest.LogCaptureFixture) -> None:
    """A layer's base KV is more than half of what the drop gains, and so the drop has left no frames for it."""
    caplog.set_level("WARNING")
    deployment = FakeDeployment(exchange=Exchange.ON)
    for replica in range(2):
        deployment.hello(replica, 0, make_facts(replica, base=30))
    deployment.deliver()
    drop(deployment, 0, 1)
    deployment.let_time_pass()
    status = exchange(deployment)
    assert (status["running"], status["moved_bytes"]) == (False, 0)
    assert "the KV of one layer takes 30 frames at replica 0, of which 0 are free; " in status["lacks"]
    said = [record.getMessage() for record in caplog.records if "no KV moves" in record.getMessage()]
    assert said == [f"KunServe exchange: no KV moves: {status['lacks']}"]
    deployment.restore()
    assert exchange(deployment)["lacks"] == ""


def test_nothing_moves_when_it_is_off() -> None:
    deployment = FakeDeployment().start()
    deployment.drop((0, 1))
    assert deployment.coordinator.next_deadline_s() is None
    assert len(remote_kv(plan_of(deployment))) == LAYERS_AWAY
    assert exchange(deployment)["mode"] == "off"


def test_a_restore_brings_all_home_first() -> None:
    deployment = merged()
    deployment.let_time_pass()
    answer = deployment.restore()
    assert (answer.verdict, answer.message) == (Verdict.DONE, "restored")
    assert deployment.state() == "normal"
    status = exchange(deployment)
    assert status["returned_bytes"] == status["moved_bytes"] == LAYERS_AWAY * 4 * 4096
    assert status["parts"] == 0
    assert deployment.coordinator.next_deadline_s() is None
    # And everything is as it was: the same drop is possible again.
    assert deployment.drop((0, 1)).verdict is Verdict.DONE


def test_a_partial_restore_brings_all_home_first_and_the_rest_goes_again() -> None:
    deployment = merged()
    deployment.let_time_pass()
    layer = next(layer for layer, host in enumerate(plan_of(deployment).hosts[0]) if host == 1)
    answer = deployment.restore([[0, 1]], layers={0: [layer]})
    assert (answer.verdict, answer.message) == (Verdict.DONE, "partly restored")
    assert plan_of(deployment).hosts[0][layer] == 0
    assert layer in plan_of(deployment).resident[0]
    deployment.let_time_pass()
    status = exchange(deployment)
    assert status["returned_bytes"] == LAYERS_AWAY * 4 * 4096
    assert status["moved_bytes"] > status["returned_bytes"]
    assert all(e.homes[layer] == 0 for e in plan_of(deployment).extents_of(0) if e.first_granule == 0)
    assert deployment.restore().message == "restored"
    assert deployment.state() == "normal"
    assert exchange(deployment)["parts"] == 0


@pytest.mark.parametrize("phase", [Phase.PREPARE, Phase.LOAD, Phase.SWITCH])
@pytest.mark.parametrize("command", ["restore", "drop"])
def test_a_command_goes_before_it_at_once(phase: Phase, command: str) -> None:
    deployment = merged(replicas=3) if command == "restore" else FakeDeployment(3, exchange=Exchange.ON).start()
    if command == "drop":
        drop(deployment, 0, 1)
    until(deployment, phase)
    assert exchange(deployment)["running"]
    answers: list[CommandAnswer] = []
    orders = len(deployment.replicas[0].orders)
    if command == "restore":
        deployment.coordinator.restore(RestoreWish(), answers.append)
    else:
        deployment.coordinator.drop(DropWish(((0, 1, 2),)), answers.append)
    assert deployment.coordinator.view() is None
    while not answers:
        deployment.deliver_one()
    assert answers[0].verdict is Verdict.DONE
    phases = deployment.phases(0)[orders:]
    # What had been ordered before, then the way back, then the command.
    assert phases[1:4] == ["revert", "undo", "reopen"]
    assert phases[0] == phase.value
    assert phases[4] == "prepare"
    deployment.let_time_pass()
    assert exchange(deployment)["last_failure"] == ""
    assert deployment.state() == ("normal" if command == "restore" else "merged")
    if command == "drop":
        assert exchange(deployment)["parts_done"] > 0, "it goes on afterwards"


def test_where_there_is_no_way_back_the_command_waits_for_the_end() -> None:
    deployment = merged()
    until(deployment, Phase.RELEASE)
    answers: list[CommandAnswer] = []
    deployment.coordinator.restore(RestoreWish(), answers.append)
    orders = len(deployment.replicas[0].orders)
    while not answers:
        deployment.deliver_one()
    assert answers[0].verdict is Verdict.DONE
    assert deployment.phases(0)[orders : orders + 3] == ["release", "resume", "prepare"]
    assert deployment.state() == "normal"


def test_what_fails_is_tried_again_later_and_later() -> None:
    deployment = merged()
    deployment.script[Phase.LOAD, 1, 0] = "refuse"
    failed_s = []
    for _ in range(3):
        while not exchange(deployment)["last_failure"] or exchange(deployment)["running"]:
            deployment.deliver_one()
        assert "refused to load: no frames" in exchange(deployment)["last_failure"]
        failed_s.append(deployment.coordinator.next_deadline_s())
        deployment.now_s = failed_s[-1] or 0.0
        deployment.coordinator.on_tick()
        assert exchange(deployment)["running"]
    assert deployment.state() == "merged"
    deployment.script.clear()
    deployment.let_time_pass()
    assert exchange(deployment)["parts_done"] == LAYERS_AWAY
    assert exchange(deployment)["last_failure"] == ""


@pytest.mark.parametrize("phase", [Phase.PREPARE, Phase.LOAD, Phase.RELEASE])
def test_a_death_ends_it_and_the_command_that_waits_is_answered(phase: Phase) -> None:
    deployment = merged(replicas=3)
    until(deployment, phase)
    answers: list[CommandAnswer] = []
    deployment.coordinator.restore(RestoreWish(), answers.append)
    deployment.lose(1)
    deployment.let_time_pass()
    assert [answer.verdict for answer in answers] == [Verdict.CONFLICT]
    plan = plan_of(deployment)
    assert all(extent.homes == (extent.replica,) * 8 for extent in plan.extents)
    assert not exchange(deployment)["running"]
    assert deployment.coordinator.plan is not None


def test_it_is_begun_with_the_members_that_live() -> None:
    deployment = merged(replicas=4)
    deployment.let_time_pass()
    before = plan_of(deployment)
    assert kv_moves(before, before) == ()
    deployment.coordinator.set_stalled({2: "it stands still"}, {})
    assert deployment.coordinator.next_deadline_s() is None


def test_who_comes_back_is_taken_back_between_two_moves() -> None:
    deployment = FakeDeployment(4, exchange=Exchange.ON).start()
    deployment.lose(3)
    deployment.deliver()
    drop(deployment, 0, 1)
    until(deployment, Phase.LOAD)
    assert not deployment.come_back(3), "a transition runs"
    while exchange(deployment)["running"]:
        deployment.deliver_one()
    assert exchange(deployment)["parts_done"] < LAYERS_AWAY
    assert deployment.coordinator.take_back(3)
    deployment.let_time_pass()
    assert exchange(deployment)["parts_done"] == LAYERS_AWAY


def hold(deployment: FakeDeployment, seconds: float) -> list[CommandAnswer]:
    """For the number 7."""
    answers: list[CommandAnswer] = []
    deployment.coordinator.hold_exchange(7, seconds, answers.append)
    return answers


def test_one_that_is_held_is_left_and_goes_on_when_it_is_free() -> None:
    deployment = merged()
    until(deployment, Phase.LOAD)
    answers = hold(deployment, 100.0)
    assert answers == [], "it is still under way"
    deployment.deliver()
    assert [answer.verdict for answer in answers] == [Verdict.DONE]
    assert (exchange(deployment)["running"], exchange(deployment)["parts_done"]) == (False, 0)
    assert len(hold(deployment, 100.0)) == 1
    deployment.coordinator.on_tick()
    deployment.deliver()
    assert exchange(deployment)["parts_done"] == 0
    deployment.coordinator.free_exchange(7, answers.append)
    assert deployment.coordinator.next_deadline_s() == deployment.now_s
    deployment.let_time_pass()
    assert exchange(deployment)["parts_done"] == LAYERS_AWAY


def test_nobody_holds_it_for_ever() -> None:
    deployment = merged()
    until(deployment, Phase.LOAD)
    hold(deployment, 100.0)
    held_s = deployment.now_s
    deployment.let_time_pass()
    assert exchange(deployment)["parts_done"] == LAYERS_AWAY
    assert deployment.now_s > held_s + 100


# By measurement


def measuring(borrowed: float, noise: float = 0.05, ranks: int = 1) -> FakeDeployment:
    """Two replicas, of which each reads memory of the other with so many bytes per second, and its own with 1e6."""
    deployment = FakeDeployment(ranks=ranks, exchange=Exchange.AUTO).start()
    for replica in range(2):
        deployment.reads[replica, 0] = (ReadSpeeds(1 - replica, 1e6, borrowed, noise),)
    return deployment


def serve(deployment: FakeDeployment, seconds: float, used_tokens: int) -> None:
    """Both replicas run ten batches a second."""
    for step in range(int(seconds * 10)):
        deployment.now_s += 0.1
        for replica in range(2):
            load = ReplicaLoad(capacity_tokens=64, used_tokens=used_tokens, batches=step)
            deployment.coordinator.on_load(replica, load)
        deployment.coordinator.on_tick()
        deployment.deliver()


def test_kv_moves_where_reading_it_costs_more_than_moving_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    deployment = measuring(borrowed=1e5)
    drop(deployment, 0, 1)
    deployment.deliver()
    assert not exchange(deployment)["running"]
    assert deployment.coordinator.next_deadline_s() is None, "nobody reads anything yet"
    serve(deployment, 20, used_tokens=64)
    # The first drop could not know, and left no frames to begin with.
    assert exchange(deployment)["parts_done"] == 0
    assert {(each["host"], each["owner"]) for each in exchange(deployment)["reads"]} == {(0, 1), (1, 0)}
    assert "KV of replica 0 moves" in caplog.text
    deployment.restore()
    drop(deployment, 0, 1)
    serve(deployment, 20, used_tokens=64)
    assert exchange(deployment)["parts_done"] == LAYERS_AWAY


@pytest.mark.parametrize(
    ("borrowed", "noise", "used_tokens", "reason"),
    [
        (1e6, 0.0, 64, "no slower than what measurements differ by"),
        (0.97e6, 0.05, 64, "no slower than what measurements differ by"),
        (1e5, 0.05, 0, "saves 0.000 s in "),
    ],
)
def test_kv_stays_where_that_does_not_pay(
    borrowed: float, noise: float, used_tokens: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    deployment = measuring(borrowed, noise)
    drop(deployment, 0, 1)
    deployment.deliver()
    deployment.restore()
    drop(deployment, 0, 1)
    serve(deployment, 20, used_tokens)
    assert exchange(deployment)["parts_done"] == exchange(deployment)["moved_bytes"] == 0
    assert all(reason in each["reason"] for each in exchange(deployment)["reads"])
    assert "KV of replica 0 stays" in caplog.text


def test_the_slowest_rank_counts() -> None:
    deployment = measuring(borrowed=1e6, ranks=2)
    deployment.reads[0, 1] = (ReadSpeeds(1, 1e6, 1e5, 0.0),)
    drop(deployment, 0, 1)
    speeds = {each["host"]: each["borrowed_bytes_per_second"] for each in exchange(deployment)["reads"]}
    assert speeds == {0: 1e5, 1: 1e6}


def test_what_a_replica_has_measured_and_counted_before_it_was_started_again_is_forgotten() -> None:
    """It may be on another machine, and its counters begin anew."""
    deployment = FakeDeployment(3, exchange=Exchange.AUTO).start()
    for replica in range(3):
        others = {0, 1, 2} - {replica}
        deployment.reads[replica, 0] = tuple(ReadSpeeds(other, 1e6, 1e5, 0.05) for other in others)
    drop(deployment, 0, 1, 2)
    for step in range(20):
        deployment.now_s += 0.1
        for replica in range(3):
            deployment.coordinator.on_load(replica, ReplicaLoad(64, used_tokens=64, batches=1000 * step))
    deployment.restore()
    deployment.reads.clear()
    deployment.lose(1)
    deployment.let_time_pass()
    assert len(exchange(deployment)["reads"]) == 6
    assert deployment.come_back(1)
    assert [(each["host"], each["owner"]) for each in exchange(deployment)["reads"]] == [(0, 2), (2, 0)]
    known = deployment.coordinator._exchange
    assert (known._batches.keys(), known._used_tokens.keys()) == ({0, 2}, {0, 2})
    deployment.coordinator.on_load(1, ReplicaLoad(64, used_tokens=64, batches=3))
    assert known._batches[1].per_second == 0.0


def test_only_drops_say_what_a_drop_pauses() -> None:
    deployment = FakeDeployment(4, exchange=Exchange.AUTO)
    for replica in range(4):
        deployment.hello(replica, 0, make_facts(replica, free=80))
    deployment.deliver()
    drop(deployment, 0, 1)
    known = deployment.coordinator._exchange
    per_part_s = known._drop_pause_s
    assert per_part_s > 0
    deployment.pause_s *= 100
    deployment.coordinator.lend(LendWish(3, 2, 64), deployment.answers.append)
    assert deployment.run().verdict is Verdict.DONE
    assert deployment.restore([[0, 1]], layers={0: [next(iter(lacks(deployment, 0)))]}).message == "partly restored"
    assert known._drop_pause_s == per_part_s
    # And a drop counts what it has made remote, not what was before it.
    deployment.pause_s /= 100
    deployment.restore([[0, 1]])
    drop(deployment, 0, 1)
    assert known._drop_pause_s == pytest.approx(per_part_s)


def lacks(deployment: FakeDeployment, replica: int) -> set[int]:
    """The layers that it has dropped."""
    return set(range(8)) - set(plan_of(deployment).resident[replica])


@pytest.mark.parametrize(("by_message", "known"), [(False, 1e5), (True, 2e9)])
def test_links_that_are_measured_by_themselves_are_not_those_of_a_busy_moment(by_message: bool, known: float) -> None:
    deployment = FakeDeployment(exchange=Exchange.AUTO, by_message=by_message).start()
    if by_message:
        deployment.say(LinkSpeed(0, 0, 1, 0, 2e9))
    for replica in range(2):
        deployment.reads[replica, 0] = (ReadSpeeds(1 - replica, 1e6, 1e5, 0.05),)
    drop(deployment, 0, 1)
    members = deployment.coordinator.status()["members"]
    assert [member["link_bytes_per_second"] for member in members] == [{"1": known}, {"0": known}]


def test_where_reading_is_slower_drops_leave_frames_for_it() -> None:
    gained = {}
    for borrowed in (1e5, 0.9e6, 1e6):
        deployment = measuring(borrowed)
        drop(deployment, 0, 1)
        deployment.restore()
        deployment.answers.clear()
        gained[borrowed] = deployment.drop((0, 1)).extension_slots and sum(
            extent.granules for extent in plan_of(deployment).extents if extent.first_granule
        )
    # Of 40 frames at each replica a layer's base KV takes 4; a granule takes 4 at each for both replicas' slots.
    assert gained[1e6] - gained[1e5] == 1
    assert gained[0.9e6] == gained[1e6], "on one host that is chance"


# By message


class Asking(FakeDeployment):
    """Two merged replicas, each of which reads a layer's KV, 16 KiB, from the other by messages in 16 ms."""

    def __init__(self, are_measured: bool = True) -> None:
        super().__init__(exchange=Exchange.AUTO, by_message=True)
        self.start()
        for replica in range(2) if are_measured else ():
            self.reads[replica, 0] = (ReadSpeeds(1 - replica, 1e9, 1e6, 0.05),)
        self.totals_ms = [[0.0, 0.0], [0.0, 0.0]]
        self.phase_s = 0.01
        drop(self, 0, 1)
        self.deliver()

    def ask(self, seconds: float, spent: float, attending: float, hosts: Sequence[int] = (0, 1)) -> None:
        """Layer hosts ask the other replica, which takes such shares of their time as long as all layers are
        remote."""
        for _ in range(round(seconds * 10)):
            self.now_s += 0.1
            for host in hosts:
                remote = exchange(self)["replicas"][1 - host]["remote_layers"] / (LAYERS_AWAY / 2)
                totals = self.totals_ms[host]
                totals[0] += 100 * spent * remote
                totals[1] += 100 * attending * remote
                times = AttentionTime(1 - host, 0, *map(int, totals))
                self.coordinator.on_load(host, ReplicaLoad(64, used_tokens=64, attention=(times,)))
            self.coordinator.on_tick()
            self.deliver()

    @property
    def moved(self) -> int:
        parts: int = exchange(self)["parts_done"]
        return parts


def test_kv_moves_where_asking_for_it_costs_more_than_moving_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    deployment = Asking()
    # 0.4 s of a second, for 10 s at least: more than twice what 4 layers take.
    deployment.ask(2, spent=0.5, attending=0.1)
    assert deployment.moved == 0, "it may be chance"
    deployment.ask(40, spent=0.5, attending=0.1)
    assert deployment.moved == LAYERS_AWAY
    said = [record.getMessage() for record in caplog.records if record.getMessage().endswith("KV of replica 0 moves")]
    assert len(said) == 1
    assert "orders a second" in said[0]


@pytest.mark.parametrize(
    ("spent", "attending", "seconds"),
    [
        (0.0, 0.0, 60),  # nobody asks
        (0.5, 0.5, 60),  # it would take as long where it is asked for
        (0.3, 0.5, 60),  # two at once are faster than one
        (0.11, 0.1, 10),  # less than twice what it takes
    ],
)
def test_kv_stays_where_asking_for_it_costs_less(spent: float, attending: float, seconds: float) -> None:
    deployment = Asking()
    deployment.ask(seconds, spent, attending)
    assert deployment.moved == 0
    assert not exchange(deployment)["running"]


def test_a_little_that_goes_on_for_long_pays_in_the_end() -> None:
    """As long as the replicas have been merged, they are expected to stay so."""
    deployment = Asking()
    deployment.ask(10, spent=0.12, attending=0.1)
    assert deployment.moved == 0
    deployment.ask(120, spent=0.12, attending=0.1)
    assert deployment.moved > 0


def test_only_the_kv_of_the_home_that_is_asked_moves() -> None:
    deployment = Asking()
    deployment.ask(40, spent=0.5, attending=0.1, hosts=[1])
    replicas = exchange(deployment)["replicas"]
    assert replicas[0]["away_layers"] > 0, "as many as there are frames for"
    assert replicas[1]["away_layers"] == 0


def test_without_a_measurement_nothing_moves() -> None:
    deployment = Asking(are_measured=False)
    deployment.ask(60, spent=0.9, attending=0.0)
    assert deployment.moved == 0
    assert exchange(deployment)["reads"] == []


def test_a_chance_wait_moves_nothing() -> None:
    """A batch has stood for 0.3 s because of another program."""
    deployment = Asking()
    deployment.ask(10, spent=0.0, attending=0.0)
    deployment.ask(0.1, spent=3.0, attending=0.0)
    deployment.ask(60, spent=0.0, attending=0.0)
    assert deployment.moved == 0
