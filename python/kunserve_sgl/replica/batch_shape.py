"""What attention needs of a batch: which rows, how long, and where the new KV goes. It can be sent, and cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kunserve_sgl.exchange.work import Work
from kunserve_sgl.policy.cutting import Amount, Chunk

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchShape:
    """Describes the requests of a batch in order; it is in the CPU's memory, and nothing of it changes.

    mode: the engine's number for prefill or decode.
    rows, lengths: int32[requests]; a request's row in the table of slots, and its tokens with the new ones.
    extends: int32[requests]; its new tokens, which are the last ones. None for decode, where each has one.
    slots: int64[tokens]; where the KV of the new tokens goes, request after request.
    """

    mode: int
    rows: Int32s
    lengths: Int32s
    extends: Int32s | None
    slots: Int64s

    @classmethod
    def of_work(cls, work: Work) -> BatchShape:
        """Makes the shape of a batch that another replica sent. Nothing is copied."""
        return cls(
            work.mode,
            np.frombuffer(work.rows, np.int32),
            np.frombuffer(work.lengths, np.int32),
            np.frombuffer(work.extends, np.int32) if work.extends else None,
            np.frombuffer(work.slots, np.int64),
        )

    @property
    def tokens(self) -> int:
        """Counts the new tokens of all requests together."""
        return len(self.slots)

    @cached_property
    def prefixes(self) -> Int32s:
        """Gives the cached tokens of each request, int32[requests]: the new ones lie behind them."""
        return self.lengths - (1 if self.extends is None else self.extends)

    @cached_property
    def amount(self) -> Amount:
        """Counts what there is to compute."""
        if self.extends is None:
            return Amount(float(sum(self.lengths.tolist())), len(self.slots))  # a quarter of what numpy takes for few
        new = self.extends.astype(np.int64)
        return Amount(float(self.prefixes @ new + (new @ new + new.sum()) / 2), len(self.slots))

    @property
    def chunks(self) -> list[Chunk]:
        """Gives the cached and the new tokens of each request."""
        if self.extends is None:
            return [(prefix, 1) for prefix in self.prefixes.tolist()]
        return list(zip(self.prefixes.tolist(), self.extends.tolist(), strict=True))

    def cut(self, sizes: Sequence[int]) -> Iterator[BatchShape]:
        """Yields the shapes of pieces of `sizes` tokens, in order. A request may go on in the next piece, whose tokens
        then attend to these."""
        extends = np.ones_like(self.lengths) if self.extends is None else self.extends
        ends = np.cumsum(extends, dtype=np.int32)
        starts = ends - extends
        borders = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        for first, last in borders:
            low, high = np.maximum(starts, first), np.minimum(ends, last)
            here = low < high
            yield BatchShape(
                self.mode,
                self.rows[here],
                (self.lengths - (ends - high))[here],
                None if self.extends is None else (high - low)[here],
                self.slots[first:last],
            )
