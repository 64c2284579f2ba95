"""The controller while requests wait for room: those that no replica has the slots for now, and that memory of others
can bring. How much each needs is in `long_requests.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kunserve_sgl.integration.controller.long_requests import room_for
from kunserve_sgl.integration.controller.losses import Losses
from kunserve_sgl.integration.messages import ContinuedGenerateReqInput

logger = logging.getLogger(__name__)


class WaitsForRoom(Losses):
    """Keeps requests until a replica has room for them."""

    def _waits_for_room(self, req: Any) -> bool:
        """Keeps a request where no replica has room for it that may get it, and memory of others could bring that; one
        that fits at some replicas is sent to one of these."""
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
        if room.least_tokens > (most := self._coordinator.most_capacity()):
            return False  # the replica says so to the client
        by_need = None if self._by_need is None or len(asked) == 1 else self._by_need.dispatcher
        replica = asked[0] if by_need is None else by_need.pick(room.tokens)
        logger.info(
            "KunServe: request %s needs room for %d tokens and waits for it; replica %d has %d",
            *(req.rid, room.tokens, replica, capacities[replica]),
        )
        return self._long.add(req, replica, min(room.tokens, most), self._clock())

    def _one_of(self, fitting: Sequence[int], req: Any) -> int:
        """Picks one of those that have room for a request. It may be all but one who lends: the largest of them is who
        borrows, and that is who has most to do."""
        if self._by_need is None or len(fitting) == 1:
            return max(fitting, key=lambda replica: self._coordinator.capacities[replica])
        return self._by_need.dispatcher.pick(self._by_need.tokens_of(req, self.max_req_input_len), fitting)

    def _follow_long(self) -> None:
        """Dispatches what was too long for its replica where that has room now, or has waited for too long, or where
        the replica is no more: then somebody else may have it."""

        def has_news(replica: int, tokens: int) -> bool:
            is_there = replica in self._active_workers and replica not in self._blocked
            return not is_there or tokens <= self._coordinator.capacities[replica]

        for request, replica in self._long.take_ready(has_news):
            request.routed_dp_rank = replica
            self.dispatching_with_trace(request)
        for request in self._long.take_overdue(self._clock()):
            # Its replica takes it in if it is not quite so long, or says how long it may be.
            largest = max(self._active_workers, key=lambda replica: self._coordinator.capacities[replica], default=None)
            request.routed_dp_rank = largest if request.routed_dp_rank is None else request.routed_dp_rank
            if isinstance(request, ContinuedGenerateReqInput):
                request.has_waited = True
            self.dispatching_with_trace(request, may_wait=False)
        self._autopilot.set_waiting(self._long.wanted)
