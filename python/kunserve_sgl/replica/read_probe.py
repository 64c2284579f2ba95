"""How fast a rank reads the memory that another replica lends it, mapped or by messages, against its own: measured, a
few MiB at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

from kunserve_sgl.control.messages import ReadSpeeds

# On a GPU more than its caches hold, and far more than what a call takes.
_PROBE_BYTES = {"cuda": 64 << 20}
_OTHER_PROBE_BYTES = 2 << 20
_ROUNDS = 5


def probe_bytes(device: torch.device) -> int:
    """Returns how much to read."""
    return _PROBE_BYTES.get(device.type, _OTHER_PROBE_BYTES)


class Reading(Protocol):
    """Reads memory of another replica, in whatever way."""

    def __call__(self, into: torch.Tensor) -> object:
        """Fills `into`, uint8[n]; on a GPU it may only be given to the device. Raises TransferError."""
        ...


def measure(
    owner: int,
    own: torch.Tensor,
    borrowed: Reading,
    wait: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> ReadSpeeds:
    """Copies `own`, uint8[n], and as much of what is `borrowed`, in turn, and returns the speeds. `wait` waits until
    what the device was given is done. It takes `_ROUNDS` times as long as reading both, and memory for n bytes. Raises
    what `borrowed` raises."""
    scratch = torch.empty_like(own)

    def seconds(read: Reading) -> float:
        wait()
        started_s = clock()
        read(scratch)
        wait()
        return max(clock() - started_s, 1e-9)

    # The first of each brings pages in, and is not counted.
    rounds = [(seconds(lambda into: into.copy_(own)), seconds(borrowed)) for _ in range(1 + _ROUNDS)][1:]
    own_s, borrowed_s = ([each[which] for each in rounds] for which in (0, 1))
    # Half of all differ by less from the median.
    spread = max(_deviation(own_s), _deviation(borrowed_s))
    own_speed, borrowed_speed = (own.numel() / statistics.median(each) for each in (own_s, borrowed_s))
    return ReadSpeeds(owner, own_speed, borrowed_speed, spread)


def _deviation(values: list[float]) -> float:
    middle = statistics.median(values)
    return statistics.median([abs(value - middle) for value in values]) / middle
