"""In whose memory the KV of each slot lies that is attended to here, layer by layer: as the loans of this rank say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kunserve_sgl.memory.slot_space import SlotRange

Pattern = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class RemoteKv:
    """Says that the KV of `slots` in a layer, which runs here, is at `home`, which has lent it under the number
    `loan`. Where it `is_mapped`, it is used as what is here."""

    slots: SlotRange
    layer: int
    home: int
    loan: int
    is_mapped: bool = False


class KvHomes:
    """Finds the homes of slots: `here`, but for those that others have lent. It is made anew when a loan begins or
    ends."""

    def __init__(self, here: int, remote: Iterable[RemoteKv]) -> None:
        self._here = here
        self._remote: dict[int, list[RemoteKv]] = defaultdict(list)
        for each in sorted(remote, key=lambda kv: kv.slots.first):
            self._remote[each.layer].append(each)
        self._patterns: dict[int, Pattern] = {
            layer: tuple((kv.slots.first, kv.slots.stop, kv.home) for kv in kvs) for layer, kvs in self._remote.items()
        }

    def pattern(self, layer: int) -> Pattern:
        """Returns what is elsewhere in a layer, as first slot, one past the last, and home; empty where all is here.
        Layers with the same pattern divide a batch in the same way."""
        return self._patterns.get(layer, ())

    def remote(self, layer: int) -> Sequence[RemoteKv]:
        """Returns what is elsewhere in a layer, by ascending slots."""
        return self._remote.get(layer, ())

    def of(self, slots: npt.NDArray[np.integer], layer: int) -> npt.NDArray[np.int64]:
        """Returns the home of each of `slots`, integers (n,), in a layer: replicas, int64 (n,)."""
        homes = np.full(len(slots), self._here, np.int64)
        for first, stop, home in self.pattern(layer):
            homes[(slots >= first) & (slots < stop)] = home
        return homes

    def loans(self, home: int, layer: int) -> tuple[int, ...]:
        """Returns the numbers of the loans by which `home` has lent KV of a layer, by ascending slots."""
        return tuple(kv.loan for kv in self.remote(layer) if kv.home == home)
