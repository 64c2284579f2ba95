"""Connections made beside other work: nobody waits for them, and what is cancelled does not stay."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.exchange.handover import CollectiveHandover
from kunserve_sgl.exchange.work import Answer
from waiting import wait_until

DEADLINE_S = 120.0


class Wire:
    """Connecting takes until the test lets it end. `made` is what is connected."""

    def __init__(self) -> None:
        self.made: set[int] = set()
        self.begun: list[tuple[int, ...]] = []
        self.may_end = threading.Event()
        self.error: Exception | None = None
        self.lock = threading.Lock()

    def begin(self, *peers: int) -> Connecting:
        return Connecting(peers, self._connect, self._disconnect, self.lock)

    def _connect(self, peers: Iterable[int], is_cancelled: Callable[[], bool]) -> None:
        self.begun.append(tuple(sorted(peers)))
        self.made.add(self.begun[-1][0])
        assert self.may_end.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        if not is_cancelled():
            self.made.update(peers)

    def _disconnect(self, peers: Iterable[int]) -> None:
        self.made.difference_update(peers)


def test_it_is_done_when_all_are_connected() -> None:
    wire = Wire()
    attempt = wire.begin(1, 2)
    wait_until(lambda: wire.made == {1}, "1 is connected", DEADLINE_S)
    assert not attempt.is_done()
    wire.may_end.set()
    wait_until(attempt.is_done, "they are connected", DEADLINE_S)
    assert wire.made == {1, 2}


def test_a_failure_is_raised_where_the_result_is_asked_for() -> None:
    wire = Wire()
    wire.error = TransientError("replica 2 did not connect")
    wire.may_end.set()
    attempt = wire.begin(1, 2)
    with pytest.raises(TransientError, match="replica 2 did not connect"):
        wait_until(attempt.is_done, "they are connected", DEADLINE_S)
    attempt.cancel()
    assert wire.made == set(), "a part of it is taken back too"


def test_what_is_cancelled_before_it_ends_or_after_is_taken_back() -> None:
    wire = Wire()
    first = wire.begin(1)
    wait_until(lambda: wire.made == {1}, "1 is connected", DEADLINE_S)
    second = wire.begin(1)
    first.cancel()
    assert wire.made == {1}, "it still runs"
    assert wire.begun == [(1,)], "attempts follow each other"
    wire.may_end.set()
    wait_until(lambda: second.is_done(), "they are connected", DEADLINE_S)
    assert first.is_done()
    assert wire.begun == [(1,), (1,)]
    assert wire.made == {1}
    second.cancel()
    assert wire.made == set()


@pytest.fixture
def make_handovers(tmp_path: Path) -> Iterator[Callable[[int], list[CollectiveHandover]]]:
    """One handover for each of so many replicas."""
    made: list[CollectiveTransport] = []

    def make(replicas: int) -> list[CollectiveHandover]:
        for replica in range(replicas):
            made.append(
                CollectiveTransport(
                    FileStore(str(tmp_path / "store")),
                    replica,
                    0,
                    backend="gloo",
                    device=torch.device("cpu"),
                    timeout_s=DEADLINE_S,
                )
            )
        return [CollectiveHandover(transport) for transport in made]

    yield make
    for transport in made:
        transport.close()


def pass_on(handovers: list[CollectiveHandover], batch: int, value: float) -> Answer:
    """Replica 0 gives a batch of replica 1 back to it, and replica 1 is told."""
    answer = Answer(0, 1, batch, handovers[0].give(1, 1, {"hidden": torch.full((4, 2), value)}, None, 0), "")
    handovers[1].arrived(answer)
    return answer


def taken(handovers: list[CollectiveHandover], answer: Answer) -> list[list[float]]:
    hidden = handovers[1].take(answer, 0)["hidden"]
    assert hidden is not None
    rows: list[list[float]] = hidden.tolist()
    return rows


def test_a_merge_that_was_given_up_does_not_take_the_connections_of_the_next_one(
    make_handovers: Callable[[int], list[CollectiveHandover]],
) -> None:
    """Replica 2 does not join in, and the others merge without it, long before the first deadline."""
    handovers = make_handovers(2)
    first = [handovers[replica].connect([1 - replica, 2], DEADLINE_S) for replica in range(2)]
    wait_until(
        lambda: all(1 - replica in handovers[replica]._transport.peers for replica in range(2)),
        "they see each other",
        DEADLINE_S,
    )
    for attempt in first:
        attempt.cancel()
    second = [handovers[replica].connect([1 - replica], DEADLINE_S) for replica in range(2)]
    began_s = time.monotonic()
    wait_until(lambda: all(attempt.is_done() for attempt in second), "they are connected", DEADLINE_S)
    assert time.monotonic() - began_s < DEADLINE_S / 2, "it waited for the first to end by its deadline"
    for attempt in first:
        with pytest.raises(TransientError, match="replica 2 did not connect"):
            attempt.is_done()
    assert taken(handovers, pass_on(handovers, 1, 1.0)) == [[1.0, 1.0]] * 4


def test_what_was_sent_before_a_connection_was_taken_back_is_not_taken_for_what_comes_later(
    make_handovers: Callable[[int], list[CollectiveHandover]],
) -> None:
    """Such as an order of an owner that has died: nobody executes it, and nobody takes its activations."""
    handovers = make_handovers(2)
    for attempt in range(2):
        connections = [handovers[replica].connect([1 - replica], DEADLINE_S) for replica in range(2)]
        wait_until(lambda made=connections: all(each.is_done() for each in made), "they are connected", DEADLINE_S)  # type: ignore[misc]
        pass_on(handovers, 1, 1.0)
        if attempt == 0:
            for connection in connections:
                connection.cancel()
    assert taken(handovers, pass_on(handovers, 2, 2.0)) == [[2.0, 2.0]] * 4


def test_peers_that_join_in_one_after_the_other(make_handovers: Callable[[int], list[CollectiveHandover]]) -> None:
    """Replica 0 joins in only when the others could go on. They would wait for it, and it for them."""
    handovers = make_handovers(3)
    attempts = [handovers[2].connect([0, 1], DEADLINE_S), handovers[1].connect([0, 2], DEADLINE_S)]
    assert not any(attempt.is_done() for attempt in attempts)
    attempts.append(handovers[0].connect([1, 2], DEADLINE_S))
    wait_until(lambda: all(attempt.is_done() for attempt in attempts), "they are connected", DEADLINE_S)
    assert [handover._transport.peers for handover in handovers] == [{1, 2}, {0, 2}, {0, 1}]
    assert isinstance(handovers[0].connect([1, 2], DEADLINE_S), Connected), "there is nothing left to do"
