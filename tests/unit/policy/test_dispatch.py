"""Which replica gets a request, and that every request counts exactly once, wherever it is."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.dispatch import Dispatcher

IDLE = ReplicaLoad(1000)


def dispatcher(*loads: ReplicaLoad) -> Dispatcher:
    made = Dispatcher(len(loads))
    for replica, load in enumerate(loads):
        made.on_report(replica, load)
    return made


def picks(made: Dispatcher, *tokens: int) -> list[int]:
    found = []
    for each in tokens:
        found.append(made.pick(each))
        made.record(found[-1], each)
    return found


def test_who_is_back_has_nothing_to_do_and_is_picked() -> None:
    made = dispatcher(IDLE, replace(IDLE, growth_tokens=900, received_requests=7), IDLE)
    made.set_groups([(0, 1), (2,)], ())
    made.record(1, 50)
    made.on_lost(1)
    assert picks(made, 10, 10, 10) == [2, 2, 2], "its group has lost a member"
    made.on_back(1)
    assert (made.work_tokens(1), made.on_the_way(1)) == (0, 0)
    made.on_report(1, IDLE)
    assert set(picks(made, 10, 10)) == {0, 1}


def test_idle_ones_take_turns() -> None:
    made = dispatcher(IDLE, IDLE, IDLE)
    found = []
    for _ in range(6):  # each has ended before the next comes
        found.append(made.pick(10))
    assert found == [0, 1, 2, 0, 1, 2]
    assert Counter(picks(Dispatcher(4), *[10] * 40)) == dict.fromkeys(range(4), 10)


def test_least_work_wins_not_the_fewest_requests() -> None:
    made = dispatcher(ReplicaLoad(9000, growth_tokens=400, running_requests=1), replace(IDLE, capacity_tokens=9000))
    assert picks(made, *[30] * 10) == [1] * 10


def test_all_parts_of_the_work_count() -> None:
    for part in ("growth_tokens", "queued_tokens", "behind_tokens"):
        assert dispatcher(replace(IDLE, **{part: 5}), IDLE).pick(1) == 1
    # what is in memory already is no work
    assert dispatcher(replace(IDLE, growth_tokens=5), replace(IDLE, used_tokens=500)).pick(1) == 1


def test_memory_comes_before_work() -> None:
    full, busy = ReplicaLoad(1000, used_tokens=950), ReplicaLoad(1000, used_tokens=100, growth_tokens=700)
    assert dispatcher(full, busy).pick(51) == 1
    assert dispatcher(full, busy).pick(50) == 0
    assert dispatcher(busy, replace(full, capacity_tokens=1100)).pick(51) == 1, "a drop has made room"


def test_shortage_is_a_share_of_the_capacity() -> None:
    small, large = ReplicaLoad(100, queued_tokens=150), ReplicaLoad(1000, queued_tokens=1100)
    assert dispatcher(small, large).pick(10) == 1


def test_group_shares_its_compute() -> None:
    busy = replace(IDLE, growth_tokens=600)
    # 2 is idle, but helps 1 with 600; 0 has 400 for itself, 3 has 310
    loads = (replace(IDLE, growth_tokens=400), busy, IDLE, replace(IDLE, growth_tokens=310))
    made = dispatcher(*loads)
    assert made.pick(1) == 2
    made.set_groups([(0,), (1, 2), (3,)], ())
    assert made.pick(1) == 2, "7/8 of 300 for the group"
    made.on_report(3, replace(IDLE, growth_tokens=250))
    assert made.pick(1) == 3
    made.on_report(3, replace(IDLE, growth_tokens=500))
    assert picks(made, 50) == [2]
    made.on_report(1, replace(IDLE))
    assert made.pick(1) == 1, "within the group, who has less of its own"


def test_transition_only_breaks_ties() -> None:
    made = dispatcher(IDLE, IDLE, IDLE, IDLE)
    made.set_groups([(0, 1), (2,), (3,)], (0, 1, 2))
    assert [made.pick(1) for _ in range(3)] == [3, 3, 3]
    made.record(3, 1)
    assert made.pick(1) == 0


def test_lost_ones_are_never_picked_and_their_groups_last() -> None:
    made = dispatcher(*[IDLE] * 4)
    made.set_groups([(0, 1), (2,), (3,)], ())
    made.on_lost(1)
    made.on_lost(1)
    made.record(2, 5000)
    made.record(3, 5000)
    assert made.pick(1) in (2, 3)
    made.on_lost(2)
    made.on_lost(3)
    assert made.pick(1) == 0
    made.record(1, 10)  # sent before its end was known
    made.on_report(1, IDLE)
    made.set_groups([(0,), (1,), (2,), (3,)], ())
    assert made.pick(1) == 0
    made.on_lost(0)
    with pytest.raises(TransientError, match="all replicas have ended"):
        made.pick(1)


def test_answers_are_expected_to_be_as_long_as_the_replicas_say() -> None:
    made = dispatcher(replace(IDLE, mean_answer_tokens=100), replace(IDLE, mean_answer_tokens=50), IDLE)
    assert made.tokens_of(10, 1000, goes_to_the_end=False) == 85
    assert made.tokens_of(10, 30, goes_to_the_end=False) == 40
    assert made.tokens_of(10, 1000, goes_to_the_end=True) == 1010
    made.on_lost(0)
    assert made.tokens_of(10, 1000, goes_to_the_end=False) == 60


@given(st.lists(st.integers(1, 4000), max_size=60), st.integers(1, 8))
def test_without_a_report_what_was_sent_is_balanced(tokens: list[int], replicas: int) -> None:
    made = Dispatcher(replicas)
    picks(made, *tokens)
    sent = [made.work_tokens(replica) for replica in range(replicas)]
    assert sum(sent) == sum(tokens)
    assert max(sent) - min(sent) <= max(tokens, default=0)


@given(st.data())
def test_groups_work_is_that_of_their_members(data: st.DataObject) -> None:
    """What is kept up to date step by step is what a new dispatcher would find."""
    replicas = data.draw(st.integers(1, 5))
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    made = Dispatcher(replicas)
    for _ in range(data.draw(st.integers(0, 40))):
        replica, event = chance.randrange(replicas), chance.randrange(10)
        if event < 4:
            made.record(replica, chance.randrange(100))
        elif event < 8:
            received = chance.randrange(10)
            made.on_report(replica, ReplicaLoad(1000, chance.randrange(100), 3, 5, received_requests=received))
        elif event == 8:
            cut = chance.randrange(replicas + 1)
            made.set_groups([group for group in (tuple(range(cut)), tuple(range(cut, replicas))) if group], ())
        else:
            made.on_lost(replica)
        for number, group in enumerate(made._groups):
            members = [each for each in made._replicas if each.group == number and not each.is_lost]
            assert (group.members, group.work_tokens) == (len(members), sum(each.work_tokens for each in members))


# Exactly once


@dataclass
class Remote:
    """A replica at the other end of two wires that keep the order: requests come in, reports go out."""

    sent: list[int] = field(default_factory=list)  # numbers of requests, in order
    received: int = 0
    ended: set[int] = field(default_factory=set)
    reports: deque[tuple[ReplicaLoad, set[int]]] = field(default_factory=deque)
    contained: tuple[int, set[int]] = (0, set())  # of the newest report that has arrived: how many, who had ended

    def report(self) -> None:
        """Request i needs 2**i tokens, so that a sum says who is in it, and how often."""
        tokens = sum(2**number for number in self.sent[: self.received] if number not in self.ended)
        self.reports.append(
            (ReplicaLoad(10**30, queued_tokens=tokens, received_requests=self.received), set(self.ended))
        )

    @property
    def expected_tokens(self) -> int:
        """Those that the newest report contains and that had not ended, and all that were sent after those."""
        count, ended = self.contained
        known = [number for number in self.sent[:count] if number not in ended]
        return sum(2**number for number in [*known, *self.sent[count:]])


@given(st.data())
def test_every_request_counts_exactly_once_wherever_it_is(data: st.DataObject) -> None:
    replicas = data.draw(st.integers(1, 4))
    made, remotes = Dispatcher(replicas), [Remote() for _ in range(replicas)]
    number = 0
    events = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["send", "send to", "receive", "end", "report", "arrive", "lose", "again"]),
                st.integers(0, replicas - 1),
            ),
            max_size=120,
        )
    )
    for event, replica in events:
        remote = remotes[replica]
        if event in ("send", "send to"):
            target = made.pick(2**number) if event == "send" else replica
            made.record(target, 2**number)
            remotes[target].sent.append(number)
            number += 1
        elif event == "receive":
            remote.received = min(len(remote.sent), remote.received + 1)
        elif event == "end":
            running = [each for each in remote.sent[: remote.received] if each not in remote.ended]
            remote.ended |= set(running[:1])
        elif event == "report":
            remote.report()
        elif event == "lose" and remote.reports:
            remote.reports.popleft()
        elif event == "arrive" and remote.reports:
            load, ended = remote.reports.popleft()
            remote.contained = load.received_requests, ended
            made.on_report(replica, load)
        elif event == "again" and remote.contained[0]:
            made.on_report(replica, replace(IDLE, received_requests=remote.contained[0] - 1))  # older: says nothing
        for each, there in enumerate(remotes):
            assert made.work_tokens(each) == there.expected_tokens, (event, replica, each)
            assert made.on_the_way(each) == len(there.sent) - there.contained[0]
