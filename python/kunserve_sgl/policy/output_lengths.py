"""How long answers have been so far, and from that: how many tokens a running request will still need."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

# Before enough answers have ended: what a request is expected to need unless it says less.
PRIOR_TOKENS = 256
_LEAST_SAMPLES = 8
# The past counts half once this many answers have ended, so that the estimate follows the load.
_WINDOW = 2048
_STEPS_PER_OCTAVE = 8
_BUCKETS = _STEPS_PER_OCTAVE * 32


class Stops(Protocol):
    """Says what ends an answer before its limit."""

    @property
    def ignore_eos(self) -> bool:
        """Tells whether the answer goes on where the model would end it."""
        ...

    @property
    def stop_strs(self) -> Sequence[str] | None:
        """Gives the texts that end the answer."""
        ...

    @property
    def stop_token_ids(self) -> Collection[int] | None:
        """Gives the tokens that end the answer."""
        ...


def ends_at_limit_only(stops: Stops) -> bool:
    """Tells whether an answer is as long as its limit says, whatever its tokens are."""
    return stops.ignore_eos and not stops.stop_strs and not stops.stop_token_ids


class OutputLengths:
    """Counts answers by length in a histogram of bounded size, with buckets that grow with the length: eight per
    doubling."""

    def __init__(self) -> None:
        self._count = [0.0] * _BUCKETS
        self._tokens = [0.0] * _BUCKETS
        self._samples = 0.0
        # answers in a bucket or in a later one, and their tokens; None when they must be summed up again
        self._tail: tuple[list[float], list[float]] | None = None

    def add(self, tokens: int) -> None:
        """Takes note that an answer has ended after `tokens`."""
        if self._samples >= _WINDOW:
            self._count = [count / 2 for count in self._count]
            self._tokens = [total / 2 for total in self._tokens]
            self._samples /= 2
        bucket = _bucket(tokens)
        self._count[bucket] += 1
        self._tokens[bucket] += tokens
        self._samples += 1
        self._tail = None

    @property
    def mean_tokens(self) -> int:
        """Gives the mean length of the answers so far; 0 while there are too few."""
        if self._samples < _LEAST_SAMPLES:
            return 0
        return max(1, round(self._tails()[1][0] / self._tails()[0][0]))

    def expected_rest(self, tokens: int, limit: int) -> int:
        """Estimates how many more tokens an answer with `tokens` so far, and `limit` at most, will get: E[L | L >
        tokens] - tokens."""
        most = max(0, limit - tokens)
        if self._samples < _LEAST_SAMPLES:
            return min(most, max(1, PRIOR_TOKENS - tokens))
        counts, totals = self._tails()
        later = _bucket(tokens) + 1
        if counts[later] <= 0:
            return min(most, max(1, tokens // 2))  # longer than any before: what is old will get older
        return min(most, max(1, round(totals[later] / counts[later]) - tokens))

    def _tails(self) -> tuple[list[float], list[float]]:
        if self._tail is None:
            counts, totals = [0.0] * (_BUCKETS + 1), [0.0] * (_BUCKETS + 1)
            for bucket in range(_BUCKETS - 1, -1, -1):
                counts[bucket] = counts[bucket + 1] + self._count[bucket]
                totals[bucket] = totals[bucket + 1] + self._tokens[bucket]
            self._tail = counts, totals
        return self._tail


def _bucket(tokens: int) -> int:
    """Finds the bucket of a length: exact up to 8 tokens, then eight buckets per doubling."""
    if tokens < _STEPS_PER_OCTAVE:
        return max(0, tokens)
    octave = tokens.bit_length() - _STEPS_PER_OCTAVE.bit_length()
    return min(_BUCKETS - 1, (octave + 1) * _STEPS_PER_OCTAVE + (tokens >> octave) - _STEPS_PER_OCTAVE)
