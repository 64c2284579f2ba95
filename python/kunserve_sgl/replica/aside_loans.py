"""What a rank lends beside its own transitions, while it serves: parameters for replicas that recover or start again.

A few at a time, between two batches. Only memory is lent, and only read: whether the borrower still lives, or has what
it was lent, is of no concern here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

from kunserve_sgl.control.messages import LayerLoan, Lend
from kunserve_sgl.exchange.offers import OfferAddress
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.replica.loans import Loans

BUDGET_S = 0.002  # per batch boundary; one loan may take longer, the next then waits for the next boundary


class AsideLoans:
    """Keeps what is lent by the coordinator's `Lend` orders, by their numbers."""

    def __init__(self, loans: Loans, address_of: Callable[[int, int], OfferAddress]) -> None:
        """`address_of(replica, incarnation)` is where and how this rank of a replica takes offers."""
        self._loans = loans
        self._address_of = address_of
        self._lent: dict[int, list[Loan]] = {}
        self._todo: deque[tuple[int, Callable[[], Loan | None]]] = deque()

    @property
    def is_busy(self) -> bool:
        """Says whether there is something left to lend, or a loan that is to end, of whatever kind."""
        return bool(self._todo or self._loans.ending)

    def on_lend(self, order: Lend) -> None:
        """Ends what was lent under the order's number, and notes what is to be lent in its place."""
        self._todo = deque(each for each in self._todo if each[0] != order.number)
        for loan in self._lent.pop(order.number, ()):
            self._loans.ending.end(loan)
        for wanted in order.loans:
            self._todo.extend((order.number, lend) for lend in self._lending(order.number, wanted))

    def advance(self, is_serving: bool) -> None:
        """Lends some of what is left, or all of it where nothing else waits, when what is to end has ended: the same
        may be lent again. Raises as `EndingLoans.advance`."""
        self._loans.ending.advance()
        until_s = time.perf_counter() + BUDGET_S
        while self._todo and not self._loans.ending:
            number, lend = self._todo.popleft()
            if (loan := lend()) is not None:
                self._lent.setdefault(number, []).append(loan)
            if is_serving and time.perf_counter() >= until_s:
                return

    def _lending(self, number: int, wanted: LayerLoan) -> list[Callable[[], Loan | None]]:
        address = partial(self._address_of, wanted.borrower, wanted.incarnation)
        return [partial(self._loans.lend_layer, number, wanted.borrower, address, layer) for layer in wanted.layers]
