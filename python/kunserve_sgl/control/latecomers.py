"""Members that had not taken the way back of a transition in time: the others went without them, and they may yet."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kunserve_sgl.control.messages import OrderReply, Phase, Result


@dataclass(slots=True)
class _Late:
    transition: int
    group: tuple[int, ...]  # who cannot change until it has followed
    ranks: set[int]  # that have not


class Latecomers:
    """Knows who is expected. Orders of the way back went to them all the same, and a rank that wakes carries them out
    one after the other; what it says to the last one shows that it is where it was before the transition."""

    def __init__(self) -> None:
        self._late: dict[int, _Late] = {}

    def expect(self, replica: int, ranks: Collection[int], transition: int, group: tuple[int, ...]) -> None:
        """Takes note that `ranks` of a replica have not come back from a transition, which ended without them."""
        self._late[replica] = _Late(transition, group, set(ranks))

    def forget(self, replica: int) -> None:
        """Takes note that a replica has ended, or has become one by itself in another way."""
        self._late.pop(replica, None)

    def on_reply(self, reply: OrderReply) -> tuple[int, ...]:
        """Takes in an answer; returns the group that is as before the transition now, empty where there is none. That
        is so when nobody else in it is late."""
        late = self._late.get(reply.replica)
        if late is None or (late.transition, Phase.REOPEN) != (reply.transition, reply.phase):
            return ()
        if reply.result is Result.REFUSED:
            return ()
        late.ranks.discard(reply.rank)
        if late.ranks:
            return ()
        del self._late[reply.replica]
        return () if any(other in self._late for other in late.group) else late.group
