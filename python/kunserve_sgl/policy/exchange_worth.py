"""Whether it pays to exchange KV, which saves time with every batch: by reading what is mapped, or by messages.

What is saved counts for as long as the group is expected to stay merged: for the least time that it does, or for as
long as it has been merged, whichever is longer. Nobody knows how long a load lasts; where no duration is likelier than
another, half of those which have lasted for a time last for as long again. It is also the rule for who may rent or buy:
to buy when the rent so far has reached the price never costs more than twice what the better of the two would have.
"""

from __future__ import annotations

from dataclasses import dataclass

from kunserve_sgl.policy.demand import AttentionTime, Rate

# Rates, speeds and the time that a group stays are estimates: KV begins to move where one of them may be wrong by a
# factor of two, and it is no loss. What has begun goes on while it is none by the estimates themselves.
MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Moves:
    """Says what is to move between two homes: so many `parts`, of `size_bytes` in all. Besides copying, each part keeps
    a replica from running batches for `pause_s`. The group is expected to stay merged for `stay_s`."""

    parts: int
    size_bytes: int
    pause_s: float
    stay_s: float

    def cost_s(self, byte_s: float) -> float:
        """Returns what it takes there and back, where copying a byte takes `byte_s`."""
        return 2 * (self.size_bytes * byte_s + self.parts * self.pause_s)


@dataclass(frozen=True, slots=True)
class Worth:
    """Says what moves save and what they take, and how that is known, with the numbers."""

    saved_s: float
    cost_s: float
    reason: str

    def pays(self, has_begun: bool) -> bool:
        """Says whether KV is to move; it needs less of a reason where some has."""
        return self.saved_s > (1.0 if has_begun else MARGIN) * self.cost_s


def worth_of_reading(own: float, borrowed: float, noise: float, read_bytes_per_s: float, moves: Moves) -> Worth:
    """Compares what moves save with what they take, where lent memory is mapped. `own` and `borrowed` are bytes per
    second that the layer host reads; single measurements differ by the share `noise`. Of the KV `read_bytes_per_s` are
    read. Only what is slower by more than the measurements differ is saved. Copying reads all and writes it."""
    speeds = f"reads {borrowed / 2**30:.2f} GiB/s of lent memory, {own / 2**30:.2f} of its own (noise {noise:.0%})"
    byte_s = 1 / borrowed + 1 / own
    slower_s = 1 / borrowed - 1 / own - noise * byte_s
    cost_s = moves.cost_s(byte_s)
    if slower_s <= 0:
        return Worth(0.0, cost_s, f"{speeds}: no slower than what measurements differ by")
    return _compared(speeds, read_bytes_per_s * slower_s * moves.stay_s, cost_s, moves)


def worth_of_asking(borrowed: float, asking: Asking, share: float, moves: Moves) -> Worth:
    """Compares what moves save with what they take, where the home attends to its KV. The layer host reads `borrowed`
    bytes per second by messages, into its memory. When the KV has moved, a `share` of its orders is not sent any more.
    """
    spent, attending = asking.spent_ms.per_second, asking.attending_ms.per_second
    found = (
        f"sends {asking.orders.per_second:.0f} orders a second, which take {spent:.0f} ms where it would attend for "
        f"{attending:.0f} ms, and reads {borrowed / 2**30:.2f} GiB/s by messages"
    )
    saved_s = max(0.0, spent - attending) / 1000 * share * moves.stay_s
    return _compared(found, saved_s, moves.cost_s(1 / borrowed), moves)


def _compared(found: str, saved_s: float, cost_s: float, moves: Moves) -> Worth:
    return Worth(saved_s, cost_s, f"{found}: saves {saved_s:.3f} s in {moves.stay_s:.3g} s, and takes {cost_s:.3f} s")


class Asking:
    """Follows what attention by messages takes a layer host, for one home. Time comes in as data."""

    def __init__(self, time_constant_s: float) -> None:
        self._time_constant_s = time_constant_s
        self._begin()

    def _begin(self) -> None:
        self._sent = 0
        self.orders, self.spent_ms, self.attending_ms = (Rate(self._time_constant_s) for _ in range(3))

    def update(self, now_s: float, times: AttentionTime) -> None:
        """Takes in a report of `now_s`. A layer host that counts fewer orders than before has been started again."""
        if times.orders < self._sent:
            self._begin()
        self._sent = times.orders
        self.orders.update(now_s, times.orders)
        self.spent_ms.update(now_s, times.spent_ms)
        self.attending_ms.update(now_s, times.attending_ms)

    def fade(self, now_s: float) -> None:
        """Takes in that nothing more has been reported until `now_s`."""
        for rate in (self.orders, self.spent_ms, self.attending_ms):
            rate.fade(now_s)

    def scale(self, share: float) -> None:
        """Takes in that from now on a layer host sends only so much of the orders that it has sent until now."""
        for rate in (self.orders, self.spent_ms, self.attending_ms):
            rate.per_second *= share
