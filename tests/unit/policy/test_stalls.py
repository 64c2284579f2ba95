"""Who stands still, by a clock that is data: never an idle replica, never one whose batches go on."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.dispatch import Dispatcher
from kunserve_sgl.policy.stalls import TELLING_S, StallWatch

LIMIT_S = 100.0
IDLE = ReplicaLoad(1000)
BUSY = replace(IDLE, running_requests=1, received_requests=1)


def watch(replicas: int = 2) -> StallWatch:
    return StallWatch(replicas, LIMIT_S)


def test_idle_replica_never_stalls() -> None:
    made = watch()
    assert made.stalled(10**9) == {}
    made.on_report(0, IDLE, 0.0)
    made.on_sent(0, 1.0)
    made.on_report(0, replace(IDLE, received_requests=1, batches=1), 2.0)
    assert made.stalled(10**9) == {}


def test_replica_that_is_back_begins_anew() -> None:
    made = watch()
    made.on_sent(1, 0.0)
    assert list(made.stalled(LIMIT_S + 1)) == [1]
    made.on_lost(1, LIMIT_S + 1)
    assert made.stalled(LIMIT_S + 1) == {}
    made.on_back(1)
    assert made.stalled(10**9) == {}
    assert made.sent_requests(1) == 0
    made.on_sent(1, 500.0)
    assert list(made.stalled(501.0 + LIMIT_S)) == [1]


@pytest.mark.parametrize("load", [None, IDLE], ids=["never reported", "has reported"])
def test_request_that_a_replica_does_not_even_take_in(load: ReplicaLoad | None) -> None:
    """As when its process is stopped."""
    made = watch()
    if load is not None:
        made.on_report(1, load, 0.0)
    made.on_sent(1, 5.0)
    assert made.stalled(5.0 + LIMIT_S) == {}
    assert made.stalled(6.0 + LIMIT_S) == {1: "no batch has run for 101 s, and requests stand"}


@pytest.mark.parametrize("where", ["running_requests", "queued_requests", "behind_tokens"])
def test_queue_that_never_moves_though_the_replica_reports(where: str) -> None:
    made = watch()
    stands = replace(IDLE, received_requests=1, **{where: 1})
    for second in range(0, 200, 5):
        made.on_report(0, stands, float(second))
    assert list(made.stalled(200.0)) == [0]
    made.on_report(0, replace(stands, batches=1), 201.0)
    assert made.stalled(201.0) == {}, "it makes progress again"
    assert made.stalled(201.0 + LIMIT_S) == {}
    assert list(made.stalled(202.0 + LIMIT_S)) == [0]


def test_long_prefills_below_the_limit_are_progress() -> None:
    made = watch()
    made.on_sent(0, 0.0)
    for batch in range(20):
        now_s = batch * (LIMIT_S - 1)
        assert made.stalled(now_s) == {}
        made.on_report(0, replace(BUSY, batches=batch), now_s)


def test_time_without_work_does_not_count_and_the_rest_adds_up() -> None:
    """Clients that give up and come again do not hide that nothing moves."""
    made = watch()
    for round_ in range(2):
        start_s = 1000.0 * round_
        made.on_sent(0, start_s)
        made.on_report(0, replace(BUSY, received_requests=round_ + 1), start_s)
        assert made.stalled(start_s + 40) == {}
        assert list(made.stalled(start_s + 41)) == ([0] if round_ else [])
        made.on_report(0, replace(IDLE, received_requests=round_ + 1), start_s + 60)
        assert made.stalled(start_s + 900) == {}
    made.on_sent(0, 3002.0)
    assert made.stalled(3002.0 + LIMIT_S) == {}, "who has stood still and has nothing left may try again"


def test_paused_engine_stands_because_it_was_told_to() -> None:
    made = watch()
    made.on_report(0, replace(BUSY, is_paused=True), 0.0)
    assert made.stalled(10**6) == {}
    made.on_report(0, BUSY, 1e6)
    assert made.stalled(1e6 + LIMIT_S) == {}


def test_who_has_ended_does_not_stall() -> None:
    made = watch()
    made.on_sent(0, 0.0)
    made.on_waiting(1, [0], 0.0, 0.0)
    made.on_lost(0, 0.0)
    assert made.stalled(10**6) == {}
    assert 0 not in made.notes(10**6)


def test_the_one_that_others_wait_for_is_named() -> None:
    made = watch(3)
    made.on_report(0, BUSY, 0.0)
    made.on_waiting(0, [1], 2.0, 2.0)
    assert made.notes(TELLING_S) == {}
    made.on_waiting(0, [1], 11.0, 11.0)
    notes = made.notes(12.0)
    assert notes == {
        0: "its batch has been with replica 1 for 12 s",
        1: "replica 0 has waited for it for 12 s",
    }
    made.on_waiting(0, [1], 100.0, 100.0)
    stalled = made.stalled(101.0)
    assert stalled == {
        0: "no batch has run for 101 s, and requests stand; its batch has been with replica 1 for 101 s",
        1: "replica 0 has waited for it for 101 s",
    }
    made.on_report(0, replace(BUSY, batches=1), 102.0)
    assert (made.stalled(102.0), made.notes(102.0)) == ({}, {})


def test_of_two_layer_hosts_the_one_that_reports_is_not_the_one() -> None:
    """It has nothing to run: the batch is with the other one, or will be back soon."""
    made = watch(3)
    made.on_report(1, IDLE, 0.0)
    for second in range(0, 102, 2):
        made.on_waiting(0, [1, 2], float(second), float(second))
        made.on_report(2, IDLE, float(second))
    assert made.notes(12.0).keys() == made.to_blame(101.0).keys() | {0} == {0, 1}
    made.on_report(1, replace(IDLE, batches=1), 101.0)
    assert made.to_blame(101.0) == {}, "it has woken up"
    assert made.to_blame(102.0 + LIMIT_S / 2).keys() == set(), "nobody says any more that it waits"


def test_who_waits_for_nobody_that_stands_still_is_the_one() -> None:
    """One of its own ranks may stand still, so that its layer host lacks a part of the batch."""
    made = watch(3)
    for second in range(0, 152, 2):
        made.on_waiting(0, [1], float(second), float(second))
        made.on_report(1, IDLE, float(second))
    assert made.to_blame(150.0) == {}
    assert made.to_blame(151.0) == {
        0: "its batch has been with replica 1 for 151 s, and nobody else stands still",
    }
    made.on_waiting(1, [2], 1.0, 151.0)
    assert made.to_blame(151.0) == {}, "the batch may be behind one that waits"


def test_who_says_no_more_that_it_waits_is_not_believed_for_ever() -> None:
    """It has got its answer and nothing to report since, or does not run any more itself."""
    made = watch(2)
    made.on_waiting(0, [1], 99.0, 99.0)
    assert list(made.stalled(101.0)) == [1]
    assert (made.stalled(120.0), made.notes(120.0)) == ({}, {})


def test_who_waits_itself_is_not_the_one() -> None:
    made = watch(3)
    made.on_waiting(0, [1], 10.0, 10.0)
    made.on_waiting(1, [2], 10.0, 10.0)
    assert made.notes(10.0)[2] == "replica 1 has waited for it for 10 s"
    assert made.notes(10.0)[1] == "its batch has been with replica 2 for 10 s"
    made.on_waiting(2, [99, -1, 2], 1.0, 1.0)
    assert made.notes(10.0)[2] == "replica 1 has waited for it for 10 s", "nonsense is left out"


@dataclass
class Replica:
    """What a replica would report. `works` says whether it runs batches, `answers` whether it reports."""

    open: int = 0
    received: int = 0
    batches: int = 0
    works: bool = True
    answers: bool = True

    def load(self) -> ReplicaLoad:
        return ReplicaLoad(1000, running_requests=self.open, received_requests=self.received, batches=self.batches)


@given(st.data())
def test_stalled_ones_get_no_requests_and_recovered_ones_do(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    made, dispatcher = watch(count), Dispatcher(count)
    replicas = [Replica() for _ in range(count)]
    on_the_way: list[int] = [0] * count
    idle_since_s = [0.0] * count
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 60))):
        now_s += chance.choice([1.0, 30.0])
        for number, each in enumerate(replicas):
            if chance.random() < 0.1:
                each.works = not each.works
            each.answers = each.works or chance.random() < 0.5
            if each.works or each.answers:
                each.open, each.received, on_the_way[number] = (
                    each.open + on_the_way[number],
                    each.received + on_the_way[number],
                    0,
                )
            if each.works and each.open:
                each.batches += 1
                each.open -= chance.randrange(each.open + 1)
            if each.answers:
                made.on_report(number, each.load(), now_s)
                dispatcher.on_report(number, each.load())
            if each.works or not (each.open or on_the_way[number]):
                idle_since_s[number] = now_s
        stalled = made.stalled(now_s)
        dispatcher.set_stalled(stalled)
        for number, each in enumerate(replicas):
            if each.works:
                assert number not in stalled
            elif now_s - idle_since_s[number] > LIMIT_S:
                assert number in stalled
        if len(stalled) == count:
            with pytest.raises(TransientError, match="no replica makes progress"):
                dispatcher.pick(10)
            continue
        target = dispatcher.pick(10)
        assert target not in stalled
        dispatcher.record(target, 10)
        made.on_sent(target, now_s)
        on_the_way[target] += 1
    # All work again: each gets requests, from the next report on.
    for number, each in enumerate(replicas):
        each.open, each.received, each.batches = 0, each.received + on_the_way[number], each.batches + 1
        made.on_report(number, each.load(), now_s)
        dispatcher.on_report(number, each.load())
    dispatcher.set_stalled(made.stalled(now_s))
    found = set()
    for _ in range(count):
        found.add(dispatcher.pick(10))
    assert found == set(range(count))


def test_merged_with_one_that_stands_is_passed_over_too() -> None:
    made = Dispatcher(3)
    made.set_groups([(0, 1), (2,)], ())
    made.set_stalled([1])
    assert [made.pick(1) for _ in range(3)] == [2, 2, 2]
    made.set_groups([(0,), (1,), (2,)], ())
    assert {made.pick(1) for _ in range(3)} == {0, 2}
    made.set_stalled([])
    assert {made.pick(1) for _ in range(3)} == {0, 1, 2}


def test_who_is_to_blame() -> None:
    """Replica 0 waits for 1, and 2 stands for want of memory, 3 in the middle of what it runs; 4 takes nothing in."""
    made = watch(5)
    now_s = LIMIT_S + 5
    for replica in range(4):
        made.on_report(replica, {1: IDLE, 2: replace(IDLE, queued_requests=1)}.get(replica, BUSY), 0.0)
    made.on_sent(4, 0.0)
    made.on_waiting(0, (1,), LIMIT_S + 1, now_s)
    assert sorted(made.stalled(now_s)) == [0, 1, 2, 3, 4]
    assert sorted(made.to_blame(now_s)) == [1, 3, 4]
    assert made.to_blame(now_s)[1] == "replica 0 has waited for it for 101 s"
    assert made.to_blame(LIMIT_S) == {}


def test_who_waited_for_one_that_has_ended_begins_anew() -> None:
    made = watch()
    now_s = LIMIT_S + 5
    made.on_report(0, BUSY, 0.0)
    made.on_waiting(0, (1,), LIMIT_S + 1, now_s)
    assert sorted(made.stalled(now_s)) == [0, 1]
    made.on_lost(1, now_s)
    assert made.stalled(now_s + LIMIT_S) == {}
    assert list(made.stalled(now_s + LIMIT_S + 1)) == [0]
