"""How much of a replica's time a phase may take that has much to do: the copying of parameters while batches run."""

from __future__ import annotations


class Pace:
    """Lets something take a share of the time that passes, in bits. Time comes in as data."""

    def __init__(self, share: float, most_s: float, now_s: float) -> None:
        """`most_s` is the longest bit, but for what cannot be divided: it is paid for by a longer wait."""
        self._share = share
        self._most_s = most_s
        self._looked_at_s = now_s
        self._credit_s = 0.0

    def credit_s(self, now_s: float) -> float:
        """Returns how long it may take now; below zero where it is not its turn."""
        self._credit_s = min(self._most_s, self._credit_s + self._share * (now_s - self._looked_at_s))
        self._looked_at_s = now_s
        return self._credit_s

    def pay(self, seconds: float) -> None:
        """Takes note that it has taken so long."""
        self._credit_s -= seconds
