"""What comes next at the ranks of one replica: rank 0 decides and announces it, the others follow.

The ranks exchange tensors in every layer, so all of them must be in the same layers of the same batch.
"""

from __future__ import annotations

import time

from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work import Answer, PeerOrder, Turn, TurnKind


class Turns:
    """Is one rank's end of what the ranks of a replica tell each other. What waits here for another replica raises
    TransientError after `timeout_s`; what waits for rank 0 after `rank_timeout_s`."""

    def __init__(self, link: PeerLink, ranks: int, timeout_s: float, rank_timeout_s: float) -> None:
        """`ranks` are the tensor-parallel ranks of this replica. They wait for each other as long as their collectives
        do, as in layers: a replica that is stopped for a while goes on then, with all of its ranks."""
        self._link = link
        self.ranks = ranks
        self.timeout_s = timeout_s
        self._rank_timeout_s = rank_timeout_s

    @property
    def leads(self) -> bool:
        """Tells whether this is rank 0."""
        return self._link.rank == 0

    def announce(
        self,
        kind: TurnKind,
        owner: int = -1,
        batch: int = -1,
        piece: int = -1,
        end: int = -1,
        sizes: tuple[int, ...] = (),
    ) -> None:
        """At rank 0: tells the other ranks what comes next; see `Turn`."""
        if self.ranks > 1:
            turn = Turn(kind, owner, batch, piece, end, sizes)
            for rank in range(1, self.ranks):
                self._link.send(self._link.replica, turn, rank)

    def next(self) -> Turn:
        """At another rank: waits for what comes next."""
        return self._link.wait_turn(time.monotonic() + self._rank_timeout_s)

    def order_of(self, turn: Turn) -> PeerOrder:
        """At another rank: waits for the order that a SERVE turn names, which its owner sends to every rank."""
        return self._link.wait_order(turn.owner, turn.batch, self.deadline_s())

    def answer_to(self, number: int) -> Answer:
        """At another rank: waits for the answer to the own order of that number. Rank 0 serves meanwhile, see
        `OrdersAway.serve_until`."""
        return self._link.wait_answer(number, self.deadline_s())

    def deadline_s(self) -> float:
        """Returns the deadline of what begins to wait now, on the monotonic clock."""
        return time.monotonic() + self.timeout_s
