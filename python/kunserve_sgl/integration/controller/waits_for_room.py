"""The controller while requests wait for room: those that no replica has the slots for now, and that memory of others
can bring. How much each needs is in `long_requests.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.io_struct import sock_send

from kunserve_sgl.integration.controller.long_requests import room_for
from kunserve_sgl.integration.controller.losses import Losses
from kunserve_sgl.integration.messages import ContinuedGenerateReqInput, RequestWaited

logger = logging.getLogger(__name__)


class WaitsForRoom(Losses):
    """Keeps requests until a replica has room for them."""

    def _waits_for_room(self, req: Any, since_s: float | None = None) -> bool:
        """Keeps a request where no replica has room for it that may get it, and memory of others could bring that: for
        as long as the rest of its time, where it waits since `since_s`, or has waited before. One that fits at some
        replicas is sent to one of these; one that has waited in vain to the largest, which takes it in if it is not
        quite so long, or says how long it may be."""
        capacities = self._coordinator.capacities
        base_tokens = min(map(self._coordinator.slots_at_start, range(len(capacities))), default=0)
        options = self.server_args
        room = room_for(req, options.get_model_config().context_len, options.page_size, base_tokens)
        if room is None or room.least_tokens <= min(capacities, default=room.least_tokens):
            return False
        there = [replica for replica in self._active_workers if replica not in self._blocked]
        wanted = req.routed_dp_rank
        if wanted is not None and wanted not in range(len(capacities)):
            return False
        asked = [wanted] if wanted in there else there
        if fitting := [replica for replica in asked if room.least_tokens <= capacities[replica]]:
            req.routed_dp_rank = self._one_of(fitting, req)
            return False
        largest = max(asked, key=lambda replica: capacities[replica])
        if isinstance(req, ContinuedGenerateReqInput) and req.has_waited:
            req.routed_dp_rank = largest
            return False
        if room.least_tokens > (most := self._coordinator.most_capacity()):
            return False  # the replica says so to the client
        by_need = None if self._by_need is None or len(asked) == 1 else self._by_need.dispatcher
        replica = largest if by_need is None else by_need.pick(room.tokens, asked)
        logger.info(
            "KunServe: request %s needs room for %d tokens and waits for it; replica %d has %d",
            *(req.rid, room.tokens, replica, capacities[replica]),
        )
        since_s = self._clock() if since_s is None else since_s
        if isinstance(req, ContinuedGenerateReqInput):
            since_s, req.waited_s = since_s - req.waited_s, 0.0
        return self._long.add(req, replica, min(room.tokens, most), since_s)

    def _one_of(self, fitting: Sequence[int], req: Any) -> int:
        """Picks one of those that have room for a request. It may be all but one who lends: the largest of them is who
        borrows, and that is who has most to do. With a method of SGLang's it is the one that has fewest requests."""
        if len(fitting) == 1:
            return fitting[0]
        if self._by_need is None:
            return min(fitting, key=self._open.count)
        return self._by_need.dispatcher.pick(self._by_need.tokens_of(req, self.max_req_input_len), fitting)

    def _follow_long(self) -> None:
        """Dispatches what was too long for its replica where that has room now, or has waited for too long, or where
        the replica is no more: then whoever the client accepts may have it, for which it does not wait anew."""

        def is_there(replica: int) -> bool:
            return replica in self._active_workers and replica not in self._blocked

        def has_news(replica: int, tokens: int) -> bool:
            return not is_there(replica) or tokens <= self._coordinator.capacities[replica]

        for request, replica, since_s in self._long.take_ready(has_news):
            if is_there(replica):
                request.routed_dp_rank = replica
            self._tell_of_waiting(request, self._clock() - since_s)
            self.dispatching_with_trace(request, since_s=since_s)
        for request in self._long.take_overdue(self._clock()):
            self._tell_of_waiting(request, self._long.longest_s)
            self.dispatching_with_trace(_having_waited(request))
        self._autopilot.set_waiting(self._long.wanted)

    def _tell_of_waiting(self, request: Any, waited_s: float) -> None:
        """Lets the HTTP server know, which sends the request again where its replica loses it or gives it back."""
        sock_send(self._send_to_tokenizer, RequestWaited(name=request.rid, waited_s=waited_s))


def _having_waited(request: Any) -> ContinuedGenerateReqInput:
    """Returns a request that has waited in vain: no replica may give it back, for it would wait once more."""
    if not isinstance(request, ContinuedGenerateReqInput):
        return ContinuedGenerateReqInput.of(request, has_waited=True)
    request.has_waited = True
    return request
