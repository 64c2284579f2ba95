"""Links between replicas are measured by reads of a few MiB: each pair once, in the background, and never for long."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from transition_world import NoAttention

from kunserve_sgl import threads
from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange import link_probe
from kunserve_sgl.exchange.attention_service import AttentionService
from kunserve_sgl.exchange.link_probe import ROUND_BYTES, ROUNDS, measure
from kunserve_sgl.exchange.memory_reads import PROBE_LOAN, LoanReader, LoanSpan, ReadOrder, ReadService, Silences
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.replica.lent_memory import LentMemory
from kunserve_sgl.replica.link_measuring import LinkMeasuring, Peer, measured_by
from waiting import wait_until

WAIT_S = 120.0


class Ring:
    """The memory services of all replicas, and who measures their links."""

    def __init__(self, directory: Path, replicas: int) -> None:
        self.links: dict[tuple[int, int], float] = {}
        self.asked: Counter[tuple[int, int]] = Counter()  # bytes, by who asks and who is asked
        self.services: list[MemoryService] = []
        self.measuring: list[LinkMeasuring] = []
        for replica in range(replicas):
            reads = ReadService(replica, replicas, LentMemory())
            attention = AttentionService(replica, replicas, 1, LentMemory(), NoAttention())
            address = f"ipc://{directory}/memory-{replica}"
            service = MemoryService(address, 0, attention, reads, lambda offer: None)
            service._serve = {**service._serve, ReadOrder: self._counting(replica, reads)}
            service.start()
            self.services.append(service)
            tell = self._telling(replica)
            self.measuring.append(LinkMeasuring(replica, 0, replicas, tell, None))
        self.peers = [Peer(replica, 0, service.address) for replica, service in enumerate(self.services)]

    def _counting(self, owner: int, reads: ReadService) -> Callable[..., Any]:
        def answer(order: ReadOrder, payload: memoryview) -> Any:
            self.asked[order.borrower, owner] += order.size
            return reads.answer(order, payload)

        return answer

    def _telling(self, replica: int) -> Callable[[Peer, float], None]:
        return lambda peer, speed: self.links.__setitem__((replica, peer.replica), speed)

    def meet(self, replica: int, *peers: Peer) -> None:
        self.measuring[replica].meet([peer for peer in peers or self.peers if peer.replica != replica])

    def wait(self, links: int) -> None:
        wait_until(lambda: len(self.links) == links, f"{links} links are measured", WAIT_S)

    def close(self) -> None:
        for measuring in self.measuring:
            measuring.close()
        for service in self.services:
            service.close()


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Ring]:
    made = Ring(tmp_path, 4)
    yield made
    made.close()


@pytest.mark.parametrize("replicas", range(1, 10))
def test_each_pair_is_measured_by_one_of_the_two_and_nobody_measures_more_than_half(replicas: int) -> None:
    pairs = [{replica, peer} for replica in range(replicas) for peer in measured_by(replica, replicas)]
    assert len(pairs) == replicas * (replicas - 1) // 2
    assert all(set(pair) in pairs for pair in itertools.combinations(range(replicas), 2))
    assert max(len(measured_by(replica, replicas)) for replica in range(replicas)) <= replicas / 2


def test_all_pairs_are_measured_once_and_cost_a_few_mib_each(ring: Ring) -> None:
    for replica in range(4):
        ring.meet(replica)
    ring.wait(6)
    assert sorted(map(sorted, ring.links)) == [list(pair) for pair in itertools.combinations(range(4), 2)]
    assert all(speed > 1e6 for speed in ring.links.values())
    assert set(ring.asked) == set(ring.links)
    assert all(ROUNDS * ROUND_BYTES < cost < 2 * ROUNDS * ROUND_BYTES for cost in ring.asked.values())


def test_a_peer_that_comes_back_is_measured_again_and_others_are_not(ring: Ring) -> None:
    ring.meet(0)
    ring.wait(2)
    ring.links.clear()
    ring.meet(0, Peer(1, 1, ring.peers[1].address))
    ring.wait(1)
    assert set(ring.links) == {(0, 1)}

    def measuring() -> list[threading.Thread]:
        return [each for each in threading.enumerate() if each.name == "kunserve-links" and each.is_alive()]

    wait_until(lambda: not measuring(), "what has been told has ended", WAIT_S)
    ring.meet(0, Peer(3, 1, ring.peers[3].address))  # 3 measures that
    assert not measuring()


def test_one_that_does_not_answer_keeps_nobody_from_measuring_the_others(
    ring: Ring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link_probe, "DEADLINE_S", 2.0)  # the other one has to answer within it
    ring.meet(0, Peer(1, 0, "ipc:///nobody/is/there"), ring.peers[2])
    ring.wait(1)
    assert set(ring.links) == {(0, 2)}
    assert "the link to replica 1 has not been measured: " in caplog.text


def test_nothing_is_left_of_a_measurement_that_is_called_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_probe, "DEADLINE_S", 4 * WAIT_S)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    silent = context.socket(zmq.ROUTER)
    silent.bind(f"ipc://{tmp_path}/silent")
    measuring = LinkMeasuring(0, 0, 2, lambda peer, speed: None, None)
    measuring.meet([Peer(1, 0, f"ipc://{tmp_path}/silent")])
    assert silent.poll(int(1000 * WAIT_S)), "it has not asked"
    closing = threading.Thread(target=measuring.close)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    silent.close(0)


def test_a_measurement_that_does_not_come_to_its_end_is_not_waited_for(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "END_DEADLINE_S", 0.01)
    has_measured, goes_on = threading.Event(), threading.Event()

    def tell(peer: Peer, speed: float) -> None:
        has_measured.set()
        assert goes_on.wait(WAIT_S)

    measuring = LinkMeasuring(0, 0, 4, tell, None)
    measuring.meet([ring.peers[1]])
    assert has_measured.wait(WAIT_S)
    with pytest.raises(TransientError, match=r"thread kunserve-links has not ended within 0\.01 s"):
        measuring.close()
    goes_on.set()
    monkeypatch.undo()
    measuring.close()


def test_at_the_deadline_what_has_been_measured_counts(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second goes by with every MiB that is given."""
    monkeypatch.setattr(link_probe, "DEADLINE_S", 3.0)
    mib = 1 << 20
    address = ring.peers[1].address
    assert measure(address, (1, 0), 0, None, lambda: False, lambda: ring.asked[0, 1] / mib) == mib
    assert ring.asked[0, 1] < ROUNDS * ROUND_BYTES


def test_what_everybody_may_read_are_zeros_and_nobody_may_write_them(ring: Ring) -> None:
    here = torch.ones(1000, dtype=torch.uint8)
    reader = LoanReader(ring.peers[1].address, (1, 0), 0, PROBE_LOAN, Silences(WAIT_S))
    list(reader.transfer([LoanSpan(0, 0, here)], 1000))
    reader.close()
    assert not here.any()
    with pytest.raises(TransferError, match="it is from this replica"):
        measure(ring.peers[1].address, (1, 0), 1, None, lambda: False)
