"""What a replica on another machine has counted, for /metrics of the head: the files of prometheus_client, sent as they
are by its rank 0. On the head's machine SGLang's processes share a directory; elsewhere nobody would read it."""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from kunserve_sgl.integration.messages import MetricsTold

INTERVAL_S = 5.0
_USED = struct.Struct("i")  # how many bytes of a file are used, at its beginning


class MetricFiles:
    """Sends the files in `directory`, which is that of a replica and has its name, where they have changed, every
    `INTERVAL_S` at most. Costs what is used of the files, in bytes; some 100 KiB for a scheduler of SGLang that counts,
    which is that of rank 0 unless --enable-metrics-for-all-schedulers says otherwise."""

    def __init__(self, directory: Path, send: Callable[[MetricsTold], None], clock: Callable[[], float]) -> None:
        self._directory = directory
        self._send = send
        self._clock = clock
        self._next_s = float("-inf")
        self._sent: dict[tuple[str, str], bytes] = {}  # by process and kind

    def follow(self) -> None:
        """Sends what is new, if it is time to. To be called between batches, also while there are none."""
        if self._clock() < self._next_s:
            return
        self._next_s = self._clock() + INTERVAL_S
        news: defaultdict[str, dict[str, bytes]] = defaultdict(dict)
        for path in sorted(self._directory.glob("*.db")):
            kind, _, process = path.stem.rpartition("_")
            content = _used_part(path)
            if content and self._sent.get((process, kind)) != content:
                news[process][kind] = self._sent[process, kind] = content
        for process, files in news.items():
            self._send(MetricsTold(who=f"{self._directory.name}.{process}", files=files))


def _used_part(path: Path) -> bytes:
    """Reads what prometheus_client has written, nothing while a file is being made; it goes on with zeros."""
    content = path.read_bytes()
    if len(content) < _USED.size:
        return b""
    (used,) = _USED.unpack_from(content)
    return content[:used]
