"""Activations by gloo between real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import FileStore, PrefixStore

from kunserve_sgl.errors import ConfigurationError, InvariantError, TransientError
from kunserve_sgl.exchange import collective_transport
from kunserve_sgl.exchange.collective_groups import GroupMaker
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.work import TensorNote
from waiting import wait_until

REPLICAS = 3
TIMEOUT_S = 120.0
SHORT_S = 2.0
LONGER_S = 6.0  # for what has to get some way before
ANSWER_S = 300.0
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Tensors = dict[str, "torch.Tensor | None"]
# The processes are forked from one that has imported what they need, which takes far longer than what they do.
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["pytest", "kunserve_sgl.exchange.collective_transport"])


def any_bits(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any values of the type, NaN among them; the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)[..., 0]


def same_bits(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    is_like = one.dtype == other.dtype and one.shape == other.shape
    return is_like and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class Member:
    """What a process of the tests does when it is told: one method for each order."""

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self.transport: CollectiveTransport | None = None
        self.messages_seen: list[weakref.ref[torch.Tensor]] = []

    def open(self, path: str, timeout_s: float = TIMEOUT_S, incarnation: int = 0) -> None:
        self.transport = CollectiveTransport(
            FileStore(path), self.replica, 0, backend="gloo", device=CPU, timeout_s=timeout_s, incarnation=incarnation
        )

    def expect_incarnation(self, peer: int, incarnation: int) -> None:
        self.used.disconnect([peer])
        self.used.expect_incarnation(peer, incarnation)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
        self.transport = None

    def connect(self, peers: list[int]) -> list[int]:
        self.used.connect(peers)
        return sorted(self.used.peers)

    def disconnect(self, peers: list[int]) -> None:
        self.used.disconnect(peers)

    @property
    def used(self) -> CollectiveTransport:
        assert self.transport is not None
        return self.transport

    def send(self, to: int, rows: int, columns: int, seed: int) -> tuple[TensorNote, ...]:
        """Sends, then writes over what it sent."""
        tensor = any_bits((rows, columns), torch.float32, seed)
        notes = self.used.send(to, {"x": tensor})
        tensor.zero_()
        return notes

    def receives(self, source: int, notes: tuple[TensorNote, ...], seed: int) -> bool:
        """Whether what arrives is what `send` sent with this seed."""
        got = self.used.expect(source, notes).take()["x"]
        return same_bits(got, any_bits(notes[0].shape, torch.float32, seed))

    def kinds(self, keep: list[int] | None) -> Tensors:
        tensors: Tensors = {str(dtype): any_bits((6, 33), dtype, 7) for dtype in DTYPES}
        tensors |= {"none": None, "transposed": any_bits((33, 6), torch.bfloat16, 8).t(), "empty": torch.empty(0, 4)}
        if keep is not None:
            del tensors["empty"]  # which has no such rows
        return tensors

    def send_kinds(self, to: int, keep: list[int] | None) -> tuple[TensorNote, ...]:
        return self.used.send(to, self.kinds(keep), None if keep is None else torch.tensor(keep, dtype=torch.int64))

    def receives_kinds(self, source: int, notes: tuple[TensorNote, ...], keep: list[int] | None) -> list[str]:
        """What does not arrive as it was sent."""
        got = self.used.expect(source, notes).take()
        sent = {n: t if t is None or keep is None else t[keep] for n, t in self.kinds(keep).items()}
        assert list(got) == list(sent)
        return [name for name in sent if not same_bits(got[name], sent[name])]

    def closes_while_it_receives(self, source: int) -> tuple[float, str]:
        """Seconds from closing until the receive gave up, and how."""
        ended: list[str] = []
        begun = threading.Event()

        def receive() -> None:
            begun.set()
            try:
                self.used.expect(source, (TensorNote("x", "float32", (4, 4)),)).take()
            except TransientError as error:
                ended.append(str(error))

        waiter = threading.Thread(target=receive)
        waiter.start()
        assert begun.wait(TIMEOUT_S)
        waiter.join(0.5)
        assert waiter.is_alive()
        begin_s = time.monotonic()
        self.used.close()
        waiter.join(TIMEOUT_S)
        return time.monotonic() - begin_s, *ended  # type: ignore[return-value]

    def watch_messages(self) -> None:
        """From now on, see `messages_left`."""
        used = vars(collective_transport)
        pack, unpack = used["pack"], used["unpack"]
        seen = self.messages_seen = []

        def packing(tensors: Tensors, keep: torch.Tensor | None, memory: torch.Tensor) -> None:
            seen.append(weakref.ref(memory))
            pack(tensors, keep, memory)

        def unpacking(notes: Sequence[TensorNote], memory: torch.Tensor) -> Tensors:
            seen.append(weakref.ref(memory))
            tensors: Tensors = unpack(notes, memory)
            return tensors

        used.update(pack=packing, unpack=unpacking)

    def messages_left(self) -> tuple[int, int]:
        """How many messages were sent and taken, and of how many something still has the memory."""
        return len(self.messages_seen), sum(message() is not None for message in self.messages_seen)


class DyingMaker(GroupMaker):
    def _group(self, *_: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class StuckMaker(GroupMaker):
    """As where NCCL waits for a peer that is gone, for which it has no deadline."""

    freed = threading.Event()

    def _group(self, *_: object) -> Any:
        self.freed.wait(ANSWER_S)
        raise RuntimeError("nobody came")


def run_member(replica: int, orders: Connection) -> None:
    torch.set_num_threads(1)
    member = Member(replica)
    while (order := orders.recv()) is not None:
        name, arguments = order
        try:
            orders.send((None, getattr(member, name)(*arguments)))
        except Exception as error:  # noqa: BLE001 - the test raises it
            orders.send((error, None))
    member.close()


def run_dying(path: str, peer: int, replica: int) -> None:
    store = PrefixStore("rank-0", FileStore(path))
    maker = DyingMaker(store, replica, backend="gloo", device=CPU, timeout_s=TIMEOUT_S)
    maker.make(peer, time.monotonic() + TIMEOUT_S)


class Handle:
    """The test's end of a member."""

    def __init__(self, replica: int) -> None:
        self.orders, theirs = FORKING.Pipe()
        self.process: BaseProcess = FORKING.Process(target=run_member, args=(replica, theirs))
        self.process.start()
        theirs.close()

    def begin(self, name: str, *arguments: Any) -> None:
        self.orders.send((name, arguments))

    def end(self) -> Any:
        assert self.orders.poll(ANSWER_S), "a member does not answer"
        error, result = self.orders.recv()
        if error is not None:
            raise error
        return result

    def do(self, name: str, *arguments: Any) -> Any:
        self.begin(name, *arguments)
        return self.end()


