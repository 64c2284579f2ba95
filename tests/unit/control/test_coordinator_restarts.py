"""Replicas that have ended and were started again, as the coordinator sees them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_deployment import FakeDeployment, make_facts

from kunserve_sgl.control.answers import Verdict
from kunserve_sgl.control.messages import LayerLoan, Lend, Phase, Wanting, Welcome
from kunserve_sgl.errors import TransientError


def states(deployment: FakeDeployment) -> list[str]:
    return [member["state"] for member in deployment.coordinator.status()["members"]]


def agree(deployment: FakeDeployment) -> None:
    """Everybody who lives knows the plan that holds."""
    deployment.deliver()
    epoch = deployment.coordinator.status()["epoch"]
    assert {fake.plan_epoch for r, fake in enumerate(deployment.replicas) if r not in deployment.dead} == {epoch}


def latest_welcome(deployment: FakeDeployment, replica: int) -> Welcome:
    return [m for r, _, m in deployment.sent if r == replica and isinstance(m, Welcome)][-1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_replica_that_is_back_is_as_any_other(ranks: int) -> None:
    deployment = FakeDeployment(replicas=2, ranks=ranks).start()
    deployment.lose(1)
    assert states(deployment) == ["normal", "restarting"]
    status = deployment.coordinator.status()
    assert status["state"] == "restarting"
    assert status["members"][1]["reason"] == "it is started again"
    answer = deployment.drop((0, 1))
    assert (answer.verdict, answer.message) == (Verdict.CONFLICT, "replica 1 is restarting: it is started again")
    assert not deployment.coordinator.take_back(1), "it has not reported"
    assert deployment.come_back(1)
    agree(deployment)
    assert states(deployment) == ["normal", "normal"]
    assert not deployment.coordinator.is_lost(1)
    for replica in range(2):
        welcome = latest_welcome(deployment, replica)
        assert welcome.incarnations == (0, 1)
        assert welcome.inboxes == (
            tuple(f"inbox 0 {rank}" for rank in range(ranks)),
            tuple(f"inbox 1 {rank} 1" for rank in range(ranks)),
        )
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    assert deployment.restore().verdict is Verdict.DONE
    agree(deployment)


def test_not_before_all_of_its_ranks_have_reported() -> None:
    deployment = FakeDeployment(replicas=2, ranks=2).start()
    deployment.lose(1)
    deployment.hello(1, 0, incarnation=1)
    assert not deployment.coordinator.take_back(1)
    deployment.coordinator.set_restarting(1, "that failed, and it is tried again")
    deployment.hello(1, 1, incarnation=2)
    assert not deployment.coordinator.take_back(1), "the other one is of the try before"
    deployment.hello(1, 0, incarnation=2)
    assert deployment.coordinator.take_back(1)
    assert latest_welcome(deployment, 0).incarnations == (0, 2)


def test_others_go_on_meanwhile_and_may_be_merged() -> None:
    deployment = FakeDeployment(replicas=3).start()
    deployment.lose(2)
    deployment.deliver()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    assert states(deployment) == ["merged", "merged", "restarting"]
    deployment.hello(0, 0, make_facts(0, base=6))
    assert deployment.come_back(2)
    agree(deployment)
    assert states(deployment) == ["merged", "merged", "normal"]
    assert deployment.restore().verdict is Verdict.DONE
    assert deployment.drop((1, 2)).verdict is Verdict.DONE
    agree(deployment)


def test_a_replica_waits_for_the_end_of_a_transition() -> None:
    deployment = FakeDeployment(replicas=3).start()
    deployment.lose(2)
    deployment.order_drop((0, 1))
    assert not deployment.come_back(2)
    assert deployment.run().verdict is Verdict.DONE
    assert deployment.coordinator.take_back(2)
    agree(deployment)
    assert states(deployment) == ["merged", "merged", "normal"]


def test_who_was_lost_in_a_transition_comes_back_after_the_way_back() -> None:
    deployment = FakeDeployment(replicas=2).start()
    deployment.script[Phase.PREPARE, 1, 0] = "silent"
    deployment.order_drop((0, 1))
    deployment.deliver()
    deployment.lose(1)
    answer = deployment.run()
    assert answer.message == "rolled back: replica 1 rank 0 ended with exit code -9"
    assert states(deployment) == ["normal", "restarting"]
    assert deployment.come_back(1)
    deployment.script.clear()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    agree(deployment)


def test_who_was_merged_comes_back_when_the_others_have_recovered() -> None:
    deployment = FakeDeployment(replicas=4).start()
    assert deployment.drop((0, 1), (2, 3)).verdict is Verdict.DONE
    deployment.lose(0)
    assert states(deployment) == ["restarting", "recovering", "merged", "merged"]
    assert not deployment.come_back(0), "not before that"
    deployment.deliver()
    assert deployment.coordinator.take_back(0)
    agree(deployment)
    assert states(deployment) == ["normal", "normal", "merged", "merged"]
    assert deployment.restore().verdict is Verdict.DONE
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    agree(deployment)


def test_a_group_of_which_nobody_is_left_comes_back_apart() -> None:
    deployment = FakeDeployment(replicas=2).start()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    for replica in (0, 1):
        deployment.lose(replica)
    deployment.deliver()
    assert states(deployment) == ["restarting", "restarting"]
    for replica in (1, 0):
        assert deployment.come_back(replica)
    agree(deployment)
    assert states(deployment) == ["normal", "normal"]
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    agree(deployment)


def test_who_is_given_up_stays_degraded_with_the_reason() -> None:
    deployment = FakeDeployment(replicas=2).start()
    deployment.lose(1)
    deployment.coordinator.give_up(1, "given up: ended 6 times")
    assert states(deployment) == ["normal", "degraded"]
    assert deployment.coordinator.status()["members"][1]["reason"] == "given up: ended 6 times"
    assert deployment.drop((0, 1)).message == "replica 1 is degraded: given up: ended 6 times"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_granules": 7}, r"rank 0 was started with other memory than before: "),
        ({"row_count": 9}, r"rank 0 was started with other memory than before: "),
        ({"base_granules": 9, "free_frames": 50}, None),
    ],
)
def test_who_is_back_has_the_memory_that_it_had(change: dict[str, int], reason: str | None) -> None:
    """The number of own slots may have been changed by hand; the first one is what it comes back with."""
    deployment = FakeDeployment(replicas=2).start()
    assert deployment.coordinator.slots_at_start(1) == 4 * 16
    deployment.lose(1)
    facts = replace(make_facts(1), **change)
    if reason is None:
        assert deployment.come_back(1, facts=facts)
        agree(deployment)
        assert deployment.coordinator.slots_at_start(1) == 4 * 16
        return
    with pytest.raises(TransientError, match=reason):
        deployment.come_back(1, facts=facts)
    assert states(deployment) == ["normal", "restarting"]


def test_who_is_back_has_the_parameters_that_it_had_and_that_the_others_have() -> None:
    deployment = FakeDeployment(replicas=3)
    for replica in range(3):
        deployment.hello(replica, 0, checksums=("a",) * 8)
    deployment.lose(1)
    with pytest.raises(TransientError, match=r"rank 0 has loaded other parameters than replica 0 has, whose weights"):
        deployment.come_back(1, checksums=("b",) * 8)
    deployment.lose(0)
    deployment.hello(2, 0, checksums=("b",) * 8)  # updated meanwhile
    for _ in range(2):  # as often as it is tried
        with pytest.raises(TransientError, match=r"rank 0 has loaded other parameters than replica 2 has"):
            deployment.come_back(1, checksums=("a",) * 8)
    deployment.lose(2)
    with pytest.raises(TransientError, match=r"rank 0 has loaded other parameters than it had before, whose weights"):
        deployment.come_back(1, checksums=("b",) * 8)
    assert deployment.come_back(1, checksums=("a",) * 8), "nobody is there whose answers would differ"


# Its layers come from those who live


def want(deployment: FakeDeployment, replica: int, incarnation: int = 1, *, is_done: bool = False) -> None:
    for rank in range(deployment.ranks):
        memory = f"memory {replica} {rank} {incarnation}"
        deployment.say(Wanting(replica, rank, is_done=is_done, incarnation=incarnation, memory_address=memory))
    deployment.deliver()


def lent(deployment: FakeDeployment) -> list[list[LayerLoan]]:
    return [[loan for loans in fake.lends.values() for loan in loans] for fake in deployment.replicas]


@pytest.mark.parametrize("ranks", [1, 2])
def test_those_who_live_lend_their_layers_until_it_has_them(ranks: int) -> None:
    deployment = FakeDeployment(replicas=4, ranks=ranks).start()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    kept = [fake.plan.resident[r] for r, fake in enumerate(deployment.replicas) if fake.plan is not None]
    deployment.lose(3)
    deployment.say(Wanting(3, 0, incarnation=1, memory_address="memory 3 0 1"))
    deployment.deliver()
    assert (lent(deployment) == [[]] * 4) == (ranks > 1), "not before all ranks take offers"
    want(deployment, 3)
    loans = lent(deployment)
    assert all((loan.borrower, loan.incarnation) == (3, 1) for each in loans for loan in each)
    addresses = tuple(f"memory 3 {rank} 1" for rank in range(ranks))
    assert {loan.memory_addresses for each in loans for loan in each} == {addresses}
    layers = [{layer for loan in each for layer in loan.layers} for each in loans]
    assert sorted(layer for each in layers for layer in each) == list(range(8))
    assert all(each and each <= set(kept[r]) for r, each in enumerate(layers[:3]))
    # What is lent cannot be dropped.
    assert deployment.drop((0, 2)).message == "replica 0 lends its parameters to replica 3, which is starting"
    view = deployment.coordinator.view()
    assert view is not None
    assert view.unavailable == {0, 1, 2, 3}
    deployment.say(Wanting(3, 0, is_done=True, incarnation=1))
    want(deployment, 3, is_done=True)
    assert lent(deployment) == [[]] * 4
    assert deployment.restore().verdict is Verdict.DONE
    assert deployment.come_back(3)
    agree(deployment)
    told = [message for _, _, message in deployment.sent if isinstance(message, Welcome)][-1]
    own = [tuple(f"memory {replica} {rank}" for rank in range(ranks)) for replica in range(3)]
    assert told.memory_addresses == (*own, addresses)


def test_nobody_lends_while_a_transition_or_a_recovery_runs() -> None:
    deployment = FakeDeployment(replicas=4).start()
    deployment.lose(3)
    deployment.order_drop((0, 1))
    deployment.deliver_one()
    deployment.say(Wanting(3, 0, incarnation=1))
    assert not [m for _, _, m in deployment.sent if isinstance(m, Lend)]
    assert deployment.run().verdict is Verdict.DONE
    deployment.deliver()
    assert any(lent(deployment))
    deployment.coordinator.set_restarting(3, "that failed, and it is tried again")
    deployment.deliver()
    assert lent(deployment) == [[]] * 4
    deployment.lose(1)
    deployment.say(Wanting(3, 0, incarnation=2))
    assert lent(deployment) == [[]] * 4
    deployment.deliver()
    assert [sum(len(loan.layers) for loan in each) for each in lent(deployment)] == [4, 0, 4, 0]
    assert {loan.incarnation for each in lent(deployment) for loan in each} == {2}


def test_what_one_was_to_lend_that_dies_is_lent_by_others() -> None:
    deployment = FakeDeployment(replicas=3).start()
    deployment.lose(2)
    want(deployment, 2)
    assert [bool(each) for each in lent(deployment)] == [True, True, False]
    deployment.lose(0)
    deployment.deliver()
    assert [loan.layers for loan in lent(deployment)[1]] == [tuple(range(8))]
    deployment.coordinator.give_up(2, "given up")
    deployment.deliver()
    assert not lent(deployment)[1]
    deployment.lose(1)
    before = len(deployment.sent)
    want(deployment, 1)  # nobody is left
    assert len(deployment.sent) == before


def test_it_gets_the_parameters_that_the_others_have_now() -> None:
    deployment = FakeDeployment(replicas=3)
    for replica in range(3):
        deployment.hello(replica, 0, checksums=("a",) * 8, rest="a")
    deployment.lose(1)
    assert deployment.coordinator.checksums_for(1) == (("a",) * 8,)
    assert not deployment.coordinator.has_new_parameters(1)
    for replica in (0, 2):
        deployment.hello(replica, 0, checksums=("b",) * 8, rest="b")
    assert deployment.coordinator.has_new_parameters(1)
    assert deployment.coordinator.checksums_for(1) == (("b",) * 8,)
    with pytest.raises(TransientError, match=r"rank 0 has loaded other embedding, norm or head than replica 0 has"):
        deployment.come_back(1, checksums=("b",) * 8, rest="a")
    deployment.lose(1)
    assert deployment.come_back(1, checksums=("b",) * 8, rest="b")
    for replica in range(3):
        deployment.lose(replica)
    assert deployment.coordinator.checksums_for(0) == (("b",) * 8,)


def test_what_a_model_never_loads_is_not_compared() -> None:
    """It differs from the start."""
    deployment = FakeDeployment(replicas=2)
    for replica in range(2):
        deployment.hello(replica, 0, checksums=("a",) * 8, rest=f"chance {replica}")
    deployment.lose(1)
    assert deployment.come_back(1, checksums=("a",) * 8, rest="other chance")
