"""How fast memory of a peer comes here by messages: a few MiB, read for nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kunserve_sgl.exchange.memory_reads import CHUNK_BYTES, PROBE_LOAN, LoanReader, LoanSpan, Silences
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.wire.curve import Curve, Name

ROUND_BYTES = 2 << 20
ROUNDS = 3
DEADLINE_S = 10.0
_FIRST_BYTES = 64 << 10  # connects, and is not counted


def measure(
    address: str,
    peer: Name,
    me: int,
    curve: Curve | None,
    is_called_off: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Returns the bytes per second of the fastest of `ROUNDS` reads of `ROUND_BYTES` from rank `peer`, which serves at
    `address`, to replica `me`: what else the processors do can only make a read slower. After `DEADLINE_S`, or when it
    `is_called_off`, what has come until then counts. Raises TransferError where nothing has come, or the peer refuses.
    """
    here = torch.empty(min(ROUND_BYTES, CHUNK_BYTES), dtype=torch.uint8)
    reader = LoanReader(address, peer, me, PROBE_LOAN, Silences(DEADLINE_S), curve)
    ends_s, fastest = clock() + DEADLINE_S, 0.0

    def read(size_bytes: int) -> tuple[int, float]:
        began_s, come = clock(), 0
        pieces = [LoanSpan(0, 0, here[: min(here.numel(), left)]) for left in range(size_bytes, 0, -here.numel())]
        for done in reader.transfer(pieces, here.numel()):
            come = done
            if is_called_off() or clock() >= ends_s:
                break
        return come, max(clock() - began_s, 1e-9)

    try:
        done, _ = read(_FIRST_BYTES)
        wanted = _FIRST_BYTES
        for _ in range(ROUNDS):
            if done < wanted:  # what is still to come would be taken for an answer to the next read
                break
            wanted = ROUND_BYTES
            done, seconds = read(wanted)
            fastest = max(fastest, done / seconds)
    finally:
        reader.close()
    if not fastest:
        raise TransferError(f"nothing has come within {DEADLINE_S:g} s")
    return fastest