@contextmanager
def started(count: int) -> Iterator[list[Handle]]:
    handles = [Handle(replica) for replica in range(count)]
    try:
        yield handles
    finally:
        for handle in handles:
            if handle.process.is_alive():
                handle.orders.send(None)
        for handle in handles:
            handle.process.join(ANSWER_S)
            handle.process.kill()
            handle.process.join()


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Handle]]:
    with started(REPLICAS) as handles:
        yield handles


@pytest.fixture
def members(processes: list[Handle], tmp_path: Path) -> Iterator[list[Handle]]:
    for handle in processes:
        handle.do("open", str(tmp_path / "store"))
    yield processes
    for handle in processes:
        handle.do("close")


def connect(members: Sequence[Handle], peers: Sequence[list[int]]) -> None:
    for member, named in zip(members, peers, strict=True):
        member.begin("connect", named)
    for member in members:
        member.end()


@pytest.fixture
def pair(members: list[Handle]) -> list[Handle]:
    connect(members[:2], [[1], [0]])
    return members[:2]


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[list[Handle]]:
    """Two that are connected and end with the test, which may change what is in them."""
    with started(2) as handles:
        for handle in handles:
            handle.do("open", str(tmp_path / "store"))
        connect(handles, [[1], [0]])
        yield handles


@pytest.mark.parametrize("keep", [None, [5, 0, 3]], ids=["all rows", "some rows"])
@pytest.mark.parametrize("sender", [0, 1])
def test_what_one_sends_the_other_receives(pair: list[Handle], sender: int, keep: list[int] | None) -> None:
    receiver = 1 - sender
    notes = pair[sender].do("send_kinds", receiver, keep)
    assert pair[receiver].do("receives_kinds", sender, notes, keep) == []


def test_what_has_no_rows_is_not_sent(pair: list[Handle]) -> None:
    empty = pair[0].do("send", 1, 0, 8, 1)
    notes = pair[0].do("send", 1, 4, 8, 2)
    assert pair[1].do("receives", 0, notes, 2)  # the first to arrive
    assert pair[1].do("receives", 0, empty, 1)


def test_both_send_before_either_receives(pair: list[Handle]) -> None:
    rows = 4096  # 16 MiB: more than any socket holds
    notes = [pair[me].do("send", 1 - me, rows, 1024, me) for me in (0, 1)]
    for me in (0, 1):
        pair[me].begin("receives", 1 - me, notes[1 - me], 1 - me)
    assert [pair[me].end() for me in (0, 1)] == [True, True]


