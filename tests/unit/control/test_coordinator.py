"""The coordinator with scripted replicas and a clock of its own: what it orders, and what it says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_deployment import DRAIN_S, PHASE_S, FakeDeployment, make_facts

from kunserve_sgl.args import Exchange
from kunserve_sgl.control.answers import Verdict
from kunserve_sgl.control.messages import Order, OrderReply, Phase, Result, Welcome
from kunserve_sgl.control.phased import REPLY_GRACE_S
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.partial_restore import RestoreWish

BEFORE_RELEASE = (Phase.PREPARE, Phase.LOAD, Phase.SWITCH)
BACK = ["revert", "undo", "reopen"]


def merged(**sizes: int) -> FakeDeployment:
    deployment = FakeDeployment(**sizes).start()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    for fake in deployment.replicas:
        fake.orders.clear()
    return deployment


def agrees(deployment: FakeDeployment) -> bool:
    """Everybody who lives knows the coordinator's plan, and routes by it."""
    epoch = deployment.coordinator.status()["epoch"]
    alive = [fake for r, fake in enumerate(deployment.replicas) if r not in deployment.dead]
    return all((fake.plan_epoch, fake.route_epoch) == (epoch, epoch) for fake in alive)


def test_everybody_is_welcomed_when_all_have_reported() -> None:
    deployment = FakeDeployment(replicas=2, ranks=2)
    for replica, rank in ((1, 1), (0, 0), (1, 0)):
        deployment.hello(replica, rank)
    assert deployment.sent == []
    answer = deployment.drop((0, 1))
    assert (answer.verdict, answer.message) == (
        Verdict.CONFLICT,
        "not everybody has reported yet; missing: replica 0 rank 1",
    )
    deployment.hello(0, 1)
    assert [(replica, rank) for replica, rank, _ in deployment.sent] == [(0, 0), (1, 0)]
    welcome = deployment.sent[0][2]
    assert isinstance(welcome, Welcome)
    assert welcome.inboxes[1] == ("inbox 1 0", "inbox 1 1")
    assert welcome.frame_addresses[0] == ("frames 0 0", "frames 0 1")
    assert welcome.plan.epoch == 0
    deployment.hello(0, 1)  # nothing new
    assert len(deployment.sent) == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_drop(ranks: int) -> None:
    deployment = FakeDeployment(ranks=ranks).start()
    answer = deployment.drop((0, 1))
    assert answer.verdict is Verdict.DONE
    assert (answer.epoch, answer.message) == (1, "dropped in groups [[0, 1]]")
    assert answer.seconds == 4 * 2 * 0.25  # four phases, two replicas
    assert answer.pause_seconds == 0.04  # the second replica's phases without a longest pause
    assert answer.freed_bytes == 1000 * 2 * ranks
    assert answer.extension_slots == 80 * 2
    assert deployment.phases(0) == deployment.phases(1) == ["prepare", "switch", "release", "resume"]
    assert deployment.state() == "merged"
    assert agrees(deployment)
    status = deployment.coordinator.status()
    assert status["hosts"][0] == (0, 0, 0, 0, 1, 1, 1, 1)
    assert status["homes"][2] == {
        "replica": 0, "first_granule": 4, "granules": 5, "slots": 80, "homes": (0, 0, 0, 0, 1, 1, 1, 1),
    }  # fmt: skip
    assert status["members"][1] == {
        "id": 1, "state": "merged", "group": (0, 1), "lost": False, "stalled": False, "reason": "",
            "link_bytes_per_second": {"0": None},
    }  # fmt: skip
    assert status["transition"] is None


