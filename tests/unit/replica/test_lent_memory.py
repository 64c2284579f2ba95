"""Lent memory is read by messages: by whom it was lent to, within its bounds, as long as the loan stands; and whoever
does not answer is given up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq
from transition_world import NoAttention

from kunserve_sgl import threads
from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange import memory_reads
from kunserve_sgl.exchange.attention_service import AttentionService
from kunserve_sgl.exchange.memory_reads import (
    LoanReader,
    LoanSpan,
    LoanWriter,
    ReadAnswer,
    ReadOrder,
    ReadRowsOrder,
    ReadService,
    Silences,
    WriteRowsOrder,
)
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.offer_messages import OfferMessages
from kunserve_sgl.exchange.offers import KvOffer, LentOffers, ParameterOffer
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.lent_memory import LentMemory
from kunserve_sgl.wire.asking import NOBODY_TO_ASK
from kunserve_sgl.wire.curve import Curve, Name, make_keys
from kunserve_sgl.wire.rejections import BadMessageError
from waiting import wait_until

LENDER, BORROWER, OTHER = range(3)
LOAN, KV_LOAN = 7, 8
PART_BYTES = 64
WAIT_S = 120.0
ARRIVES_S = 3.0  # so long one waits in vain for an answer to what has to have arrived


class Lender:
    """Has lent a small and a large part."""

    def __init__(self, directory: Path, curve: Curve | None = None) -> None:
        self.parts = [torch.arange(size, dtype=torch.int64).to(torch.uint8) for size in (10, 1000)]
        self.lent = LentMemory()
        self.lent.lend_bytes(LOAN, BORROWER, self.parts)
        self.offered: list[LentOffers] = []
        self.reads = ReadService(LENDER, 3, self.lent)
        attention = AttentionService(LENDER, 3, 1, self.lent, NoAttention())
        bound = f"ipc://{directory}/memory" if curve is None else "tcp://127.0.0.1:*"
        self.service = MemoryService(bound, 0, attention, self.reads, self.offered.append, curve)
        self.address = self.service.address
        self.service.start()

    def refusal(self, order: ReadOrder) -> str:
        answer, data = self.reads.answer(order, memoryview(b""))
        assert not len(data)
        return answer.error


@pytest.fixture
def lender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lender]:
    monkeypatch.setattr(memory_reads, "CHUNK_BYTES", PART_BYTES)
    monkeypatch.setattr(memory_reads, "WINDOW_BYTES", 3 * PART_BYTES)
    made = Lender(tmp_path)
    yield made
    if not made.service.failure:
        made.service.close()


def read(lender: Lender, borrower: int, pieces: list[LoanSpan], patience_s: float = WAIT_S) -> list[int]:
    reader = LoanReader(lender.address, (LENDER, 0), borrower, LOAN, Silences(patience_s))
    try:
        return list(reader.transfer(pieces, PART_BYTES))
    finally:
        reader.close()


def test_pieces_are_read_in_order_and_in_chunks(lender: Lender) -> None:
    targets = [torch.zeros(size, dtype=torch.uint8) for size in (700, 4, 10)]
    spans = [LoanSpan(1, 300, targets[0]), LoanSpan(0, 6, targets[1]), LoanSpan(0, 0, targets[2])]
    done = read(lender, BORROWER, spans)
    assert torch.equal(targets[0], lender.parts[1][300:])
    assert torch.equal(targets[1], lender.parts[0][6:])
    assert torch.equal(targets[2], lender.parts[0])
    assert done == sorted(done)
    assert done[-1] == 714
    assert lender.reads.report() == {str(BORROWER): 714}


def test_what_is_not_lent_to_it_is_refused(lender: Lender) -> None:
    target = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(TransferError, match="it refuses: loan 7 is not of bytes to it"):
        read(lender, OTHER, [LoanSpan(0, 0, target)])
    assert lender.lent.end(LOAN)
    with pytest.raises(TransferError, match="it refuses: loan 7 is not of bytes to it"):
        read(lender, BORROWER, [LoanSpan(0, 0, target)])
    assert not target.any()
    assert not lender.reads.given_bytes


def write(lender: Lender, borrower: int, loan: int, pieces: list[LoanSpan]) -> None:
    writer = LoanWriter(lender.address, (LENDER, 0), borrower, loan, Silences(WAIT_S))
    try:
        for _ in writer.transfer(pieces, PART_BYTES):
            pass
    finally:
        writer.close()


def test_what_is_written_is_there_in_the_end(lender: Lender) -> None:
    parts = [torch.zeros(size, dtype=torch.uint8) for size in (10, 1000)]
    lender.lent.lend_bytes(KV_LOAN, BORROWER, parts, is_writable=True)
    data = torch.arange(700).to(torch.uint8)
    write(lender, BORROWER, KV_LOAN, [LoanSpan(1, 200, data), LoanSpan(0, 3, data[:4])])
    assert torch.equal(parts[1][200:900], data)
    assert not parts[1][:200].any()
    assert not parts[1][900:].any()
    assert parts[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 0, 0, 0]
    assert lender.reads.taken_bytes == {BORROWER: 704}


def test_what_is_not_lent_for_that_is_not_written_to(lender: Lender) -> None:
    before = [part.clone() for part in lender.parts]
    data = torch.full((4,), 9, dtype=torch.uint8)
    with pytest.raises(TransferError, match="it refuses: loan 7 is only to be read"):
        write(lender, BORROWER, LOAN, [LoanSpan(0, 0, data)])
    lender.lent.lend_bytes(KV_LOAN, BORROWER, lender.parts, is_writable=True)
    with pytest.raises(TransferError, match="it refuses: loan 8 is not of bytes to it"):
        write(lender, OTHER, KV_LOAN, [LoanSpan(0, 0, data)])
    for part, start in ((2, 0), (-1, 0), (0, 7), (0, -1)):
        with pytest.raises(TransferError, match=r"it refuses: (part|start) "):
            write(lender, BORROWER, KV_LOAN, [LoanSpan(part, start, data)])
    assert lender.lent.end(KV_LOAN)
    with pytest.raises(TransferError, match="it refuses: loan 8 is not of bytes to it"):
        write(lender, BORROWER, KV_LOAN, [LoanSpan(0, 0, data)])
    assert all(map(torch.equal, lender.parts, before))
    assert not lender.reads.taken_bytes


def test_rows_that_lie_anywhere_are_read_and_written_many_at_once(lender: Lender) -> None:
    """A message for each would take longer than the bytes do."""
    parts = [torch.zeros(10, dtype=torch.uint8), torch.arange(1000).to(torch.uint8)]
    before = parts[1].clone().view(-1, 4)
    lender.lent.lend_bytes(KV_LOAN, BORROWER, parts, is_writable=True)
    rows = np.arange(3, 250, 3, dtype=np.int32)
    data = torch.zeros(len(rows) * 4, dtype=torch.uint8)
    for kind in (LoanReader, LoanWriter):
        loan = kind(lender.address, (LENDER, 0), BORROWER, KV_LOAN, Silences(WAIT_S))
        sent: list[object] = []
        send = loan._send
        loan._send = lambda *order, send=send, sent=sent: (sent.append(order), send(*order))  # type: ignore[method-assign]
        assert list(loan.transfer([LoanSpan(1, int(rows[0]), data, rows)], PART_BYTES))[-1] == len(data)
        loan.close()
        assert len(sent) == -(-len(data) // PART_BYTES)
        if kind is LoanReader:
            assert torch.equal(data.view(-1, 4), before[rows])
            data += 1
    expected = before.clone()
    expected[rows] += 1
    assert torch.equal(parts[1].view(-1, 4), expected)
    assert lender.reads.given_bytes == lender.reads.taken_bytes == {BORROWER: len(data)}


def numbers(*rows: int) -> bytes:
    return np.array(rows, np.int32).tobytes()


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ((OTHER, LOAN, 1, 4, numbers(0)), "not of bytes to it"),
        ((LENDER, LOAN, 1, 4, numbers(0)), "it is from this replica"),
        ((BORROWER, LOAN, 2, 4, numbers(0)), "part"),
        ((BORROWER, LOAN, 1, 4, numbers(0, 250)), "row"),
        ((BORROWER, LOAN, 1, 4, numbers(-1, 3)), "row"),
        ((BORROWER, LOAN, 1, 3, numbers(0)), "rows of 3 bytes in a part of 1000"),
        ((BORROWER, LOAN, 1, 4, b""), "size"),
        ((BORROWER, LOAN, 1, -4, numbers(0)), "size"),
        ((BORROWER, LOAN, 1, 0, numbers(0)), "size"),
        ((BORROWER, LOAN, 1, 4, numbers(*range(PART_BYTES // 4 + 1))), "size"),
        ((BORROWER, LOAN, 1, 4, b"abc"), "3 bytes of numbers"),
    ],
)
def test_orders_of_rows_that_make_no_sense(
    lender: Lender, order: tuple[int, int, int, int, bytes], reason: str
) -> None:
    before = lender.parts[1].clone()
    answer, data = lender.reads.answer_rows(ReadRowsOrder(*order), memoryview(b""))
    assert reason in answer.error
    assert not len(data)
    lender.lent.lend_bytes(LOAN, BORROWER, lender.parts, is_writable=True)
    answer, _ = lender.reads.answer_write_rows(WriteRowsOrder(*order), memoryview(b"1234"))
    assert reason in answer.error
    answer, _ = lender.reads.answer_write_rows(WriteRowsOrder(BORROWER, LOAN, 1, 4, numbers(0)), memoryview(b"12345"))
    assert "5 bytes of 1 rows" in answer.error
    assert torch.equal(lender.parts[1], before)


def test_offers_come_to_who_they_are_sent_to(lender: Lender) -> None:
    offers = OfferMessages(0, None)
    sent = [KvOffer(3, BORROWER, 5, LENDER, 0, 4, 2, 1), ParameterOffer(3, BORROWER, 6, 1, 2)]
    for offer in sent:
        offers.offer(LENDER, lender.address, offer, FrameExport("", 0, (), ()))
    wait_until(lambda: len(lender.offered) == len(sent), "they have come")
    assert lender.offered == sent
    with pytest.raises(TransferError, match="descriptors cannot be sent"):
        offers.offer(LENDER, lender.address, sent[0], FrameExport("", 0, (), (0,)))
    offers.forget(LENDER)
    offers.offer(LENDER, lender.address, sent[0], FrameExport("", 0, (), ()))
    wait_until(lambda: len(lender.offered) == 1 + len(sent), "a new way is made")
    offers.close()


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (ReadOrder(LENDER, LOAN, 0, 0, 4), "it is from this replica"),
        (ReadOrder(3, LOAN, 0, 0, 4), "borrower"),
        (ReadOrder(BORROWER, LOAN, 2, 0, 4), "part"),
        (ReadOrder(BORROWER, LOAN, -1, 0, 4), "part"),
        (ReadOrder(BORROWER, LOAN, 0, 7, 4), "start"),
        (ReadOrder(BORROWER, LOAN, 0, -1, 4), "start"),
        (ReadOrder(BORROWER, LOAN, 1, 0, PART_BYTES + 1), "size"),
        (ReadOrder(BORROWER, LOAN, 1, 0, 0), "size"),
    ],
)
def test_orders_that_make_no_sense(lender: Lender, order: ReadOrder, reason: str) -> None:
    assert reason in lender.refusal(order)


def test_what_fails_in_an_order_is_told_to_who_asks_and_ends_nobody(
    lender: Lender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*order: object) -> memoryview:
        raise RuntimeError("there is no memory for that now")

    data = torch.zeros(4, dtype=torch.uint8)
    with monkeypatch.context() as failing:
        failing.setattr(lender.reads, "_read", fail)
        failing.setattr(lender.reads, "_write", fail)
        for do in (
            lambda: read(lender, BORROWER, [LoanSpan(0, 0, data)]),
            lambda: write(lender, BORROWER, LOAN, [LoanSpan(0, 0, data)]),
        ):
            with pytest.raises(TransferError, match="it refuses: RuntimeError: there is no memory for that now"):
                do()
    assert caplog.text.count("memory is not read or written for replica 1") == 2
    assert not lender.service.failure
    read(lender, BORROWER, [LoanSpan(0, 0, data)])
    assert torch.equal(data, lender.parts[0][:4])


def test_a_service_that_has_failed_says_why_and_can_be_closed(lender: Lender, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*order: object) -> memoryview:
        raise RuntimeError("the socket is gone")

    monkeypatch.setitem(lender.service._serve, ReadOrder, fail)  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="it has not answered for"):
        read(lender, BORROWER, [LoanSpan(0, 0, torch.zeros(4, dtype=torch.uint8))], patience_s=0.3)
    lender.service._thread.join(WAIT_S)
    assert lender.service.failure == "RuntimeError: the socket is gone"
    closing = threading.Thread(target=lender.service.close, daemon=True)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive()


def test_a_service_that_does_not_come_to_its_end_can_be_closed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device hangs, say, and goes on."""
    serves, goes_on = threading.Event(), threading.Event()
    lender = Lender(tmp_path)
    answer = lender.reads.answer

    def hang(order: ReadOrder, payload: memoryview) -> tuple[ReadAnswer, memoryview]:
        serves.set()
        assert goes_on.wait(WAIT_S)
        return answer(order, payload)

    monkeypatch.setitem(lender.service._serve, ReadOrder, hang)  # type: ignore[arg-type]
    reader = LoanReader(lender.address, (LENDER, 0), BORROWER, LOAN, Silences(WAIT_S))
    data = torch.zeros(4, dtype=torch.uint8)
    reading = reader.transfer([LoanSpan(1, 6, data)], 4)
    assert next(reading) == 0
    assert serves.wait(WAIT_S)
    with monkeypatch.context() as impatient:
        impatient.setattr(threads, "END_DEADLINE_S", 0.01)
        with pytest.raises(TransientError, match=r"thread kunserve-memory has not ended within 0\.01 s"):
            lender.service.close()
    goes_on.set()
    lender.service.close()
    reader.close()
    assert not lender.service.failure


