"""Copies the KV of own slots in all layers, wherever they run."""

from __future__ import annotations

import numpy as np
import torch

from kunserve_sgl.errors import KunserveError
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work import CopySlots, TurnKind
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.orders_away import OrdersAway
from kunserve_sgl.replica.row_copies import RowCopies
from kunserve_sgl.replica.serving import ServingQueue
from kunserve_sgl.replica.turns import Turns


class SlotCopies:
    """Copies KV for one rank: in the layers that run here itself, in the others by their layer hosts."""

    def __init__(
        self,
        plan: HeldPlan,
        rows: RowCopies,
        link: PeerLink,
        turns: Turns,
        serving: ServingQueue,
        away: OrdersAway,
        writes: KvWrites,
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._link = link
        self._turns = turns
        self._serving = serving
        self._away = away
        self._writes = writes

    def copy(self, targets: torch.Tensor, sources: torch.Tensor) -> None:
        """Copies the KV of the own slots `sources` to `targets`, int64[n] each and disjoint. Returns when all layer
        hosts have done so, and serves meanwhile. Raises as `OwnBatches.forward`."""
        try:
            self._copy(targets, sources)
        except KunserveError as error:
            self._away.leave_failed(error, self._plan.is_pipelined)
            raise

    def _copy(self, targets: torch.Tensor, sources: torch.Tensor) -> None:
        me, plan = self._link.replica, self._plan
        layers = plan.layers_here(me)
        self._writes.note(targets.cpu().numpy().astype(np.int64), layers)
        self._rows.copy(targets, sources, layers)
        for host in sorted({segment.host for segment in plan.route} - {me}):
            number = self._away.add((host,))
            data = [ids.cpu().numpy().astype(np.int64).tobytes() for ids in (sources, targets)]
            self._link.send(host, CopySlots(me, number, plan.epoch, *data))
            if self._turns.leads:
                answer = self._away.serve_until(number)
                self._turns.announce(TurnKind.END)
            else:
                self._serving.follow()
                answer = self._turns.answer_to(number)
            self._away.close(answer)
