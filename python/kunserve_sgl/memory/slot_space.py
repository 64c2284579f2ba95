"""The global slot space: which slots of the KV buffers belong to which replica, and how slots and frames
align.

Replica r of N owns the slots [sink + r*V, sink + (r+1)*V) of every layer buffer. The sink before them holds
slot 0, where SGLang sends what padded tokens write; every replica has a sink of its own. Slot ids therefore
never collide and are never renumbered when replicas host layers for each other. Address space is free: only
slots with frames behind them exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kunserve_sgl.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class KvBuffer:
    """Names one buffer of one decoder layer, with a row of `row_bytes` per slot. K and V are two buffers, MLA has
    one."""

    layer: int
    name: str
    row_bytes: int

    @property
    def label(self) -> str:
        """Names the buffer's virtual range, in the ledger and in messages."""
        return f"kv/{self.layer}/{self.name}"


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Names `count` consecutive slots, from `first` on."""

    first: int
    count: int

    @property
    def stop(self) -> int:
        """Gives the slot after the last."""
        return self.first + self.count

    def __contains__(self, slot: object) -> bool:
        return isinstance(slot, int) and self.first <= slot < self.stop


@dataclass(frozen=True, slots=True)
class SlotSpace:
    """Says how the slots of all replicas lie in each buffer, which is the same in every replica of a deployment.

    A granule is the smallest number of slots that begins and ends on a frame boundary in every buffer and holds whole
    pages; KV memory grows and shrinks by granules.
    """

    granule_slots: int
    replica_granules: int
    replica_count: int

    @property
    def sink(self) -> SlotRange:
        """Gives the granule that takes what padded tokens write; no request gets a slot of it."""
        return SlotRange(0, self.granule_slots)

    @property
    def slot_count(self) -> int:
        """Counts the rows of a buffer that covers everybody's slots."""
        return self.granule_slots * (1 + self.replica_count * self.replica_granules)

    def slots_of(self, replica: int, first_granule: int, granule_count: int) -> SlotRange:
        """Returns the slots of some of a replica's granules, which are counted from 0. Raises ConfigurationError where
        the reserved address space does not have them."""
        if not 0 <= replica < self.replica_count:
            raise ConfigurationError(f"replica {replica} does not exist; accepted: 0 to {self.replica_count - 1}")
        if first_granule < 0 or granule_count < 0 or first_granule + granule_count > self.replica_granules:
            raise ConfigurationError(
                f"granules [{first_granule}, {first_granule + granule_count}) of replica {replica} lie outside its "
                f"{self.replica_granules}; reserve more address space with --kunserve-max-slots"
            )
        start = 1 + replica * self.replica_granules + first_granule
        return SlotRange(start * self.granule_slots, granule_count * self.granule_slots)


def granule_slots(buffers: Sequence[KvBuffer], frame_bytes: int, page_size: int) -> int:
    """Counts the slots per granule: the least common multiple of the page size and, per buffer, of the slots after
    which row and frame boundaries meet."""
    return math.lcm(page_size, *(frame_bytes // math.gcd(frame_bytes, buffer.row_bytes) for buffer in buffers))


def plan_slot_space(
    buffers: Sequence[KvBuffer], frame_bytes: int, page_size: int, replica_count: int, replica_slots: int
) -> SlotSpace:
    """Makes a space in which each of `replica_count` replicas may own up to `replica_slots` slots, rounded up to
    granules. Raises ConfigurationError."""
    if not buffers:
        raise ConfigurationError("a model without KV buffers has no slots")
    if replica_count < 1 or replica_slots < 1:
        raise ConfigurationError(f"{replica_count} replicas of {replica_slots} slots: both must be at least 1")
    granule = granule_slots(buffers, frame_bytes, page_size)
    return SlotSpace(granule, -(-replica_slots // granule), replica_count)