def test_memory_is_lent_and_taken_back() -> None:
    deployment = FakeDeployment()
    for replica, free in ((0, 0), (1, 24)):
        deployment.hello(replica, 0, make_facts(replica, free=free))
    deployment.deliver()
    wish = LendWish(1, 0, 33)
    told = deployment.coordinator.dry_run(wish)
    assert (told.verdict, told.message, told.extension_slots) == (Verdict.DONE, "would gain 48 tokens", 48)
    deployment.coordinator.lend(wish, deployment.answers.append)
    deployment.deliver()
    assert (deployment.answers[-1].verdict, deployment.answers[-1].message) == (
        Verdict.DONE,
        "memory is lent in groups [[0, 1]]",
    )
    assert deployment.phases(0) == deployment.phases(1) == ["prepare", "switch", "release", "resume"]
    assert deployment.state() == "lending"
    assert agrees(deployment)
    status = deployment.coordinator.status()
    assert status["hosts"] == ((0,) * 8, (1,) * 8)
    assert status["homes"][2]["homes"] == (1,) * 8
    assert deployment.coordinator.dependent_on(1) == (0, 1)
    again = deployment.coordinator.dry_run(LendWish(1, 0, 1))
    assert again.message.startswith("tokens: 1 take 8 frames, and replica 1 has 0 free"), again
    assert deployment.restore().verdict is Verdict.DONE
    assert deployment.state() == "normal"
    assert deployment.coordinator.dry_run(wish).extension_slots == 48


def test_restore() -> None:
    deployment = merged()
    answer = deployment.restore()
    assert (answer.verdict, answer.epoch, answer.message) == (Verdict.DONE, 2, "restored")
    assert deployment.phases(0) == ["prepare", "load", "switch", "release", "resume"]
    assert deployment.state() == "normal"
    assert agrees(deployment)
    assert deployment.drop((0, 1)).verdict is Verdict.DONE  # the frames are there again


def test_orders_say_all_and_wait_longer_where_slots_drain() -> None:
    deployment = merged()
    orders = [message for _, _, message in deployment.sent if isinstance(message, Order)]
    assert {order.timeout_s for order in orders} == {PHASE_S}
    assert {(order.transition, order.old_epoch, order.plan.epoch) for order in orders} == {(1, 0, 1)}
    deployment.sent.clear()
    deployment.restore()
    orders = [message for _, _, message in deployment.sent if isinstance(message, Order)]
    assert {order.phase: order.timeout_s for order in orders} == {
        Phase.PREPARE: DRAIN_S, Phase.LOAD: PHASE_S, Phase.SWITCH: PHASE_S, Phase.RELEASE: PHASE_S,
        Phase.RESUME: PHASE_S,
    }  # fmt: skip


@pytest.mark.parametrize("phase", BEFORE_RELEASE)
@pytest.mark.parametrize("act", ["refuse", "silent", "stale"])
@pytest.mark.parametrize("who", [(0, 0), (1, 0), (1, 1)])
def test_failure_before_release_is_rolled_back(phase: Phase, act: str, who: tuple[int, int]) -> None:
    deployment = merged(ranks=2)
    replica, rank = who
    deployment.script[phase, replica, rank] = act
    answer = deployment.restore()
    limit_s = DRAIN_S if phase is Phase.PREPARE else PHASE_S
    silence = f"no answer to {phase.value} within {limit_s:g} s from replica {replica} rank {rank}"
    reason, verdict = {
        "refuse": (f"replica {replica} rank {rank} refused to {phase.value}: no frames", Verdict.CONFLICT),
        "silent": (silence, Verdict.FAILED),
        "stale": (silence, Verdict.FAILED),
    }[act]
    assert (answer.verdict, answer.message, answer.epoch) == (verdict, f"rolled back: {reason}", 1)
    assert (answer.freed_bytes, answer.extension_slots) == (0, 0)
    assert deployment.phases(1 - replica)[-3:] == BACK
    assert agrees(deployment)
    assert deployment.coordinator.next_deadline_s() is None
    assert deployment.phases(replica)[-3:] == BACK
    assert deployment.state() == "merged"
    deployment.script.clear()
    assert deployment.restore().verdict is Verdict.DONE
    assert agrees(deployment)


