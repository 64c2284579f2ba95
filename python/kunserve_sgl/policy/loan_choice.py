"""Who lends KV memory to whom where one replica is short and others are idle: the choice of the automatic mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from kunserve_sgl.policy.drop_plan import capacity_tokens
from kunserve_sgl.policy.plan import Plan, ReplicaFacts

# What an idle lender keeps of its slots, free and lent frames at least, as slots: requests that come meanwhile begin
# there.
_KEPT_SHARE = 1 / 8


@dataclass(frozen=True, slots=True)
class Memory:
    """Says what memory a replica has, in tokens, of which granules have `granule_tokens`.

    `base_tokens` are its own slots, of which `least_tokens` cannot become free frames; `free_tokens` its free frames
    have room for. `room_tokens` more have addresses. It `shares` memory where somebody has slots in that of another;
    if it is the one whose memory that is, it `lends`, else it `borrows`. Others have `lent_tokens` of its memory.
    """

    granule_tokens: int
    base_tokens: int
    capacity_tokens: int
    least_tokens: int = 0
    free_tokens: int = 0
    room_tokens: int = 0
    lends: bool = False
    borrows: bool = False
    lent_tokens: int = 0

    @property
    def shares(self) -> bool:
        """Tells whether it depends on others, or they on it."""
        return self.lends or self.borrows

    def spare_tokens(self, needed_tokens: int) -> int:
        """Counts its own slots that can become free frames, where its requests need so many. Slots come and go only
        while it shares memory with nobody."""
        if self.shares:
            return 0
        kept = max(needed_tokens, self.least_tokens, self._kept_tokens)
        return max(0, self.base_tokens - kept) // self.granule_tokens * self.granule_tokens

    def is_idle(self, needed_tokens: int) -> bool:
        """Tells whether so little is needed that it keeps more than that in any case, whatever it has lent by now."""
        return needed_tokens <= self._kept_tokens

    @property
    def _kept_tokens(self) -> int:
        return round(_KEPT_SHARE * (self.base_tokens + self.free_tokens + self.lent_tokens))


@dataclass(frozen=True, slots=True)
class LoanChoice:
    """Says what is to be lent. Before, `frees_tokens` of the lender's slots have to become free frames."""

    lender: int
    borrower: int
    tokens: int
    frees_tokens: int = 0


def choose_loan(
    memory: Mapping[int, Memory],
    shortages: Mapping[int, int],
    wanted: Mapping[int, int],
    needs: Mapping[int, int],
    lenders_for: Callable[[int], Collection[int]],
    group_of: Callable[[int], Collection[int]],
    largest_group: int,
    slowness: Callable[[int, int], float] = lambda lender, borrower: 0,
) -> LoanChoice | None:
    """Returns the next loan for the replica that is most short, of those whose whole shortage others can lend; None
    where there is none.

    `shortages` and `wanted` say by borrower how many tokens are missing, and how many it had better get; `needs` how
    many each replica keeps for itself. `lenders_for` says who may lend to a replica. Of those that have all that is
    wanted one with the fastest link lends, by its class `slowness(lender, borrower)`, the one of these that has most;
    else the one that has most, and several do after one another where one has not enough, in groups of `largest_group`
    at most. A replica that lends borrows nothing. It takes N log N steps for N replicas, for each that is short.
    """
    for borrower in sorted(shortages, key=lambda replica: (-shortages[replica], replica)):
        mine = memory.get(borrower)
        if mine is None or mine.lends:
            continue
        lenders = {one: slowness(one, borrower) for one in lenders_for(borrower) if not memory[one].borrows}
        enough = _up(max(shortages[borrower], wanted[borrower]), mine.granule_tokens)
        offers = _offers(memory, needs, lenders, enough)
        group, reach, first = set(group_of(borrower)), 0, None
        for lender, tokens in offers:
            if len(joined := group.union(group_of(lender))) <= largest_group:
                first = (lender, tokens) if first is None else first
                group, reach = joined, reach + tokens
        missing = _up(shortages[borrower], mine.granule_tokens)
        if first is None or min(reach, mine.room_tokens) < missing:
            continue
        lender, most = first
        theirs = memory[lender]
        tokens = min(most, mine.room_tokens, enough)
        if tokens <= theirs.free_tokens:
            return LoanChoice(lender, borrower, tokens)
        # All that it has to spare: it can free no more while it lends.
        return LoanChoice(lender, borrower, tokens, theirs.spare_tokens(needs.get(lender, 0)))
    return None


def _offers(
    memory: Mapping[int, Memory], needs: Mapping[int, int], lenders: Mapping[int, float], enough: int
) -> list[tuple[int, int]]:
    """Lists what each of `lenders`, with the classes of their links, can lend, in tokens: those first that have
    `enough` with the fastest of them first, then most first; nothing of those that can lend none."""
    offers = [(one, memory[one].free_tokens + memory[one].spare_tokens(needs.get(one, 0))) for one in lenders]

    def rank(offer: tuple[int, int]) -> tuple[int, float, int, int]:
        one, tokens = offer
        return -min(tokens, enough), lenders[one], -tokens, one

    return sorted((offer for offer in offers if offer[1]), key=rank)


def _up(tokens: int, granule_tokens: int) -> int:
    return -(-tokens // granule_tokens) * granule_tokens


def memory_of(plan: Plan, facts: Sequence[ReplicaFacts]) -> dict[int, Memory]:
    """Returns the memory of each replica that shares no layers with others, and whose group does not."""
    borrowers: set[int] = set()
    lent: Counter[int] = Counter()  # granules, by home
    for extent in plan.extents:
        for home in set(extent.homes) - {extent.replica}:
            borrowers.add(extent.replica)
            lent[home] += extent.granules
    found = {}
    for group in plan.groups:
        if any(map(plan.runs_apart, group)):
            continue
        for fact in (facts[member] for member in group):
            granule = fact.granule_slots
            end = max(extent.first_granule + extent.granules for extent in plan.extents_of(fact.replica))
            found[fact.replica] = Memory(
                granule_tokens=granule,
                base_tokens=fact.base_granules * granule,
                capacity_tokens=capacity_tokens(plan, fact),
                least_tokens=fact.least_granules * granule,
                free_tokens=fact.free_frames // sum(fact.granule_frames) * granule,
                room_tokens=(fact.max_granules - end) * granule,
                lends=fact.replica in lent,
                borrows=fact.replica in borrowers,
                lent_tokens=lent[fact.replica] * granule,
            )
    return found
