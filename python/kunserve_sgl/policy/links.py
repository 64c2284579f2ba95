"""How fast memory gets from one replica to another: as measured, and what the nodes say where nothing is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kunserve_sgl.policy.plan import ReplicaFacts

# Links that differ by less are alike: measurements of one and the same differed by a factor of 3 on a busy machine.
_ALIKE = 4.0


@dataclass(frozen=True, slots=True)
class Links:
    """Says which machines replicas are on, where these differ, and how fast links are, in bytes per second, by both
    replicas in ascending order, where they have been measured."""

    nodes: Mapping[int, str] = field(default_factory=dict)
    speeds: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def speed(self, one: int, other: int) -> float:
        """Returns the speed of a link. One that has not been measured is faster than all within a machine, and slower
        than all between two."""
        known = self.speeds.get((min(one, other), max(one, other)))
        if known is not None:
            return known
        return math.inf if self.nodes.get(one, "") == self.nodes.get(other, "") else 0.0

    def slowest(self, members: Iterable[int]) -> float:
        """Returns the speed of the slowest link of a group."""
        return min(itertools.starmap(self.speed, itertools.combinations(members, 2)), default=math.inf)

    def neighbourhoods(self, replicas: Iterable[int]) -> dict[int, int]:
        """Divides replicas into sets within which all links are fast, and returns the number of the set of each. Fast
        is what is alike to the fastest that has been measured, and a link within a machine that has not been. It takes
        a comparison for each pair."""
        fast = max(self.speeds.values(), default=0.0) / _ALIKE
        found: list[list[int]] = []
        for replica in sorted(replicas):
            near = (each for each in found if all(self.speed(one, replica) >= max(fast, 1.0) for one in each))
            home = next(near, None)
            if home is None:
                found.append([replica])
            else:
                home.append(replica)
        return {replica: number for number, members in enumerate(found) for replica in members}


def links_of(facts: Sequence[ReplicaFacts]) -> Links:
    """Returns what is known of the links between all replicas."""
    return Links(
        nodes={fact.replica: fact.node for fact in facts},
        speeds={
            (fact.replica, peer): speed
            for fact in facts
            for peer, speed in enumerate(fact.link_speeds)
            if fact.replica < peer and speed
        },
    )