def test_death_of_an_unmerged_member_leaves_the_others_normal() -> None:
    deployment = FakeDeployment(replicas=3).start()
    deployment.script[Phase.PREPARE, 1, 0] = "die"
    answer = deployment.drop((0, 1))
    assert (answer.verdict, answer.epoch) == (Verdict.FAILED, 0)
    assert [member["state"] for member in deployment.coordinator.status()["members"]] == [
        "normal", "degraded", "normal",
    ]  # fmt: skip
    assert [r for r in range(3) if deployment.coordinator.is_lost(r)] == [1]
    assert deployment.drop((0, 1)).verdict is Verdict.CONFLICT
    assert deployment.drop((0, 2)).verdict is Verdict.DONE


@pytest.mark.parametrize("phase", [Phase.PREPARE, Phase.LOAD])
def test_others_go_back_without_a_member_that_hangs(phase: Phase) -> None:
    deployment = merged(replicas=4)
    deployment.drop((2, 3))
    for each in (phase, Phase.REVERT, Phase.UNDO, Phase.REOPEN):
        deployment.script[each, 1, 0] = "silent"
    answer = deployment.restore()
    assert answer.verdict is Verdict.FAILED
    assert answer.message.startswith(f"rolled back: no answer to {phase.value} within")
    for replica in range(4):
        assert deployment.phases(replica)[-3:] == BACK  # also to the one that hangs, for when it wakes up
    assert [member["state"] for member in deployment.coordinator.status()["members"]] == [
        "degraded", "degraded", "merged", "merged",
    ]  # fmt: skip
    assert deployment.restore([[2, 3]]).verdict is Verdict.DONE


def late_replies(deployment: FakeDeployment, replica: int, result: Result = Result.APPLIED) -> list[OrderReply]:
    """What the ranks of a member that wakes say to the last order of the way back."""
    order = next(m for _, _, m in reversed(deployment.sent) if isinstance(m, Order) and m.phase is Phase.REOPEN)
    return [deployment.reply(order, replica, rank, result) for rank in range(deployment.ranks)]


def hang(deployment: FakeDeployment, replica: int, rank: int = 0) -> None:
    for phase in (Phase.PREPARE, Phase.REVERT, Phase.UNDO, Phase.REOPEN):
        deployment.script[phase, replica, rank] = "silent"


@pytest.mark.parametrize("result", [Result.APPLIED, Result.STALE])
def test_a_member_that_wakes_after_the_others_went_back_takes_part_again(result: Result) -> None:
    """It has carried out the orders that were waiting for it by then; with all of its ranks."""
    deployment = merged(ranks=2)
    for rank in (0, 1):
        hang(deployment, 1, rank)
    assert deployment.restore().verdict is Verdict.FAILED
    assert deployment.state() == "degraded"
    first, second = late_replies(deployment, 1, result)
    deployment.say(first)
    assert deployment.state() == "degraded"
    deployment.say(second)
    assert deployment.state() == "merged"
    deployment.script.clear()
    assert deployment.restore().verdict is Verdict.DONE
    assert agrees(deployment)


def test_a_member_that_wakes_while_others_change_takes_part_again() -> None:
    deployment = FakeDeployment(replicas=4).start()
    hang(deployment, 1)
    assert deployment.drop((0, 1)).verdict is Verdict.FAILED
    (reply,) = late_replies(deployment, 1)
    deployment.order_drop((2, 3))
    deployment.say(reply)
    assert deployment.run().verdict is Verdict.DONE
    assert [member["state"] for member in deployment.coordinator.status()["members"]] == [
        "normal", "normal", "merged", "merged",
    ]  # fmt: skip


def test_a_member_that_wakes_in_time_for_the_last_phase_of_the_way_back_is_not_degraded() -> None:
    deployment = FakeDeployment().start()
    for phase in (Phase.PREPARE, Phase.REVERT, Phase.UNDO):
        deployment.script[phase, 1, 0] = "silent"
    deployment.script[Phase.REOPEN, 0, 0] = "silent"  # the other one takes its time with it
    deployment.order_drop((0, 1))
    while "reopen" not in deployment.phases(1):
        deployment.deliver()
        deployment.now_s = deployment.coordinator.next_deadline_s() or deployment.now_s
        deployment.coordinator.on_tick()
        deployment.deliver()
    deployment.say(late_replies(deployment, 0)[0])
    assert deployment.answers[-1].verdict is Verdict.FAILED
    assert deployment.state() == "normal"


