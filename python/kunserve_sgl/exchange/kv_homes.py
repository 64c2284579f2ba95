"""In whose memory the KV of each slot lies, layer by layer, as a plan says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.memory.slot_space import SlotRange, SlotSpace
from kunserve_sgl.policy.plan import Plan


class KvHomes:
    """Finds the homes of slots by one plan. It is made once per plan."""

    def __init__(self, plan: Plan, space: SlotSpace) -> None:
        extents = [
            (space.slots_of(extent.replica, extent.first_granule, extent.granules), extent.homes)
            for extent in plan.extents
        ]
        extents.sort(key=lambda each: each[0].first)
        self._ranges = [slots for slots, _ in extents]
        self._firsts = np.array([slots.first for slots in self._ranges], np.int64)
        self._stops = np.array([slots.stop for slots in self._ranges], np.int64)
        self._homes = np.array([homes for _, homes in extents], np.int64).reshape(len(extents), plan.layer_count)

    def pattern(self, layer: int) -> tuple[int, ...]:
        """Returns the homes of all extents in a layer: layers with the same pattern divide a batch in the same way."""
        return tuple(self._homes[:, layer].tolist())

    def of(self, slots: npt.NDArray[np.integer], layer: int) -> npt.NDArray[np.int64]:
        """Returns the home of each of `slots`, integers (n,), in a layer: replicas, int64 (n,). Raises InvariantError
        for a slot that belongs to no extent, as slot 0, which has a home everywhere and is never attended to."""
        extents = np.searchsorted(self._firsts, slots, side="right") - 1
        if len(slots) and (len(self._stops) == 0 or (extents < 0).any() or (slots >= self._stops[extents]).any()):
            inside = np.zeros(len(slots), bool)
            for each in self._ranges:
                inside |= (slots >= each.first) & (slots < each.stop)
            raise InvariantError(f"slots {slots[~inside][:5].tolist()} have no home in this plan")
        homes: npt.NDArray[np.int64] = self._homes[extents, layer]
        return homes

    def at(self, home: int, layer: int) -> list[SlotRange]:
        """Lists the slots that have their KV of a layer at `home`."""
        return [slots for slots, homes in zip(self._ranges, self._homes[:, layer], strict=True) if homes == home]
