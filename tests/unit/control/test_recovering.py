"""Members die, or do not do what they have to, and the coordinator leads the others back to being replicas by
themselves."""

from __future__ import annotations

import pytest
from fake_deployment import DRAIN_S, PHASE_S, FakeDeployment, make_facts

from kunserve_sgl.control.answers import Verdict
from kunserve_sgl.control.messages import HostFailed, LayerLoan, Lend, Order, Phase
from kunserve_sgl.control.recovery import RECOVERY_PHASES
from kunserve_sgl.policy.plan import ParameterLoan

RECOVERY = [phase.value for phase in RECOVERY_PHASES]
HOW = "ended with exit code -9"


def merged(*group: int, replicas: int, ranks: int = 1) -> FakeDeployment:
    deployment = FakeDeployment(replicas, ranks).start()
    assert deployment.drop(group).verdict is Verdict.DONE
    for fake in deployment.replicas:
        fake.orders.clear()
    return deployment


def die(deployment: FakeDeployment, replica: int, rank: int = 0) -> None:
    deployment.dead.add(replica)
    deployment.coordinator.on_member_lost(replica, rank, HOW)


def states(deployment: FakeDeployment) -> list[str]:
    return [member["state"] for member in deployment.coordinator.status()["members"]]


def require_by_themselves(deployment: FakeDeployment) -> None:
    """Everybody who lives knows the plan, which is the normal one."""
    deployment.deliver()
    status = deployment.coordinator.status()
    assert [set(hosts) for hosts in status["hosts"]] == [{r} for r in range(len(deployment.replicas))]
    assert [home["first_granule"] for home in status["homes"]] == [0] * len(deployment.replicas)
    assert status["transition"] is None
    alive = [fake for r, fake in enumerate(deployment.replicas) if r not in deployment.dead]
    assert {(fake.plan_epoch, fake.route_epoch) for fake in alive} == {(status["epoch"], status["epoch"])}
    assert deployment.coordinator.next_deadline_s() is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_others_recover_from_a_death_while_merged(ranks: int) -> None:
    deployment = merged(0, 1, 2, replicas=4, ranks=ranks)
    die(deployment, 1, ranks - 1)
    assert states(deployment) == ["recovering", "degraded", "recovering", "normal"]
    assert deployment.coordinator.view() is None
    assert deployment.coordinator.moving == (0, 2)
    assert deployment.drop((0, 3)).message == "replicas [0, 2] are recovering: abandon"
    die(deployment, 1, 0)  # the other rank
    deployment.deliver()
    assert deployment.phases(0) == deployment.phases(2) == RECOVERY
    assert deployment.phases(3) == []
    assert states(deployment) == ["normal", "degraded", "normal", "normal"]
    require_by_themselves(deployment)
    assert deployment.drop((0, 1)).message == f"replica 1 is degraded: replica 1 rank {ranks - 1} {HOW}"
    assert deployment.restore().message == "no replicas are merged"
    assert deployment.drop((0, 2, 3)).verdict is Verdict.DONE
    assert deployment.restore().verdict is Verdict.DONE


def test_orders_of_a_recovery() -> None:
    deployment = merged(0, 1, replicas=2)
    before = len(deployment.sent)
    die(deployment, 1, 0)
    deployment.deliver()
    orders = [message for _, _, message in deployment.sent[before:] if isinstance(message, Order)]
    assert {(order.transition, order.old_epoch, order.plan.epoch) for order in orders} == {(2, 1, 2)}
    # Parameters may have to come from a disk.
    assert [order.timeout_s for order in orders] == [PHASE_S, DRAIN_S, PHASE_S]


def loans_of(deployment: FakeDeployment, member: int) -> tuple[ParameterLoan, ...]:
    """Those that the order of the last RELOAD has."""
    order = deployment.replicas[member].reload
    assert order is not None
    assert (order.lend_timeout_s > 0) == bool(order.loans)
    return order.loans


def lends(deployment: FakeDeployment) -> list[tuple[int, Lend]]:
    return [(replica, message) for replica, _, message in deployment.sent if isinstance(message, Lend)]


