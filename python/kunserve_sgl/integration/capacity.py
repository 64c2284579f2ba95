"""The KV capacity of a running replica: grows and shrinks it, and keeps all of SGLang's copies of it in step."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

import torch

from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.scheduler.known_requests import known_requests
from kunserve_sgl.integration.scheduler.kv_resize import check_tree_cache, vacate
from kunserve_sgl.integration.scheduler.request_limits import RequestLimits
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.engine import SlotsInUseError, Vacated
from kunserve_sgl.replica.replica_memory import ReplicaMemory

logger = logging.getLogger(__name__)


class BadResizeError(ValueError):
    """The number of frames makes no sense for this replica, whatever its state."""


class CapacityManager:
    """One rank's part of its replica's capacity. All ranks of a replica take the same steps in the same order."""

    def __init__(self, scheduler: Any, memory: ReplicaMemory, limits: RequestLimits) -> None:
        check_tree_cache(scheduler.tree_cache)
        self._scheduler = scheduler
        self._limits = limits
        self._memory = memory
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._base_slots = self._allocator.slot_ranges[0]

    def status(self) -> dict[str, Any]:
        """What GET /kunserve/status says of this replica."""
        frames = self._memory.frames.snapshot()
        member = self._scheduler.member
        capacity = self._allocator.size
        base = self._allocator.count_in(self._base_slots)
        cached = self._scheduler.tree_cache.evictable_size()
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
            "pipeline": {} if member is None else member.hosting.report(),
        }

    def resize(self, frames: int) -> str:
        """Gives `frames` to the KV cache, or takes them from it where negative; returns what was done, for people.

        Raises BadResizeError, or TransientError when it cannot be done now; then nothing has changed, except that
        cached prefixes may have been evicted.
        """
        started_at_s = time.perf_counter()
        member = self._scheduler.member
        if member is not None and member.is_merged:
            raise TransientError(f"replica {self._memory.replica} depends on others until it is restored")
        step = self._memory.kv.frames_per_granule
        if frames == 0 or frames % step:
            raise BadResizeError(
                f"frames: {frames} is not accepted by replica {self._memory.replica}; accepted: multiples of {step} "
                f"other than 0, which is what {self._memory.kv.space.granule_slots} more slots take in all buffers"
            )
        before = self._allocator.size
        how = self._grow(frames // step) if frames > 0 else self._shrink(-frames // step)
        self.publish()
        self._memory.frames.check()
        if member is not None:
            member.report()
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
        if not self._all_ranks(failure is None):
            if failure is None:
                self._memory.kv.shrink(granules)
            raise failure or TransientError("another tensor-parallel rank of this replica could not map the frames")
        self._allocator.add_slots(added)
        self._limits.expect_capacity(None)
        return ""

    def _shrink(self, granules: int) -> str:
        kv = self._memory.kv
        if granules >= kv.granules:
            most = (kv.granules - 1) * kv.frames_per_granule
            raise TransientError(
                f"frames: {granules * kv.frames_per_granule} cannot be taken from the KV cache of replica "
                f"{self._memory.replica}, which has to keep one granule; it can give {most}"
            )
        slots = kv.last_slots(granules)
        capacity = self._allocator.size - self._allocator.count_in(slots)
        self._require_room(capacity)
        vacated = self.take(slots)
        kv.shrink(granules)
        return f", {vacated.moved_tokens} tokens moved, {vacated.evicted_tokens} evicted"

    def can_shrink_by(self, slots: SlotRange) -> bool:
        """Whether everything that lives here fits into the other slots, now and until every request that is known has
        ended."""
        try:
            self._require_room(self._allocator.size - self._allocator.count_in(slots))
        except SlotsInUseError:
            return False
        return True

    def take(self, slots: SlotRange) -> Vacated:
        """Takes `slots` away, what lives there moves, and requests are limited to what is left. See `can_shrink_by`."""
        vacated = vacate(self._scheduler, slots)
        self._allocator.remove_slots(slots)
        self._limits.cut_to(self._allocator.size)
        return vacated

    def _require_room(self, capacity: int) -> None:
        """What was admitted with the larger capacity must get to its end with the smaller one.

        A request may need all of it before it ends. A prompt in the middle of its prefill needs room for the rest of
        it: SGLang takes back running requests when their next tokens have no room, but not such a prompt.
        """
        if (refusal := self._limits.refusal(capacity)) is not None:
            raise SlotsInUseError(refusal)
        used = self._allocator.size - self._allocator.available_size() - self._scheduler.tree_cache.evictable_size()
        needed = self._unfinished_prefill_tokens()
        if used + needed > capacity:
            raise SlotsInUseError(
                f"{used} tokens are in use and a prefill needs {needed} more, and {capacity} slots would stay"
            )

    def _unfinished_prefill_tokens(self) -> int:
        """Room that a prompt in the middle of its prefill needs, with what others may take meanwhile: each running
        request begins at most one more page per chunk."""
        request = self._scheduler.chunked_req
        if request is None:
            return 0
        rest = len(request.full_untruncated_fill_ids) - len(request.prefix_indices)
        chunks = -(-rest // max(1, self._scheduler.chunked_prefill_size or rest))
        return int(rest + (chunks + 1) * (len(known_requests(self._scheduler).all) + 1) * self._allocator.page_size)

    def _all_ranks(self, succeeded: bool) -> bool:
        """Whether all tensor-parallel ranks of this replica succeeded. A collective: every rank must call it."""
        if self._scheduler.ps.tp_size == 1:
            return succeeded
        flag = torch.tensor([int(succeeded)])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=self._scheduler.tp_cpu_group)
        return bool(flag.item())

    def publish(self) -> None:
        """Tells everything in SGLang that keeps a copy of the capacity. A stale copy would end the server: its idle
        check compares the slots it finds with the capacity."""
        scheduler, capacity = self._scheduler, self._allocator.size
        scheduler.max_total_num_tokens = capacity
        scheduler.tp_worker.model_runner.max_total_num_tokens = capacity
        scheduler.max_req_len = min(scheduler.model_config.context_len - 1, capacity - 1)
        scheduler.max_req_input_len = scheduler.max_req_len - 5
        pool = self._allocator.get_kvcache()
        mapped_bytes = pool.get_kv_size_bytes()
        pool.mem_usage = (sum(mapped_bytes) if isinstance(mapped_bytes, tuple) else mapped_bytes) / 2**30
        scheduler.init_pool_stats_observer()
        scheduler.invariant_checker.max_total_num_tokens = capacity
        scheduler.invariant_checker.pool_stats_observer = scheduler.pool_stats_observer
        scheduler.load_inquirer = dataclasses.replace(
            scheduler.load_inquirer,
            max_total_num_tokens=capacity,
            pool_stats_observer=scheduler.pool_stats_observer,
        )
        scheduler.kv_events_publisher.max_total_num_tokens = capacity
        # Else requests that found no room are not looked at before another one ends.
        scheduler.running_batch.batch_is_full = False
        scheduler.emit_metrics_constants()
        scheduler.publish_load_snapshot(force=True)
