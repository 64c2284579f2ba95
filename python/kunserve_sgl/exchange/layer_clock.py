"""How long layers take on their device, without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch

Note = Callable[[float], None]


class _CpuBlock:
    """Measures a block on a CPU. A class, because it is entered several times in a step, which a generator makes
    noticeable."""

    __slots__ = ("_note", "_started_s")

    def __init__(self, note: Note) -> None:
        self._note = note

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(
        self, failed: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if failed is None:
            self._note(time.perf_counter() - self._started_s)


class LayerClock:
    """Measures how long blocks of layers take. On a CPU the time is known at once. A GPU works behind the calls: events
    mark begin and end in its stream, and what has ended is noted when the clock is used the next time."""

    def __init__(self, device: torch.device | str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._running: deque[tuple[Any, Any, Note]] = deque()

    def measure(self, note: Note) -> AbstractContextManager[None]:
        """Calls `note` with the seconds that the block takes, now or later; not at all if it fails."""
        return self._measure_on_gpu(note) if self._on_gpu else _CpuBlock(note)

    @contextmanager
    def _measure_on_gpu(self, note: Note) -> Iterator[None]:
        self._note_ended()
        event: Any = torch.cuda.Event  # torch does not say what its methods return
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._running.append((begin, end, note))

    def pace(self) -> None:
        """Waits until no block but the last measured one is unfinished: what is called next then waits for no more
        than that, and what came meanwhile can go first."""
        if len(self._running) > 1:
            self._running[-2][1].synchronize()

    def _note_ended(self) -> None:
        while self._running and self._running[0][1].query():
            begin, end, note = self._running.popleft()
            note(begin.elapsed_time(end) / 1000)