def test_ring(members: list[Handle]) -> None:
    """Peers are named in an order that would make each wait for another."""
    connect(members, [[1, 2], [2, 0], [0, 1]])
    connect(members, [[2, 1], [0], []])  # known ones: nobody else needs to take part
    for turn in range(3):
        notes = [members[me].do("send", (me + 1) % REPLICAS, 8, 64, 10 * turn + me) for me in range(REPLICAS)]
        for me in range(REPLICAS):
            source = (me - 1) % REPLICAS
            assert members[me].do("receives", source, notes[source], 10 * turn + source)


def test_sends_in_flight_arrive_in_order(pair: list[Handle]) -> None:
    sent = [pair[0].do("send", 1, 1 + 300 * (seed % 3), 512, seed) for seed in range(12)]
    for seed, notes in enumerate(sent):
        assert pair[1].do("receives", 0, notes, seed)


def test_memory_is_kept_only_until_it_is_sent(apart: list[Handle]) -> None:
    rows, sends = 4096, 4  # 16 MiB each: more than any socket holds
    for member in apart:
        member.do("watch_messages")
    sent = [apart[0].do("send", 1, rows, 1024, seed) for seed in range(sends)]
    assert apart[0].do("messages_left") == (sends, sends), "nobody has begun to receive them"
    for seed, notes in enumerate(sent):
        assert apart[1].do("receives", 0, notes, seed)
    for member in apart:  # the one in which the last of them was sent notices it when its thread comes to that
        wait_until(lambda member=member: member.do("messages_left") == (sends, 0), "nothing has the memory any more")


def test_nothing_sent_is_a_transient_error_in_time(processes: list[Handle], tmp_path: Path) -> None:
    for member in processes[:2]:
        member.do("open", str(tmp_path / "store"), LONGER_S)
    connect(processes[:2], [[1], [0]])
    begin_s = time.monotonic()
    with pytest.raises(TransientError, match="from replica 0"):
        processes[1].do("receives", 0, (TensorNote("x", "float32", (2, 2)),), 0)
    assert LONGER_S <= time.monotonic() - begin_s < TIMEOUT_S / 3
    with pytest.raises(TransientError):  # what came later would not be what the notes say
        processes[1].do("receives", 0, (TensorNote("x", "float32", (2, 2)),), 0)
    for member in processes[:2]:
        member.do("close")


def test_closing_ends_a_receive_that_waits(pair: list[Handle]) -> None:
    seconds, *how = pair[1].do("closes_while_it_receives", 0)
    assert seconds < TIMEOUT_S / 4
    assert how == ["activations from replica 0: closed"]
    with pytest.raises(TransientError):
        pair[1].do("receives", 0, (TensorNote("x", "float32", (2, 2)),), 0)


def test_closing_ends_the_peers_receive_and_sends(pair: list[Handle]) -> None:
    pair[0].do("send", 1, 4096, 1024, 0)  # nobody receives it
    pair[0].begin("receives", 1, (TensorNote("x", "float32", (2, 2)),), 0)
    begin_s = time.monotonic()
    pair[1].do("close")
    with pytest.raises(TransientError):
        pair[0].end()
    pair[0].do("close")
    assert time.monotonic() - begin_s < TIMEOUT_S / 4


def test_disconnected_peers_connect_again(pair: list[Handle]) -> None:
    pair[0].do("send", 1, 4096, 1024, 0)  # nobody receives it
    for me in (0, 1):
        pair[me].do("disconnect", [1 - me])
    with pytest.raises(TransientError, match="not connected"):
        pair[0].do("send", 1, 4, 4, 0)
    connect(pair, [[1], [0]])
    assert pair[1].do("receives", 0, pair[0].do("send", 1, 4, 4, 1), 1)


@pytest.mark.parametrize("again", [0, 1])
def test_a_peer_that_was_started_again_connects_anew(processes: list[Handle], tmp_path: Path, again: int) -> None:
    """The store still has what the two agreed on before; `again` forgets all of it, and the other one is told."""
    path, pair, other = str(tmp_path / "store"), processes[:2], 1 - again
    for member in pair:
        member.do("open", path)
    for incarnation in (1, 2):
        for replica, member in enumerate(pair):
            member.begin("connect", [1 - replica])
        assert [member.end() for member in pair] == [[1], [0]]
        pair[again].do("close")
        pair[again].do("open", path, TIMEOUT_S, incarnation)
        pair[other].do("expect_incarnation", again, incarnation)
    for replica, member in enumerate(pair):
        member.begin("connect", [1 - replica])
    assert [member.end() for member in pair] == [[1], [0]]
    for sender in (0, 1):
        notes = pair[sender].do("send", 1 - sender, 5, 8, sender)
        assert pair[1 - sender].do("receives", sender, notes, sender)


