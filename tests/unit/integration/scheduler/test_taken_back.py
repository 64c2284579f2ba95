"""Batches that are given up, one of them in its middle: SGLang's own requests, tree, rows and slots."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req, ReqKvInfo
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.sampling.sampling_params import SamplingParams

from kunserve_sgl.integration.runner.elastic_allocator import make_elastic_allocator
from kunserve_sgl.integration.scheduler.taken_back import take_back

CAPACITY, ROWS = 64, 8


class Replica:
    """The parts of a scheduler that batches hold on to."""

    enable_overlap = True

    def __init__(self) -> None:
        kvcache = SimpleNamespace(device="cpu")
        self.token_to_kv_pool_allocator: Any = make_elastic_allocator(
            CAPACITY, 1, first_slot=1, device="cpu", dtype=torch.float32, kvcache=kvcache, need_sort=False
        )
        self.req_to_token_pool = ReqToTokenPool(ROWS, CAPACITY, "cpu", enable_memory_saver=False)
        self.tree_cache = RadixCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.req_to_token_pool,
                token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
                page_size=1,
            )
        )
        self.sent: list[AbortReq] = []
        self.ipc_channels = SimpleNamespace(
            send_to_tokenizer=SimpleNamespace(send_output=lambda message, request: self.sent.append(message))
        )
        self.grammar_manager = SimpleNamespace(grammar_queue=[])
        self.running_batch = SimpleNamespace(reqs=[], batch_is_full=True)
        self.waiting_queue: list[Req] = []
        self.result_queue: deque[Any] = deque()
        self.last_batch: Any = None
        self.cur_batch_for_debug: Any = None
        self.chunked_req: Req | None = None
        self._pending_chunked_abort_req: Req | None = None

    def begin(self, name: str, answer: int = 0) -> Req:
        """A request that holds a row and slots."""
        request = Req(name, "", [1, 2, 3], SamplingParams(max_new_tokens=8))
        request.output_ids.extend(range(5, 5 + answer))
        assert self.req_to_token_pool.alloc([request]) is not None
        assert self.token_to_kv_pool_allocator.alloc(3 + answer) is not None
        request.kv = ReqKvInfo(kv_allocated_len=3 + answer, swa_evicted_seqlen=0)
        return request


def batch(*requests: Req) -> Any:
    return SimpleNamespace(reqs=list(requests))


def test_all_that_run_are_back_at_the_head_of_the_queue_and_everything_is_free() -> None:
    replica = Replica()
    decoding, chunked, prefilling, done = (replica.begin(name, n) for n, name in enumerate("abcd"))
    done.finished_reason = FINISH_LENGTH(3)
    waits = Req("waits", "", [1], SamplingParams())
    replica.running_batch.reqs = [decoding, done]
    replica.last_batch = batch(decoding)
    replica.result_queue.append((batch(decoding, done), None))
    replica.chunked_req = chunked
    replica.cur_batch_for_debug = batch(chunked, prefilling)  # was left in its middle
    replica.waiting_queue = [waits]
    assert take_back(replica) == 3
    assert [request.rid for request in replica.waiting_queue] == ["a", "b", "c", "waits"]
    assert list(prefilling.output_ids) == [5, 6]
    assert all((request.req_pool_idx, request.kv) == (None, None) for request in replica.waiting_queue)
    assert all(request.is_retracted for request in (decoding, chunked, prefilling))
    assert replica.token_to_kv_pool_allocator.available_size() == CAPACITY
    assert replica.req_to_token_pool.available_size() == ROWS
    assert replica.tree_cache.evictable_size() == replica.tree_cache.protected_size() == 0
    assert (replica.running_batch.reqs, replica.running_batch.batch_is_full) == ([], False)
    assert (replica.last_batch, replica.chunked_req, len(replica.result_queue)) == (None, None, 0)
    assert take_back(replica) == 0  # what waits stays where it is
    assert [request.rid for request in replica.waiting_queue] == ["a", "b", "c", "waits"]


def test_a_prompt_whose_client_has_left_in_its_middle_is_not_begun_again() -> None:
    replica = Replica()
    replica.chunked_req = replica._pending_chunked_abort_req = replica.begin("gone")
    assert take_back(replica) == 0
    assert [message.rid for message in replica.sent] == ["gone"]
    assert replica.waiting_queue == []
    assert replica._pending_chunked_abort_req is None


@pytest.mark.parametrize("overlap", [True, False])
def test_an_idle_replica_has_nothing_to_give_up(overlap: bool) -> None:
    replica = Replica()
    replica.enable_overlap = overlap
    if not overlap:
        del replica.result_queue
    assert take_back(replica) == 0
