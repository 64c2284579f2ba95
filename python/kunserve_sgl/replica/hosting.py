"""Puts together what takes the batches of one rank to other replicas, and executes theirs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.exchange.handover import Handover
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exits import EXIT_DEADLINE_S
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.layer_runner import LayerRunner
from kunserve_sgl.replica.layer_times import LayerTimes
from kunserve_sgl.replica.orders_away import OrdersAway
from kunserve_sgl.replica.own_batches import OwnBatches
from kunserve_sgl.replica.row_copies import RowCopies
from kunserve_sgl.replica.segment_server import SegmentServer
from kunserve_sgl.replica.serving import ServingQueue
from kunserve_sgl.replica.slot_copies import SlotCopies
from kunserve_sgl.replica.time_spent import TimeSpent
from kunserve_sgl.replica.turns import Turns

# For the coordinator to find out who stands still, to end it, and to call batches off when it is gone.
VERDICT_S = EXIT_DEADLINE_S + 10.0


class LayerHosting:
    """Puts together the parts of one rank that run batches, by the plan that it holds."""

    def __init__(
        self,
        plan: HeldPlan,
        runner: LayerRunner,
        rows: RowCopies,
        link: PeerLink,
        handover: Handover,
        ranks: int,
        order_timeout_s: float,
        rank_timeout_s: float,
    ) -> None:
        """`rows` copies KV in the layers that run here. `ranks` are the tensor-parallel ranks of this replica. Who has
        a batch of others for longer than `order_timeout_s` is ended by the coordinator, who lets the others recover;
        where that does not happen, the batch has failed a while later. `rank_timeout_s` is how long ranks of one
        replica wait for each other."""
        turns = self.turns = Turns(link, ranks, order_timeout_s + VERDICT_S, rank_timeout_s)
        spent = TimeSpent()
        times = LayerTimes(runner.device, runner.layer_count, decides=turns.leads)
        self.writes = KvWrites()
        server = SegmentServer(plan, runner, rows, link, handover, times, spent, self.writes)
        self.plan = plan
        self.serving = ServingQueue(plan, link, turns, server, times)
        self.away = OrdersAway(link, turns, self.serving, spent)
        self.own_batches = OwnBatches(
            plan, runner, link, handover, turns, self.serving, self.away, times, spent, self.writes
        )
        self.slot_copies = SlotCopies(plan, rows, link, turns, self.serving, self.away, self.writes)
        link.wait_for_activations(handover, lambda host, reason: self.away.tell_of_failure(host, reason))
        self._handover = handover
        self._times = times
        self._spent = spent

    def connect(self, peers: Iterable[int], timeout_s: float) -> Connecting | Connected:
        """Begins what must have ended before the first batch to or from `peers`; see `Handover.connect`."""
        return self._handover.connect(peers, timeout_s)

    def looks_waited_for(self) -> bool:
        """Looks into the inbox, and says whether others wait for this replica; see `ServingQueue`."""
        return self.serving.looks_waited_for()

    def forget_all_but(self, owners: Iterable[int]) -> None:
        """Drops the orders of all but `owners`; see `ServingQueue`."""
        self.serving.forget_all_but(owners)

    def forget(self, peer: int, incarnation: int) -> None:
        """Gives up all that belongs to the processes of a peer, which have ended: its orders, the ways to it, what is
        shared for activations. The peer is `incarnation` now. Every rank calls it at the same point."""
        self.serving.forget(peer)
        self._handover.forget(peer, incarnation)

    def forget_everything(self) -> None:
        """Drops the orders of everybody, and own orders that are with others: their answers are of no use any more."""
        self.serving.forget_all_but(())
        self.serving.own_is_begun = False
        self.away.forget_all()

    def disconnect(self, peers: Iterable[int]) -> None:
        """Ends the connections to `peers`; see `Handover.disconnect`."""
        self._handover.disconnect(peers)

    def report(self) -> dict[str, Any]:
        """Returns the own batches' route, and where this rank's time has gone since the start, in seconds."""
        cost = self._times.cost
        return {
            "route": [[segment.host, segment.start, segment.end] for segment in self.plan.route],
            "own_batches_sent": self.own_batches.sent,
            "pieces_sent": self.own_batches.pieces_sent,
            "batches_served": self.serving.served,
            "seconds": self._spent.report(),
            "chunk_cost": None
            if cost is None
            else {"pair_s": cost.pair_s, "token_s": cost.token_s, "fixed_s": cost.fixed_s},
        }
