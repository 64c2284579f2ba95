"""Replicas that are being started again and take their layers from those who live: who wants what, and who lends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from kunserve_sgl.control.messages import Device, Wanting
from kunserve_sgl.policy.plan import ParameterLoan


class Newcomers:
    """Keeps what the ranks of such replicas have said, and the loans that are made to them: by an order `number` each.

    Who lends takes part in no transition meanwhile: a layer that is lent cannot be dropped.
    """

    def __init__(self, ranks: int, lend: Callable[[int, int, Sequence[ParameterLoan]], None]) -> None:
        """`lend(lender, number, loans)` tells a replica to lend, or with no loans that it is over."""
        self._ranks = ranks
        self._lend = lend
        self._wanting: dict[int, dict[int, Wanting]] = {}
        self._done: dict[int, set[int]] = {}
        self._lent: dict[int, tuple[int, tuple[int, ...]]] = {}  # number and lenders, by newcomer

    def add(self, message: Wanting) -> None:
        """Takes in what a rank has said."""
        replica = message.replica
        if not message.is_done:
            self._wanting.setdefault(replica, {})[message.rank] = message
            return
        done = self._done.setdefault(replica, set())
        done.add(message.rank)
        if len(done) == self._ranks:
            self.forget(replica)

    @property
    def ready(self) -> list[int]:
        """Lists the replicas whose ranks all wait, and that nobody lends anything yet."""
        return [r for r, ranks in self._wanting.items() if len(ranks) == self._ranks and r not in self._lent]

    def incarnation(self, replica: int) -> int:
        """Returns that of a replica in `ready`."""
        return self._wanting[replica][0].incarnation

    def memory_addresses(self, replica: int) -> tuple[str, ...]:
        """Returns where its ranks use memory by messages, of a replica whose ranks all wait."""
        return tuple(self._wanting[replica][rank].memory_address for rank in range(self._ranks))

    def devices(self, replica: int) -> list[Device]:
        """Returns where the memory of its ranks is, of a replica in `ready`."""
        return [self._wanting[replica][rank].device for rank in range(self._ranks)]

    def lend_to(self, replica: int, number: int, loans: Sequence[ParameterLoan]) -> None:
        """Lets others lend to a replica in `ready`."""
        lenders = tuple(sorted({loan.owner for loan in loans}))
        self._lent[replica] = number, lenders
        for lender in lenders:
            self._lend(lender, number, [loan for loan in loans if loan.owner == lender])

    def forget(self, replica: int) -> None:
        """Ends what is lent to a replica, which has all it wanted, or has ended."""
        self._wanting.pop(replica, None)
        self._done.pop(replica, None)
        number, lenders = self._lent.pop(replica, (0, ()))
        for lender in lenders:
            self._lend(lender, number, ())

    def on_lost(self, lender: int) -> None:
        """Takes note that a replica has ended: what it was to lend is to be lent by others."""
        for newcomer in [each for each, (_, lenders) in self._lent.items() if lender in lenders]:
            number, lenders = self._lent.pop(newcomer)
            for other in lenders:
                self._lend(other, number, ())

    def newcomer_of(self, lender: int) -> int | None:
        """Returns a replica that `lender` lends to now; None where it lends to nobody."""
        return next((newcomer for newcomer, (_, lenders) in self._lent.items() if lender in lenders), None)

    def lenders(self) -> Collection[int]:
        """Lists those who lend now."""
        return {lender for _, lenders in self._lent.values() for lender in lenders}
