"""Which requests a replica had begun with when it ended, so that a request is only blamed where it can be to blame.

Rank 0 writes into a file of the server's directory that it has mapped: what it has written is there however it ends,
also where a request ends it in the moment in which it begins. A few bytes per request, and no call into the system.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from array import array
from collections import deque
from collections.abc import Iterable

# Far more than run at a time. Who began earlier than the last so many is not known any more.
MOST_KEPT = 1 << 16
_NUMBER_BYTES = 8
_UNKNOWN = (1 << 8 * _NUMBER_BYTES) - 1  # instead of numbers, where these are lost
_SIZE_BYTES = _NUMBER_BYTES * (1 + MOST_KEPT)


class BegunRequests:
    """Is written by the replica. `begun_of` reads it."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _SIZE_BYTES)
            self._map = mmap.mmap(fd, _SIZE_BYTES)
        finally:
            os.close(fd)
        self._order: deque[int] = deque()
        self._known: set[int] = set()
        self._count = 0

    def begin_taking_in(self, name: str) -> None:
        """Notes that the request is being taken in; it may be what fails in that."""
        self._write(0, _number(name))

    def end_taking_in(self) -> None:
        """Notes that the request which was being taken in has been, and waits."""
        self._write(0, 0)

    def add(self, names: Iterable[str]) -> None:
        """Notes that a batch with these requests begins."""
        for number in map(_number, names):
            if number in self._known:
                continue
            if len(self._order) == MOST_KEPT:
                self._known.discard(self._order.popleft())
            self._order.append(number)
            self._known.add(number)
            self._write(1 + self._count % MOST_KEPT, number)
            self._count += 1

    def close(self) -> None:
        """Gives the mapping up; the file stays."""
        self._map.close()

    def _write(self, place: int, number: int) -> None:
        self._map[place * _NUMBER_BYTES : (place + 1) * _NUMBER_BYTES] = number.to_bytes(_NUMBER_BYTES, "little")


def begun_of(path: str, names: Iterable[str]) -> list[str]:
    """Returns those of `names` with which the replica that had written the file had begun. Where there is none it had
    not been ready for any. Where nobody could read it any more, it may have begun with each of them."""
    begun = array("Q")
    begun.frombytes(begun_numbers(path) or b"")
    known = set(begun) - {0}
    return [name for name in names if _UNKNOWN in known or _number(name) in known]


def begun_numbers(path: str) -> bytes | None:
    """Returns what a replica has written, for `leave_begun` on another machine; None where there is no file."""
    try:
        with open(path, "rb") as file:
            written = file.read(_SIZE_BYTES).rstrip(b"\0")
    except FileNotFoundError:
        return None
    return written + bytes(-len(written) % _NUMBER_BYTES)


def leave_begun(path: str, numbers: bytes | None) -> None:
    """Writes on this machine what a replica had written on its own; None where that cannot be known any more."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(_UNKNOWN.to_bytes(_NUMBER_BYTES, "little") if numbers is None else numbers)


def _number(name: str) -> int:
    """Returns a number that no other request has, by all chance, and that is neither 0 nor _UNKNOWN."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=_NUMBER_BYTES).digest(), "little") % _UNKNOWN or 1
