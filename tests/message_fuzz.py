"""Messages that nobody should send: valid ones of which fields have random and extreme values, wrong types, or bytes
that were flipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec

_NUMBERS = (0, 1, -1, 2, 7, 99, 500, 10**9, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**64 - 1, -(2**63))
_OTHERS: tuple[Any, ...] = (
    *(None, True, "", "x", "\0", "\u00e9" * 5000, b"", b"\xff" * 7, [], {}, [[]], [0] * 1000, ["a"]),
    *(math.nan, math.inf, -math.inf, 1e308, -1.0, 0.5, "applied", "refused", "prepare", "release", "undo"),
)


def fuzzed(random: Random, messages: Sequence[msgspec.Struct]) -> bytes:
    """One of `messages`, or what is left of it: as it is in one case of eight."""
    kind = random.randrange(8)
    message: Any = msgspec.msgpack.decode(msgspec.msgpack.encode(random.choice(messages)))
    if kind == 0:
        return msgspec.msgpack.encode(message)
    if kind == 1:
        return _broken(random, msgspec.msgpack.encode(message))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        message = _changed(random, message)
    return msgspec.msgpack.encode(message)


def _changed(random: Random, value: Any) -> Any:
    """`value` with a field or an element, at any depth, that is another one now."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not keys or random.random() < 0.02:
        return _strange(random, value)
    if random.random() < 0.03:
        if isinstance(value, list):
            return value * random.choice((0, 2, 100)) if random.random() < 0.5 else value[:-1]
        return {key: each for key, each in value.items() if key != random.choice(list(keys))}
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key = random.choice(list(keys))
    copy[key] = _changed(random, copy[key])
    return copy


def _strange(random: Random, value: Any) -> Any:
    kind = random.random()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and kind < 0.4:
        return random.choice(_NUMBERS)
    if is_number and kind < 0.6 and -(2**60) < value < 2**60:
        return value + random.choice((-1, 1, 2, 0.5)) if isinstance(value, float) else value + random.choice((-1, 1, 2))
    if is_number and kind < 0.8:
        return random.getrandbits(random.choice((4, 8, 16, 32, 48, 63)))
    if isinstance(value, bytes) and kind < 0.8:
        return value[:-1] if kind < 0.1 else random.randbytes(len(value)) if kind < 0.6 else value * 2
    return random.choice((*_NUMBERS, *_OTHERS))


def _broken(random: Random, payload: bytes) -> bytes:
    data = bytearray(payload)
    for _ in range(random.randrange(1, 4)):
        if data:
            data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data[: random.randrange(len(data) + 1)] if random.random() < 0.3 else data)
