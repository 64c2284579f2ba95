"""Into how many pieces a batch is cut, and where, so that its layer hosts work at the same time; and after how many
layers a layer host looks for other work, so that no piece holds up others.

The cost of a piece over all layers, in seconds: a * sum(p c + (c^2 + c) / 2) + b * sum(c) + g, summed over chunks of c
new tokens behind p cached ones; a decode step has c = 1. It is the chunk cost model of the KunServe paper; a, b and g
are fitted to what the layers have taken.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MOST_PIECES = 32
# A slice takes at most about so many times the fixed cost over all layers. A decode step takes little more than the
# fixed cost, so it waits for about so many steps of its own at each layer host.
_HOLD = 2.0
# What is not longer than so many slices goes on without a look.
_SHORT = 1.5
# Pieces cost their layer hosts time: the fewest are taken with which the batch is at most so much later than at best.
_NEAR = 1.05
# What a cut must save to be worth it: the model is an estimate.
_LEAST_GAIN = 0.05
_KEPT_PER_SIZE = 8
_REFIT_AFTER = 64
# Of the number of tokens, largest to smallest seen: with less the slope is a guess.
_LEAST_SPREAD_BITS = 2

Chunk = tuple[int, int]
"""Cached tokens, and new tokens behind them."""


class Amount(NamedTuple):
    """Says how much there is to compute for a piece: `tokens` new tokens, and the query-key pairs of attention, the sum
    of p c + (c^2 + c) / 2. Whoever runs a batch at every step counts these without a look at each chunk."""

    pairs: float
    tokens: int


def amount_of(chunks: Sequence[Chunk]) -> Amount:
    """Counts what there is to compute for the new tokens of `chunks`."""
    pairs = sum(prefix * new + (new * new + new) / 2 for prefix, new in chunks)
    return Amount(pairs, sum(new for _, new in chunks))


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """Gives the seconds over all layers: per query-key pair, per token, and per piece."""

    pair_s: float
    token_s: float
    fixed_s: float

    def seconds(self, amount: Amount) -> float:
        """Estimates the seconds that one piece takes over all layers."""
        return self.variable_s(amount) + self.fixed_s

    def variable_s(self, amount: Amount) -> float:
        """Estimates the seconds that grow with the tokens, over all layers."""
        return self.pair_s * amount.pairs + self.token_s * amount.tokens


class CostFit:
    """Fits a `ChunkCost` to the newest observations of each size (powers of two), so that a long time of decode steps
    does not make it forget what a prefill takes."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[float, float, float]]] = {}
        self._left = 0
        self._cost: ChunkCost | None = None

    def add(self, amount: Amount, seconds: float) -> None:
        """Takes in an observation: `seconds` is what all layers took for so much together."""
        if seconds <= 0:
            return
        size = amount.tokens.bit_length()
        if size not in self._seen:
            self._seen[size] = deque(maxlen=_KEPT_PER_SIZE)
            self._left = 0
        self._seen[size].append((amount.pairs, float(amount.tokens), seconds))
        self._left -= 1

    @property
    def cost(self) -> ChunkCost | None:
        """Gives the fitted cost, None until sizes different enough have been seen."""
        if self._left <= 0 and self._seen and max(self._seen) - min(self._seen) >= _LEAST_SPREAD_BITS:
            self._left = _REFIT_AFTER
            self._cost = ChunkCost(*_least_squares([each for seen in self._seen.values() for each in seen]))
        return self._cost


def piece_sizes(
    amount: Amount,
    chunks: Callable[[], Sequence[Chunk]],
    cost: ChunkCost | None,
    shares: Sequence[float],
    others_s: Sequence[float],
) -> tuple[int, ...]:
    """Returns the tokens of each piece, in order; the cuts make them take equally long. `amount` is that of `chunks`,
    which are looked at only where the batch is cut.

    `shares` is the part of the layers that each layer host of the batch runs; `others_s` what the last batch of each
    other replica that has any under way takes. With m pieces the batch takes m - 1 times the longest segment and once
    through all. That is minimized, unless the others' batches are long enough to keep the layer hosts busy meanwhile.
    """
    tokens = amount.tokens
    if cost is None or tokens < 2 or len(shares) < 2:
        return (tokens,)
    variable_s = cost.variable_s(amount)
    # However many pieces, the longest segment is visited by all tokens, and by two pieces at least.
    longest = max(shares)
    if cost.fixed_s * (1 + longest) + variable_s * longest > (1 - _LEAST_GAIN) * (cost.fixed_s + variable_s):
        return (tokens,)
    most = min(tokens, MOST_PIECES)

    def through_s(pieces: int) -> float:
        return (cost.fixed_s + variable_s / pieces) * (1 + (pieces - 1) * longest)

    whole_s = through_s(1)
    # The other layer hosts count as busy where the others' batches fill all of their time but half of one's.
    if whole_s <= 0 or sum(min(1.0, other_s / whole_s) for other_s in others_s) > len(shares) - 1.5:
        return (tokens,)
    fastest_s = min(map(through_s, range(1, most + 1)))
    if fastest_s > (1 - _LEAST_GAIN) * whole_s:
        return (tokens,)
    return _cut(chunks(), cost, next(n for n in range(1, most + 1) if through_s(n) <= _NEAR * fastest_s))