@pytest.mark.parametrize("alone", [0, 1])
def test_a_peer_that_does_not_come_is_a_transient_error(processes: list[Handle], tmp_path: Path, alone: int) -> None:
    """And what that attempt left in the store does not disturb the next."""
    for member in processes[:2]:
        member.do("open", str(tmp_path / "store"), SHORT_S)
    for _ in range(2):
        begin_s = time.monotonic()
        with pytest.raises(TransientError, match=f"replica {1 - alone} did not connect"):
            processes[alone].do("connect", [1 - alone])
        assert time.monotonic() - begin_s < TIMEOUT_S / 3
    with pytest.raises(TransientError, match=f"replica {alone} did not connect"):  # an old question is none
        processes[1 - alone].do("connect", [alone])
    for member in processes[:2]:
        member.do("open", str(tmp_path / "store"))
    connect(processes[:2], [[1], [0]])
    assert processes[1].do("receives", 0, processes[0].do("send", 1, 4, 4, 1), 1)
    for member in processes[:2]:
        member.do("close")


@pytest.mark.parametrize("survivor", [0, 1])
def test_a_peer_that_dies_while_connecting(processes: list[Handle], tmp_path: Path, survivor: int) -> None:
    """It dies when both have agreed and the groups are being made."""
    path = str(tmp_path / "store")
    dying = FORKING.Process(target=run_dying, args=(path, survivor, 1 - survivor))
    dying.start()
    try:
        FileStore(path).wait(
            [f"rank-0/0.0-1.0/{'question/1' if survivor == 0 else 'questions'}"], timedelta(seconds=ANSWER_S)
        )
        processes[survivor].do("open", path, LONGER_S)
        begin_s = time.monotonic()
        with pytest.raises(TransientError, match="could not be made"):
            processes[survivor].do("connect", [1 - survivor])
        assert time.monotonic() - begin_s < TIMEOUT_S / 3
        dying.join(ANSWER_S)
        assert dying.exitcode == -signal.SIGKILL
    finally:
        dying.kill()
        dying.join()
    processes[survivor].do("close")


def test_making_a_group_has_a_deadline_of_its_own(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"))
    usual = store.timeout  # type: ignore[attr-defined]
    theirs = PrefixStore("0.0-1.0", store)
    theirs.add("questions", 1)
    theirs.set("question/1", "gloo")
    maker = StuckMaker(store, 0, backend="gloo", device=CPU, timeout_s=TIMEOUT_S)
    begin_s = time.monotonic()
    with pytest.raises(TransientError, match="not in time"):
        maker.make(1, begin_s + SHORT_S)
    assert time.monotonic() - begin_s < TIMEOUT_S / 2
    assert store.timeout == usual  # type: ignore[attr-defined]
    maker.freed.set()


def test_a_peer_with_another_backend_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    theirs = PrefixStore("rank-0/0.0-1.0", FileStore(path))
    theirs.add("questions", 1)
    theirs.set("question/1", "nccl GPU-1")
    transport = CollectiveTransport(FileStore(path), 0, 0, backend="gloo", device=CPU, timeout_s=TIMEOUT_S)
    with pytest.raises(ConfigurationError, match="replica 1 sends activations by nccl"):
        transport.connect([1])
    transport.close()


def test_a_backend_that_does_not_fit_the_device_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    with pytest.raises(ConfigurationError, match="nccl sends what is on cuda"):
        CollectiveTransport(FileStore(path), 0, 0, backend="nccl", device=CPU, timeout_s=1)
    with pytest.raises(ConfigurationError, match="gloo sends what is on cpu"):
        CollectiveTransport(FileStore(path), 0, 0, backend="gloo", device=torch.device("cuda", 0), timeout_s=1)
    with pytest.raises(ConfigurationError, match="'mpi'"):
        CollectiveTransport(FileStore(path), 0, 0, backend="mpi", device=CPU, timeout_s=1)  # type: ignore[arg-type]


def test_a_replica_is_no_peer_of_itself(tmp_path: Path) -> None:
    transport = CollectiveTransport(FileStore(str(tmp_path / "store")), 0, 0, backend="gloo", device=CPU, timeout_s=1)
    with pytest.raises(InvariantError):
        transport.connect([0])
    transport.close()
