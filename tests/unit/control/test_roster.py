"""Members of a plan must have the same parameters, rank by rank."""

from __future__ import annotations

import pytest

from kunserve_sgl.control.messages import Hello
from kunserve_sgl.control.roster import Roster
from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.plan import ReplicaFacts

FACTS = ReplicaFacts(0, 4096, 16, 4, 100, 0, (10, 10), (1, 1))


def roster_of(checksums: dict[tuple[int, int], tuple[str, ...]]) -> Roster:
    roster = Roster(3, 2)
    for (replica, rank), sums in checksums.items():
        roster.add(Hello(replica, rank, "inbox", "frames", FACTS, sums))
    return roster


def test_ranks_hold_other_parts_but_each_the_same_as_its_peers() -> None:
    roster = roster_of({(replica, rank): (f"a{rank}", f"b{rank}") for replica in range(3) for rank in range(2)})
    roster.require_same_parameters([0, 1, 2])


def test_the_layer_and_the_replicas_that_differ_are_named() -> None:
    sums = {(replica, rank): ("a", "b") for replica in range(3) for rank in range(2)}
    roster = roster_of({**sums, (2, 1): ("a", "changed")})
    roster.require_same_parameters([0, 1])
    with pytest.raises(TransientError, match=r"replicas 0 and 2 have different parameters in layers \[1\] \(rank 1\)"):
        roster.require_same_parameters([0, 1, 2])