def test_what_a_member_that_woke_says_does_not_mend_who_has_ended_since() -> None:
    deployment = FakeDeployment(replicas=3).start()
    hang(deployment, 1)
    deployment.drop((0, 1))
    deployment.lose(1)
    deployment.coordinator.give_up(1, "given up")
    deployment.say(late_replies(deployment, 1)[0])
    assert [member["state"] for member in deployment.coordinator.status()["members"]] == [
        "normal", "degraded", "normal",
    ]  # fmt: skip


def test_a_member_that_could_not_go_back_stays_degraded() -> None:
    deployment = FakeDeployment().start()
    hang(deployment, 1)
    deployment.drop((0, 1))
    deployment.say(late_replies(deployment, 1, Result.REFUSED)[0])
    assert deployment.state() == "degraded"


def test_who_refused_to_begin_has_nothing_to_take_back() -> None:
    deployment = FakeDeployment(ranks=2).start()
    deployment.script[Phase.PREPARE, 1, 1] = "refuse"
    for phase in (Phase.REVERT, Phase.UNDO, Phase.REOPEN):
        deployment.script[phase, 1, 1] = "stale"
    started_s = deployment.now_s
    answer = deployment.drop((0, 1))
    assert (answer.verdict, deployment.state()) == (Verdict.CONFLICT, "normal")
    assert deployment.now_s - started_s < PHASE_S  # nobody was waited for


def test_everybody_dies() -> None:
    deployment = FakeDeployment().start()
    deployment.script[Phase.PREPARE, 0, 0] = "die"
    deployment.script[Phase.REVERT, 1, 0] = "die"
    answer = deployment.drop((0, 1))
    assert answer.verdict is Verdict.FAILED
    assert deployment.coordinator.next_deadline_s() is None


def test_late_and_double_replies_change_nothing() -> None:
    deployment = FakeDeployment().start()
    for phase in Phase:
        deployment.script[phase, 0, 0] = "twice"
    assert deployment.drop((0, 1)).extension_slots == 160
    deployment.script.clear()
    deployment.script[Phase.PREPARE, 1, 0] = "silent"
    assert deployment.restore().verdict is Verdict.FAILED
    order = next(m for _, _, m in reversed(deployment.sent) if isinstance(m, Order) and m.phase is Phase.PREPARE)
    deployment.script[Phase.PREPARE, 0, 0] = "silent"
    deployment.answers.clear()
    deployment.coordinator.restore(RestoreWish(), deployment.answers.append)
    deployment.deliver()
    for replica in (0, 1):  # of the transition before
        deployment.say(deployment.reply(order, replica, 0))
    status = deployment.coordinator.status()["transition"]
    assert (status["phase"], status["waiting_for"]) == ("prepare", [(0, 0), (1, 0)])
    deployment.say(OrderReply(status["number"], Phase.PREPARE, 0, 0, Result.APPLIED))
    deployment.script.clear()
    deployment.say(OrderReply(status["number"], Phase.PREPARE, 1, 0, Result.APPLIED))
    assert deployment.run().verdict is Verdict.DONE


def test_deadline_has_to_pass() -> None:
    deployment = FakeDeployment().start()
    deployment.script[Phase.PREPARE, 1, 0] = "silent"
    started_s = deployment.now_s
    deployment.order_drop((0, 1))
    deployment.deliver()
    assert deployment.coordinator.next_deadline_s() == started_s + PHASE_S + REPLY_GRACE_S
    deployment.now_s = started_s + PHASE_S
    deployment.coordinator.on_tick()
    assert deployment.state() == "dropping"
    assert "revert" not in deployment.phases(0)