def test_members_lend_what_they_have_and_others_the_rest() -> None:
    """Each says after ABANDON what it has; who is no member lends by a message that is taken back in the end."""
    deployment = merged(0, 1, 2, replicas=5, ranks=2)
    deployment.replicas[0].resident = (0, 1, 2, 5)
    deployment.replicas[2].resident = (2, 3, 4, 5)
    die(deployment, 1)
    deployment.deliver()
    assert loans_of(deployment, 0) == loans_of(deployment, 2)
    assert loans_of(deployment, 0) == (
        ParameterLoan(0, 2, (0, 1)),
        ParameterLoan(2, 0, (3, 4)),
        ParameterLoan(3, 0, (6,)),
        ParameterLoan(3, 2, (6,)),
        ParameterLoan(4, 0, (7,)),
        ParameterLoan(4, 2, (7,)),
    )
    three, four = (
        tuple(LayerLoan(borrower, 0, (layer,), (f"memory {borrower} 0", f"memory {borrower} 1")) for borrower in (0, 2))
        for layer in (6, 7)
    )
    assert lends(deployment) == [(3, Lend(2, three)), (4, Lend(2, four)), (3, Lend(2)), (4, Lend(2))]
    assert deployment.phases(3) == deployment.phases(4) == []
    assert [fake.lends for fake in deployment.replicas] == [{}] * 5
    require_by_themselves(deployment)


def test_a_layer_that_one_rank_lacks_is_not_lent() -> None:
    deployment = merged(0, 1, replicas=3, ranks=2)
    deployment.replicas[0].resident = tuple(range(8))
    die(deployment, 1)
    deployment.deliver_one()  # both ranks of replica 0 have abandoned, and have everything
    deployment.deliver()
    assert loans_of(deployment, 0) == ()
    assert lends(deployment) == []


@pytest.mark.parametrize("why", ["stalled", "lost", "other parameters", "recovers too"])
def test_who_cannot_be_expected_to_lend_is_not_asked(why: str) -> None:
    deployment = FakeDeployment(replicas=4).start()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    if why == "stalled":
        deployment.coordinator.set_stalled({2: "it hangs"}, {})
    elif why == "lost":
        die(deployment, 2)
    elif why == "other parameters":
        facts = make_facts(2)
        deployment.hello(2, 0, facts, checksums=tuple(f"other {layer}" for layer in range(8)))
    else:
        deployment.order_drop((2, 3))
        deployment.deliver_one()
        deployment.replicas[2].resident = ()
    deployment.replicas[0].resident = (0, 1)
    die(deployment, 1)
    deployment.deliver()
    loans = loans_of(deployment, 0)
    assert {loan.owner for loan in loans if loan.borrower == 0} == {3}
    assert {layer for loan in loans if loan.borrower == 0 for layer in loan.layers} == set(range(2, 8))
    require_by_themselves(deployment)


def test_a_recovery_begins_again_without_a_lender_that_dies() -> None:
    """What it has not lent yet is lent by others; the one that has been told already is told anew."""
    deployment = merged(0, 1, replicas=4)
    deployment.replicas[0].resident = ()
    deployment.script[Phase.RELOAD, 0, 0] = "silent"
    die(deployment, 1)
    deployment.deliver()
    assert {loan.owner for loan in loans_of(deployment, 0)} == {2, 3}
    assert [bool(fake.lends) for fake in deployment.replicas] == [False, False, True, True]
    deployment.script.clear()
    die(deployment, 2)
    deployment.deliver()
    assert deployment.phases(0) == RECOVERY[:2] + RECOVERY
    assert loans_of(deployment, 0) == (ParameterLoan(3, 0, tuple(range(8))),)
    assert not deployment.replicas[3].lends
    require_by_themselves(deployment)
    assert states(deployment) == ["normal", "degraded", "degraded", "normal"]


def fail(deployment: FakeDeployment, replica: int, host: int) -> None:
    deployment.say(HostFailed(replica, 0, host, "ValueError: no such kernel"))


def test_all_members_recover_where_a_layer_host_fails_and_lives() -> None:
    deployment = merged(0, 1, 2, replicas=4, ranks=2)
    fail(deployment, 0, 2)
    assert deployment.coordinator.moving == (0, 1, 2)
    for other in (1, 2):  # as every rank says of every batch
        fail(deployment, other, 2)
    deployment.deliver()
    fail(deployment, 1, 2)  # late
    assert [deployment.phases(replica) for replica in range(4)] == [RECOVERY, RECOVERY, RECOVERY, []]
    require_by_themselves(deployment)
    assert states(deployment) == ["normal"] * 4
    assert not deployment.ended
    assert deployment.drop((0, 1, 2)).verdict is Verdict.DONE


def test_who_says_late_that_a_dead_one_failed_need_not_recover_again() -> None:
    deployment = merged(0, 1, 2, replicas=3)
    die(deployment, 2)
    deployment.deliver()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    fail(deployment, 0, 2)
    assert deployment.coordinator.moving == ()
    assert states(deployment)[:2] == ["merged", "merged"]


