"""What ranks ask the store over which they make process groups, and its answers; and the names in it.

A name belongs to one pair of incarnations of two replicas, and to ranks of one number: only these two may use it.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

MOST_KEY_BYTES = 256
MOST_VALUE_BYTES = 4096  # gloo tells an address, NCCL an id of 128 bytes
MOST_KEYS = 8  # of one order
MOST_SUM = 1 << 53
MOST_MESSAGE_BYTES = 2 * (MOST_VALUE_BYTES + MOST_KEYS * MOST_KEY_BYTES)

Action = Literal["set", "get", "add", "check", "delete"]

_KEY = re.compile(r"rank-(\d{1,4})/(\d{1,6})\.(\d{1,6})-(\d{1,6})\.(\d{1,6})/.+", re.ASCII | re.DOTALL)


class StoreOrder(msgspec.Struct, frozen=True, array_like=True):
    """Asks for one thing. `keys` is one, but for `check`; `value` is for `set`, `amount` for `add`. The answer has the
    same `number`."""

    number: int
    action: Action
    keys: list[str]
    value: bytes = b""
    amount: int = 0


class StoreAnswer(msgspec.Struct, frozen=True, array_like=True):
    """Answers an order. `value` is what `get` has found, None where there is nothing; `count` is the sum of an `add`,
    how many of the keys are there of a `check`, or were of a `delete`. `error` is empty, or says why nothing was done.
    """

    number: int
    value: bytes | None = None
    count: int = 0
    error: str = ""


class KeyOwners(msgspec.Struct, frozen=True):
    """Says whose a key is: ranks `rank` of two replicas, each in one incarnation."""

    rank: int
    replicas: tuple[int, int]
    incarnations: tuple[int, int]


def rank_prefix(rank: int) -> str:
    """Returns what all keys of ranks of this number begin with."""
    return f"rank-{rank}"


def pair_prefix(low: int, low_incarnation: int, high: int, high_incarnation: int) -> str:
    """Returns what the keys of a pair of replicas go on with; `low` is the one with the lower number."""
    return f"{low}.{low_incarnation}-{high}.{high_incarnation}"


def owners_of(key: str) -> KeyOwners | None:
    """Returns whose `key` is, None for one of nobody's."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    rank, low, low_incarnation, high, high_incarnation = map(int, found.groups())
    return KeyOwners(rank, (low, high), (low_incarnation, high_incarnation)) if low < high else None
