"""Random bodies for KunServe's POST routes: right ones, nearly right ones, and what is no JSON at all."""

from __future__ import annotations

import json
import random
from typing import Any

STATUSES = {200, 400, 401, 409, 413, 503}
ROUTES = ("plan", "drop", "restore", "kv", "lend")

_NUMBERS: tuple[Any, ...] = (
    *(0, 1, 2, 3, -1, 16, 2**31, 2**53, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**4200, 0.5, 1e308),
    *(float("nan"), float("inf"), float("-inf"), True, False),
)
_TEXTS = ("", "0", "1", "01", "-1", "groups", "\ud800", "\x00", "größe", "\U0001f600", "١", "9" * 5000, "a" * 20_000)
_KEYS = ("groups", "layers", "tokens", "force", "action", "replica", "frames", "from", "to", "0", "1", "7", "00")
_BYTES = (
    *(b"", b" ", b"null", b"[]", b"{", b"}", b'"', b"NaN", b"\xff\xfe", b"\x00", b'{"groups": [[0, 1]]}{}'),
    *(b"[" * 100_000, b'{"replica": 0, "replica": 1, "frames": 4}'),
    *(b'{"a":' * 100_000, b'{"\\ud800": 1}', b'"\xed\xa0\x80"', b"\xef\xbb\xbf{}", b"1" * 4301, b"-" + b"9" * 10_000),
    *(b'{"groups": %s1%s}' % (b"[" * 5000, b"]" * 5000), b"{}" + b" " * 1_000_000),
    *('{"groups": [[0, 1]]}'.encode("utf-16"), b'{"tokens": 1e99999}', b"groups=0&tokens=1"),
)  # fmt: skip


def random_body(chance: random.Random, route: str) -> bytes:
    kind = chance.random()
    if kind < 0.1:
        return chance.choice(_BYTES)
    body = _right(chance, route)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        body = _mutated(chance, body)
    raw = json.dumps(body).encode()
    return _damaged(chance, raw) if kind > 0.8 else raw


def _right(chance: random.Random, route: str) -> Any:
    """A body that may be right, for a server of two replicas with four layers."""
    if route == "kv":
        return {"replica": chance.randrange(2), "frames": chance.choice((-16, 16, 32))}
    if route == "lend" or (route == "plan" and chance.random() < 0.1):
        loan = {"from": chance.randrange(2), "to": chance.randrange(2), "tokens": chance.choice((1, 64, 2**40))}
        return loan if route == "lend" else {**loan, "action": "lend"}
    body: dict[str, Any] = {"groups": [[0, 1]] if chance.random() < 0.8 else [[1, 0]]}
    is_restore = route == "restore" or (route == "plan" and chance.random() < 0.3)
    if route == "plan" and (is_restore or chance.random() < 0.2):
        body["action"] = "restore" if is_restore else "drop"
    more = chance.random()
    if is_restore:
        if more < 0.4:
            body["layers"] = {str(chance.randrange(2)): chance.sample(range(4), chance.randrange(1, 4))}
        elif more < 0.6:
            body["tokens"] = chance.randrange(1, 5000)
        if chance.random() < 0.2:
            body["force"] = chance.random() < 0.5
    else:
        hosts = [chance.randrange(2) for _ in range(4)]
        if more < 0.2:
            body["layers"] = hosts
        elif more < 0.4:
            body["layers"] = {str(chance.randrange(2)): hosts}
        elif more < 0.6:
            body["tokens"] = chance.randrange(1, 5000)
    return body


def _anything(chance: random.Random, depth: int = 0) -> Any:
    kind = chance.randrange(6 if depth < 3 else 3)
    if kind == 0:
        return chance.choice(_NUMBERS)
    if kind == 1:
        return chance.choice(_TEXTS)
    if kind == 2:
        return None
    if kind == 3:
        return {chance.choice(_KEYS + _TEXTS): _anything(chance, depth + 1) for _ in range(chance.randrange(4))}
    return [_anything(chance, depth + 1) for _ in range(chance.randrange(5))]


def _mutated(chance: random.Random, value: Any) -> Any:
    """`value` with one place changed."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        changed = dict(value)
        key = chance.choice(list(changed))
        what = chance.random()
        if what < 0.15:
            del changed[key]
        elif what < 0.3:
            changed[chance.choice(_KEYS + _TEXTS)] = _anything(chance)
        else:
            changed[key] = _mutated(chance, changed[key])
        return changed
    if isinstance(value, list) and value and chance.random() < 0.7:
        items = list(value)
        place = chance.randrange(len(items))
        what = chance.random()
        if what < 0.15:
            del items[place]
        elif what < 0.3:
            items[place:place] = [_anything(chance)] * chance.choice((1, 1, 1, 5000))
        else:
            items[place] = _mutated(chance, items[place])
        return items
    return _anything(chance)


def _damaged(chance: random.Random, raw: bytes) -> bytes:
    damaged = bytearray(raw)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(damaged) + 1)
        if chance.random() < 0.5:
            damaged[place:place] = chance.randbytes(chance.randrange(1, 6))
        else:
            del damaged[place : place + chance.randrange(1, 6)]
    return bytes(damaged)