def test_a_loan_does_not_end_while_something_is_served_under_it() -> None:
    lent = LentMemory()
    lent.lend_slots(LOAN, BORROWER, 0, SlotRange(0, 8))
    lent.lend_bytes(KV_LOAN, BORROWER, [])
    for loan, held in ((LOAN, lent.held(BORROWER, 0, [LOAN])), (KV_LOAN, lent.held_bytes(BORROWER, KV_LOAN))):
        with held:
            assert not lent.end(loan)
            with pytest.raises(BadMessageError, match="loan 7 is not of layer 0"), lent.held(BORROWER, 0, [LOAN]):
                pass
            assert not lent.end(loan)
        assert lent.end(loan)
    with pytest.raises(BadMessageError, match="loan 8 is not of bytes"), lent.held_bytes(BORROWER, KV_LOAN):
        pass


def test_a_loan_ends_while_something_is_served_under_another() -> None:
    lent = LentMemory()
    lent.lend_slots(LOAN, BORROWER, 0, SlotRange(0, 8))
    lent.lend_bytes(KV_LOAN, OTHER, [])
    with lent.held(BORROWER, 0, [LOAN]):
        assert lent.end(KV_LOAN)
    with lent.held(BORROWER, 0, [LOAN]) as slots:
        assert slots == [SlotRange(0, 8)]


