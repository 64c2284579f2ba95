"""The autopilot lends: with the real coordinator, and replicas that refuse, stay silent or end."""

from __future__ import annotations

import pytest
from fake_deployment import DRAIN_S, PHASE_S, FakeDeployment

from kunserve_sgl.control.answers import Verdict
from kunserve_sgl.control.autopilot import Autopilot
from kunserve_sgl.control.messages import Phase, ResizeRefused
from kunserve_sgl.policy.decision import Act, Thresholds
from kunserve_sgl.policy.demand import ReplicaLoad

LIMITS = Thresholds(drop_at=0.9, restore_at=0.5, horizon_s=2.0, min_stay_s=5.0, cool_down_s=10.0, largest_group=4)
BASE_TOKENS = 64  # four granules of 16


class Flight:
    """An autopilot in the same time as its deployment."""

    def __init__(self, replicas: int = 2) -> None:
        self.world = FakeDeployment(replicas).start()
        self.pilot = Autopilot(self.world.coordinator, LIMITS, DRAIN_S, lambda: self.world.now_s, orders=True)

    @property
    def capacities(self) -> tuple[int, ...]:
        return self.world.coordinator.capacities

    def run(self, seconds: float, *demands: int, longest: int = 0) -> None:
        """Lets time pass while replicas need so much."""
        ends_s = self.world.now_s + seconds
        while self.world.now_s < ends_s:
            for replica, demand in enumerate(demands):
                if replica not in self.world.dead:
                    load = ReplicaLoad(self.capacities[replica], demand, longest_request_tokens=longest)
                    self.pilot.on_load(replica, load)
            self.pilot.on_tick()
            self.world.deliver()
            self.world.coordinator.on_tick()
            self.world.now_s += 0.1


def test_slots_of_an_idle_replica_are_lent_and_come_back() -> None:
    flight = Flight()
    flight.run(3.0, 80, 0)
    assert flight.world.state() == "lending"
    # It keeps an eighth, which is one granule here; of the other three, two cover what is missing.
    assert flight.capacities == (BASE_TOKENS + 32, BASE_TOKENS - 48)
    flight.run(20.0, 0, 0)
    assert (flight.world.state(), flight.capacities) == ("normal", (BASE_TOKENS, BASE_TOKENS))
    acts = (Act.FREE, Act.LEND, Act.RESTORE, Act.REUSE, Act.DROP)
    assert [flight.pilot.decisions[act] for act in acts] == [1, 1, 1, 1, 0]
    assert flight.pilot.next_deadline_s() is None, "an idle server stays idle"


def test_a_request_that_waits_elsewhere_is_lent_for() -> None:
    flight = Flight()
    flight.run(1.0, 0, 0)
    flight.pilot.set_waiting({1: 100})
    assert flight.pilot.next_deadline_s() is not None
    flight.run(3.0, 0, 0)
    assert flight.capacities[1] >= 100
    flight.run(20.0, 0, 0)
    assert flight.capacities[1] >= 100, "as long as it waits"
    flight.pilot.set_waiting({})
    flight.run(20.0, 0, 0)
    assert flight.capacities == (BASE_TOKENS, BASE_TOKENS)


@pytest.mark.parametrize("act", ["refuse", "silent"])
def test_a_lender_that_cannot_does_not_keep_a_drop_away(act: str) -> None:
    flight = Flight()
    flight.world.resizes[1] = act
    flight.run(PHASE_S + 2.0, 80, 0)
    assert flight.world.state() == "merged"
    assert flight.pilot.decisions[Act.FREE] == 1
    assert flight.capacities[0] > BASE_TOKENS


def test_a_loan_that_fails_leads_to_a_drop() -> None:
    flight = Flight()
    flight.world.script[Phase.PREPARE, 1, 0] = "refuse"
    flight.run(0.9, 80, 0)
    assert flight.pilot.decisions[Act.LEND] == 1
    flight.world.script.clear()
    flight.run(1.0, 80, 0)
    assert flight.world.state() == "merged"
    flight.run(30.0, 0, 0)
    assert flight.capacities == (BASE_TOKENS, BASE_TOKENS)


def test_a_lender_that_is_short_has_its_slots_back_before_the_stay_is_over() -> None:
    flight = Flight()
    flight.run(2.0, 80, 0)
    assert flight.world.state() == "lending"
    flight.run(3.0, 30, 56)  # of which the restore takes 2.5
    assert (flight.world.state(), flight.capacities) == ("normal", (BASE_TOKENS, BASE_TOKENS))


@pytest.mark.parametrize("ends", [0, 1])
def test_when_lender_or_borrower_end_the_other_has_all_its_slots(ends: int) -> None:
    flight = Flight()
    flight.run(2.0, 80, 0)
    assert flight.world.state() == "lending"
    flight.world.lose(ends)
    flight.pilot.on_lost(ends)
    flight.world.hello(1 - ends, 0, flight.world.facts[1 - ends])  # what it has when it has recovered
    flight.run(10.0, 0, 0)
    assert flight.capacities[1 - ends] == BASE_TOKENS
    assert flight.world.come_back(ends)
    flight.run(10.0, 0, 0)
    assert (flight.world.state(), flight.capacities) == ("normal", (BASE_TOKENS, BASE_TOKENS))


def test_a_resize_is_answered_whatever_happens() -> None:
    world = FakeDeployment().start()
    answers = world.answers
    world.coordinator.resize(1, -32, answers.append)
    world.coordinator.resize(0, -32, answers.append)
    assert world.coordinator.capacities == (BASE_TOKENS, BASE_TOKENS - 32), "nobody may count on what is about to go"
    assert (answers.pop().message) == "the memory of replica 1 is being resized"
    world.let_time_pass()
    assert answers.pop().verdict is Verdict.DONE
    assert world.coordinator.capacities == (BASE_TOKENS, BASE_TOKENS - 32)
    world.resizes[1] = "silent"
    world.coordinator.resize(1, 32, answers.append)
    assert world.coordinator.capacities == (BASE_TOKENS, BASE_TOKENS - 32), "nor on what is about to come"
    world.say(ResizeRefused(1, 1, "of an earlier order"))
    world.say(ResizeRefused(0, 2, "of another replica"))
    assert answers == []
    world.let_time_pass()
    assert answers.pop().message == f"replica 1 has not resized within {PHASE_S:g} s"
    world.coordinator.resize(1, 32, answers.append)
    world.lose(1)
    world.coordinator.on_tick()
    assert answers.pop().message == "replica 1 rank 0 ended with exit code -9"
    world.drop((0, 1))
    world.coordinator.resize(1, 32, answers.append)
    assert answers.pop().verdict is Verdict.CONFLICT