@pytest.mark.parametrize("phase", [Phase.PREPARE, Phase.SWITCH, Phase.RELEASE])
def test_a_layer_host_fails_in_the_middle_of_a_restore(phase: Phase) -> None:
    deployment = merged(0, 1, replicas=3)
    deployment.script[phase, 1, 0] = "silent"
    deployment.order_restore()
    deployment.deliver()
    fail(deployment, 0, 1)
    answer = deployment.run()
    why = "replica 1 could not execute a batch of replica 0: ValueError: no such kernel"
    assert answer.message == f"{why}; replicas [0, 1] serve by themselves again"
    require_by_themselves(deployment)


@pytest.mark.parametrize("phase", [Phase.PREPARE, Phase.LOAD, Phase.SWITCH, Phase.RELEASE, Phase.RESUME])
@pytest.mark.parametrize("killed", [0, 1])
def test_others_recover_from_a_death_in_a_restore(phase: Phase, killed: int) -> None:
    deployment = merged(0, 1, replicas=2)
    deployment.script[phase, killed, 0] = "die"
    answer = deployment.restore()
    other = 1 - killed
    reason = f"replica {killed} rank 0 {HOW}"
    assert (answer.verdict, answer.epoch) == (Verdict.FAILED, 3)
    assert answer.message == f"{reason}; replicas [{other}] serve by themselves again"
    assert deployment.phases(other)[-3:] == RECOVERY
    require_by_themselves(deployment)


@pytest.mark.parametrize("phase", [Phase.SWITCH, Phase.RELEASE, Phase.RESUME])
def test_others_recover_from_a_death_in_a_drop_once_somebody_may_have_switched(phase: Phase) -> None:
    deployment = FakeDeployment(replicas=3).start()
    deployment.script[phase, 1, 0] = "die"
    answer = deployment.drop((0, 1))
    assert (answer.verdict, answer.epoch) == (Verdict.FAILED, 2)
    assert deployment.phases(0)[-3:] == RECOVERY
    require_by_themselves(deployment)
    assert states(deployment) == ["normal", "degraded", "normal"]
    assert deployment.drop((0, 2)).verdict is Verdict.DONE


@pytest.mark.parametrize("phase", [Phase.REVERT, Phase.UNDO, Phase.REOPEN])
@pytest.mark.parametrize("has_switched", [False, True])
def test_a_death_on_the_way_back(phase: Phase, has_switched: bool) -> None:
    deployment = FakeDeployment().start()
    deployment.script[Phase.SWITCH if has_switched else Phase.PREPARE, 0, 0] = "refuse"
    deployment.script[phase, 1, 0] = "die"
    answer = deployment.drop((0, 1))
    if has_switched:
        assert answer.verdict is Verdict.FAILED
        assert deployment.phases(0)[-3:] == RECOVERY
    else:
        assert answer.message == "rolled back: replica 0 rank 0 refused to prepare: no frames"
        assert deployment.phases(0)[-3:] == ["revert", "undo", "reopen"]
    require_by_themselves(deployment)
    assert states(deployment) == ["normal", "degraded"]


@pytest.mark.parametrize("phase", [Phase.RELEASE, Phase.RESUME])
@pytest.mark.parametrize("act", ["refuse", "silent"])
def test_who_fails_where_there_is_no_way_back_recovers_with_the_others(phase: Phase, act: str) -> None:
    deployment = FakeDeployment(replicas=4).start()
    deployment.script[phase, 1, 0] = act
    answer = deployment.drop((0, 1))
    assert answer.verdict is Verdict.FAILED
    assert answer.message.endswith("; replicas [0, 1] serve by themselves again")
    require_by_themselves(deployment)
    assert states(deployment) == ["normal"] * 4
    assert not deployment.ended
    deployment.script.clear()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE


@pytest.mark.parametrize("phase", [Phase.REVERT, Phase.UNDO, Phase.REOPEN])
@pytest.mark.parametrize("act", ["refuse", "silent"])
def test_who_fails_on_the_way_back_recovers_with_the_others(phase: Phase, act: str) -> None:
    deployment = FakeDeployment().start()
    deployment.script[Phase.SWITCH, 0, 0] = "refuse"
    deployment.script[phase, 1, 0] = act
    answer = deployment.drop((0, 1))
    assert answer.verdict is Verdict.FAILED
    assert answer.message.startswith("replica 0 rank 0 refused to switch: no frames; and the way back failed: ")
    require_by_themselves(deployment)