def test_who_does_not_answer_is_given_up_and_not_asked_again_for_a_while(tmp_path: Path) -> None:
    now_s = 0.0
    silences = Silences(0.2, lambda: now_s)
    address, target = f"ipc://{tmp_path}/nobody", torch.zeros(4, dtype=torch.uint8)
    for reason in ("it has not answered for 0.2 s", "it has not answered before"):
        reader = LoanReader(address, (LENDER, 0), BORROWER, LOAN, silences)
        done = reader.transfer([LoanSpan(0, 0, target)], PART_BYTES)
        with pytest.raises(TransferError, match=reason):
            assert set(done) <= {0}
        reader.close()
    assert silences.has(address)
    now_s = 1.0
    assert not silences.has(address)


def test_an_answer_to_something_else_is_none(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    lender = context.socket(zmq.ROUTER)
    address, target = f"ipc://{tmp_path}/liar", torch.zeros(4, dtype=torch.uint8)
    lender.bind(address)
    answers = [
        (msgspec.msgpack.encode(ReadAnswer(0, 0, "")), bytes(5)),
        (msgspec.msgpack.encode(ReadAnswer(0, 1, "")), bytes(4)),
        (b"rubbish", bytes(4)),
        (b"\x95\xa5bytes\x00\x00\xa0" + 100_000 * b"\x91", bytes(4)),  # one more field, too deep to be passed over
    ]
    for head, body in answers:
        reader = LoanReader(address, (LENDER, 0), BORROWER, LOAN, Silences(WAIT_S))
        done = reader.transfer([LoanSpan(0, 0, target)], PART_BYTES)
        next(done)
        assert lender.poll(1000 * WAIT_S)
        lender.send_multipart([lender.recv_multipart()[0], head, body])
        with pytest.raises(TransferError, match="it has answered what"):
            assert set(done) <= {0}
        reader.close()
    lender.close(0)


# Over TCP


class Keys:
    """Those of a deployment of three replicas."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        make_keys(directory / "keys", 3, 1)

    @contextmanager
    def of(self, name: Name) -> Iterator[Curve]:
        curve = Curve(self.directory / "keys", name)
        try:
            yield curve
        finally:
            curve.close()


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "ours")


@pytest.fixture
def listening(keys: Keys) -> Iterator[Lender]:
    with keys.of((LENDER, 0)) as curve:
        made = Lender(keys.directory, curve)
        yield made
        made.service.close()


def read_as(lender: Lender, curve: Curve, borrower: int, patience_s: float) -> torch.Tensor:
    target = torch.zeros(1000, dtype=torch.uint8)
    reader = LoanReader(lender.address, (LENDER, 0), borrower, LOAN, Silences(patience_s), curve)
    try:
        assert list(reader.transfer([LoanSpan(1, 0, target)], 1000))[-1] == 1000
    finally:
        reader.close()
    return target


def test_who_has_keys_reads_over_tcp_and_as_nobody_else(listening: Lender, keys: Keys) -> None:
    with keys.of((BORROWER, 0)) as curve:
        assert torch.equal(read_as(listening, curve, BORROWER, WAIT_S), listening.parts[1])
    with keys.of((OTHER, 0)) as curve:
        with pytest.raises(TransferError, match="it refuses: loan 7 is not of bytes to it"):
            read_as(listening, curve, OTHER, WAIT_S)
        before = listening.reads.given_bytes.total()
        with pytest.raises(TransferError, match="it has not answered for"):
            read_as(listening, curve, BORROWER, ARRIVES_S)
        assert listening.service.rejections.counts == {"ReadOrder": 1}
        assert listening.reads.given_bytes.total() == before


def test_who_has_no_keys_or_others_is_not_listened_to(
    listening: Lender, keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strangers = Keys(tmp_path / "theirs")
    with strangers.of((BORROWER, 0)) as curve:
        with pytest.raises(TransferError, match="it has not answered for"):  # takes the lender for somebody else
            read_as(listening, curve, BORROWER, 0.3)
        with keys.of((BORROWER, 0)) as ours:
            curve._public_of[LENDER, 0] = ours._public_of[LENDER, 0]
        with pytest.raises(TransferError, match=f"it has not answered for|{NOBODY_TO_ASK}"):
            read_as(listening, curve, BORROWER, ARRIVES_S)
    assert "refused a connection from 127.0.0.1" in caplog.text
    target = torch.zeros(4, dtype=torch.uint8)
    reader = LoanReader(listening.address, (LENDER, 0), BORROWER, LOAN, Silences(0.3))
    wait_until(lambda: not reader._socket.poll(0, zmq.POLLOUT), "the connection is refused")
    with pytest.raises(TransferError, match=NOBODY_TO_ASK):
        list(reader.transfer([LoanSpan(0, 0, target)], PART_BYTES))
    reader.close()
    assert not listening.reads.given_bytes
    assert not listening.service.rejections.counts
    with keys.of((BORROWER, 0)) as curve:  # and it still serves
        assert torch.equal(read_as(listening, curve, BORROWER, WAIT_S), listening.parts[1])
