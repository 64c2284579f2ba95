"""Others' orders that wait at this rank: which one is executed next, and how far.

Who waits for a batch executes those of others, first of whom it has not served for longest. Between two own batches
each owner is served at most once. A long segment is executed in slices of layers, and short ones go in between; at most
one long segment is begun here at a time, own or another's, because two would both end late.
"""

from __future__ import annotations

from collections.abc import Iterable

from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work import PeerOrder, Turn, TurnKind, Work
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.layer_times import LayerTimes
from kunserve_sgl.replica.segment_server import SegmentServer
from kunserve_sgl.replica.turns import Turns


class ServingQueue:
    """Decides at one rank which order is executed next. Rank 0 takes orders out of the queue, the other ranks execute
    those that it announces."""

    def __init__(self, plan: HeldPlan, link: PeerLink, turns: Turns, server: SegmentServer, times: LayerTimes) -> None:
        self._plan = plan
        self._link = link
        self._turns = turns
        self._server = server
        self._times = times
        self._others_s: dict[int, float] = {}  # by owner: what its last batch takes, since the last own one
        self.own_is_begun = False  # whether an own segment has been executed in part

    @property
    def served(self) -> int:
        """Counts the orders that have been executed to their end, since the start."""
        return self._server.served

    @property
    def is_waited_for(self) -> bool:
        """Tells whether there are orders that `serve` would execute, as far as the inbox has been looked into."""
        return self._plan.serves and self._link.order_count > 0

    def looks_waited_for(self) -> bool:
        """Looks into the inbox, and says whether there are orders that `serve` would execute."""
        self._link.poll(0)
        return self.is_waited_for

    @property
    def has_begun_long(self) -> bool:
        """Tells whether another's segment has been executed in part, and orders wait."""
        return self._server.has_begun and self.is_waited_for

    def forget_all_but(self, owners: Iterable[int]) -> None:
        """Drops the orders of all but `owners`, also those that were begun. Every rank calls it at the same point."""
        kept = set(owners)
        self._link.poll(0)
        self._link.forget_orders_but(kept)
        self._server.forget_all_but(kept)

    def forget(self, owner: int) -> None:
        """Drops the orders of `owner`, also those that were begun, and the ways there. Every rank calls it at the same
        point."""
        self._link.poll(0)
        self._link.forget(owner)
        self._server.forget(owner)
        self._others_s.pop(owner, None)

    def take_others_s(self) -> tuple[float, ...]:
        """Returns what the last batch of each owner that was served since the last call takes over all layers, in
        seconds."""
        seconds = tuple(self._others_s.values())
        self._others_s.clear()
        return seconds

    def serve(self) -> int:
        """Executes what others wait for, at most one order each; returns how many. Every rank calls it at the same
        points."""
        if not self._plan.serves:
            return 0
        if not self._turns.leads:
            return self.follow()
        self._link.poll(0)
        served = self.serve_each()
        self._turns.announce(TurnKind.END)
        return served

    def serve_each(self) -> int:
        """At rank 0: executes the oldest order of each owner, of those that are here. The other ranks are to follow."""
        if not self._plan.serves:
            return 0
        return sum([self._serve(order) for order in self._link.take_one_order_per_owner()])

    def serve_one(self) -> bool:
        """At rank 0: looks at one order, and executes it unless it has to wait for another long one. Returns whether
        there was one. The other ranks are to follow."""
        order = self._link.take_order()
        if order is None:
            return False
        self._serve(order)
        return True

    def follow(self) -> int:
        """At another rank: executes what rank 0 announces, up to its next turn of another kind, which is taken too.
        Returns how many orders."""
        served = 0
        while (turn := self._turns.next()).kind is TurnKind.SERVE:
            self.follow_turn(turn)
            served += 1
        return served

    def follow_turn(self, turn: Turn) -> None:
        """At another rank: executes the order that a SERVE turn names."""
        self._server.execute(self._turns.order_of(turn), turn.end)

    def _serve(self, order: PeerOrder) -> bool:
        """Lets all ranks execute the order now, or a slice of it; puts it back, and returns False, where it is long and
        has to wait for another long one."""
        end = -1
        if isinstance(order, Work):
            segment, shape = order.segments[0], self._server.shape_of(order)
            begun = self._server.begun_layer(order)
            end = self._times.slice_end(segment.start if begun is None else begun, segment.end, shape)
            if begun is None:
                if end < segment.end and (self.own_is_begun or self._server.has_begun):
                    self._link.put_back(order)
                    return False
                cost = self._times.cost
                self._others_s[order.owner] = 0.0 if cost is None else cost.seconds(shape.amount)
        self._turns.announce(TurnKind.SERVE, order.owner, order.batch, end=end)
        self._server.execute(order, end)
        return True
