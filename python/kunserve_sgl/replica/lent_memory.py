"""What of a rank's memory others may use by messages: the books of what is lent, for the thread that serves them.

The thread that runs batches enters what it lends and takes it out before the loan ends. From then on an order is
refused and touches nothing. One that is served under the loan just then goes on, and the loan ends after it. Neither
thread waits for the other: an order takes as long as it takes, and on a device that hangs it does not come to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.wire.rejections import require


class LentMemory:
    """Keeps those books, by the numbers of loans."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # for a look into the books, not while an order is served
        self._slots: dict[int, tuple[int, int, SlotRange]] = {}  # borrower, layer, and slots
        # Borrower, what it may read, and whether it may write to that.
        self._bytes: dict[int, tuple[int, Sequence[torch.Tensor], bool]] = {}
        self._served: list[int] = []  # loans, once for each order that is being served under them

    def lend_slots(self, loan: int, borrower: int, layer: int, slots: SlotRange) -> None:
        """Lets `borrower` have these slots attended to in a layer."""
        self._slots[loan] = borrower, layer, slots

    def lend_bytes(self, loan: int, borrower: int, parts: Sequence[torch.Tensor], *, is_writable: bool = False) -> None:
        """Lets `borrower` read `parts`, uint8 (size,) each, and write to them where that is said."""
        self._bytes[loan] = borrower, parts, is_writable

    def end(self, loan: int) -> bool:
        """Lets nothing be served under a loan from now on. Returns False where something still is: the loan may end
        when another call returns True."""
        with self._lock:
            self._slots.pop(loan, None)
            self._bytes.pop(loan, None)
            return loan not in self._served

    @contextmanager
    def held(self, borrower: int, layer: int, loans: Sequence[int]) -> Iterator[list[SlotRange]]:
        """See `exchange.attention_service.LentKv`."""
        with self._lock:
            found = []
            for loan in loans:
                to, lent_layer, slots = self._slots.get(loan, (-1, -1, SlotRange(0, 0)))
                require((to, lent_layer) == (borrower, layer), "loan {} is not of layer {} to it", loan, layer)
                found.append(slots)
            self._served.extend(loans)
        try:
            yield found
        finally:
            self._leave(loans)

    @contextmanager
    def held_bytes(self, borrower: int, loan: int, *, writes: bool = False) -> Iterator[Sequence[torch.Tensor]]:
        """See `exchange.memory_reads.LentBytes`."""
        with self._lock:
            to, parts, is_writable = self._bytes.get(loan, (-1, (), False))
            require(to == borrower, "loan {} is not of bytes to it", loan)
            require(is_writable or not writes, "loan {} is only to be read", loan)
            self._served.append(loan)
        try:
            yield parts
        finally:
            self._leave([loan])

    def _leave(self, loans: Sequence[int]) -> None:
        with self._lock:
            for loan in loans:
                self._served.remove(loan)
