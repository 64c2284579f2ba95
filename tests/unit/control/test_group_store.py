"""The coordinator's store of small values: what ranks may ask of it, and what it keeps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control import addresses
from kunserve_sgl.control.group_store import MOST_KEPT, GroupStore, group_store_of
from kunserve_sgl.wire.asking import connect_asker
from kunserve_sgl.wire.curve import Curve
from kunserve_sgl.wire.rejections import COORDINATOR, UNREADABLE, Rejections
from kunserve_sgl.wire.store_messages import MOST_MESSAGE_BYTES, MOST_VALUE_BYTES, StoreAnswer, StoreOrder, owners_of
from message_fuzz import fuzzed

ARRIVAL_MS = 120_000
MINE = "rank-1/0.0-2.0/"  # of rank 1 of replicas 0 and 2


def options(directory: Path) -> KunserveOptions:
    return KunserveOptions(
        kunserve_control="network", kunserve_remote_attention="message", kunserve_directory=str(directory)
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GroupStore]:
    addresses.make_keys(options(tmp_path), 3, 2)
    curve = addresses.curve_of(options(tmp_path), COORDINATOR)
    made = group_store_of(options(tmp_path), curve, Rejections(), replicas=3)
    assert made is not None
    assert curve is not None
    yield made
    made.close()
    curve.close()


class Asker:
    """A rank that asks without waiting for anybody; the test lets the store serve."""

    def __init__(self, store: GroupStore, curve: Curve) -> None:
        self._store = store
        self._curve = curve
        self._number = 0
        self.socket = connect_asker(store.address, COORDINATOR, curve, MOST_MESSAGE_BYTES)

    def say(self, payload: bytes) -> None:
        self.socket.send(payload)
        assert self._store.socket.poll(ARRIVAL_MS)
        self._store.serve()

    def ask(self, action: str, *keys: str, value: bytes = b"", amount: int = 0) -> StoreAnswer | None:
        """The answer; None where there is none."""
        self._number += 1
        self.say(msgspec.msgpack.encode((self._number, action, keys, value, amount)))
        self.say(msgspec.msgpack.encode((0, "check", [MINE + "anything"])))  # is answered, and after the first
        for _ in range(2):
            assert self.socket.poll(ARRIVAL_MS)
            answer = msgspec.msgpack.decode(self.socket.recv(), type=StoreAnswer)
            if answer.number != self._number:
                return None
            assert self.socket.poll(ARRIVAL_MS)
            self.socket.recv()
            return answer
        raise AssertionError


@pytest.fixture
def asker_of(store: GroupStore, tmp_path: Path) -> Iterator[Callable[[int, int], Asker]]:
    made: list[tuple[Asker, Curve]] = []

    def make(replica: int, rank: int) -> Asker:
        curve = addresses.curve_of(options(tmp_path), (replica, rank))
        assert curve is not None
        made.append((Asker(store, curve), curve))
        return made[-1][0]

    yield make
    for asker, curve in made:
        asker.socket.close(0)
        curve.close()


def test_only_a_network_has_one(tmp_path: Path) -> None:
    for control in ("ipc", "tcp"):
        mine = replace(options(tmp_path / control), kunserve_control=control)
        (tmp_path / control).mkdir()
        addresses.make_keys(mine, 2, 1)
        curve = addresses.curve_of(mine, COORDINATOR)
        assert group_store_of(mine, curve, Rejections(), 2) is None
        if curve is not None:
            curve.close()


def test_both_ranks_of_a_pair_use_its_values(asker_of: Callable[[int, int], Asker]) -> None:
    low, high = asker_of(0, 1), asker_of(2, 1)
    assert low.ask("get", MINE + "x") == StoreAnswer(1)
    assert low.ask("set", MINE + "x", value=b"a\0\xff") == StoreAnswer(2)
    assert high.ask("get", MINE + "x") == StoreAnswer(1, value=b"a\0\xff")
    assert high.ask("add", MINE + "n", amount=2) == StoreAnswer(2, count=2)
    assert low.ask("add", MINE + "n", amount=-3) == StoreAnswer(3, count=-1)
    assert low.ask("get", MINE + "n") == StoreAnswer(4, value=b"-1")
    assert low.ask("check", MINE + "x", MINE + "n", MINE + "z") == StoreAnswer(5, count=2)
    assert [high.ask("delete", MINE + "x") for _ in range(2)] == [StoreAnswer(3, count=1), StoreAnswer(4, count=0)]
    assert low.ask("check", MINE + "x") == StoreAnswer(6, count=0)
    assert low.ask("get", "rank-1/0.0-2.0/x/y\n z") == StoreAnswer(7)


@pytest.mark.parametrize(
    ("action", "keys", "value"),
    [
        ("set", ["rank-1/1.0-2.0/x"], b""),  # of two others
        ("set", ["rank-0/0.0-2.0/x"], b""),  # of the other rank
        ("set", ["rank-1/2.0-0.0/x"], b""),
        ("set", ["rank-1/0.0-0.0/x"], b""),
        ("set", ["rank-1/0.0-3.0/x"], b""),  # there is none
        ("set", ["rank-1/0.0-2.0"], b""),
        ("set", ["x"], b""),
        ("set", [], b""),
        ("set", [MINE + "x", MINE + "y"], b""),
        ("check", [MINE + "x", "rank-1/1.0-2.0/x"], b""),
        ("check", [MINE + "x"] * 9, b""),
        ("set", [MINE + "x" * 256], b""),
        ("set", [MINE + "x"], b"x" * (MOST_VALUE_BYTES + 1)),
        ("burn", [MINE + "x"], b""),
    ],
)
def test_what_makes_no_sense_is_ignored_and_counted(
    store: GroupStore, asker_of: Callable[[int, int], Asker], action: str, keys: list[str], value: bytes
) -> None:
    asker = asker_of(0, 1)
    assert asker.ask(action, *keys, value=value) is None
    assert sum(store._rejections.counts.values()) == 1
    assert asker.ask("check", MINE + "x") == StoreAnswer(2, count=0)


def test_what_cannot_be_added_is_refused(store: GroupStore, asker_of: Callable[[int, int], Asker]) -> None:
    asker = asker_of(0, 1)
    asker.ask("set", MINE + "x", value=b"text")
    asker.ask("add", MINE + "n", amount=1 << 53)
    for number, key, what in ((3, "x", "no number to add to"), (4, "n", "sum")):
        answer = asker.ask("add", MINE + key, amount=1)
        assert answer is not None
        assert (answer.number, what in answer.error) == (number, True)
    assert store._rejections.counts == {"StoreOrder": 2}


def test_what_is_for_another_incarnation_is_refused_at_once_and_forgotten(
    store: GroupStore, asker_of: Callable[[int, int], Asker]
) -> None:
    low, high = asker_of(0, 1), asker_of(2, 1)
    low.ask("set", MINE + "x", value=b"old")
    store.expect(2, 1)
    answer = low.ask("check", MINE + "x")
    assert answer is not None
    assert answer.error == "replicas (0, 2) are in incarnations (0, 1), and asked for is (0, 0)"
    assert high.ask("get", "rank-1/0.0-2.1/x") == StoreAnswer(1)
    assert low.ask("set", "rank-1/0.0-2.1/x", value=b"new") == StoreAnswer(3)
    assert high.ask("get", "rank-1/0.0-2.1/x") == StoreAnswer(2, value=b"new")


def test_what_attempts_leave_behind_is_bounded(store: GroupStore, asker_of: Callable[[int, int], Asker]) -> None:
    asker = asker_of(0, 1)
    asker.ask("set", MINE + "old", value=b"1")
    asker.ask("add", MINE + "n", amount=1)
    for number in range(MOST_KEPT - 1):
        asker.say(msgspec.msgpack.encode(StoreOrder(0, "set", [f"{MINE}{number}"], b"1")))
        if number == MOST_KEPT // 2:
            asker.say(msgspec.msgpack.encode(StoreOrder(0, "add", [MINE + "n"], amount=1)))
    assert [len(book) for book in store._books.values()] == [MOST_KEPT]
    (book,) = store._books.values()
    assert MINE + "old" not in book
    assert book[MINE + "n"] == b"2"


def test_rubbish_changes_nothing(store: GroupStore, asker_of: Callable[[int, int], Asker]) -> None:
    asker, rng = asker_of(0, 1), random.Random(7)
    orders = [
        StoreOrder(1, "set", ["rank-1/1.0-2.0/x"], b"1"),
        StoreOrder(2, "add", ["rank-0/0.0-2.0/n"], amount=1),
        StoreOrder(3, "check", ["rank-1/1.0-2.0/x", "rank-1/1.0-2.0/y"]),
        StoreOrder(4, "delete", ["rank-1/2.0-2.0/x"]),
    ]
    for _ in range(500):
        asker.say(fuzzed(rng, orders))
    assert not store._books
    assert store._rejections.counts[UNREADABLE] > 0
    assert asker.ask("set", MINE + "x", value=b"1") == StoreAnswer(1)


@pytest.mark.parametrize("knows", ["nothing", "the public key of the store", "keys of another deployment"])
def test_strangers_neither_read_nor_write(store: GroupStore, tmp_path: Path, knows: str) -> None:
    order = msgspec.msgpack.encode(StoreOrder(1, "set", [MINE + "x"], b"1"))
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        failed = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
        monitor = stranger.get_monitor_socket(failed)
        stranger.setsockopt(zmq.LINGER, 0)
        if knows == "keys of another deployment":
            (tmp_path / "other").mkdir()
            addresses.make_keys(options(tmp_path / "other"), 3, 2)
            other = addresses.curve_of(options(tmp_path / "other"), (0, 1))
            assert other is not None
            other.call(stranger, COORDINATOR)
            other.close()
        elif knows == "the public key of the store":
            public, secret = zmq.curve_keypair()
            stranger.setsockopt(zmq.CURVE_PUBLICKEY, public)
            stranger.setsockopt(zmq.CURVE_SECRETKEY, secret)
            stranger.setsockopt(zmq.CURVE_SERVERKEY, store._curve._public_of[COORDINATOR])
        stranger.connect(store.address)
        stranger.send(order)
        assert monitor.poll(ARRIVAL_MS), "the stranger was not turned away"
        assert recv_monitor_message(monitor)["event"] & failed
        store.serve()
        assert not store._books
        assert not stranger.poll(0)
        stranger.disable_monitor()


def test_whose_a_key_is() -> None:
    owners = owners_of("rank-3/10.2-11.0/1/10>11/0/0")
    assert owners is not None
    assert (owners.rank, owners.replicas, owners.incarnations) == (3, (10, 11), (2, 0))
    assert owners_of("rank-\u0663/10.2-11.0/x") is None
