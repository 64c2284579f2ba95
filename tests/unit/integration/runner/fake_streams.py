"""Streams of a device that only keep in which order what they are given comes: what must have ended before what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FakeDevice:
    """Has streams that run beside each other, except where one is told to wait for another."""

    def __init__(self) -> None:
        self.before: dict[str, frozenset[str]] = {}  # by work: what has ended when it begins
        self.ended: frozenset[str] = frozenset()  # what the CPU has waited for
        self.default = FakeStream(self)
        self._current = self.default

    def current_stream(self, *_: object) -> FakeStream:
        return self._current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        outside, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = outside

    def launch(self, work: str) -> None:
        """Gives the current stream something to do."""
        self.before[work] = self._current.given | self.ended
        self._current.given |= {work}


class FakeStream:
    """Does what it is given in order."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.given: frozenset[str] = frozenset()

    def wait_stream(self, other: FakeStream) -> None:
        self.given |= other.given

    def synchronize(self) -> None:
        self._device.ended |= self.given
