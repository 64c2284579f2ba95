"""Messages that are longer than any can be: nobody allocates for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from kunserve_sgl.exchange.attention_work import AttentionOrder, AttentionShape, SlotsNote
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.message_limits import most_answer_bytes, most_order_bytes, most_work_bytes
from kunserve_sgl.exchange.offer_messages import OfferInbox
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work import CopySlots, RowUpdate, Work
from kunserve_sgl.exchange.work_check import Limits
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.plan import Segment
from kunserve_sgl.wire.asking import connect_asker
from kunserve_sgl.wire.framing import BESIDE_BYTES, MOST_CONTROL_BYTES, WORK
from kunserve_sgl.wire.rejections import UNREADABLE
from waiting import wait_until

ARRIVAL_MS = 120_000
LIMIT_BYTES = 4096
REQUESTS, WIDTH, TOKENS, REPLICAS, LAYERS = 300, 20_000, 5000, 4, 100
SLOTS = 6_000_000


def limits(requests: int = REQUESTS, slots: int = SLOTS) -> Limits:
    return Limits(
        replicas=REPLICAS,
        layers=LAYERS,
        rows=[range(1 + replica * requests, 1 + (replica + 1) * requests) for replica in range(REPLICAS)],
        slots=[SlotRange(16 + replica * slots, slots) for replica in range(REPLICAS)],
        row_width=WIDTH,
        most_tensor_bytes=1 << 20,
        decode=2,
        extend=(1,),
    )


def int32s(count: int) -> bytes:
    return np.full(count, 1 << 30, np.int32).tobytes()


def longest_work() -> Work:
    """Of a batch that no layer host knows anything of."""
    segments = tuple(Segment(0, layer, layer + 1) for layer in range(LAYERS))
    updates = tuple(RowUpdate(host, int32s(REQUESTS), int32s(REQUESTS * WIDTH)) for host in range(REPLICAS))
    each, slots, keep = int32s(REQUESTS), int32s(2 * TOKENS), int32s(TOKENS)
    return Work(0, 1, 1 << 53, 1 << 53, segments, 1, each, each, each, slots, updates, (), 0, keep)


def longest_copy() -> CopySlots:
    return CopySlots(0, 1, 1, sources=int32s(2 * SLOTS), targets=int32s(2 * SLOTS))


def test_the_longest_messages_are_taken() -> None:
    sizes = [len(WORK + msgspec.msgpack.encode(message)) for message in (longest_work(), longest_copy())]
    assert max(sizes) <= most_work_bytes(limits(), TOKENS) <= max(sizes) + BESIDE_BYTES
    # What is left where batches and memory are small is the coordinator's.
    assert most_work_bytes(limits(requests=1, slots=16), 10) == MOST_CONTROL_BYTES + BESIDE_BYTES


@pytest.mark.parametrize("tokens", [100, 100_000])
def test_the_longest_orders_for_attention_and_their_answers_are_taken(tokens: int) -> None:
    shapes = [AttentionShape(8, 2, 64, 64, 64, "bfloat16"), AttentionShape(8, 2, 128, 64, 64, "bfloat16")]
    each, entries = int32s(REQUESTS), int32s(REQUESTS * WIDTH)
    slots = SlotsNote(each, each, each, entries, entries)
    notes = shapes[1].order_notes(tokens, tokens)
    order = AttentionOrder(0, 1 << 53, LAYERS, (1 << 40,) * 1000, 1 << 53, slots, (1 << 40,) * 10_000, notes)
    order_bytes = max(len(msgspec.msgpack.encode(order)), tokens * (8 * 128 + 2 * 128 + 2 * 64) * 2)
    assert order_bytes <= most_order_bytes(limits(), shapes, tokens) <= order_bytes + BESIDE_BYTES
    answer_bytes = tokens * 8 * (64 + 1) * 4
    assert answer_bytes + BESIDE_BYTES <= most_answer_bytes(shapes, tokens) <= answer_bytes + BESIDE_BYTES + 1024


class Sender:
    """A peer that can be seen to be disconnected."""

    def __init__(self, kind: int, address: str) -> None:
        self.socket: Any = zmq.Context.instance().socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(address)

    def is_disconnected_by(self, size_bytes: int) -> bool:
        self.socket.send_multipart([b"", bytes(size_bytes)] if self.socket.type == zmq.DEALER else [bytes(size_bytes)])
        found = bool(self._monitor.poll(ARRIVAL_MS))
        if found:
            recv_monitor_message(self._monitor)
        return found

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(0)


@pytest.fixture
def senders() -> Iterator[list[Sender]]:
    made: list[Sender] = []
    yield made
    for each in made:
        each.close()


def test_who_sends_more_to_an_inbox_is_disconnected_and_what_comes_next_is_taken(
    tmp_path: Path, senders: list[Sender]
) -> None:
    link = PeerLink(0, 0, f"ipc://{tmp_path}/inbox", most_bytes=LIMIT_BYTES)
    senders.append(sender := Sender(zmq.PUSH, link.address))
    assert sender.is_disconnected_by(LIMIT_BYTES + 1)
    sender.socket.send(WORK + b"no work")

    def has_come() -> bool:
        link.poll(100)
        return link.rejections.counts[UNREADABLE] > 0

    wait_until(has_come, "the next message is there")
    assert link.rejections.counts == {UNREADABLE: 1}
    link.close()


def test_who_sends_more_to_a_memory_socket_is_disconnected_and_what_comes_next_is_taken(
    tmp_path: Path, senders: list[Sender]
) -> None:
    served: Any = SimpleNamespace(device=torch.device("cpu"), answer=None, answer_write=None)
    served.answer_rows = served.answer_write_rows = None
    service = MemoryService(f"ipc://{tmp_path}/memory", 0, served, served, lambda _offer: None, None, LIMIT_BYTES)
    service.start()
    senders.append(sender := Sender(zmq.DEALER, service.address))
    assert sender.is_disconnected_by(LIMIT_BYTES + 1)
    sender.socket.send_multipart([b"no order", b""])
    wait_until(lambda: service.rejections.counts[UNREADABLE] > 0, "the next message is there")
    assert (service.rejections.counts, service.failure) == ({UNREADABLE: 1}, "")
    service.close()


def test_who_offers_more_than_an_offer_is_disconnected(tmp_path: Path, senders: list[Sender]) -> None:
    inbox = OfferInbox(f"ipc://{tmp_path}/offers", 0, None)
    senders.append(sender := Sender(zmq.DEALER, inbox.address))
    assert sender.is_disconnected_by(BESIDE_BYTES + 1)
    assert inbox.take() is None
    inbox.close()


def test_who_answers_more_than_was_asked_for_is_disconnected(tmp_path: Path) -> None:
    listener: Any = zmq.Context.instance().socket(zmq.ROUTER)
    listener.setsockopt(zmq.LINGER, 0)
    listener.bind(address := f"ipc://{tmp_path}/answers")
    monitor = listener.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    asker = connect_asker(address, (0, 0), None, LIMIT_BYTES)
    asker.send(b"?")
    assert listener.poll(ARRIVAL_MS)
    listener.send_multipart([listener.recv_multipart()[0], bytes(LIMIT_BYTES + 1)])
    assert monitor.poll(ARRIVAL_MS)
    assert not asker.poll(0)
    listener.disable_monitor()
    for each in (monitor, asker, listener):
        each.close(0)
