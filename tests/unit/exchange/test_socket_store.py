"""Process groups over the coordinator's store: between threads, and between processes that share a network only."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from _group_program import options_of
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import DistStoreError

from kunserve_sgl.control import addresses
from kunserve_sgl.control.group_store import GroupStore, group_store_of
from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.group_store import SocketStore
from kunserve_sgl.exits import CONTROLLER_PATIENCE_S
from kunserve_sgl.wire.rejections import COORDINATOR, Rejections
from namespaces import Namespace, two_namespaces

CPU = torch.device("cpu")
TIMEOUT_S = 60.0
SHORT_S = 1.0
PREFIX = "rank-0/0.0-1.0"
PROGRAM = Path(__file__).with_name("_group_program.py")
TESTS = Path(__file__).parents[2]


class Coordinator:
    """Serves the store from a thread, as the controller does from its loop; or stands still."""

    def __init__(self, directory: Path) -> None:
        options = options_of(str(directory), "127.0.0.1")
        addresses.make_keys(options, 2, 1)
        curve = addresses.curve_of(options, COORDINATOR)
        store = group_store_of(options, curve, Rejections(), replicas=2)
        assert store is not None
        assert curve is not None
        self.store: GroupStore = store
        self._curve = curve
        self._directory = str(directory)
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self.serves = threading.Event()
        self.serves.set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._opened: list[SocketStore] = []
        self._curves = [self._curve]

    def _run(self) -> None:
        while not self._is_over.is_set():
            if self.serves.wait(0.05):
                with self._lock:
                    if self.serves.is_set():
                        self.store.serve()
                time.sleep(0.001)

    def stand_still(self) -> None:
        """What it was at has ended then."""
        with self._lock:
            self.serves.clear()

    def expect(self, replica: int, incarnation: int) -> None:
        with self._lock:
            self.store.expect(replica, incarnation)

    def open(self, replica: int) -> SocketStore:
        curve = addresses.curve_of(options_of(self._directory, "127.0.0.1"), (replica, 0))
        assert curve is not None
        self._curves.append(curve)
        self._opened.append(SocketStore(self.store.address, curve))
        return self._opened[-1]

    def transport(self, replica: int, timeout_s: float = TIMEOUT_S) -> CollectiveTransport:
        return CollectiveTransport(
            self.open(replica), replica, 0, backend="gloo", device=CPU, timeout_s=timeout_s, host="127.0.0.1"
        )

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self.store.close()
        for opened in self._opened:
            opened.close()
        for curve in self._curves:
            curve.close()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator(tmp_path)
    yield made
    made.close()


def test_it_is_a_store_of_torchs(coordinator: Coordinator) -> None:
    mine, theirs = (PrefixStore(PREFIX, coordinator.open(replica)) for replica in (0, 1))
    mine.set("x", "a\0b")
    assert theirs.get("x") == b"a\0b"
    assert (mine.add("n", 2), theirs.add("n", 1)) == (2, 3)
    assert theirs.check(["x", "n"])
    assert not theirs.check(["x", "y"])
    theirs.wait(["x", "n"], timedelta(seconds=TIMEOUT_S))
    assert (mine.delete_key("x"), theirs.delete_key("x")) == (True, False)
    later = threading.Timer(0.1, mine.set, ("y", "late"))
    later.start()
    theirs.set_timeout(timedelta(seconds=TIMEOUT_S))
    assert theirs.get("y") == b"late"
    later.join()


def test_nothing_waits_past_its_deadline(coordinator: Coordinator) -> None:
    store = coordinator.open(0)
    store.set_timeout(timedelta(seconds=0.2))
    for call in (lambda: store.get(f"{PREFIX}/x"), lambda: store.wait([f"{PREFIX}/x"], timedelta(seconds=0.2))):
        begin_s = time.monotonic()
        with pytest.raises(DistStoreError, match="in time"):
            call()
        assert 0.2 <= time.monotonic() - begin_s < TIMEOUT_S


def test_a_coordinator_that_stands_still_is_not_waited_for(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = coordinator.open(0)
    store.set(f"{PREFIX}/x", b"1")
    coordinator.stand_still()
    calls = (lambda: store.set(f"{PREFIX}/x", b"2"), lambda: store.wait([f"{PREFIX}/x"], timedelta(seconds=0.2)))
    with monkeypatch.context() as impatient:
        impatient.setattr("kunserve_sgl.exchange.group_store.CONTROLLER_PATIENCE_S", 0.2)
        for call in calls:
            with pytest.raises(DistStoreError, match="has not answered in time"):
                call()
    coordinator.serves.set()
    assert store.get(f"{PREFIX}/x") == b"2"  # the answers that were overdue are not taken for this one


def test_one_question_takes_no_longer_than_all_of_the_wait(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, deadlines_s = coordinator.open(0), list[float]()
    monkeypatch.setattr(store, "_answer", deadlines_s.append)
    store.set_timeout(timedelta(seconds=SHORT_S))
    calls: list[Callable[[], object]] = [
        lambda: store.get(f"{PREFIX}/x"),
        lambda: store.wait([f"{PREFIX}/x"], timedelta(seconds=SHORT_S)),
        lambda: store.add(f"{PREFIX}/n", 1),
        lambda: store.set(f"{PREFIX}/x", b"1"),
    ]
    for call in calls:
        with pytest.raises(DistStoreError, match="has not answered in time"):
            call()
        assert deadlines_s.pop() <= time.monotonic() + SHORT_S


def test_many_threads_use_one_store(coordinator: Coordinator) -> None:
    store, sums = coordinator.open(0), []

    def count() -> None:
        sums.extend(store.add(f"{PREFIX}/n", 1) for _ in range(50))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sums) == list(range(1, 201))


def connect_both(transports: Sequence[CollectiveTransport]) -> None:
    other = threading.Thread(target=transports[1].connect, args=([0],))
    other.start()
    transports[0].connect([1])
    other.join()


def test_groups_are_made_and_send(coordinator: Coordinator) -> None:
    transports = [coordinator.transport(replica) for replica in (0, 1)]
    for _ in range(2):
        connect_both(transports)
        for sender, receiver in ((0, 1), (1, 0)):
            notes = transports[sender].send(receiver, {"x": torch.full((2, 2), sender + 0.5)})
            got = transports[receiver].expect(sender, notes).take()["x"]
            assert got is not None
            assert torch.equal(got, torch.full((2, 2), sender + 0.5))
        for replica in (0, 1):
            transports[replica].disconnect([1 - replica])
    for transport in transports:
        transport.close()


def test_a_peer_that_does_not_come_is_given_up(coordinator: Coordinator) -> None:
    for replica in (0, 1):
        transport = coordinator.transport(replica, SHORT_S)
        begin_s = time.monotonic()
        with pytest.raises(TransientError, match=f"replica {1 - replica} did not connect in time"):
            transport.connect([1 - replica])
        assert time.monotonic() - begin_s < TIMEOUT_S
        transport.close()


def test_a_peer_that_has_ended_is_not_waited_for_any_more(coordinator: Coordinator) -> None:
    transport = coordinator.transport(0)
    begin_s = time.monotonic()
    with contextlib.closing(transport):
        ends = threading.Timer(0.3, coordinator.expect, (1, 1))
        ends.start()
        with pytest.raises(TransientError, match=r"in incarnations \(0, 1\)"):
            transport.connect([1])
        assert time.monotonic() - begin_s < TIMEOUT_S / 2
        ends.join()


@contextlib.contextmanager
def running(where: Namespace, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        where.command([sys.executable, str(PROGRAM), *arguments]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(TESTS), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize(("delay_s", "loss"), [(0.0, 0.0), (0.005, 0.1)])
def test_groups_between_two_network_namespaces(tmp_path: Path, delay_s: float, loss: float) -> None:
    directory = str(tmp_path)
    addresses.make_keys(options_of(directory, "127.0.0.1"), 2, 1)
    with two_namespaces() as network:
        a, b = network.first, network.second
        network.cable.set(delay_s=delay_s, loss=loss)
        with running(a, "store", directory, a.address) as store:
            address = line_of(store)
            assert address.startswith(f"tcp://{a.address}:")
            rest = (address, str(TIMEOUT_S))
            with (
                running(a, "rank", directory, a.address, "0", *rest) as low,
                running(b, "rank", directory, b.address, "1", *rest) as high,
            ):
                assert line_of(low) == str([100.0, 101.0, 102.0, 103.0, 104.0, 105.0])
                assert line_of(high) == str([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        assert (network.cable.frames().lost > 0) == (loss > 0)


def test_a_cut_network_ends_with_an_error(tmp_path: Path) -> None:
    directory = str(tmp_path)
    addresses.make_keys(options_of(directory, "127.0.0.1"), 2, 1)
    with two_namespaces() as network:
        a, b = network.first, network.second
        with running(a, "store", directory, a.address) as store:
            rest = (line_of(store), "3")
            network.cable.set(loss=1.0)
            with (
                running(b, "rank", directory, b.address, "1", *rest) as high,
                running(a, "rank", directory, a.address, "0", *rest) as low,
            ):
                assert line_of(high).startswith("refused: replica 0 cannot be connected to: ")
                assert float(line_of(high)) < CONTROLLER_PATIENCE_S
                assert line_of(low) == "refused: replica 1 did not connect in time"
