"""SGLang's scheduler as the runtime of a rank sees it: see `replica.engine.Engine`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from kunserve_sgl.integration.runner.memory_budget import most_prefill_tokens
from kunserve_sgl.integration.scheduler.known_requests import known_requests
from kunserve_sgl.integration.scheduler.kv_resize import check_tree_cache, vacate
from kunserve_sgl.integration.scheduler.making_room import make_room
from kunserve_sgl.integration.scheduler.slot_audit import alike, slot_differences
from kunserve_sgl.integration.scheduler.streams import wait_for_streams
from kunserve_sgl.integration.scheduler.taken_back import take_back
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.engine import AnswerLimits, Engine, LoadNow, Request, Said, SlotAllocator, Vacated
from kunserve_sgl.replica.layer_runner import LayerRunner, RequestRows

if TYPE_CHECKING:
    from kunserve_sgl.integration.scheduler.scheduler import KunserveScheduler


class SglangEngine(Engine):
    """Reads everything when it is asked for: the scheduler replaces parts of itself."""

    def __init__(self, scheduler: KunserveScheduler, limits: AnswerLimits, layers: LayerRunner) -> None:
        """Raises ConfigurationError for a prefix cache that cannot be emptied in part."""
        check_tree_cache(scheduler.tree_cache)
        self._scheduler = scheduler
        self._limits = limits
        self._layers = layers

    @property
    @override
    def allocator(self) -> SlotAllocator:
        allocator: SlotAllocator = self._scheduler.token_to_kv_pool_allocator
        return allocator

    @property
    @override
    def rows(self) -> RequestRows:
        rows: RequestRows = self._scheduler.req_to_token_pool
        return rows

    @property
    @override
    def limits(self) -> AnswerLimits:
        return self._limits

    @property
    @override
    def layers(self) -> LayerRunner:
        return self._layers

    @property
    @override
    def batches(self) -> int:
        return int(self._scheduler.forward_ct)

    @property
    @override
    def most_tokens(self) -> int:
        """Counts, without chunks, a prompt as long as the context, which may come by itself."""
        scheduler, arguments = self._scheduler, self._scheduler.server_args
        prefill = most_prefill_tokens(
            arguments.chunked_prefill_size, arguments.max_prefill_tokens, scheduler.model_config.context_len
        )
        return int(prefill + scheduler.max_running_requests)

    @property
    @override
    def rank_timeout_s(self) -> float:
        timeout_s = self._scheduler.server_args.dist_timeout
        return default_pg_timeout.total_seconds() if timeout_s is None else float(timeout_s)

    @override
    def load_now(self) -> LoadNow:
        scheduler, known = self._scheduler, known_requests(self._scheduler)
        chunked, rest = scheduler.chunked_req, 0
        if chunked is not None:
            # Not by its prefix: that is as it was before the chunk which has its slots already.
            rest = len(chunked.full_untruncated_fill_ids) - chunked.kv_committed_len
        return LoadNow(
            running=known.running,
            waiting=known.waiting,
            for_grammar=known.for_grammar,
            prefill_rest_tokens=rest,
            evictable_tokens=self.evictable_tokens(),
            max_running_requests=scheduler.max_running_requests,
            batches=scheduler.forward_ct,
            is_paused=scheduler._engine_paused,
        )

    @override
    def evictable_tokens(self) -> int:
        return int(self._scheduler.tree_cache.evictable_size())

    @override
    def cached_tokens(self, request: Request) -> int:
        tree_cache = self._scheduler.tree_cache
        node = getattr(tree_cache, "root_node", None)
        if node is None:
            return 0
        key = RadixKey(token_ids=request.origin_input_ids, extra_key=request.extra_key)
        key = key.page_aligned(tree_cache.page_size)
        found = 0
        while len(key) and (child := node.children.get(key.child_key(tree_cache.page_size))) is not None:
            shared = child.key.match(key, page_size=tree_cache.page_size)
            found += shared
            if shared < len(child.key):
                break
            node, key = child, key[shared:]
        return int(found)

    @override
    def prefill_room_tokens(self) -> int:
        """Reckons with one more page per chunk for each running request."""
        scheduler, request = self._scheduler, self._scheduler.chunked_req
        if request is None:
            return 0
        rest = len(request.full_untruncated_fill_ids) - len(request.prefix_indices)
        chunks = -(-rest // max(1, scheduler.chunked_prefill_size or rest))
        return int(rest + (chunks + 1) * (len(known_requests(scheduler).all) + 1) * self.allocator.page_size)

    @override
    def vacate(self, slots: SlotRange) -> Vacated:
        return vacate(self._scheduler, slots)

    @override
    def make_room(self, capacity: int) -> int:
        return make_room(self._scheduler, self._scheduler.limits, capacity)

    @override
    def abandon_batches(self) -> int:
        return take_back(self._scheduler)

    @override
    def capacity_changed(self) -> None:
        """Replaces every copy: a stale one would end the server, because SGLang's idle check compares the slots it
        finds with the capacity."""
        scheduler = self._scheduler
        capacity = scheduler.token_to_kv_pool_allocator.size
        scheduler.max_total_num_tokens = capacity
        scheduler.tp_worker.model_runner.max_total_num_tokens = capacity
        scheduler.max_req_len = min(scheduler.model_config.context_len - 1, capacity - 1)
        scheduler.max_req_input_len = scheduler.max_req_len - 5
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
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

    @override
    def all_ranks(self, succeeded: bool) -> bool:
        if self._scheduler.ps.tp_size == 1:
            return succeeded
        flag = torch.tensor([int(succeeded)])
        group = self._scheduler.tp_cpu_group  # whose own deadline is two hours
        reduction = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group, async_op=True)
        assert reduction is not None
        reduction.wait(timedelta(seconds=self.rank_timeout_s))
        return bool(flag.item())

    @override
    def slot_differences(self) -> list[str]:
        return slot_differences(self._scheduler)

    @override
    def alike(self) -> dict[str, str]:
        return alike(self._scheduler)

    @override
    def gather(self, mine: Said) -> Sequence[Said]:
        ranks = self._scheduler.ps.tp_size
        if ranks == 1:
            return [mine]
        said: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(said, mine, group=self._scheduler.tp_cpu_group)
        return said

    @override
    def synchronize(self) -> None:
        wait_for_streams(self._scheduler)
