"""What each layer host knows of this replica's request rows, so that a batch carries only what is new of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]


class RowLedger:
    """Books which prefix of each request row every layer host has: `known[host][row]` is its length. Invariant: that
    prefix at the layer host equals the one here. So whoever changes a row below what is known has to say so
    (`rewritten`), and whoever gives a row to another request too (`forget_rows`). Forgetting is always safe: it costs
    sending again."""

    def __init__(self, row_count: int) -> None:
        self._row_count = row_count
        self._entered: dict[int, npt.NDArray[np.int32]] = {}  # but for the last steps
        # By layer host, the last step by which it was sent nothing but new slots: rows, and lengths with these. Booked
        # when somebody asks for more than whether the next step follows, which has the same rows as a rule.
        self._last_steps: dict[int, tuple[Integers, Integers]] = {}

    @property
    def _known(self) -> dict[int, npt.NDArray[np.int32]]:
        for host, (rows, lengths) in self._last_steps.items():
            self._entered[host][rows] = lengths
        self._last_steps.clear()
        return self._entered

    @property
    def is_empty(self) -> bool:
        """Tells whether no layer host knows anything, as while this replica hosts all its layers itself."""
        return not self._entered

    def update_for(
        self, host: int, rows: Integers, lengths: Integers, table: npt.NDArray[np.int32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Returns what layer host `host` lacks of the first `lengths[i]` entries of the distinct rows `rows[i]`, both
        integers[n], as two int32 arrays: for each row where it begins, `starts[n]`, and `values`, which holds the
        entries row after row. Books it as known: if it cannot be sent, `forget` the layer host."""
        starts = self.advance(host, rows, lengths)
        index, positions = entries(rows, starts, lengths)
        return starts, table[index, positions]

    def advance(self, host: int, rows: Integers, lengths: Integers) -> npt.NDArray[np.int32]:
        """Returns for the distinct rows `rows[i]` where begins what layer host `host` lacks of their first `lengths[i]`
        entries, int32[n], and books it as known. For tables that numpy cannot read, whose entries the caller fetches;
        `update_for` does both."""
        known = self._known_of(host)
        before = known[rows]
        known[rows] = np.maximum(before, lengths)
        starts: npt.NDArray[np.int32] = np.minimum(before, lengths).astype(np.int32, copy=False)
        return starts

    def appends(self, host: int, rows: Integers, lengths: Integers, prefixes: Integers) -> bool:
        """Tells whether layer host `host` has the first `prefixes[i]` entries of the distinct rows `rows[i]`. It enters
        the slots of new tokens itself, so their first `lengths[i]` are booked as known then."""
        last = self._last_steps.get(host)
        follows = last is not None and last[0].tobytes() == rows.tobytes() and last[1].tobytes() == prefixes.tobytes()
        if not follows and not np.logical_and.reduce(self._known_of(host)[rows] >= prefixes):
            return False
        self._last_steps[host] = rows, lengths  # at most forgets something
        return True

    def _known_of(self, host: int) -> npt.NDArray[np.int32]:
        known = self._known
        if host not in known:
            known[host] = np.zeros(self._row_count, np.int32)
        return known[host]

    def longest_known(self, row: int) -> int:
        """Returns the length of the longest prefix of `row` that a layer host knows."""
        return max((int(known[row]) for known in self._known.values()), default=0)

    def rewritten(self, row: int, start: int) -> None:
        """Takes note that the row has other entries than before, from `start` on."""
        for known in self._known.values():
            known[row] = min(int(known[row]), start)

    def rewritten_from(self, rows: Integers, starts: Integers) -> None:
        """Takes note that several distinct rows have other entries than before: row `rows[i]` from `starts[i]` on."""
        for known in self._known.values():
            known[rows] = np.minimum(known[rows], starts)

    def forget(self, host: int) -> None:
        """Takes layer host `host` to know nothing: it restarted, gave the memory back, or missed an update."""
        self._known.pop(host, None)

    def forget_rows(self, rows: Iterable[int]) -> None:
        """Takes no layer host to know anything of these rows: they belong to other requests now."""
        index = list(rows)
        for known in self._known.values():
            known[index] = 0

    def clear(self) -> None:
        """Takes every layer host to know nothing."""
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
    """Returns row and position of every entry in [starts, lengths), row after row."""
    counts = lengths - starts
    if (counts == 1).all():
        return rows, starts  # a decode step
    first = np.cumsum(counts) - counts
    positions = np.arange(int(counts.sum())) + np.repeat(starts - first, counts)
    return np.repeat(rows, counts), positions