def slice_end(start: int, end: int, layers: int, amount: Amount, cost: ChunkCost | None) -> int:
    """Returns up to which layer a layer host executes layers [start, end) of a model of `layers` before it looks for
    other work: `end` where that is not far."""
    if cost is None or cost.fixed_s <= 0:
        return end
    slices = cost.seconds(amount) / layers * (end - start) / (_HOLD * cost.fixed_s)
    if slices <= _SHORT:
        return end
    return start + max(1, (end - start) // math.ceil(slices))


def _cut(chunks: Sequence[Chunk], cost: ChunkCost, pieces: int) -> tuple[int, ...]:
    """Returns the sizes of at most `pieces` pieces that differ little in time; none is empty."""
    whole_s = cost.variable_s(amount_of(chunks))
    wanted_s = [whole_s * number / pieces for number in range(1, pieces)]
    ends: list[int] = []
    before_s, before = 0.0, 0
    for prefix, new in chunks:
        here_s = cost.variable_s(amount_of([(prefix, new)]))
        while len(ends) < len(wanted_s) and wanted_s[len(ends)] <= before_s + here_s:
            ends.append(before + _tokens_within(wanted_s[len(ends)] - before_s, prefix, new, cost))
        before_s, before = before_s + here_s, before + new
    borders = sorted({0, *ends, before})
    return tuple(end - start for start, end in itertools.pairwise(borders))


def _tokens_within(seconds: float, prefix: int, new: int, cost: ChunkCost) -> int:
    """Returns how many of a chunk's tokens take so long, rounded: x of a/2 x^2 + (a p + a/2 + b) x = seconds."""
    square, linear = cost.pair_s / 2, cost.pair_s * (prefix + 0.5) + cost.token_s
    if square * new <= 1e-9 * linear:
        exact = seconds / linear if linear > 0 else 0.0
    else:
        exact = ((linear * linear + 4 * square * seconds) ** 0.5 - linear) / (2 * square)
    return max(0, min(new, round(exact)))


def _least_squares(seen: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Fits the coefficients, none below zero, of (pairs, tokens, 1), by least squares of the relative error. With three
    of them, the best of all choices which ones are zero is the solution."""
    rows = [(pairs / seconds, tokens / seconds, 1 / seconds) for pairs, tokens, seconds in seen]
    scale = [max(sum(row[i] ** 2 for row in rows) ** 0.5, 1e-300) for i in range(3)]
    gram = [[sum(row[i] * row[j] for row in rows) / scale[i] / scale[j] for j in range(3)] for i in range(3)]
    goal = [sum(row[i] for row in rows) / scale[i] for i in range(3)]
    best, least = [0.0] * 3, 0.0  # the error, less what it is without any coefficient
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        solved = _solve([[gram[i][j] for j in chosen] + [goal[i]] for i in chosen])
        if solved is None or min(solved) < 0:
            continue
        # At a solution of the normal equations the error is shorter by this.
        error = -sum(x * goal[i] for i, x in zip(chosen, solved, strict=True))
        if error < least:
            best, least = [0.0] * 3, error
            for i, x in zip(chosen, solved, strict=True):
                best[i] = x / scale[i]
    return best[0], best[1], best[2]


def _solve(table: list[list[float]]) -> list[float] | None:
    """Solves linear equations, each its coefficients and its right side, by Gauss-Jordan; None if singular."""
    for step in range(len(table)):
        pivot = max(range(step, len(table)), key=lambda i: abs(table[i][step]))
        if abs(table[pivot][step]) < 1e-9:
            return None
        table[step], table[pivot] = table[pivot], table[step]
        table[step] = [value / table[step][step] for value in table[step]]
        for other in range(len(table)):
            if other != step:
                factor = table[other][step]
                table[other] = [value - factor * base for value, base in zip(table[other], table[step], strict=True)]
    return [row[-1] for row in table]
