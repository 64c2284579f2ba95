"""How each two replicas use each other's memory: mapped, or by messages, as their ranks have reported."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from kunserve_sgl.args import RemoteAttentionBy
from kunserve_sgl.control.messages import Device
from kunserve_sgl.control.roster import Roster

logger = logging.getLogger(__name__)


class Ways:
    """Decides for all. It is the one way that the flags say or, with AUTO, for each two what works between them.

    `chosen[r][other]` says whether r maps memory of `other`; it is empty until `choose` is called, and another object
    when it changes."""

    def __init__(self, way: RemoteAttentionBy, roster: Roster, replicas: int) -> None:
        """`roster` has what the ranks of so many `replicas` have reported."""
        self._way = way
        self._roster = roster
        self._replicas = range(replicas)
        self.chosen: tuple[tuple[bool, ...], ...] = ()
        self._differ = False

    @property
    def must_map(self) -> bool:
        """Tells whether replicas share memory only where they map each other's."""
        return self._way is RemoteAttentionBy.MAP

    def choose(self) -> None:
        """Decides anew; all replicas have reported, and one may be on another machine than before."""
        chosen = tuple(tuple(self._works(one, other) for other in self._replicas) for one in self._replicas)
        if chosen == self.chosen:
            return
        self.chosen = chosen
        self._differ = len({chosen[one][other] for one in self._replicas for other in range(one)}) > 1
        if self._way is RemoteAttentionBy.AUTO:
            pairs = [f"{other} and {one}" for one in self._replicas for other in range(one) if chosen[one][other]]
            who = f"between replicas {', '.join(pairs)}, and used by messages between others" if pairs else "by nobody"
            logger.info("KunServe: memory of others is mapped %s", who)

    def _works(self, one: int, other: int) -> bool:
        return self.must_map or (self._way is RemoteAttentionBy.AUTO and self._roster.map_each_other(one, other))

    def maps(self, one: int, other: int) -> bool:
        """Tells whether two replicas map each other's memory. It has been decided."""
        return self.chosen[one][other]

    @property
    def that_differ(self) -> tuple[tuple[bool, ...], ...]:
        """Gives `chosen` where some map each other's memory and others do not; else nothing."""
        return self.chosen if self._differ else ()

    def of(self, replica: int) -> tuple[bool, ...]:
        """Returns for `Welcome` which replicas' memory one maps; nothing where that is the same for all."""
        return self.chosen[replica] if self._way is RemoteAttentionBy.AUTO else ()

    def can_lend(self, owner: int, devices: Sequence[Device]) -> bool:
        """Tells whether those who have these `devices`, by rank, can get at memory of `owner`."""
        return not self.must_map or self._roster.reaches(owner, devices)

    def maps_at(self, owner: int, devices: Sequence[Device]) -> bool:
        """Tells for `LayerLoan` whether those who have these `devices`, and may not have reported yet, map memory of
        `owner`; never where that is the same for all."""
        return self._way is RemoteAttentionBy.AUTO and self._roster.reaches(owner, devices)

    def are_apart(self, members: Collection[int]) -> bool:
        """Tells whether some of `members` are on other GPUs than others, as far as they have reported."""
        return self._roster.are_apart(members)
