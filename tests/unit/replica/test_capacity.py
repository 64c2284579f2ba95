"""The KV capacity of one rank: frames go behind slots and come back, and requests keep the room that they need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transition_world import BASE_GRANULES, Rank

from kunserve_sgl.errors import TransientError
from kunserve_sgl.replica.capacity import BadResizeError
from kunserve_sgl.replica.engine import SlotsInUseError


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    made = Rank(tmp_path, replica=0, rank=0, replicas=2, reserve_frames=300)
    yield made
    made.memory.frames.check()
    made.close()


def test_frames_come_and_go(rank: Rank) -> None:
    step, free, size = rank.kv.frames_per_granule, rank.pool.free_frames, rank.allocator.size
    granule = rank.kv.space.granule_slots
    assert f"{size} -> {size + 2 * granule} tokens (+{2 * step} frames" in rank.capacity.resize(2 * step)
    assert (rank.allocator.size, rank.pool.free_frames) == (size + 2 * granule, free - 2 * step)
    assert rank.engine.capacity_changes == 1
    assert rank.capacity.status()["capacity_tokens"] == rank.allocator.size
    assert "0 tokens moved, 0 evicted" in rank.capacity.resize(-2 * step)
    assert (rank.allocator.size, rank.pool.free_frames) == (size, free)
    assert rank.engine.capacity_changes == 2


def test_what_cannot_be_changes_nothing(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    step = rank.kv.frames_per_granule
    before = rank.pool.snapshot(), rank.allocator.size
    for frames in (0, 1, -1, step + 1):
        with pytest.raises(BadResizeError, match=f"multiples of {step} other than 0"):
            rank.capacity.resize(frames)
    with pytest.raises(TransientError, match="are not free"):
        rank.capacity.resize(1000 * step)
    with pytest.raises(TransientError, match="has to keep one granule"):
        rank.capacity.resize(-BASE_GRANULES * step)
    monkeypatch.setattr(rank.engine, "all_ranks", lambda succeeded: False)
    with pytest.raises(TransientError, match="another tensor-parallel rank"):
        rank.capacity.resize(step)
    assert (rank.pool.snapshot(), rank.allocator.size) == before
    assert rank.engine.capacity_changes == 0


def test_slots_that_requests_need_stay(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used, what a prefill needs, and what a request may need before it ends."""
    last, size = rank.kv.last_slots(1), rank.allocator.size
    used = rank.allocator.alloc(size - last.count)
    assert rank.capacity.can_shrink_by(last)
    rank.engine.prefill_rest_tokens = 1
    assert not rank.capacity.can_shrink_by(last)
    rank.engine.cached = 1  # it may go
    assert rank.capacity.can_shrink_by(last)
    rank.engine.prefill_rest_tokens = rank.engine.cached = 0
    monkeypatch.setattr(rank.engine.limits, "refusal", lambda capacity: f"{capacity} are too few")
    with pytest.raises(SlotsInUseError, match=f"{size - last.count} are too few"):
        rank.capacity.resize(-rank.kv.frames_per_granule)
    assert rank.allocator.size == size
    rank.allocator.free(used)
