"""Loans that are to end: each as soon as no order of a peer is served under it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.memory.frame_loans import FrameLoans, Loan
from kunserve_sgl.replica.lent_memory import LentMemory

logger = logging.getLogger(__name__)


class EndingLoans:
    """Ends loans. Nothing here waits: what cannot end at once is tried again at each batch boundary. Until then its
    frames are booked as lent, so nobody gets them."""

    def __init__(
        self, lent: LentMemory, frames: FrameLoans, longest_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """An order that is served for `longest_s` after its loan was to end is taken to hang."""
        self._lent = lent
        self._frames = frames
        self._longest_s = longest_s
        self._clock = clock
        self._since_s: dict[int, float] = {}  # by loan

    def __bool__(self) -> bool:
        """Says whether a loan has not ended that is to."""
        return bool(self._since_s)

    def end(self, loan: Loan) -> None:
        """Lets nothing be served under a loan from now on, and books it as given back: now, or in `advance`."""
        number = loan.loan_id
        if self._lent.end(number):
            self._frames.end_loan(number)
            return
        self._since_s[number] = self._clock()
        logger.warning("KunServe: loan %d ends after the order of %s that is served under it", number, loan.borrower)

    def advance(self) -> None:
        """Ends what can end now. Raises InvariantError where an order hangs."""
        for number, since_s in tuple(self._since_s.items()):
            if self._lent.end(number):
                self._frames.end_loan(number)
                del self._since_s[number]
            elif self._clock() - since_s >= self._longest_s:
                raise InvariantError(
                    f"loan {number} was to end {self._longest_s:g} s ago, and an order of a peer is still served under "
                    "it"
                )
