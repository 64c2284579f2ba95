"""What a replica on another machine has counted, for /metrics of the head: the files of prometheus_client, sent as they
are. On the head's machine SGLang's processes share a directory; elsewhere nobody would read it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

from kunserve_sgl.integration.messages import MetricsTold

INTERVAL_S = 5.0
_USED = struct.Struct("i")  # how many bytes of a file are used, at its beginning


class MetricFiles:
    """Sends the files of this process in `directory` where they have changed, every `INTERVAL_S` at most. Costs what is
    used of the files, in bytes; some 100 KiB for SGLang's scheduler."""

    def __init__(
        self, directory: Path, who: str, send: Callable[[MetricsTold], None], clock: Callable[[], float]
    ) -> None:
        self._directory = directory
        self._who = who
        self._send = send
        self._clock = clock
        self._next_s = float("-inf")
        self._sent: dict[str, bytes] = {}

    def follow(self) -> None:
        """Sends what is new, if it is time to. To be called between batches, also while there are none."""
        if self._clock() < self._next_s:
            return
        self._next_s = self._clock() + INTERVAL_S
        end = f"_{os.getpid()}.db"
        now = {path.name.removesuffix(end): _used_part(path) for path in self._directory.glob(f"*{end}")}
        if files := {kind: content for kind, content in now.items() if content and self._sent.get(kind) != content}:
            self._send(MetricsTold(who=self._who, files=files))
            self._sent |= files


def _used_part(path: Path) -> bytes:
    """Reads what prometheus_client has written, nothing while a file is being made; it goes on with zeros."""
    content = path.read_bytes()
    if len(content) < _USED.size:
        return b""
    (used,) = _USED.unpack_from(content)
    return content[:used]
