"""How fast memory gets from one replica to another: as measured, and what the nodes say where nothing is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kunserve_sgl.policy.plan import ReplicaFacts

# Links are told from each other by whole factors of this, counted from the fastest: measurements of one and the same
# differed by a factor of 3 on a busy machine.
_ALIKE = 4.0


@dataclass(frozen=True, slots=True)
class Links:
    """Says which machines replicas are on, where these differ, and how fast links are, in bytes per second, by both
    replicas in ascending order, where they have been measured. `maps[r][other]` says whether two map each other's
    memory, where some do and others do not."""

    nodes: Mapping[int, str] = field(default_factory=dict)
    speeds: Mapping[tuple[int, int], float] = field(default_factory=dict)
    maps: Sequence[Sequence[bool]] = ()
    _fastest: Mapping[bool, float] = field(init=False, repr=False, compare=False)  # by whether it is by message
    _first_by_message: float = field(init=False, repr=False, compare=False)  # class of what is by message

    def __post_init__(self) -> None:
        mapped = {pair: speed for pair, speed in self.speeds.items() if not self._is_by_message(*pair)}
        others = [speed for pair, speed in self.speeds.items() if pair not in mapped]
        fastest = {False: max(mapped.values(), default=0.0), True: max(others, default=0.0)}
        object.__setattr__(self, "_fastest", fastest)
        first = 1 + max(itertools.starmap(self._slowness_of_reading, mapped), default=0) if self.maps else 0
        object.__setattr__(self, "_first_by_message", first)

    def slowness(self, one: int, other: int) -> float:
        """Returns the class of a link: 0 of one that is alike to the fastest, and the more the slower, so that chance
        decides between no two. One that has not been measured is taken for fast within a machine, and for slower than
        all between two. Where some map each other's memory, links of either way have classes of their own, and those
        by message come after the others that have been measured."""
        first = self._first_by_message if self._is_by_message(one, other) else 0
        return first + self._slowness_of_reading(one, other)

    def _is_by_message(self, one: int, other: int) -> bool:
        return bool(self.maps) and not self.maps[one][other]

    def _slowness_of_reading(self, one: int, other: int) -> float:
        by_message = self._is_by_message(one, other)
        known = self.speeds.get((min(one, other), max(one, other)))
        if known is not None:
            return max(0, math.ceil(math.log(self._fastest[by_message] / known, _ALIKE)) - 1)
        is_on_one = self.nodes.get(one, "") == self.nodes.get(other, "") or (bool(self.maps) and not by_message)
        return 0 if is_on_one else math.inf

    def slowness_of(self, members: Iterable[int]) -> float:
        """Returns the class of the slowest link of a group."""
        return max(itertools.starmap(self.slowness, itertools.combinations(members, 2)), default=0)

    def neighbourhoods(self, replicas: Iterable[int]) -> dict[int, int]:
        """Divides replicas into sets within which all links are fast, of class 0, and returns the number of the set of
        each. It takes a comparison for each pair."""
        found: list[list[int]] = []
        for replica in sorted(replicas):
            near = (each for each in found if not any(self.slowness(one, replica) for one in each))
            home = next(near, None)
            if home is None:
                found.append([replica])
            else:
                home.append(replica)
        return {replica: number for number, members in enumerate(found) for replica in members}


def links_of(facts: Sequence[ReplicaFacts], maps: Sequence[Sequence[bool]] = ()) -> Links:
    """Returns what is known of the links between all replicas. `maps` are as in `Links`."""
    return Links(
        nodes={fact.replica: fact.node for fact in facts},
        speeds={
            (fact.replica, peer): speed
            for fact in facts
            for peer, speed in enumerate(fact.link_speeds)
            if fact.replica < peer and speed
        },
        maps=maps,
    )
