"""Gives up all batches of a scheduler, also one that was left in its middle, and takes their requests back."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.managers.io_struct import AbortReq

from kunserve_sgl.integration.scheduler.known_requests import known_requests

logger = logging.getLogger(__name__)


def take_back(scheduler: Any) -> int:
    """Puts every running request back to the head of the queue with the tokens that it has so far, and frees every slot
    and row. Returns how many requests. All ranks of a replica call it at the same batch boundary.

    As SGLang does for /pause_generation in mode "retract", but that nothing is asked of the batches: one of them may
    have been left in its middle, so what its requests hold is not known. Results that have not been looked at are
    dropped; their tokens are computed again.
    """
    known = known_requests(scheduler)
    current = scheduler.cur_batch_for_debug  # a prefill that was left in its middle is in no other place
    elsewhere = {id(request) for request in known.all}
    running = [*known.running, *(r for r in (current.reqs if current else ()) if id(r) not in elsewhere)]
    running = [request for request in running if not request.finished()]
    aborted = scheduler._pending_chunked_abort_req
    scheduler._pending_chunked_abort_req = scheduler.chunked_req = None
    scheduler.last_batch = scheduler.cur_batch_for_debug = None
    scheduler.running_batch.reqs = []
    scheduler.running_batch.batch_is_full = False
    if scheduler.enable_overlap:
        scheduler.result_queue.clear()
    scheduler.tree_cache.reset()
    scheduler.req_to_token_pool.clear()
    scheduler.token_to_kv_pool_allocator.clear()
    back = []
    for request in running:
        request.req_pool_idx = request.kv = None
        request.reset_for_retract()
        if request is aborted:  # its client has left in the middle of its prefill
            scheduler.ipc_channels.send_to_tokenizer.send_output(AbortReq(rid=request.rid), request)
            continue
        request.time_stats.set_wait_queue_entry_time()
        back.append(request)
    scheduler.waiting_queue = [*back, *scheduler.waiting_queue]
    logger.warning("KunServe: %d running requests are back in the queue", len(back))
    return len(back)
