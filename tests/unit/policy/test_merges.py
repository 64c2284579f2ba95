"""Which groups are merged: against an exhaustive search over all ways to merge."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from kunserve_sgl.policy.merges import GroupNeed, choose_merges

COPY = 100


def singles(*shortages: int) -> list[GroupNeed]:
    return [GroupNeed((replica,), shortage) for replica, shortage in enumerate(shortages)]


def partitions(items: Sequence[GroupNeed]) -> Iterator[list[list[GroupNeed]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, block in enumerate(rest):
            yield [*rest[:i], [items[0], *block], *rest[i + 1 :]]


def covers(block: Sequence[GroupNeed]) -> bool:
    gain = sum(group.reserve_tokens for group in block) + COPY * (len(block) - 1)
    return sum(group.shortage_tokens for group in block) <= gain


def fewest_merges(groups: Sequence[GroupNeed], largest: int) -> int | None:
    """Over all ways to merge that cover every group's shortage."""
    return min(
        (
            len(groups) - len(blocks)
            for blocks in partitions(groups)
            if all(covers(block) for block in blocks)
            and all(len(block) == 1 or sum(len(g.members) for g in block) <= largest for block in blocks)
        ),
        default=None,
    )


def random_groups(chance: random.Random, shape: str) -> list[GroupNeed]:
    groups, replica = [], 0
    same = chance.randrange(0, 90)
    while replica < 6 and (len(groups) < 2 or chance.random() < 0.8):
        size = chance.choice((1, 1, 1, 2)) if shape == "mixed" and replica < 5 else 1
        shortage = same if shape == "alike" else chance.choice((0, chance.randrange(0, 100)))
        reserve = chance.randrange(0, 60) if size > 1 else 0
        groups.append(GroupNeed(tuple(range(replica, replica + size)), shortage, reserve))
        replica += size
    return groups


@pytest.mark.parametrize("shape", ["alike", "uneven", "mixed"])
def test_against_exhaustive_search(shape: str) -> None:
    chance = random.Random(shape)
    solvable = optimal = 0
    for _ in range(400):
        groups = random_groups(chance, shape)
        best = fewest_merges(groups, largest=6)
        chosen = choose_merges(groups, COPY, largest=6)
        merges = sum(group.merges for group in chosen)
        if best is None:
            assert any(group.missing_tokens > 0 for group in chosen)
            continue
        solvable += 1
        assert all(group.missing_tokens <= 0 for group in chosen), groups
        assert best <= merges <= best + 1, groups
        optimal += merges == best
    assert solvable > 100
    print(f"{shape}: {optimal} of {solvable} with the fewest merges")
    assert optimal == solvable if shape == "alike" else optimal > 0.95 * solvable


@pytest.mark.parametrize("seed", range(100))
def test_what_is_chosen_is_consistent(seed: int) -> None:
    chance = random.Random(seed)
    groups = [
        GroupNeed((replica,), chance.choice((0, chance.randrange(150)))) for replica in range(chance.randrange(1, 40))
    ]
    largest = chance.randrange(1, 6)
    chosen = choose_merges(groups, COPY, largest)
    members = [member for group in chosen for member in group.members]
    assert len(members) == len(set(members))
    assert {m for group in groups if group.shortage_tokens for m in group.members} <= set(members)
    for group in chosen:
        assert len(group.members) <= largest
        assert group.merges == len(group.members) - 1
        assert group.reserve_tokens == COPY * group.merges
        assert group.shortage_tokens == sum(groups[member].shortage_tokens for member in group.members)


def test_nothing_is_merged_without_need() -> None:
    assert choose_merges(singles(0, 0, 0), COPY, 8) == []
    pair = GroupNeed((0, 1), 40, reserve_tokens=50)
    assert choose_merges([pair, GroupNeed((2,), 0)], COPY, 8) == [pair]


def test_one_copy_serves_two_where_it_is_enough() -> None:
    chosen = choose_merges(singles(90, 10, 90, 10), COPY, 8)
    assert [group.members for group in chosen] == [(0, 3), (1, 2)]


def test_the_smallest_partner_is_taken() -> None:
    groups = [GroupNeed((0,), 60), GroupNeed((1, 2), 0), GroupNeed((3,), 0), GroupNeed((4,), 60)]
    assert [group.members for group in choose_merges(groups, COPY, 8)] == [(0, 1, 2), (3, 4)]
    assert [group.members for group in choose_merges(groups, COPY, 2)] == [(0,), (3, 4)]
