"""KV slots of one replica in the memory of another, without a drop: no layer moves, so there is no pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.plan import Extent, Plan, ReplicaFacts
from kunserve_sgl.policy.plan_check import check_facts, check_transition


@dataclass(frozen=True, slots=True)
class LendWish:
    """Says what is wanted: `lender` lets `borrower` have so many more KV slots, in frames that are free at `lender`."""

    lender: int
    borrower: int
    tokens: int


def lend_plan(current: Plan, facts: Sequence[ReplicaFacts], wish: LendWish) -> Plan:
    """Makes the plan in which the slots are there, rounded up to granules. Raises ConfigurationError where the wish
    makes no sense for this deployment, and TransientError where it cannot be done as things are."""
    check_facts(facts)
    last = current.replica_count - 1
    for name, replica in (("from", wish.lender), ("to", wish.borrower)):
        if not 0 <= replica <= last:
            raise ConfigurationError(f"{name}: there is no replica {replica}; accepted: 0 to {last}")
    if wish.lender == wish.borrower:
        raise ConfigurationError(f"from and to are both {wish.lender}; accepted: two replicas")
    if wish.tokens < 1:
        raise ConfigurationError(f"tokens: {wish.tokens}; accepted: 1 or more")
    for replica in (wish.lender, wish.borrower):
        if merged := [member for member in current.group_of(replica) if current.runs_apart(member)]:
            raise TransientError(
                f"replica {replica} depends on replicas {merged}, whose layers run elsewhere; POST /kunserve/restore "
                "first"
            )
    lender, borrower = facts[wish.lender], facts[wish.borrower]
    granules = -(-wish.tokens // borrower.granule_slots)
    needed = granules * sum(lender.granule_frames)
    if needed > lender.free_frames:
        raise TransientError(
            f"tokens: {wish.tokens} take {needed} frames, and replica {wish.lender} has {lender.free_frames} free; "
            f"POST /kunserve/kv with replica {wish.lender} and frames below 0 frees some"
        )
    end = max(extent.first_granule + extent.granules for extent in current.extents_of(wish.borrower))
    lent = Extent(wish.borrower, end, granules, (wish.lender,) * current.layer_count)
    new = replace(current, epoch=current.epoch + 1, extents=(*current.extents, lent))
    check_transition(current, new, facts)
    return new
