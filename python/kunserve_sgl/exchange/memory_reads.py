"""Bytes of memory that a rank has lent, read and written by messages: what is asked, the giving end, and the end that
asks.

A read takes as long as its bytes: these are copied out of the memory at the giving end, go through a socket, and are
copied to where they belong. It is asked for in chunks of CHUNK_BYTES, WINDOW_BYTES ahead of what has come, so that the
giving end is never busy with one for longer than that takes, and the reading one does not wait for each.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import zmq
from typing_extensions import override

from kunserve_sgl.exchange.device_copies import fill, fill_rows, on_host
from kunserve_sgl.exchange.work_check import MOST_ERROR
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.wire.asking import NOBODY_TO_ASK, connect_asker
from kunserve_sgl.wire.curve import Curve, Name
from kunserve_sgl.wire.framing import BESIDE_BYTES
from kunserve_sgl.wire.rejections import BadMessageError, Rejections, require, require_range

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
WINDOW_BYTES = 8 << 20
PROBE_LOAN = 0  # zeros that everybody may read, to measure how fast they come; loans are numbered from 1 on
_LOOK_MS = 1
_LONGEST_LOOK_S = 1.0  # between two looks counts as silence: this process may have stood still itself


class LoanOrder(msgspec.Struct, frozen=True, array_like=True):
    """Is about part `part` of what `loan` has lent to replica `borrower`."""

    borrower: int
    loan: int
    part: int

    @property
    def peer(self) -> int:
        """Gives the replica that asks."""
        return self.borrower


class ReadOrder(LoanOrder, frozen=True, array_like=True, tag="read"):
    """Asks for `size` bytes from `start` on."""

    start: int
    size: int


class WriteOrder(LoanOrder, frozen=True, array_like=True, tag="write"):
    """Puts the bytes that travel beside it there, from `start` on."""

    start: int


class RowsOrder(LoanOrder, frozen=True, array_like=True):
    """Is about some rows of a part, which is rows of `row_bytes`: `rows` are their numbers, int32."""

    row_bytes: int
    rows: bytes


class ReadRowsOrder(RowsOrder, frozen=True, array_like=True, tag="read rows"):
    """Asks for the rows."""


class WriteRowsOrder(RowsOrder, frozen=True, array_like=True, tag="write rows"):
    """Puts the rows that travel beside it there."""


BytesOrder = ReadOrder | WriteOrder | ReadRowsOrder | WriteRowsOrder


class ReadAnswer(msgspec.Struct, frozen=True, array_like=True, tag="bytes"):
    """Answers a `BytesOrder`, in the order in which they were sent: what was read travels beside it. `start` of rows is
    the first of them. `error` is empty, or says why nothing has been done."""

    part: int
    start: int
    error: str


_ANSWERS: msgspec.msgpack.Decoder[ReadAnswer] = msgspec.msgpack.Decoder(ReadAnswer)


class LentBytes(Protocol):
    """Says what memory of this rank others may read and write."""

    def held_bytes(
        self, borrower: int, loan: int, *, writes: bool = False
    ) -> AbstractContextManager[Sequence[torch.Tensor]]:
        """Gives the parts of what a loan has lent to `borrower`, uint8 (size,) each; it does not end before the block
        does. Any thread may call it. Raises BadMessageError where it does not stand, or is only to be read."""
        ...


class ReadService:
    """Answers reads of what one rank has lent, and writes to it. Whatever fails in one is in its answer."""

    def __init__(self, replica: int, replicas: int, lent: LentBytes) -> None:
        """Borrowers are all `replicas` but this one."""
        self._replica, self._replicas = replica, replicas
        self._lent = lent
        self._rejections = Rejections()
        self.given_bytes: Counter[int] = Counter()  # by borrower
        self.taken_bytes: Counter[int] = Counter()

    def report(self) -> dict[str, int]:
        """Counts the bytes that have been read, by borrower."""
        return {str(borrower): count for borrower, count in sorted(self.given_bytes.items())}

    def answer(self, order: ReadOrder, payload: memoryview) -> tuple[ReadAnswer, memoryview]:
        """Returns the answer to an order, and the bytes."""
        data, error = self._try(order, lambda: self._read(order))
        return ReadAnswer(order.part, order.start, error), data

    def answer_write(self, order: WriteOrder, payload: memoryview) -> tuple[ReadAnswer, memoryview]:
        """Returns the answer to an order with the bytes in `payload`, which are there then."""
        nothing, error = self._try(order, lambda: self._write(order, payload))
        return ReadAnswer(order.part, order.start, error), nothing

    def answer_rows(self, order: ReadRowsOrder, payload: memoryview) -> tuple[ReadAnswer, memoryview]:
        """Returns the answer to an order, and the rows."""
        data, error = self._try(order, lambda: self._read_rows(order))
        return ReadAnswer(order.part, _first_of(order.rows), error), data

    def answer_write_rows(self, order: WriteRowsOrder, payload: memoryview) -> tuple[ReadAnswer, memoryview]:
        """Returns the answer to an order with the rows in `payload`, which are there then."""
        nothing, error = self._try(order, lambda: self._write_rows(order, payload))
        return ReadAnswer(order.part, _first_of(order.rows), error), nothing

    def _read_rows(self, order: ReadRowsOrder) -> memoryview:
        """Raises BadMessageError for what the borrower may not read."""
        with self._rows(order) as (table, rows):
            copy = on_host(table.index_select(0, torch.from_numpy(rows).to(table.device)))
        self.given_bytes[order.borrower] += copy.numel()
        data: memoryview = copy.numpy().data
        return data

    def _write_rows(self, order: WriteRowsOrder, payload: memoryview) -> memoryview:
        """Returns nothing. Raises BadMessageError for what the borrower may not write."""
        with self._rows(order) as (table, rows):
            require(len(payload) == len(rows) * order.row_bytes, "{} bytes of {} rows", len(payload), len(rows))
            fill_rows(table, rows, payload)
        self.taken_bytes[order.borrower] += len(payload)
        return memoryview(b"")

    @contextmanager
    def _rows(self, order: RowsOrder) -> Iterator[tuple[torch.Tensor, npt.NDArray[np.int64]]]:
        """Gives the part that an order is about, row by row, and the numbers of the rows."""
        self._require_peer(order.borrower)
        require(len(order.rows) % 4 == 0, "{} bytes of numbers", len(order.rows))
        rows = np.frombuffer(order.rows, np.int32).astype(np.int64)
        require_range("size", len(rows) * order.row_bytes, 1, CHUNK_BYTES)
        writes = isinstance(order, WriteRowsOrder)
        with self._lent.held_bytes(order.borrower, order.loan, writes=writes) as parts:
            require_range("part", order.part, 0, len(parts) - 1)
            size = parts[order.part].numel()
            require(size % order.row_bytes == 0, "rows of {} bytes in a part of {}", order.row_bytes, size)
            for row in (int(rows.min()), int(rows.max())):
                require_range("row", row, 0, size // order.row_bytes - 1)
            yield parts[order.part].view(-1, order.row_bytes), rows

    def _try(self, order: BytesOrder, action: Callable[[], memoryview]) -> tuple[memoryview, str]:
        """Returns what `action` does; where it fails, nothing and the reason, which is for who asks."""
        try:
            return action(), ""
        except BadMessageError as refusal:
            self._rejections.add(type(order).__name__, refusal)
            error = str(refusal)
        except Exception as failure:
            logger.exception("KunServe: memory is not read or written for replica %d", order.borrower)
            error = f"{type(failure).__name__}: {failure}"
        return memoryview(b""), error[:MOST_ERROR]

    def _write(self, order: WriteOrder, payload: memoryview) -> memoryview:
        """Returns nothing. Raises BadMessageError for what the borrower may not write."""
        self._require_peer(order.borrower)
        require_range("size", len(payload), 1, CHUNK_BYTES)
        with self._lent.held_bytes(order.borrower, order.loan, writes=True) as parts:
            require_range("part", order.part, 0, len(parts) - 1)
            require_range("start", order.start, 0, parts[order.part].numel() - len(payload))
            fill(parts[order.part][order.start : order.start + len(payload)], payload)
        self.taken_bytes[order.borrower] += len(payload)
        return memoryview(b"")

    def _require_peer(self, borrower: int) -> None:
        require_range("borrower", borrower, 0, self._replicas - 1)
        require(borrower != self._replica, "it is from this replica")

    def _read(self, order: ReadOrder) -> memoryview:
        """Raises BadMessageError for what the borrower may not read."""
        self._require_peer(order.borrower)
        require_range("size", order.size, 1, CHUNK_BYTES)
        if order.loan == PROBE_LOAN:
            zeros: memoryview = torch.zeros(order.size, dtype=torch.uint8).numpy().data
            return zeros
        with self._lent.held_bytes(order.borrower, order.loan) as parts:
            require_range("part", order.part, 0, len(parts) - 1)
            require_range("start", order.start, 0, parts[order.part].numel() - order.size)
            lent = parts[order.part][order.start : order.start + order.size]
            copy = lent.clone() if lent.device.type == "cpu" else on_host(lent)
        self.given_bytes[order.borrower] += order.size
        data: memoryview = copy.numpy().data
        return data


@dataclass(frozen=True, slots=True, eq=False)
class LoanSpan:
    """Says which bytes of a loan go where, or come from where: as many of part `part`, from `start` on, as `local` has,
    uint8 (size,), contiguous. Or `rows` of it, int32 (n,), which lie in `local` behind one another; then `start` is
    the first."""

    part: int
    start: int
    local: torch.Tensor
    rows: npt.NDArray[np.int32] | None = None

    @property
    def row_bytes(self) -> int:
        """Gives the size of a row."""
        assert self.rows is not None
        return self.local.numel() // len(self.rows)


class Silences:
    """Notes who has not answered, so that nobody waits for the same one again and again."""

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Who has said nothing for `patience_s` is not asked for four times as long."""
        self.patience_s = patience_s
        self._clock = clock
        self._until_s: dict[str, float] = {}

    def add(self, address: str) -> None:
        """Notes that nothing has come from there."""
        self._until_s[address] = self._clock() + 4 * self.patience_s

    def has(self, address: str) -> bool:
        """Says whether nothing is to be expected from there."""
        return self._clock() < self._until_s.get(address, 0.0)


