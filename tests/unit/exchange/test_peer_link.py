"""The link of a rank to its peers, over real sockets: order, turns, deadlines, and what cannot be read."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.exchange.peer_link import Arrivals, PeerLink, require_own
from kunserve_sgl.exchange.work import Answer, CopySlots, Message, PeerOrder, Turn, TurnKind, Work
from kunserve_sgl.policy.plan import Segment
from kunserve_sgl.wire.curve import Curve, make_keys
from kunserve_sgl.wire.framing import WORK, control_message
from kunserve_sgl.wire.rejections import UNREADABLE, BadMessageError, Sender

ARRIVAL_S = 120.0
MakeLinks = Callable[[int, int], list[list[PeerLink]]]


def work(owner: int, batch: int, host: int = 0) -> Work:
    return Work(owner, owner, batch, 3, (Segment(host, 0, 2),), 1, b"r", b"l", b"", b"s", (), (), 0, None)


def copy(owner: int, batch: int) -> CopySlots:
    return CopySlots(owner, batch, 3, b"from", b"to")


@pytest.fixture(params=["ipc", "tcp"])
def make_links(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeLinks]:
    made: list[PeerLink] = []
    curves: list[Curve] = []

    def make(replicas: int, ranks: int) -> list[list[PeerLink]]:
        def bind(r: int, k: int) -> str:
            return f"ipc://{tmp_path}/{r}-{k}" if request.param == "ipc" else "tcp://127.0.0.1:*"

        def curve(r: int, k: int) -> Curve | None:
            if request.param == "ipc":
                return None
            curves.append(Curve(tmp_path / "keys", (r, k)))
            return curves[-1]

        if request.param == "tcp":
            make_keys(tmp_path / "keys", replicas, ranks)
        links = [[PeerLink(r, k, bind(r, k), curve=curve(r, k)) for k in range(ranks)] for r in range(replicas)]
        made.extend(link for row in links for link in row)
        inboxes = [[link.address for link in row] for row in links]
        for link in made:
            link.connect(inboxes)
            link.connect(inboxes)  # again, as a second welcome does
        return links

    yield make
    for link in made:
        link.close()
    for each in curves:
        each.close()


def until(link: PeerLink, found: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + ARRIVAL_S
    while not found():
        assert time.monotonic() < deadline_s
        link.poll(100)


def orders(link: PeerLink, count: int) -> list[PeerOrder]:
    taken: list[PeerOrder] = []

    def more() -> bool:
        while (order := link.take_order()) is not None:
            taken.append(order)
        return len(taken) >= count

    until(link, more)
    assert not link.order_count
    return taken


def test_orders_of_an_owner_stay_in_order(make_links: MakeLinks) -> None:
    links = make_links(3, 1)
    for batch in range(50):
        for owner in (1, 2):
            links[owner][0].send(0, work(owner, batch) if batch % 2 else copy(owner, batch))
    taken = orders(links[0][0], 100)
    for owner in (1, 2):
        assert [order.batch for order in taken if order.owner == owner] == list(range(50))
    assert taken[0] == copy(taken[0].owner, 0)
    assert work(1, 7) in taken


def test_a_peer_that_was_started_again_is_met_at_its_new_address_without_what_the_old_one_left(
    make_links: MakeLinks, tmp_path: Path
) -> None:
    links = make_links(3, 1)
    host, kept, gone = (row[0] for row in links)
    gone.send(0, work(2, 1))
    kept.send(0, work(1, 1))
    until(host, lambda: host.order_count == 2)
    gone.inbox.close(linger=0)
    host.send(2, work(0, 1))  # nobody takes it
    host.forget(2)
    assert [order.owner for order in orders(host, 1)] == [1]
    address = f"ipc://{tmp_path}/again" if gone.address.startswith("ipc") else "tcp://127.0.0.1:*"
    again = PeerLink(2, 0, address, curve=gone._curve)
    try:
        inboxes = [[host.address], [kept.address], [again.address]]
        for link in (host, again):
            link.connect(inboxes)
        host.send(2, work(0, 2))
        again.send(0, work(2, 2))
        assert orders(again, 1) == [work(0, 2)]
        assert orders(host, 1) == [work(2, 2)]
    finally:
        again.close()


def test_who_was_served_last_comes_last(make_links: MakeLinks) -> None:
    """Nobody waits behind all the pieces of another one."""
    links = make_links(3, 1)
    host = links[0][0]
    for batch in (1, 2, 3):
        links[1][0].send(0, work(1, batch))
    until(host, lambda: host.order_count == 3)
    links[2][0].send(0, work(2, 1))
    until(host, lambda: host.order_count == 4)
    assert [(o.owner, o.batch) for o in orders(host, 4)] == [(1, 1), (2, 1), (1, 2), (1, 3)]


def test_one_order_per_owner_is_the_oldest(make_links: MakeLinks) -> None:
    links = make_links(3, 1)
    host = links[0][0]
    for owner, batch in [(1, 1), (1, 2), (1, 3)]:
        links[owner][0].send(0, work(owner, batch))
    until(host, lambda: host.order_count == 3)
    for owner, batch in [(2, 1), (2, 2)]:
        links[owner][0].send(0, work(owner, batch))
    until(host, lambda: host.order_count == 5)
    rounds = [[(o.owner, o.batch) for o in host.take_one_order_per_owner()] for _ in range(4)]
    assert rounds == [[(1, 1), (2, 1)], [(1, 2), (2, 2)], [(1, 3)], []]


def test_same_ranks_of_replicas_and_ranks_of_a_replica_are_peers(make_links: MakeLinks) -> None:
    links = make_links(2, 2)
    for r, k in itertools.product(range(2), range(2)):
        links[r][k].send(1 - r, work(r, 10 + r, 1 - r))
        links[r][k].send(r, Turn(TurnKind.SERVE, r, k), rank=1 - k)
        with pytest.raises(KeyError):
            links[r][k].send(1 - r, work(r, 0), rank=1 - k)
    for r, k in itertools.product(range(2), (1, 0)):  # rank 0 gives out what rank 1 has too
        assert [(order.owner, order.batch) for order in orders(links[r][k], 1)] == [(1 - r, 11 - r)]
        assert links[r][k].wait_turn(time.monotonic() + ARRIVAL_S) == Turn(TurnKind.SERVE, r, 1 - k)


def test_answers_are_found_by_batch(make_links: MakeLinks) -> None:
    links = make_links(2, 1)
    for batch in (2, 1):
        links[1][0].send(0, Answer(1, 0, batch, (), f"error {batch}"))
    assert links[0][0].wait_answer(1, time.monotonic() + ARRIVAL_S).error == "error 1"
    assert links[0][0].wait_answer(2, time.monotonic() + ARRIVAL_S).error == "error 2"
    assert links[0][0].take_answer(1) is None


def test_an_order_that_rank_0_names_is_picked_out(make_links: MakeLinks) -> None:
    links = make_links(2, 2)
    host = links[0][1]
    for batch in (1, 2, 3):
        links[1][1].send(0, work(1, batch))
    assert host.wait_order(1, 2, time.monotonic() + ARRIVAL_S) == work(1, 2)
    assert [order.batch for order in orders(host, 2)] == [1, 3]


@pytest.mark.parametrize("what", ["rank 0's next turn", "batch 4 of replica 1", "the answer to batch 4"])
def test_waiting_ends_at_the_deadline(make_links: MakeLinks, what: str) -> None:
    link = make_links(2, 2)[0][1]
    waits: dict[str, Callable[[float], object]] = {
        "rank 0's next turn": link.wait_turn,
        "batch 4 of replica 1": lambda deadline_s: link.wait_order(1, 4, deadline_s),
        "the answer to batch 4": lambda deadline_s: link.wait_answer(4, deadline_s),
    }
    started_s = time.monotonic()
    with pytest.raises(TransientError, match=f"replica 0 rank 1: {what} did not come in time"):
        waits[what](started_s + 0.1)
    assert time.monotonic() - started_s >= 0.1


def test_control_messages_are_kept_apart_and_rubbish_is_left_out(
    make_links: MakeLinks, caplog: pytest.LogCaptureFixture
) -> None:
    links = make_links(2, 1)
    link = links[0][0]
    curve = links[1][0]._curve
    stranger = (zmq.Context.instance() if curve is None else curve.context).socket(zmq.PUSH)
    stranger.setsockopt(zmq.LINGER, 0)
    if curve is not None:
        curve.call(stranger, (0, 0))
    sender = None if curve is None else (1, 0)
    stranger.connect(link.address)
    try:
        with caplog.at_level(logging.ERROR):
            stranger.send(control_message(b"first"))
            stranger.send(WORK + b"\xc1 no message")
            stranger.send(WORK + b"\x93\xa4turn\x07\x00")  # a turn of a kind that does not exist
            stranger.send(b"of no kind")
            stranger.send(b"")
            stranger.send_multipart([WORK, control_message(b"second")])  # parts are messages of their own
            until(link, lambda: len(link._control) == 2)
        assert link.take_control() == [(b"first", sender), (b"second", sender)]
        assert link.take_control() == []
        assert link.rejections.counts == {UNREADABLE: 5}
        assert len(caplog.records) == 1, "the log was flooded"
        assert not link.order_count
        links[1][0].send(0, work(1, 1))
        assert orders(link, 1) == [work(1, 1)]
    finally:
        stranger.close()


def test_what_fails_the_check_is_counted_and_left_out(make_links: MakeLinks) -> None:
    def check(message: Message, sender: Sender) -> None:
        if isinstance(message, Answer) or message.batch == 2:
            raise BadMessageError("it is bad")

    links = make_links(2, 1)
    links[0][0].check_with(check)
    told: list[object] = []

    class Told(Arrivals):
        def arrived(self, message: Work | Answer) -> None:
            told.append(message)

        def has_come(self, message: Work | Answer) -> bool:
            return True

    links[0][0].wait_for_activations(Told(), lambda host, reason: None)
    links[1][0].send(0, Answer(1, 0, 1, (), ""))
    for batch in (1, 2, 3):
        links[1][0].send(0, work(1, batch))
    assert orders(links[0][0], 2) == told == [work(1, 1), work(1, 3)]
    assert links[0][0].take_answer(1) is None
    assert links[0][0].rejections.counts == {"Work": 1, "Answer": 1}


def test_orders_that_nobody_executes_do_not_pile_up(make_links: MakeLinks) -> None:
    links = make_links(2, 2)
    host, behind = links[0]
    for batch in range(1100):
        links[1][0].send(0, work(1, batch))
    until(host, lambda: host._agreement.held_of(1) + host.rejections.counts["Work"] == 1100)
    assert host._agreement.held_of(1) == 1001  # the other rank has none of them
    links[1][0].send(0, Answer(1, 0, 5, (), ""))
    behind._take_in_control(b"an order", None)  # it is for rank 0
    assert behind.take_control() == []
    for _ in range(1100):
        host._take_in_control(b"an order", None)
    assert len(host.take_control()) == 1000


def test_a_poll_without_messages_ends(make_links: MakeLinks) -> None:
    link = make_links(1, 1)[0][0]
    started_s = time.monotonic()
    link.poll(0)
    link.poll(50)
    assert time.monotonic() - started_s >= 0.05
    assert link.take_order() is None


def test_foreign_orders_are_an_error() -> None:
    require_own(work(1, 1, host=0), 0)
    require_own(copy(1, 1), 0)
    with pytest.raises(InvariantError, match="replica 0 received a segment for replica 2"):
        require_own(work(1, 1, host=2), 0)
    with pytest.raises(InvariantError, match="its own order"):
        require_own(copy(0, 1), 0)


def test_rank_0_gives_out_what_all_ranks_have(make_links: MakeLinks) -> None:
    """In the order of each owner, whichever rank gets it first."""
    links = make_links(2, 3)
    host = links[0]
    sent = [work(1, 1), copy(1, 2), work(1, 3), Answer(1, 0, 7, (), "")]
    for rank in (1, 0):
        for message in sent:
            links[1][rank].send(0, message)
    until(host[0], lambda: len(host[0]._agreement._held) == len(sent))
    until(host[1], lambda: host[1].order_count == 3 and 7 in host[1]._answers)
    host[0].poll(100)
    assert host[0].holds_back
    assert host[0].take_order() is None
    assert host[0].take_answer(7) is None
    links[1][2].send(0, sent[0])
    until(host[2], lambda: host[2].order_count == 1)
    assert orders(host[0], 1) == sent[:1]
    for message in sent[1:]:
        links[1][2].send(0, message)
    until(host[2], lambda: host[2].order_count == 3 and 7 in host[2]._answers)
    assert orders(host[0], 2) == sent[1:3]
    until(host[0], lambda: not host[0].holds_back)
    assert host[0].take_answer(7) == sent[3]
    assert not host[0].holds_back
    assert [rank.rejections.counts.total() for rank in host] == [0, 0, 0]


def test_a_batch_that_comes_twice_on_its_way_is_told_apart(make_links: MakeLinks) -> None:
    links = make_links(2, 2)
    first, second = (msgspec.structs.replace(work(1, 1), segments=(Segment(0, at, at + 2),)) for at in (0, 4))
    links[1][0].send(0, first)
    links[1][0].send(0, second)
    links[1][1].send(0, first)
    until(links[0][1], lambda: links[0][1].order_count == 1)
    assert orders(links[0][0], 1) == [first]
    until(links[0][0], lambda: links[0][0].holds_back)


def test_what_one_rank_has_of_a_peer_that_has_died_is_forgotten(make_links: MakeLinks) -> None:
    links = make_links(3, 2)
    host, other = links[0]
    links[1][0].send(0, work(1, 1))
    links[2][0].send(0, work(2, 1))
    links[2][1].send(0, work(2, 2))
    links[1][0].send(0, Answer(1, 0, 5, (), ""))
    until(host, lambda: len(host._agreement._held) == 3)
    until(other, lambda: other.order_count == 1)
    until(host, lambda: len(host._agreement._haves) == 1)
    host.forget_orders_but([1])
    assert (set(host._agreement._held), host._agreement._haves) == ({(1, 1, 0), (0, 5, -2)}, {})
    host.forget(1)
    host.forget_answers()
    assert not host.holds_back


def test_an_answer_that_failed_at_one_rank_has_failed(make_links: MakeLinks) -> None:
    links = make_links(2, 2)
    links[1][0].send(0, Answer(1, 0, 5, (), ""))
    links[1][1].send(0, Answer(1, 0, 5, (), "no memory"))
    until(links[0][1], lambda: links[0][1].take_answer(5) is not None)
    until(links[0][0], lambda: 5 in links[0][0]._answers)
    assert links[0][0].take_answer(5) == Answer(1, 0, 5, (), "no memory")
