"""What each layer host knows of this replica's request rows, so that a batch carries only what is new of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class RowLedger:
    """`known[host][row]` is the length of the row's prefix that `host` already has.

    Invariant: that prefix at the layer host equals the one here. So whoever changes a row below what is known has to
    say so (`rewritten`), and whoever gives a row to another request too (`forget_rows`). Forgetting is always safe: it
    costs sending again.
    """

    def __init__(self, row_count: int) -> None:
        self._row_count = row_count
        self._known: dict[int, npt.NDArray[np.int32]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no layer host knows anything, as while this replica hosts all its layers itself."""
        return not self._known

    def update_for(
        self, host: int, rows: Integers, lengths: Integers, table: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """What `host` lacks of the first `lengths[i]` entries of the distinct rows `rows[i]`: it begins at `starts[i]`,
        and `values` holds it row after row. Books it as known: if it cannot be sent, `forget` the layer host."""
        starts = self.advance(host, rows, lengths)
        index, positions = entries(rows, starts, lengths)
        return starts, table[index, positions]

    def advance(self, host: int, rows: Integers, lengths: Integers) -> npt.NDArray[np.int32]:
        """The first half of `update_for`, for a table that numpy cannot read: the starts, booked as known."""
        known = self._known.get(host)
        if known is None:
            known = self._known[host] = np.zeros(self._row_count, np.int32)
        before = known[rows]
        known[rows] = np.maximum(before, lengths)
        starts: npt.NDArray[np.int32] = np.minimum(before, lengths).astype(np.int32)
        return starts

    def longest_known(self, row: int) -> int:
        """The length of the prefix of `row` that at least one layer host knows."""
        return max((int(known[row]) for known in self._known.values()), default=0)

    def rewritten(self, row: int, start: int) -> None:
        """From `start` on the row has other entries than before."""
        for known in self._known.values():
            known[row] = min(int(known[row]), start)

    def rewritten_from(self, rows: Integers, starts: Integers) -> None:
        """As `rewritten`, for several distinct rows."""
        for known in self._known.values():
            known[rows] = np.minimum(known[rows], starts)

    def forget(self, host: int) -> None:
        """The layer host's copy is gone or in doubt: it restarted, gave the memory back, or missed an update."""
        self._known.pop(host, None)

    def forget_rows(self, rows: Iterable[int]) -> None:
        """The rows belong to other requests now."""
        index = list(rows)
        for known in self._known.values():
            known[index] = 0

    def clear(self) -> None:
        """Takes every host to know nothing."""
        self._known.clear()


def apply_update(
    table: npt.NDArray[np.int32],
    rows: npt.NDArray[np.integer],
    starts: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer],
    values: npt.NDArray[np.int32],
) -> None:
    """Writes at the layer host what `RowLedger.update_for` gave the owner."""
    index, positions = entries(rows, starts, lengths)
    table[index, positions] = values


def entries(
    rows: npt.NDArray[np.integer], starts: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Row and position of every entry in [starts, lengths), row after row."""
    counts = lengths - starts
    if (counts == 1).all():
        return rows, starts  # a decode step
    first = np.cumsum(counts) - counts
    positions = np.arange(int(counts.sum())) + np.repeat(starts - first, counts)
    return np.repeat(rows, counts), positions