def test_second_command_while_one_runs() -> None:
    deployment = merged(replicas=4)
    deployment.script[Phase.PREPARE, 1, 0] = "silent"
    deployment.answers.clear()
    deployment.coordinator.restore(RestoreWish(), deployment.answers.append)
    deployment.deliver()
    assert [member["state"] for member in deployment.coordinator.status()["members"]] == [
        "restoring", "restoring", "normal", "normal",
    ]  # fmt: skip
    reason = "groups [[0, 1]] are restoring: prepare"
    for ask in (deployment.coordinator.drop, deployment.coordinator.dry_run):
        extra = () if ask == deployment.coordinator.dry_run else (deployment.answers.append,)
        answer = ask(DropWish(((2, 3),)), *extra) or deployment.answers.pop()  # type: ignore[operator]
        assert (answer.verdict, answer.message) == (Verdict.CONFLICT, reason)
    deployment.coordinator.restore(RestoreWish(), deployment.answers.append)
    assert deployment.answers.pop().message == reason
    assert deployment.run().message.startswith("rolled back: no answer to prepare within 300 s")


@pytest.mark.parametrize("exchange", Exchange)
def test_a_group_with_a_replica_that_there_is_not_is_refused(exchange: Exchange) -> None:
    deployment = FakeDeployment(replicas=2, exchange=exchange).start()
    assert deployment.drop((0, 7)).verdict is Verdict.BAD_REQUEST


def test_several_groups_and_who_is_not_in_them() -> None:
    deployment = FakeDeployment(replicas=5).start()
    assert deployment.drop((0, 1), (2, 3)).verdict is Verdict.DONE
    assert deployment.phases(4) == []
    assert agrees(deployment)  # replica 4 was told
    assert deployment.coordinator.status()["members"][3]["group"] == (2, 3)
    assert deployment.restore([[3, 2]]).verdict is Verdict.DONE
    assert [member["state"] for member in deployment.coordinator.status()["members"]] == [
        "merged", "merged", "normal", "normal", "normal",
    ]  # fmt: skip
    assert agrees(deployment)
    answer = deployment.restore([[2, 3]])
    assert (answer.verdict, answer.message) == (
        Verdict.BAD_REQUEST,
        "groups: [2, 3] is not merged; accepted: [[0, 1]]",
    )


def test_merges_of_merges_are_restored_one_by_one() -> None:
    deployment = FakeDeployment(replicas=4).start()
    for groups in ([(0, 1), (2, 3)], [(0, 1, 2, 3)]):
        assert deployment.drop(*groups).verdict is Verdict.DONE
    for fake in deployment.replicas:
        fake.orders.clear()
    answer = deployment.restore([[0, 1, 2, 3]])
    assert (answer.verdict, answer.epoch) == (Verdict.DONE, 4)
    assert deployment.phases(2) == ["prepare", "load", "switch", "release", "resume"] * 2
    assert deployment.state() == "normal"
    assert agrees(deployment)
    assert deployment.restore().message == "no replicas are merged"


def test_restore_that_fails_half_way_says_what_holds() -> None:
    deployment = FakeDeployment(replicas=4).start()
    for groups in ([(0, 1), (2, 3)], [(0, 1, 2, 3)]):
        deployment.drop(*groups)
    deployment.answers.clear()
    deployment.coordinator.restore(RestoreWish(), deployment.answers.append)
    while deployment.coordinator.status()["epoch"] == 2:
        deployment.deliver_one()
    deployment.script[Phase.LOAD, 2, 0] = "refuse"
    answer = deployment.run()
    assert (answer.verdict, answer.epoch) == (Verdict.CONFLICT, 3)
    assert deployment.coordinator.status()["members"][3]["group"] == (2, 3)
    assert agrees(deployment)
    deployment.script.clear()
    assert deployment.restore().verdict is Verdict.DONE


PART = {0: (4, 5), 1: (2, 3)}


