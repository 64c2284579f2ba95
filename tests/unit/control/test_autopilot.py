"""The autopilot by itself: a driver that follows a script, and a clock that moves only when it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fake_deployment import FakeDeployment

from kunserve_sgl.control.answers import CommandAnswer, Verdict
from kunserve_sgl.control.autopilot import DECISION_INTERVAL_S, Autopilot
from kunserve_sgl.control.messages import HostFailed
from kunserve_sgl.policy.decision import Act, DeploymentView, Thresholds
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.partial_restore import RestoreWish

LIMITS = Thresholds(drop_at=0.9, restore_at=0.5, horizon_s=2.0, min_stay_s=5.0, cool_down_s=10.0, largest_group=4)
NORMAL = DeploymentView(((0,), (1,)), {(0,): 0, (1,): 0}, 1000, {})
MERGED = DeploymentView(((0, 1),), {(0, 1): 0}, 1000, {(0, 1): {0: 1000, 1: 1000}})


@dataclass
class Script:
    """A driver whose plan and answers the test sets."""

    plan: DeploymentView | None = NORMAL
    calls: list[Any] = field(default_factory=list)
    done: list[Callable[[CommandAnswer], None]] = field(default_factory=list)

    def view(self) -> DeploymentView | None:
        return self.plan

    def drop(self, wish: DropWish, done: Callable[[CommandAnswer], None]) -> None:
        self.calls.append(wish)
        self.done.append(done)

    def lend(self, wish: LendWish, done: Callable[[CommandAnswer], None]) -> None:
        self.calls.append(wish)
        self.done.append(done)

    def resize(self, replica: int, tokens: int, done: Callable[[CommandAnswer], None]) -> None:
        self.calls.append((replica, tokens))
        self.done.append(done)

    def restore(
        self, wish: RestoreWish, done: Callable[[CommandAnswer], None], *, only_last: bool, drain_s: float
    ) -> None:
        self.calls.append((wish, only_last, drain_s))
        self.done.append(done)


class Flight:
    """An autopilot with a script and a clock."""

    def __init__(self, orders: bool = True, driver: Any = None) -> None:
        self.now_s = 100.0
        self.script = Script()
        self.pilot = Autopilot(driver or self.script, LIMITS, 3.0, lambda: self.now_s, orders)

    def load(self, *demands: int, capacity: int = 1000, longest: int = 0) -> None:
        for replica, demand in enumerate(demands):
            self.pilot.on_load(replica, ReplicaLoad(capacity, demand, longest_request_tokens=longest))

    def run(self, seconds: float) -> None:
        """Ticks as a loop that sleeps until the deadline would."""
        ends_s = self.now_s + seconds
        while (deadline_s := self.pilot.next_deadline_s()) is not None and deadline_s <= ends_s:
            self.now_s = max(self.now_s, deadline_s)
            self.pilot.on_tick()
        self.now_s = ends_s
        self.pilot.on_tick()

    def answer(
        self, verdict: Verdict = Verdict.DONE, plan: DeploymentView | None = NORMAL, seconds: float = 0.1
    ) -> None:
        self.script.plan = plan
        self.script.done.pop()(CommandAnswer(verdict, "as the test says", 1, seconds=seconds))


def test_drop_where_memory_is_short() -> None:
    flight = Flight()
    flight.load(800, 800)
    flight.run(1.0)
    assert flight.script.calls == []
    flight.load(1300, 700)
    flight.run(0.2)
    assert flight.script.calls == [DropWish(((0, 1),), needs={0: 400, 1: 200})]
    flight.load(1500, 700)
    flight.run(5.0)
    assert len(flight.script.calls) == 1, "an order at a time"


def test_manual_never_acts() -> None:
    flight = Flight(orders=False)
    flight.load(5000, 5000)
    assert flight.pilot.next_deadline_s() is None
    flight.run(60.0)
    assert flight.script.calls == []
    assert flight.pilot.status() == {
        "acts": False,
        "decision": "nothing",
        "reason": "orders come over HTTP",
        "demand": {replica: {"tokens": 5000, "ahead_tokens": 5000} for replica in (0, 1)},
    }


def test_decisions_are_an_interval_apart_and_end_when_nothing_is_left_to_decide() -> None:
    flight = Flight()
    assert flight.pilot.next_deadline_s() is None
    flight.load(100, 0)
    flight.pilot.on_tick()
    assert flight.pilot.next_deadline_s() == flight.now_s + DECISION_INTERVAL_S
    flight.load(0, 0)
    flight.run(1.0)
    assert flight.pilot.next_deadline_s() is None, "an idle server stays idle"


def test_restore_when_the_load_has_been_low_for_the_stay() -> None:
    flight = Flight()
    flight.script.plan = MERGED
    flight.load(900, 100, capacity=1500)
    flight.run(20.0)
    assert flight.script.calls == []
    flight.load(400, 100, capacity=1500)
    flight.run(4.0)
    flight.load(600, 100, capacity=1500)  # above the threshold: the stay begins anew
    flight.run(0.2)
    flight.load(400, 100, capacity=1500)
    flight.run(4.8)
    assert flight.script.calls == []
    flight.run(1.0)
    assert flight.script.calls == [(RestoreWish(((0, 1),)), True, 3.0)]


def test_no_restore_while_a_request_may_outgrow_the_capacity_that_is_left() -> None:
    flight = Flight()
    flight.script.plan = MERGED
    flight.load(100, 100, capacity=1500, longest=1200)
    flight.run(30.0)
    assert flight.script.calls == []
    flight.load(100, 100, capacity=1500, longest=800)
    flight.run(6.0)
    assert len(flight.script.calls) == 1


def test_idle_and_merged_is_restored_without_further_reports() -> None:
    flight = Flight()
    flight.script.plan = MERGED
    flight.load(0, 0, capacity=1500)
    flight.pilot.on_tick()
    flight.run(6.0)
    assert len(flight.script.calls) == 1


def test_failures_are_followed_by_longer_and_longer_waits(caplog: pytest.LogCaptureFixture) -> None:
    flight = Flight()
    flight.load(2000, 2000)
    waits = []
    for _ in range(8):
        flight.run(0.2)
        while not flight.script.done:
            flight.run(0.1)
        if waits:
            waits[-1] = flight.now_s - waits[-1]
        flight.answer(Verdict.FAILED)
        waits.append(flight.now_s)
    waits.pop()
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 60], abs=0.3)
    flight.run(61.0)
    flight.answer(Verdict.DONE)
    flight.run(0.2)
    assert flight.script.done, "a success ends the waiting"
    assert "next drop in 60 s at the earliest: as the test says" in caplog.text


def test_merges_that_break_are_followed_by_longer_and_longer_waits() -> None:
    """Each drop succeeds, and the merge fails in its first batch."""
    flight = Flight()
    flight.load(2000, 2000)
    flight.run(0.2)
    waits = []
    for _ in range(8):
        began_s = flight.now_s
        while not flight.script.done:
            flight.run(0.1)
        waits.append(flight.now_s - began_s)
        flight.answer(Verdict.DONE)
        flight.pilot.on_broken()
    assert waits == pytest.approx([0, 1, 2, 4, 8, 16, 32, 60], abs=0.3)
    assert flight.pilot.last.act is Act.DROP
    flight.run(0.2)
    assert flight.pilot.last.reason.startswith("the last drop failed; ")


def test_a_merge_that_a_restore_has_ended_ends_the_waiting() -> None:
    flight = Flight()
    for _ in range(5):
        flight.pilot.on_broken()
    flight.script.plan = MERGED
    flight.load(0, 0, capacity=1500)
    flight.pilot.on_tick()
    flight.run(6.0)
    flight.answer(Verdict.DONE)
    flight.pilot.on_broken()
    flight.run(11.0)
    flight.load(2000, 2000)
    flight.run(0.2)
    assert isinstance(flight.script.calls[-1], DropWish)


def test_a_restore_that_failed_does_not_keep_a_drop_away() -> None:
    flight = Flight()
    flight.script.plan = MERGED
    flight.load(0, 0, capacity=1500)
    flight.pilot.on_tick()
    flight.run(6.0)
    flight.answer(Verdict.CONFLICT, MERGED)
    flight.run(0.5)
    assert len(flight.script.calls) == 1, "not again at once"
    assert flight.pilot.last.reason.startswith("the last restore failed; for ")
    flight.script.plan = replace(MERGED, reserve_tokens={(0, 1): 1000})
    flight.load(2000, 2000, capacity=1500)
    flight.run(0.2)
    assert isinstance(flight.script.calls[-1], DropWish)


def test_a_group_that_can_gain_nothing_more_does_not_keep_others_merged() -> None:
    flight = Flight()
    small, large = (0, 1), (2, 3, 4, 5)
    flight.script.plan = DeploymentView(
        (small, large),
        {small: 0, large: 0},
        1000,
        {small: dict.fromkeys(small, 1000), large: dict.fromkeys(large, 1000)},
    )
    flight.load(0, 0, 3000, 3000, 3000, 3000, capacity=1700)
    flight.run(4.5)
    assert flight.script.calls == []
    assert "there is nothing left to drop within groups of 4" in flight.pilot.last.reason
    flight.run(1.0)
    assert flight.script.calls == [(RestoreWish(((0, 1),)), True, 3.0)]


def test_what_it_does_is_one_line_with_numbers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    flight = Flight()
    flight.load(1300, 700)
    flight.run(0.2)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "KunServe auto: drop [[0, 1]]: replica 0 needs 1300 tokens now and 1300 in 2 s, has 1000; waiting would take "
        "inf s, the pipeline costs 0.20 s"
    )


def test_short_wait_is_cheaper_than_the_pipeline() -> None:
    flight = Flight()
    for tick in range(50):  # 2000 tokens come and go in a second
        flow, used = 200 * tick, 500 if tick < 20 else 1000
        flight.pilot.on_load(0, ReplicaLoad(1000, used, arrived_tokens=flow, finished_tokens=flow))
        flight.pilot.on_load(1, ReplicaLoad(1000, 100))
        flight.pilot.on_tick()
        flight.now_s += 0.1
    assert flight.script.calls == []
    assert flight.pilot.last.act.value == "wait"
    assert "waiting would take 0.0" in flight.pilot.last.reason


def test_what_a_restore_waits_for_makes_no_drop_look_expensive() -> None:
    flight = Flight()
    flight.load(1300, 700)
    flight.run(0.2)
    flight.answer(plan=MERGED)
    flight.load(0, 0, capacity=1500)
    flight.run(20.0)
    (_, wish) = flight.script.calls
    assert isinstance(wish[0], RestoreWish)
    flight.answer(seconds=100.0)
    flight.load(1300, 700)
    flight.run(0.2)
    assert len(flight.script.calls) == 3
    assert flight.pilot.last.reason.endswith("the pipeline costs 0.17 s"), "0.1 s of the first drop, weighed"


def test_a_request_that_is_alone_and_fits_is_no_reason() -> None:
    flight = Flight()
    alone = ReplicaLoad(1000, used_tokens=500, growth_tokens=480, running_requests=1)
    for arrived in (0, 980):
        flight.pilot.on_load(0, replace(alone, arrived_tokens=arrived))
        flight.run(1.0)
        assert flight.script.calls == []
    assert flight.pilot.forecasts()[0].ahead_tokens > alone.capacity_tokens, "its arrival looks like a trend"
    flight.pilot.on_load(0, replace(alone, queued_tokens=30, queued_requests=1))
    flight.run(0.2)
    assert flight.script.calls == [DropWish(((0, 1),), needs={0: 110, 1: 55})]


def test_a_request_that_is_alone_and_does_not_fit_is_one() -> None:
    flight = Flight()
    flight.pilot.on_load(0, ReplicaLoad(1000, queued_tokens=1300, queued_requests=1))
    flight.run(0.2)
    assert len(flight.script.calls) == 1


def test_with_the_coordinator() -> None:
    """The real coordinator carries out what is ordered; orders by hand work beside it."""
    deployment = FakeDeployment().start()
    flight = Flight(driver=deployment.coordinator)
    flight.load(200, 10, capacity=64)
    flight.run(0.2)
    deployment.deliver()
    assert deployment.state() == "merged"
    view = deployment.coordinator.view()
    assert view is not None
    assert view.before == {(0, 1): {0: 64, 1: 64}}
    flight.load(20, 10, capacity=144)
    flight.run(6.0)
    deployment.deliver()
    assert deployment.state() == "normal"
    deployment.drop((0, 1))
    assert deployment.state() == "merged"
    flight.run(6.0)
    deployment.deliver()
    assert deployment.state() == "normal", "what was merged by hand is restored too"


def test_the_autopilot_is_told_of_a_layer_host_that_fails() -> None:
    deployment = FakeDeployment().start()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    for replica in (0, 1):  # as every rank says of every batch
        deployment.say(HostFailed(replica, 0, 1 - replica, "ValueError: no such kernel"))
    deployment.deliver()
    deployment.say(HostFailed(0, 0, 1, "ValueError: no such kernel"))
    assert deployment.broken == 1, "once for a merge"


def needs_in(view: DeploymentView, demands: dict[int, int]) -> Any:
    """What is ordered where replicas of 1000 tokens need so much."""
    flight = Flight()
    flight.script.plan = view
    for replica, demand in demands.items():
        flight.pilot.on_load(replica, ReplicaLoad(1000, demand))
    flight.run(0.2)
    return [call.groups for call in flight.script.calls]


def test_groups_of_one_size_are_merged_before_others() -> None:
    groups = ((0,), (1,), (2, 3))
    view = DeploymentView(groups, dict.fromkeys(groups, 0), 1000, {(2, 3): {2: 1000, 3: 1000}})
    everybody = dict.fromkeys(range(4), 2500)
    assert needs_in(view, everybody) == [((0, 1),)]
    assert needs_in(view, {3: 1500}) == [((0, 2, 3),)], "there is no other group of its size"
    apart = DeploymentView(groups, dict.fromkeys(groups, 0), 1000, {}, islands=(frozenset({0}), frozenset({1, 2, 3})))
    assert needs_in(apart, {0: 1500}) == [], "it can be merged with nobody"
    assert needs_in(apart, {1: 1500}) == [((1, 2, 3),)]
    deeper = DeploymentView(groups, {**dict.fromkeys(groups, 0), (2, 3): 500}, 1000, view.before)
    assert needs_in(deeper, everybody) == [((0, 1), (2, 3))]
