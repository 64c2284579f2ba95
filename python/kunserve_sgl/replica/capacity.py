"""The KV capacity of a running replica: grows and shrinks it."""

from __future__ import annotations

import logging
import time
from typing import Any

from kunserve_sgl.errors import TransientError
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.engine import Engine, SlotsInUseError, Vacated
from kunserve_sgl.replica.replica_memory import ReplicaMemory

logger = logging.getLogger(__name__)


class BadResizeError(ValueError):
    """Says that the number of frames makes no sense for this replica, whatever its state."""


class CapacityManager:
    """Changes the capacity of a replica at one of its ranks. All ranks of a replica take the same steps in the same
    order."""

    def __init__(self, engine: Engine, memory: ReplicaMemory) -> None:
        self._engine = engine
        self._memory = memory
        self._allocator = engine.allocator
        self._base_slots = self._allocator.slot_ranges[0]

    def status(self) -> dict[str, Any]:
        """Returns what GET /kunserve/status says of this replica's memory."""
        frames = self._memory.frames.snapshot()
        capacity = self._allocator.size
        base = self._allocator.count_in(self._base_slots)
        cached = self._engine.evictable_tokens()
        return {
            "id": self._memory.replica,
            "frames": {
                "total": frames.total,
                "parameters": frames.parameters,
                "kv": frames.kv,
                "lent": frames.lent,
                "free": frames.free,
                "bytes": frames.frame_bytes,
                "per_granule": self._memory.kv.frames_per_granule,
            },
            "slots": {
                "base": base,
                "extension": capacity - base,
                "used": capacity - self._allocator.available_size() - cached,
                "cached": cached,
                "per_granule": self._memory.kv.space.granule_slots,
            },
            "capacity_tokens": capacity,
        }

    def resize(self, frames: int) -> str:
        """Gives `frames` to the KV cache, or takes them from it where negative; returns what was done, for people.

        Raises BadResizeError, or TransientError when it cannot be done now; then nothing has changed, except that
        cached prefixes may have been evicted.
        """
        started_at_s = time.perf_counter()
        step = self._memory.kv.frames_per_granule
        if frames == 0 or frames % step:
            raise BadResizeError(
                f"frames: {frames} is not accepted by replica {self._memory.replica}; accepted: multiples of {step} "
                f"other than 0, which is what {self._memory.kv.space.granule_slots} more slots take in all buffers"
            )
        before = self._allocator.size
        how = self._grow(frames // step) if frames > 0 else self._shrink(-frames // step)
        self._engine.capacity_changed()
        self._memory.frames.check()
        message = (
            f"KV capacity of replica {self._memory.replica}: {before} -> {self._allocator.size} tokens "
            f"({frames:+d} frames{how}, {1000 * (time.perf_counter() - started_at_s):.1f} ms)"
        )
        logger.info("KunServe: %s", message)
        return message

    def _grow(self, granules: int) -> str:
        free = self._memory.frames.free_frames
        needed = granules * self._memory.kv.frames_per_granule
        if needed > free:
            raise TransientError(f"frames: {needed} are not free at replica {self._memory.replica}; free: {free}")
        if granules > (room := self._memory.kv.space.replica_granules - self._memory.kv.granules):
            raise TransientError(
                f"frames: the reserved address space has room for {room} more granules, not for {granules}; "
                "start with a larger --kunserve-max-slots"
            )
        failure: TransientError | None = None
        try:
            added = self._memory.kv.grow(granules)
        except TransientError as error:
            failure = error
        if not self._engine.all_ranks(failure is None):
            if failure is None:
                self._memory.kv.shrink(granules)
            raise failure or TransientError("another tensor-parallel rank of this replica could not map the frames")
        self._allocator.add_slots(added)
        self._engine.limits.expect_capacity(None)
        return ""

    def _shrink(self, granules: int) -> str:
        kv = self._memory.kv
        least = kv.least_granules
        if granules > kv.granules - least:
            most = max(0, kv.granules - least) * kv.frames_per_granule
            raise TransientError(
                f"frames: {granules * kv.frames_per_granule} cannot be taken from the KV cache of replica "
                f"{self._memory.replica}, which has to keep {'one granule' if least == 1 else f'{least} granules'}; "
                f"it can give {most}"
            )
        slots = kv.last_slots(granules)
        capacity = self._allocator.size - self._allocator.count_in(slots)
        self._require_room(capacity)
        vacated = self.take(slots)
        kv.shrink(granules)
        return f", {vacated.moved_tokens} tokens moved, {vacated.evicted_tokens} evicted"

    def can_shrink_by(self, slots: SlotRange) -> bool:
        """Says whether everything that lives here fits into the other slots, now and until every request that is known
        has ended."""
        try:
            self._require_room(self._left_without(self._allocator.count_in(slots)))
        except SlotsInUseError:
            return False
        return True

    def force(self, tokens: int) -> None:
        """Sees to it that `tokens` of the slots can go soon, whoever has them: requests give up what has no room in the
        rest, by the engine's own retraction, and those that never would have any are answered. To be called again at
        every boundary until the slots are gone. `give_up` takes back what can be taken back."""
        ending = self._engine.make_room(self._left_without(tokens))
        # Without these SGLang would end those with an error that are about to end.
        withheld = max(0, tokens - ending)
        if self._allocator.withheld != withheld:
            self._allocator.withhold(withheld)
            self._engine.capacity_changed()

    def give_up(self) -> None:
        """Forces nobody any more."""
        self._allocator.withhold(0)
        self._engine.capacity_changed()

    def _left_without(self, tokens: int) -> int:
        return self._allocator.size + self._allocator.withheld - tokens

    def take(self, slots: SlotRange) -> Vacated:
        """Takes `slots` away, moves what lives there, and limits requests to what is left. Raises SlotsInUseError, with
        nothing changed, where `can_shrink_by` says no."""
        vacated = self._engine.vacate(slots)
        self._allocator.remove_slots(slots)
        self._engine.limits.cut_to(self._allocator.size)
        return vacated

    def _require_room(self, capacity: int) -> None:
        """Raises SlotsInUseError where requests would not have room: what was admitted with the larger capacity must
        get to its end with the smaller one.

        A request may need all of it before it ends. A prompt in the middle of its prefill needs room for the rest of
        it: SGLang takes back running requests when their next tokens have no room, but not such a prompt.
        """
        if (refusal := self._engine.limits.refusal(capacity)) is not None:
            raise SlotsInUseError(refusal)
        used = self._allocator.size - self._allocator.available_size() - self._engine.evictable_tokens()
        needed = self._engine.prefill_room_tokens()
        if used + needed > capacity:
            raise SlotsInUseError(
                f"{used} tokens are in use and a prefill needs {needed} more, and {capacity} slots would stay"
            )
