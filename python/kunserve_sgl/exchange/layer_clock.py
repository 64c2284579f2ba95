"""How long layers take on their device, without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Note = Callable[[float], None]


class LayerClock:
    """Measures how long blocks of layers take. On a CPU the time is known at once. A GPU works behind the calls: events
    mark begin and end in its stream, and what has ended is noted when the clock is used the next time."""

    def __init__(self, device: torch.device | str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._running: deque[tuple[Any, Any, Note]] = deque()

    @contextmanager
    def measure(self, note: Note) -> Iterator[None]:
        """Calls `note` with the seconds that the block takes, now or later; not at all if it fails."""
        if not self._on_gpu:
            started_s = time.perf_counter()
            yield
            note(time.perf_counter() - started_s)
            return
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
