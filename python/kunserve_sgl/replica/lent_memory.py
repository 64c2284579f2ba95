"""What of a rank's memory others may use by messages: the books of what is lent, for the thread that serves them.

The thread that runs batches enters what it lends and takes it out before the loan ends. Both hold one lock meanwhile,
the serving thread for as long as it is at one order, so no loan ends while an order is served under it, and an order
that comes too late is refused and touches nothing. An order that does not come to its end, on a device that hangs,
keeps the loan, and the thread that runs batches for a while only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kunserve_sgl.errors import TransientError
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.wire.rejections import require


class LentMemory:
    """Keeps those books, by the numbers of loans."""

    def __init__(self, end_timeout_s: float) -> None:
        """`end_timeout_s` bounds how long the end of a loan waits for an order that is being served."""
        self._end_timeout_s = end_timeout_s
        self._lock = threading.Lock()
        self._slots: dict[int, tuple[int, int, SlotRange]] = {}  # borrower, layer, and slots
        # Borrower, what it may read, and whether it may write to that.
        self._bytes: dict[int, tuple[int, Sequence[torch.Tensor], bool]] = {}

    def lend_slots(self, loan: int, borrower: int, layer: int, slots: SlotRange) -> None:
        """Lets `borrower` have these slots attended to in a layer."""
        self._slots[loan] = borrower, layer, slots

    def lend_bytes(self, loan: int, borrower: int, parts: Sequence[torch.Tensor], *, is_writable: bool = False) -> None:
        """Lets `borrower` read `parts`, uint8 (size,) each, and write to them where that is said."""
        self._bytes[loan] = borrower, parts, is_writable

    def end(self, loan: int) -> None:
        """Waits until nothing is served under a loan, and lets nothing be served any more. Raises TransientError where
        an order that is being served does not come to its end in time; the loan stands then."""
        if not self._lock.acquire(timeout=self._end_timeout_s):
            raise TransientError(
                f"loan {loan} cannot end: an order of a peer is still served after {self._end_timeout_s:g} s"
            )
        try:
            self._slots.pop(loan, None)
            self._bytes.pop(loan, None)
        finally:
            self._lock.release()

    @contextmanager
    def held(self, borrower: int, layer: int, loans: Sequence[int]) -> Iterator[list[SlotRange]]:
        """See `exchange.attention_service.LentKv`."""
        with self._lock:
            found = []
            for loan in loans:
                to, lent_layer, slots = self._slots.get(loan, (-1, -1, SlotRange(0, 0)))
                require((to, lent_layer) == (borrower, layer), "loan {} is not of layer {} to it", loan, layer)
                found.append(slots)
            yield found

    @contextmanager
    def held_bytes(self, borrower: int, loan: int, *, writes: bool = False) -> Iterator[Sequence[torch.Tensor]]:
        """See `exchange.memory_reads.LentBytes`."""
        with self._lock:
            to, parts, is_writable = self._bytes.get(loan, (-1, (), False))
            require(to == borrower, "loan {} is not of bytes to it", loan)
            require(is_writable or not writes, "loan {} is only to be read", loan)
            yield parts