@pytest.mark.parametrize("phase", RECOVERY_PHASES)
@pytest.mark.parametrize("act", ["die", "refuse", "silent", "stale"])
def test_a_recovery_begins_again_without_a_member_that_does_not_come_along(phase: Phase, act: str) -> None:
    deployment = merged(0, 1, 2, 3, replicas=4, ranks=2)
    deployment.script[phase, 2, 1] = act
    die(deployment, 1, 0)
    deployment.let_time_pass()
    until = RECOVERY[: RECOVERY.index(phase.value) + 1]
    assert deployment.phases(2) == until
    assert deployment.phases(0) == deployment.phases(3) == until + RECOVERY
    require_by_themselves(deployment)
    assert states(deployment) == ["normal", "degraded", "degraded", "normal"]
    limit_s = DRAIN_S if phase is Phase.RELOAD else PHASE_S
    assert deployment.ended == {
        "die": {},
        "refuse": {2: f"replica 2 rank 1 could not {phase.value}: no frames"},
        "stale": {2: f"replica 2 rank 1 could not {phase.value}: "},
        "silent": {2: f"replica 2 rank 1 did not {phase.value} within {limit_s:g} s"},
    }[act]  # fmt: skip
    assert deployment.drop((0, 3)).verdict is Verdict.DONE


def test_all_who_do_not_come_along_are_ended_at_once() -> None:
    """The controller stands until they are gone."""
    deployment = merged(0, 1, 2, 3, replicas=4)
    for silent in (2, 3):
        deployment.script[Phase.ABANDON, silent, 0] = "silent"
    die(deployment, 1, 0)
    deployment.let_time_pass()
    require_by_themselves(deployment)
    assert deployment.ended_at_once == [{2, 3}]


def test_who_has_mapped_memory_of_those_who_recover_is_gone_before_they_go_on() -> None:
    """It may take as long as a network does, and nobody stands meanwhile."""
    deployment = merged(0, 1, 2, 3, replicas=4)
    deployment.lingering.add(2)
    for silent in (2, 3):
        deployment.script[Phase.ABANDON, silent, 0] = "silent"
    die(deployment, 1, 0)
    deployment.let_time_pass()
    assert deployment.ended_at_once[0] == {2, 3}
    assert deployment.phases(0) == ["abandon"] * 2  # without 3, which is gone
    assert deployment.coordinator.next_deadline_s() is None
    deployment.coordinator.on_tick()
    assert deployment.phases(0) == ["abandon"] * 2
    die(deployment, 2, 0)
    deployment.let_time_pass()
    require_by_themselves(deployment)
    assert deployment.phases(0) == ["abandon"] * 2 + RECOVERY


def test_groups_lose_members_one_after_the_other() -> None:
    deployment = FakeDeployment(replicas=6).start()
    assert deployment.drop((0, 1), (2, 3)).verdict is Verdict.DONE
    die(deployment, 0, 0)
    deployment.deliver_one()
    die(deployment, 5, 0)  # nobody depends on it
    die(deployment, 2, 0)
    deployment.let_time_pass()
    assert deployment.phases(1)[-3:] == deployment.phases(3)[-3:] == RECOVERY
    require_by_themselves(deployment)
    assert states(deployment) == ["degraded", "normal", "degraded", "normal", "normal", "degraded"]


def test_a_death_in_another_group_ends_the_transition_too() -> None:
    deployment = merged(0, 1, replicas=4)
    deployment.script[Phase.PREPARE, 3, 0] = "silent"
    deployment.order_drop((2, 3))
    deployment.deliver()
    die(deployment, 1, 0)
    answer = deployment.run()
    assert answer.message == f"replica 1 rank 0 {HOW}; replicas [0, 2, 3] serve by themselves again"
    require_by_themselves(deployment)


def test_a_death_of_somebody_else_does_not_disturb_a_transition() -> None:
    deployment = FakeDeployment(replicas=3).start()
    deployment.order_drop((0, 1))
    deployment.deliver_one()
    die(deployment, 2, 0)
    assert deployment.run().verdict is Verdict.DONE
    assert states(deployment) == ["merged", "merged", "degraded"]


def test_everybody_of_a_group_dies() -> None:
    deployment = merged(0, 1, replicas=3)
    deployment.script[Phase.RELOAD, 0, 0] = "die"
    die(deployment, 1, 0)
    deployment.let_time_pass()
    require_by_themselves(deployment)
    assert states(deployment) == ["degraded", "degraded", "normal"]
