"""Bytes of memory that a rank has lent, read by messages: what is asked, the giving end, and the end that reads.

A read takes as long as its bytes: these are copied out of the memory at the giving end, go through a socket, and are
copied to where they belong. It is asked for in chunks of CHUNK_BYTES, WINDOW_BYTES ahead of what has come, so that the
giving end is never busy with one for longer than that takes, and the reading one does not wait for each.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch
import zmq

from kunserve_sgl.exchange.work_check import MOST_ERROR
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.wire.asking import NOBODY_TO_ASK, connect_asker
from kunserve_sgl.wire.curve import Curve, Name
from kunserve_sgl.wire.rejections import BadMessageError, Rejections, require, require_range

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
WINDOW_BYTES = 8 << 20
_LOOK_MS = 1
_LONGEST_LOOK_S = 1.0  # between two looks counts as silence: this process may have stood still itself


class ReadOrder(msgspec.Struct, frozen=True, array_like=True, tag="read"):
    """Asks for `size` bytes from `start` on of part `part` of what `loan` has lent to replica `borrower`."""

    borrower: int
    loan: int
    part: int
    start: int
    size: int

    @property
    def peer(self) -> int:
        """Gives the replica that asks."""
        return self.borrower


class ReadAnswer(msgspec.Struct, frozen=True, array_like=True, tag="bytes"):
    """Answers a `ReadOrder`, in the order in which they were sent: the bytes travel beside it. `error` is empty, or
    says why there are none."""

    part: int
    start: int
    error: str


class LentBytes(Protocol):
    """Says what memory of this rank others may read."""

    def held_bytes(self, borrower: int, loan: int) -> AbstractContextManager[Sequence[torch.Tensor]]:
        """Gives the parts of what a loan has lent to `borrower`, uint8 (size,) each; it does not end before the block
        does. Any thread may call it. Raises BadMessageError where it does not stand."""
        ...


class ReadService:
    """Answers reads of what one rank has lent."""

    def __init__(self, replica: int, replicas: int, lent: LentBytes) -> None:
        """Borrowers are all `replicas` but this one."""
        self._replica, self._replicas = replica, replicas
        self._lent = lent
        self._rejections = Rejections()
        self.given_bytes: Counter[int] = Counter()  # by borrower

    def report(self) -> dict[str, int]:
        """Counts the bytes that have been read, by borrower."""
        return {str(borrower): count for borrower, count in sorted(self.given_bytes.items())}

    def answer(self, order: ReadOrder, payload: memoryview) -> tuple[ReadAnswer, memoryview]:
        """Returns the answer to an order, and the bytes."""
        try:
            data = self._read(order)
        except BadMessageError as refusal:
            self._rejections.add(ReadOrder.__name__, refusal)
            return ReadAnswer(order.part, order.start, str(refusal)[:MOST_ERROR]), memoryview(b"")
        self.given_bytes[order.borrower] += order.size
        return ReadAnswer(order.part, order.start, ""), data

    def _read(self, order: ReadOrder) -> memoryview:
        """Raises BadMessageError for what the borrower may not read."""
        require_range("borrower", order.borrower, 0, self._replicas - 1)
        require(order.borrower != self._replica, "it is from this replica")
        require_range("size", order.size, 1, CHUNK_BYTES)
        with self._lent.held_bytes(order.borrower, order.loan) as parts:
            require_range("part", order.part, 0, len(parts) - 1)
            require_range("start", order.start, 0, parts[order.part].numel() - order.size)
            copy = torch.empty(order.size, dtype=torch.uint8)
            copy.copy_(parts[order.part][order.start : order.start + order.size])
        data: memoryview = copy.numpy().data
        return data


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Says which bytes of a loan go where: as many of part `part`, from `start` on, as `target` has, uint8 (size,)."""

    part: int
    start: int
    target: torch.Tensor


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


class LoanReader:
    """Reads what one loan has lent to `borrower`, at `address`. It has a connection of its own, so what was given up
    before is of no concern to it."""

    def __init__(
        self, address: str, lender: Name, borrower: int, loan: int, silences: Silences, curve: Curve | None = None
    ) -> None:
        """`lender` is who listens at `address`, to whom `curve` has the keys over TCP. Nothing is sent before something
        is read."""
        self._address = address
        self._borrower = borrower
        self._loan = loan
        self._silences = silences
        self._socket = connect_asker(address, lender, curve)
        self._decoder = msgspec.msgpack.Decoder(ReadAnswer)

    def close(self) -> None:
        """Gives up what has not come. Closing twice is allowed."""
        self._socket.close(linger=0)

    def read(self, pieces: Iterable[Piece], part_bytes: int) -> Generator[int, None, None]:
        """Fills all targets, which are on a CPU, in order. Yields how many bytes are there: after about `part_bytes`,
        and whenever nothing more has come within a millisecond, so that the caller may do other things meanwhile.
        Raises TransferError where the giving end refuses, or has said nothing for too long."""
        chunks = deque(_chunks(pieces))
        asked: deque[Piece] = deque()
        done = asked_bytes = yielded = 0
        silent_s, looked_s = 0.0, time.monotonic()
        while chunks or asked:
            if self._silences.has(self._address):
                raise TransferError("it has not answered before")
            while chunks and asked_bytes - done < WINDOW_BYTES:
                asked.append(chunks.popleft())
                asked_bytes += asked[-1].target.numel()
                self._ask(asked[-1])
            came = bool(self._socket.poll(_LOOK_MS))
            now_s = time.monotonic()
            silent_s = 0.0 if came else silent_s + min(now_s - looked_s, _LONGEST_LOOK_S)
            looked_s = now_s
            if came:
                piece = asked.popleft()
                self._take(piece)
                done += piece.target.numel()
            elif silent_s >= self._silences.patience_s:
                self._silences.add(self._address)
                raise TransferError(f"it has not answered for {self._silences.patience_s:g} s")
            if not came or done - yielded >= part_bytes or not (chunks or asked):
                yielded = done
                yield done

    def _ask(self, piece: Piece) -> None:
        order = ReadOrder(self._borrower, self._loan, piece.part, piece.start, piece.target.numel())
        try:
            self._socket.send_multipart([msgspec.msgpack.encode(order), b""], zmq.NOBLOCK)
        except zmq.Again as error:
            raise TransferError(NOBODY_TO_ASK) from error

    def _take(self, piece: Piece) -> None:
        head, *rest = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        try:
            answer = self._decoder.decode(head.buffer)
        except msgspec.DecodeError as error:
            raise TransferError(f"it has answered what makes no sense: {error}") from error
        if answer.error:
            raise TransferError(f"it refuses: {answer.error}")
        size = piece.target.numel()
        if (answer.part, answer.start, len(rest)) != (piece.part, piece.start, 1) or len(rest[0].buffer) != size:
            raise TransferError("it has answered what was not asked")
        piece.target.numpy()[:] = np.frombuffer(rest[0].buffer, np.uint8)


def _chunks(pieces: Iterable[Piece]) -> Iterable[Piece]:
    for piece in pieces:
        for start in range(0, piece.target.numel(), CHUNK_BYTES):
            yield Piece(piece.part, piece.start + start, piece.target[start : start + CHUNK_BYTES])