def test_a_partial_restore_leaves_the_rest_merged_and_restorable() -> None:
    deployment = merged()
    answer = deployment.restore([[0, 1]], layers=PART)
    assert (answer.verdict, answer.message, answer.epoch) == (Verdict.DONE, "partly restored", 2)
    assert deployment.phases(0) == ["prepare", "load", "switch", "release", "resume"]
    assert deployment.state() == "merged"
    assert agrees(deployment)
    assert deployment.coordinator.status()["hosts"] == (
        (0, 0, 0, 0, 0, 0, 1, 1), (0, 0, 1, 1, 1, 1, 1, 1),
    )  # fmt: skip
    view = deployment.coordinator.view()
    assert view is not None
    assert list(view.before) == [(0, 1)], "the load may restore the rest"
    answer = deployment.restore()
    # What is left of the new slots is lent by then, and must not be when it goes.
    assert (answer.verdict, answer.message, answer.epoch) == (Verdict.DONE, "restored", 4)
    assert deployment.state() == "normal"
    assert agrees(deployment)
    assert deployment.drop((0, 1)).verdict is Verdict.DONE  # the frames are there again


def test_an_automatic_restore_takes_the_rest_of_a_merge_in_one_command() -> None:
    deployment = merged()
    deployment.restore(layers=PART)
    deployment.answers.clear()
    deployment.coordinator.restore(RestoreWish(((0, 1),)), deployment.answers.append, only_last=True)
    answer = deployment.run()
    assert (answer.message, answer.epoch, deployment.state()) == ("the last merge is undone", 4, "normal")


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_restore_that_fails_on_its_way_can_be_ordered_again(fails_at: int) -> None:
    deployment = merged()
    deployment.restore(layers=PART)
    deployment.order_restore()
    for _ in range(fails_at - 1):
        while deployment.coordinator.status()["epoch"] < 3:
            deployment.deliver_one()
    deployment.script[Phase.SWITCH, 1, 0] = "refuse"
    answer = deployment.run()
    assert (answer.verdict, answer.epoch) == (Verdict.CONFLICT, 1 + fails_at)
    assert deployment.state() == "merged"
    assert agrees(deployment)
    deployment.script.clear()
    assert deployment.restore().message == "restored"
    assert deployment.state() == "normal"


def test_bringing_all_back_by_layers_is_a_restore() -> None:
    deployment = merged()
    answer = deployment.restore(layers={0: (4, 5, 6, 7), 1: (0, 1, 2, 3)})
    assert (answer.verdict, answer.message) == (Verdict.DONE, "the last merge is undone")
    assert deployment.state() == "normal"
    assert deployment.restore().message == "no replicas are merged"


def test_a_partial_restore_concerns_the_last_merge_only() -> None:
    deployment = FakeDeployment(replicas=4).start()
    assert deployment.drop((0, 1), (2, 3)).verdict is Verdict.DONE
    assert deployment.drop((0, 1, 2, 3)).verdict is Verdict.DONE
    pairs = deployment.coordinator.status()["hosts"]
    answer = deployment.restore(layers={0: (7,)})
    assert answer.verdict is Verdict.BAD_REQUEST
    assert "layers: [7] of replica 0; accepted are those that the last merge dropped there" in answer.message
    assert deployment.coordinator.status()["hosts"] == pairs
    assert deployment.restore(tokens=16).message == "partly restored"
    assert deployment.restore().message == "restored"
    assert deployment.state() == "normal"


def test_members_that_recover_forget_what_was_partly_restored() -> None:
    deployment = FakeDeployment(replicas=3).start()
    assert deployment.drop((0, 1, 2)).verdict is Verdict.DONE
    assert deployment.restore(tokens=16).message == "partly restored"
    deployment.lose(1)
    deployment.let_time_pass()
    assert deployment.restore().message == "no replicas are merged"
    deployment.come_back(1)
    deployment.let_time_pass()
    assert deployment.state() == "normal"
    assert deployment.drop((0, 1, 2)).verdict is Verdict.DONE