class LoanTransfer(ABC):
    """Reads or writes what one loan has lent to `borrower`, at `address`. It has a connection of its own, so what was
    given up before is of no concern to it."""

    def __init__(
        self, address: str, lender: Name, borrower: int, loan: int, silences: Silences, curve: Curve | None = None
    ) -> None:
        """`lender` is who listens at `address`, to whom `curve` has the keys over TCP. Nothing is sent before something
        is asked for."""
        self._address = address
        self._borrower = borrower
        self._loan = loan
        self._silences = silences
        self._socket = connect_asker(address, lender, curve, CHUNK_BYTES + BESIDE_BYTES)
        self.waits = True  # for a moment, where nothing has come

    def close(self) -> None:
        """Gives up what has not come. Closing twice is allowed."""
        self._socket.close(linger=0)

    def transfer(self, pieces: Iterable[LoanSpan], part_bytes: int) -> Generator[int, None, None]:
        """Goes through all pieces, wherever they are, in order. Yields how many bytes are done: after about
        `part_bytes`, and whenever nothing more has come, within a millisecond where it `waits`, so that the caller may
        do other things meanwhile. Raises TransferError where the lender refuses, or has said nothing for too long."""
        chunks = deque(_chunks(pieces))
        asked: deque[LoanSpan] = deque()
        done = asked_bytes = yielded = 0
        silent_s, looked_s = 0.0, time.monotonic()
        while chunks or asked:
            if self._silences.has(self._address):
                raise TransferError("it has not answered before")
            while chunks and asked_bytes - done < WINDOW_BYTES:
                asked.append(chunks.popleft())
                asked_bytes += asked[-1].local.numel()
                self._send(*self._order(asked[-1]))
            came = bool(self._socket.poll(_LOOK_MS if self.waits else 0))
            now_s = time.monotonic()
            silent_s = 0.0 if came else silent_s + min(now_s - looked_s, _LONGEST_LOOK_S)
            looked_s = now_s
            if came:
                piece = asked.popleft()
                self._take(piece)
                done += piece.local.numel()
            elif silent_s >= self._silences.patience_s:
                self._silences.add(self._address)
                raise TransferError(f"it has not answered for {self._silences.patience_s:g} s")
            if not came or done - yielded >= part_bytes or not (chunks or asked):
                yielded = done
                yield done

    @abstractmethod
    def _order(self, piece: LoanSpan) -> tuple[BytesOrder, bytes | memoryview]:
        """Returns what is asked for a piece, and the bytes that travel beside it."""

    @abstractmethod
    def _take_payload(self, piece: LoanSpan, payload: memoryview) -> bool:
        """Takes what has come for a piece. Returns whether it is what was asked for."""

    def _send(self, order: BytesOrder, payload: bytes | memoryview) -> None:
        try:
            self._socket.send_multipart([msgspec.msgpack.encode(order), payload], zmq.NOBLOCK)
        except zmq.Again as error:
            raise TransferError(NOBODY_TO_ASK) from error

    def _take(self, piece: LoanSpan) -> None:
        head, *rest = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        try:
            answer = _ANSWERS.decode(head.buffer)
        except (msgspec.DecodeError, RecursionError) as error:
            raise TransferError(f"it has answered what makes no sense: {error}") from error
        if answer.error:
            raise TransferError(f"it refuses: {answer.error}")
        is_right = (answer.part, answer.start, len(rest)) == (piece.part, piece.start, 1)
        if not is_right or not self._take_payload(piece, rest[0].buffer):
            raise TransferError("it has answered what was not asked")


