"""The division of a batch by homes: every slot in one part, and every new token's KV stored once."""

from __future__ import annotations

import numpy as np
import pytest

from kunserve_sgl.exchange.attention_parts import divide_batch, slots_of_rows


def test_slots_of_rows_are_those_of_the_table() -> None:
    table = np.arange(100, dtype=np.int32).reshape(5, 20) * 3
    rows, lengths = np.array([4, 0, 2]), np.array([20, 1, 0])
    assert slots_of_rows(table, rows, lengths).tolist() == [*table[4].tolist(), 0]


def test_a_batch_in_three_places() -> None:
    """A decode step, a chunk whose new tokens are in two places, and a request that has nothing new."""
    slots = np.arange(100, 112)
    homes = np.array([0, 0, 1, *(2, 0, 0, 2, 2, 0), *(1, 1, 1)])
    parts = divide_batch(slots, homes, np.array([3, 6, 3]), np.array([1, 3, 0]))
    assert list(parts) == [0, 1, 2]
    here, there, elsewhere = parts[0], parts[1], parts[2]
    assert here.tokens.tolist() == [0, 1, 2, 3]
    assert here.new_tokens.tolist() == [3]
    assert here.slots.query_counts.tolist() == [1, 3]
    assert here.slots.first_positions.tolist() == [2, 3]
    assert here.slots.slot_counts.tolist() == [2, 3]
    assert here.slots.slots.tolist() == [100, 101, 104, 105, 108]
    assert here.slots.positions.tolist() == [0, 1, 1, 2, 5]
    assert here.slots.new_slots.tolist() == [108]
    assert (there.tokens.tolist(), there.new_tokens.tolist(), there.slots.new_slots.tolist()) == ([0], [0], [102])
    assert elsewhere.tokens.tolist() == [1, 2, 3]
    assert elsewhere.new_tokens.tolist() == [1, 2]
    assert elsewhere.slots.slots.tolist() == [103, 106, 107]
    assert elsewhere.slots.new_slots.tolist() == [106, 107]


@pytest.mark.parametrize("seed", range(30))
def test_random_batches_are_divided_without_loss_or_overlap(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, size=random.integers(1, 8))
    counts = np.where(random.random(len(lengths)) < 0.5, 1, random.integers(0, lengths + 1))
    total = int(lengths.sum())
    slots = random.permutation(10 * total)[:total]
    homes = random.integers(random.integers(1, 5), size=total)
    parts = divide_batch(slots, homes, lengths, counts)
    seen: dict[int, list[tuple[int, int]]] = {}  # by request: position and slot
    stored: dict[int, int] = {}  # by new token: slot
    firsts, starts = lengths - counts, np.cumsum(counts) - counts
    for home, part in parts.items():
        requests = [r for r in range(len(lengths)) if counts[r] > 0 and starts[r] in part.tokens]
        assert part.slots.first_positions.tolist() == firsts[requests].tolist()
        assert part.slots.query_counts.tolist() == counts[requests].tolist()
        assert part.tokens.tolist() == [starts[r] + t for r in requests for t in range(counts[r])]
        bounds = np.cumsum(part.slots.slot_counts)[:-1]
        for request, own, positions in zip(
            requests, np.split(part.slots.slots, bounds), np.split(part.slots.positions, bounds), strict=True
        ):
            assert len(own) > 0
            assert (np.diff(positions) > 0).all()
            begin = int(lengths[:request].sum())
            assert (homes[begin + positions] == home).all()
            seen.setdefault(request, []).extend(zip(positions.tolist(), own.tolist(), strict=True))
        new = zip(part.new_tokens.tolist(), part.slots.new_slots.tolist(), strict=True)
        for token, slot in new:
            assert token not in stored
            stored[token] = slot
    for request, own in enumerate(np.split(slots, np.cumsum(lengths)[:-1])):
        expected = list(enumerate(own.tolist())) if counts[request] else []
        assert sorted(seen.get(request, [])) == expected
        for token in range(counts[request]):
            assert stored[int(starts[request]) + token] == own[firsts[request] + token]
    assert len(stored) == counts.sum()


def test_a_batch_that_contradicts_itself_is_refused() -> None:
    two = np.array([2])
    with pytest.raises(ValueError, match=r"\[3\] new tokens of requests of \[2\] tokens"):
        divide_batch(np.arange(2), np.zeros(2, np.int64), two, np.array([3]))
    with pytest.raises(ValueError, match="requests of 2 tokens with"):
        divide_batch(np.arange(3), np.zeros(3, np.int64), two, two)
