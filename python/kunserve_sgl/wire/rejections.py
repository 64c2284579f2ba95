"""Counts messages that make no sense and are ignored, and says so in the log, at most now and then."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sized
from typing import TypeVar

import msgspec

logger = logging.getLogger(__name__)

# Between two lines about messages of one kind: whoever floods a socket must not flood the log.
_SILENCE_S = 10.0
_MOST_TEXT = 200  # of a reason, which may repeat what the message said

UNREADABLE = "unreadable"

# (replica, rank) of who sent a message, or COORDINATOR; None where the socket does not say. Then only this user's
# processes can have sent it.
Sender = tuple[int, int] | None
COORDINATOR = (-1, -1)

_M = TypeVar("_M")


class BadMessageError(Exception):
    """Says that a message is not what its sender may say here. It is ignored, and nothing has changed."""


class Rejections:
    """Counts the messages that one process ignored. `counts` is by kind: the name of the message's type, or
    `UNREADABLE`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.tell: Callable[[str], None] = lambda kind: None  # told the kind of each
        self._silent_until_s: dict[str, float] = {}
        self._silent: Counter[str] = Counter()

    def read(
        self, decoder: msgspec.msgpack.Decoder[_M], payload: bytes | memoryview, check: Callable[[_M], None]
    ) -> _M | None:
        """Decodes a message and checks it. Returns None, and counts it, for one that cannot be decoded or for which
        `check` raises BadMessageError."""
        try:
            message = decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.add(UNREADABLE, f"{len(payload)} bytes: {error}")
            return None
        try:
            check(message)
        except BadMessageError as error:
            self.add(type(message).__name__, error)
            return None
        return message

    def add(self, kind: str, reason: object) -> None:
        """Counts a message of `kind` that is ignored for `reason`, and logs it unless this kind was logged a moment
        ago."""
        self.counts[kind] += 1
        self.tell(kind)
        now_s = time.monotonic()
        if now_s < self._silent_until_s.get(kind, now_s):
            self._silent[kind] += 1
            return
        self._silent_until_s[kind] = now_s + _SILENCE_S
        more = f", and {count} more before it" if (count := self._silent.pop(kind, 0)) else ""
        logger.error("KunServe: ignored a message (%s): %s%s", kind, str(reason)[:_MOST_TEXT], more)


def require(is_so: bool, what: str, *values: object) -> None:
    """Raises BadMessageError with `what`, a format for `values`, unless `is_so`."""
    if not is_so:
        raise BadMessageError(what.format(*values))


def require_range(what: str, value: float, least: float, most: float) -> None:
    """Raises BadMessageError unless `value` is in [least, most]; a NaN is not."""
    if not least <= value <= most:
        raise BadMessageError(f"{what} {value}; accepted: {least} to {most}")


def require_count(what: str, values: Sized, most: int) -> None:
    """Raises BadMessageError where there are more than `most` of them."""
    if len(values) > most:
        raise BadMessageError(f"{what}: {len(values)}; accepted: {most} at most")