class LoanReader(LoanTransfer):
    """Fills pieces with what is lent."""

    @override
    def _order(self, piece: LoanSpan) -> tuple[BytesOrder, bytes]:
        if piece.rows is not None:
            return ReadRowsOrder(self._borrower, self._loan, piece.part, piece.row_bytes, piece.rows.tobytes()), b""
        return ReadOrder(self._borrower, self._loan, piece.part, piece.start, piece.local.numel()), b""

    @override
    def _take_payload(self, piece: LoanSpan, payload: memoryview) -> bool:
        if len(payload) != piece.local.numel():
            return False
        fill(piece.local, payload)
        return True


class LoanWriter(LoanTransfer):
    """Writes pieces to what is lent, which has to be KV. A piece that is done is there."""

    @override
    def _order(self, piece: LoanSpan) -> tuple[BytesOrder, memoryview]:
        data: memoryview = on_host(piece.local).numpy().data
        if piece.rows is not None:
            return WriteRowsOrder(self._borrower, self._loan, piece.part, piece.row_bytes, piece.rows.tobytes()), data
        return WriteOrder(self._borrower, self._loan, piece.part, piece.start), data

    @override
    def _take_payload(self, piece: LoanSpan, payload: memoryview) -> bool:
        return not len(payload)


def _first_of(rows: bytes) -> int:
    return int.from_bytes(rows[:4], "little", signed=True)


def _chunks(pieces: Iterable[LoanSpan]) -> Iterable[LoanSpan]:
    for piece in pieces:
        if piece.rows is not None:
            size, at_once = piece.row_bytes, max(1, CHUNK_BYTES // piece.row_bytes)
            for first in range(0, len(piece.rows), at_once):
                rows = piece.rows[first : first + at_once]
                yield LoanSpan(piece.part, int(rows[0]), piece.local[first * size : (first + len(rows)) * size], rows)
            continue
        for start in range(0, piece.local.numel(), CHUNK_BYTES):
            yield LoanSpan(piece.part, piece.start + start, piece.local[start : start + CHUNK_BYTES])
