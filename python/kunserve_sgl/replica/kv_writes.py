"""Notes which slots batches write while the KV of a layer is copied to another home."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.batch_shape import Int64s


class KvWrites:
    """Is told of everything that writes KV at this rank, before it is given to the device. Nothing else writes to slots
    whose layer runs here. Where nothing is watched, that costs nothing."""

    def __init__(self) -> None:
        self._found: dict[tuple[SlotRange, int], list[Int64s]] = {}

    def watch(self, slots: SlotRange, layer: int) -> None:
        """Notes from now on what is written to `slots` in a layer."""
        self._found[slots, layer] = []

    def forget(self, slots: SlotRange, layer: int) -> None:
        """Ends what `watch` has begun."""
        self._found.pop((slots, layer), None)

    def forget_all(self) -> None:
        """Watches nothing any more."""
        self._found.clear()

    def note(self, slots: Int64s, layers: Container[int]) -> None:
        """Says that `slots`, int64[n] of any replica, are about to be written in `layers`."""
        for (watched, layer), found in self._found.items():
            if layer in layers:
                found.append(slots[(slots >= watched.first) & (slots < watched.stop)])

    def take(self, slots: SlotRange, layer: int) -> Int64s:
        """Returns which of `slots` have been written in a layer since `watch` or the last call, int64[n], ascending and
        each once. The device must have finished what it was given."""
        found = self._found[slots, layer]
        self._found[slots, layer] = []
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