def test_dry_runs_of_restores_say_what_would_go() -> None:
    deployment = merged()
    for wish in (RestoreWish(), RestoreWish(layers=PART), RestoreWish(((0, 1),), tokens=16)):
        planned = deployment.coordinator.dry_run(wish)
        assert planned.verdict is Verdict.DONE
        assert planned.cost is not None
        assert planned.message == f"would give up {-planned.cost.gained_tokens} tokens"
        assert planned.cost.loaded_bytes > 0
        assert planned.plan is not None
    assert deployment.coordinator.dry_run(RestoreWish(((0, 2),))).verdict is Verdict.BAD_REQUEST
    assert deployment.phases(0) == []
    assert deployment.restore(layers=PART).epoch == 2


def test_dry_run_changes_nothing() -> None:
    deployment = FakeDeployment(ranks=2).start()
    sent = len(deployment.sent)
    answer = deployment.coordinator.dry_run(DropWish(((0, 1),)))
    assert (answer.verdict, answer.epoch, answer.seconds, answer.extension_slots) == (Verdict.DONE, 1, 0.0, 160)
    assert answer.freed_bytes == 2 * 8 * 10 * 4096  # of both ranks
    assert answer.plan is not None
    assert answer.cost is not None
    assert answer.cost.hops == (2, 2)
    assert len(deployment.sent) == sent
    assert deployment.state() == "normal"
    refused = deployment.coordinator.dry_run(DropWish(((0, 2),)))
    assert (refused.verdict, refused.message) == (
        Verdict.BAD_REQUEST,
        "groups: there is no replica 2; accepted: 0 to 1",
    )


def test_resized_replica_is_planned_with_as_it_is_now() -> None:
    deployment = FakeDeployment(ranks=2).start()
    resized = replace(make_facts(1), base_granules=6, free_frames=7)
    deployment.hello(1, 0, resized)
    assert deployment.drop((0, 1)).message == "the memory of replica 1 is being resized"
    deployment.hello(1, 1, replace(resized, free_frames=3))
    deployment.deliver()
    assert agrees(deployment)
    assert deployment.coordinator.status()["epoch"] == 1
    assert deployment.coordinator.status()["homes"][1]["granules"] == 6
    answer = deployment.drop((0, 1))
    assert answer.verdict is Verdict.DONE
    assert deployment.coordinator.status()["homes"][3]["first_granule"] == 6


def test_new_facts_wait_for_the_transition() -> None:
    deployment = FakeDeployment(replicas=3).start()
    deployment.order_drop((0, 1))
    deployment.hello(2, 0, replace(make_facts(2), base_granules=5))
    assert deployment.coordinator.status()["homes"][2]["granules"] == 4
    assert deployment.run().verdict is Verdict.DONE
    deployment.deliver()
    assert deployment.coordinator.status()["homes"][2]["granules"] == 5
    assert agrees(deployment)
    deployment.hello(0, 0, replace(make_facts(0), base_granules=9))  # must not happen while merged
    assert deployment.coordinator.status()["homes"][0]["granules"] == 4


def test_unlike_replicas_are_refused() -> None:
    deployment = FakeDeployment()
    deployment.hello(0, 0)
    deployment.hello(1, 0, make_facts(1, granule_slots=32))
    answer = deployment.drop((0, 1))
    assert (answer.verdict, answer.message) == (Verdict.BAD_REQUEST, "replicas differ in granule_slots: [16, 32]")


def test_report_of_somebody_unknown_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    deployment = FakeDeployment().start()
    sent = len(deployment.sent)
    deployment.hello(2, 0)
    assert len(deployment.sent) == sent
    assert "not of this deployment" in caplog.text


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_has_changed_before_the_first_order_arrived_ends_the_transition(rank: int) -> None:
    """A replica was resized, or got other weights, while the order to it was on its way."""
    deployment = FakeDeployment(ranks=2).start()
    deployment.script[Phase.PREPARE, 1, 0] = deployment.script[Phase.PREPARE, 1, 1] = "silent"
    deployment.order_drop((0, 1))
    deployment.deliver()
    deployment.hello(1, rank, make_facts(1, base=6))
    answer = deployment.run()
    assert answer.verdict is Verdict.CONFLICT
    assert answer.message == "rolled back: the memory or the parameters of replica 1 have changed meanwhile"
    assert deployment.phases(0)[-3:] == BACK
    assert deployment.state() == "normal"
    deployment.script.clear()
    deployment.hello(1, 1 - rank, make_facts(1, base=6))
    deployment.deliver()
    assert deployment.drop((0, 1)).verdict is Verdict.DONE
    assert agrees(deployment)


