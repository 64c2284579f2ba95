"""Which groups to merge, so that every group that is short of KV memory gains what it needs."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """Says how much a group needs: it is short of `shortage_tokens`, zero if it is not. By dropping layers that it
    keeps several times it gains `reserve_tokens` without another group."""

    members: tuple[int, ...]
    shortage_tokens: int
    reserve_tokens: int = 0
    merges: int = 0

    @property
    def missing_tokens(self) -> int:
        """Gives the tokens that merging has to bring; negative where there are some to spare."""
        return self.shortage_tokens - self.reserve_tokens

    @property
    def is_acting(self) -> bool:
        """Tells whether the group has to drop something."""
        return self.merges > 0 or self.shortage_tokens > 0


Ranked = tuple[bool, int, int, tuple[int, ...], GroupNeed]


def choose_merges(
    groups: Iterable[GroupNeed],
    copy_tokens: int,
    largest: int,
    slowness_of: Callable[[Sequence[int]], float] | None = None,
) -> list[GroupNeed]:
    """Returns the groups that are to drop, those that need no merge included; `missing_tokens` above zero says that
    there is no way to gain more.

    Merging two groups frees one copy of the parameters, which is room for `copy_tokens`. The group that misses most
    goes first. Its partner is the one that misses least, if one copy is enough for both; else the smallest of those
    that stay out of it so far; else again the one that misses least. No group gets more than `largest` members.

    With up to six groups this finds the fewest merges in most cases, and one more than that in the others; to find
    them always is as hard as bin covering. It takes N log N comparisons for N groups.

    Where several would do alike, the partner is one with which the slowest link of all members is fastest, by the class
    `slowness_of(members)`; to find it takes a look at each of them for each merge.
    """
    everybody = list(groups)
    # The one that misses least first.
    short = sorted((group.missing_tokens, group.members, group) for group in everybody if group.missing_tokens > 0)
    calm = [_rank(group) for group in everybody if group.missing_tokens <= 0]
    heapq.heapify(calm)
    stuck: list[GroupNeed] = []

    def link(one: GroupNeed, other: GroupNeed) -> float:
        return 0 if slowness_of is None else slowness_of(one.members + other.members)

    def take_short(group: GroupNeed) -> GroupNeed:
        end = 1
        while slowness_of and end < len(short) and _alike(short[end][-1], short[0][-1]):
            end += 1
        return short.pop(min(range(end), key=lambda index: link(group, short[index][-1])))[-1]

    def take_calm(group: GroupNeed) -> GroupNeed:
        alike = [heapq.heappop(calm)]
        while slowness_of and calm and calm[0][:3] == alike[0][:3]:
            alike.append(heapq.heappop(calm))
        chosen = min(alike, key=lambda each: link(group, each[-1]))
        for each in alike:
            if each is not chosen:
                heapq.heappush(calm, each)
        return chosen[-1]

    while short:
        missing, _, group = short.pop()
        room = largest - len(group.members)
        least = short[0] if short and len(short[0][1]) <= room else None
        if least is not None and missing + least[0] <= copy_tokens:
            partner = take_short(group)
        elif calm and not calm[0][0] and calm[0][1] <= room:
            partner = take_calm(group)
        elif least is not None:
            partner = take_short(group)
        elif calm and calm[0][1] <= room:
            partner = take_calm(group)
        else:
            stuck.append(group)
            continue
        merged = _merged(group, partner, copy_tokens)
        if merged.missing_tokens > 0:
            bisect.insort(short, (merged.missing_tokens, merged.members, merged))
        else:
            heapq.heappush(calm, _rank(merged))
    acting = [group for *_, group in calm if group.is_acting]
    return sorted(acting + stuck, key=lambda group: group.members)


def _alike(one: GroupNeed, other: GroupNeed) -> bool:
    return (one.missing_tokens, len(one.members)) == (other.missing_tokens, len(other.members))


def _rank(group: GroupNeed) -> Ranked:
    """Orders groups: those that take no part come first, then the smallest; where equal, the one with most to spare."""
    return group.is_acting, len(group.members), group.missing_tokens, group.members, group


def _merged(one: GroupNeed, other: GroupNeed, copy_tokens: int) -> GroupNeed:
    return GroupNeed(
        members=tuple(sorted(one.members + other.members)),
        shortage_tokens=one.shortage_tokens + other.shortage_tokens,
        reserve_tokens=one.reserve_tokens + other.reserve_tokens + copy_tokens,
        merges=one.merges + other.merges + 1,
    )
