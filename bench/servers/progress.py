"""Shows how long something has been waited for."""

from __future__ import annotations

import sys
from types import TracebackType

_LINE_EVERY_S = 10.0


class WaitProgress:
    """Called with the seconds waited, writes them to stderr: in place on a terminal, else a line now and then. The end
    of the block ends the line."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next_s = 0.0
        self._line_open = False

    def __enter__(self) -> WaitProgress:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self._line_open:
            print(file=sys.stderr, flush=True)
            self._line_open = False

    def __call__(self, waited_s: float) -> None:
        if sys.stderr.isatty():
            print(f"\r{self._what}: {waited_s:.0f} s ", end="", file=sys.stderr, flush=True)
            self._line_open = True
        elif waited_s >= self._next_s:
            print(f"{self._what}: {waited_s:.0f} s", file=sys.stderr, flush=True)
            self._next_s = waited_s + _LINE_EVERY_S