def test_a_short_time_to_drain_leaves_the_members_their_time_for_the_rest() -> None:
    deployment = merged()
    deployment.script[Phase.PREPARE, 1, 0] = "silent"
    started_s = deployment.now_s
    deployment.answers.clear()
    deployment.coordinator.restore(RestoreWish(), deployment.answers.append, drain_s=2.0)
    deployment.deliver()
    [order] = {m.timeout_s for _, _, m in deployment.sent if isinstance(m, Order) and m.old_epoch == 1}
    assert order == 2.0
    assert deployment.coordinator.next_deadline_s() == started_s + PHASE_S + REPLY_GRACE_S


def test_stalled_replicas_are_named_and_take_part_in_nothing() -> None:
    deployment = FakeDeployment(replicas=4).start()
    deployment.drop((0, 1))
    coordinator = deployment.coordinator
    coordinator.set_stalled({1: "it stands"}, {0: "waits for it", 1: "is waited for"})
    status = coordinator.status()
    assert status["state"] == "stalled"
    assert [member["state"] for member in status["members"]] == ["merged", "stalled", "normal", "normal"]
    assert [member["stalled"] for member in status["members"]] == [False, True, False, False]
    assert [member["reason"] for member in status["members"]] == ["waits for it", "it stands", "", ""]
    view = coordinator.view()
    assert view is not None
    assert view.unavailable == {1}
    answer = deployment.restore()
    assert (answer.verdict, answer.message) == (Verdict.CONFLICT, "replica 1 makes no progress: it stands")
    assert deployment.drop((2, 3)).verdict is Verdict.DONE
    coordinator.set_stalled({}, {})
    assert deployment.state() == "merged"
    assert deployment.restore().verdict is Verdict.DONE


def test_members_depend_on_each_other_as_soon_as_they_may_have_switched() -> None:
    """So one that stands still then can be ended before the deadlines of the phase and of the way back have passed."""
    deployment = FakeDeployment(replicas=3).start()
    dependent = deployment.coordinator.dependent_on
    deployment.script[Phase.PREPARE, 1, 0] = deployment.script[Phase.SWITCH, 1, 0] = "silent"
    deployment.order_drop((0, 1))
    deployment.deliver()
    assert [dependent(replica) for replica in range(3)] == [(0,), (1,), (2,)]
    number = deployment.coordinator.status()["transition"]["number"]
    deployment.say(OrderReply(number, Phase.PREPARE, 1, 0, Result.APPLIED))
    deployment.deliver()
    assert [dependent(replica) for replica in range(3)] == [(0, 1), (0, 1), (2,)]


def test_a_drop_that_names_a_lost_member_of_a_merged_group_is_refused_for_that() -> None:
    """And not because the others of its group are missing in the request, which would sound as if they helped."""
    deployment = merged(replicas=3)
    deployment.coordinator.on_member_lost(1, 0, "ended with exit code -9")
    deployment.deliver()  # replica 0 has recovered
    for wish in (DropWish(((1, 2),)), DropWish(((0, 1),)), DropWish(((0, 1, 2),))):
        deployment.answers.clear()
        deployment.coordinator.drop(wish, deployment.answers.append)
        for answer in (*deployment.answers, deployment.coordinator.dry_run(wish)):
            assert answer.verdict is Verdict.CONFLICT
            assert "is degraded: replica 1 rank 0 ended with exit code -9" in answer.message
