"""Pieces in the frame pool: free frames are made anew in the sizes that are wanted, without one more or less."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cuda_model.driver import GRANULARITY_BYTES, FakeBindings, make_fake_cuda
from kunserve_sgl.errors import InvariantError
from kunserve_sgl.memory.errors import MappingFailedError, OutOfMemoryError, PoolFullError, SplitPieceError
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.virtual_range import LayerSpan, Span
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

RANGE_FRAMES = 64


class World:
    """A pool over the modelled driver, whose GPU has no memory but the pool's, with a range for each of some layers."""

    def __init__(self, frames: int) -> None:
        self.bindings = FakeBindings(memory_frames=frames)
        self.pool = FramePool(make_fake_cuda(self.bindings), "replica 0")
        self.ranges = [self.pool.vmm.reserve(RANGE_FRAMES, f"k {layer}") for layer in range(8)]
        self.frames = frames

    def at(self, layer: int, first: int, count: int) -> LayerSpan:
        return LayerSpan(layer, Span(self.ranges[layer], first, count))

    def calls(self, action: Callable[[], object]) -> dict[str, list[int]]:
        """What an action creates, in frames, and how often it releases."""
        self.bindings.log.clear()
        action()
        return {
            "create": [call[1] // GRANULARITY_BYTES for call in self.bindings.calls("cuMemCreate")],
            "release": [1 for _ in self.bindings.calls("cuMemRelease")],
        }

    def check(self) -> None:
        self.pool.check()
        assert self.pool.snapshot().total == self.frames
        assert self.bindings.broken_rules == []


def test_what_goes_and_what_comes_may_have_different_sizes() -> None:
    world = World(20)
    pool = world.pool
    for layer in range(2):
        pool.add_frames(10, in_one_piece=True)
        pool.map_parameters([world.at(layer, 0, 10)], in_one_piece=True)
    with pytest.raises(SplitPieceError):
        pool.unmap_parameters([world.at(0, 0, 5)])
    pool.unmap_parameters([world.at(0, 0, 10)])
    kv = [world.at(2, 0, 3), world.at(3, 0, 3)]
    calls = world.calls(lambda: pool.map_kv(kv, in_one_piece=True))
    assert calls == {"create": [3, 3, 4], "release": [1]}
    assert len(world.bindings.calls("cuMemMap")) == len(world.bindings.calls("cuMemSetAccess")) == 2
    assert (pool.free_frames, pool.snapshot().kv) == (4, 6)
    world.check()
    pool.unmap_kv(kv)
    assert world.calls(lambda: pool.map_kv(kv, in_one_piece=True)) == {"create": [], "release": []}
    pool.unmap_kv(kv)
    calls = world.calls(lambda: pool.map_parameters([world.at(0, 0, 10)], in_one_piece=True))
    assert calls == {"create": [10], "release": [1, 1, 1]}
    world.check()
    # Frame by frame again, as they were before there were pieces.
    pool.unmap_parameters([world.at(0, 0, 10)])
    calls = world.calls(lambda: pool.map_kv([world.at(2, 0, 2)]))
    assert calls == {"create": [1, 1, 8], "release": [1]}
    pool.unmap_kv([world.at(2, 1, 1)])
    world.check()


def test_what_is_missing_is_refused_before_anything_is_given_back() -> None:
    world = World(10)
    world.pool.add_frames(10, in_one_piece=True)
    before = world.bindings.state()
    with pytest.raises(PoolFullError):
        world.pool.map_kv([world.at(0, 0, 11)], in_one_piece=True)
    assert world.bindings.state() == before


@pytest.mark.parametrize("failing", range(3))
def test_memory_that_does_not_come_back_in_other_sizes_comes_back_as_it_was(failing: int) -> None:
    world = World(10)
    pool = world.pool
    for size in (4, 6):
        pool.add_frames(size, in_one_piece=True)
    creations: list[int] = []

    def refuse(name: str, number: int) -> bool:
        if name == "cuMemCreate":
            creations.append(number)
        return name == "cuMemCreate" and len(creations) in (failing + 1, failing + 2)  # it is asked twice

    world.bindings.fail_when(refuse)
    with pytest.raises(OutOfMemoryError):
        pool.map_kv([world.at(0, 0, 5), world.at(1, 0, 3)], in_one_piece=True)
    world.bindings.fail_when(lambda name, number: False)
    assert pool.free_frames == 10
    world.check()
    assert sorted(size.piece.size_bytes for size in world.bindings.allocations.values() if not size.released) == [
        4 * GRANULARITY_BYTES,
        6 * GRANULARITY_BYTES,
    ]
    pool.map_kv([world.at(0, 0, 5), world.at(1, 0, 3)], in_one_piece=True)
    world.check()


def test_memory_that_does_not_come_back_at_all_stops_the_pool() -> None:
    world = World(10)
    world.pool.add_frames(10, in_one_piece=True)
    world.bindings.fail_when(lambda name, number: name == "cuMemCreate")
    with pytest.raises(InvariantError, match="could not be undone"):
        world.pool.map_kv([world.at(0, 0, 5)], in_one_piece=True)


def test_a_piece_that_cannot_be_mapped_stays_free() -> None:
    world = World(10)
    world.pool.add_frames(10, in_one_piece=True)
    world.bindings.fail_when(lambda name, number: name == "cuMemSetAccess")
    with pytest.raises(MappingFailedError):
        world.pool.map_kv([world.at(0, 0, 5)], in_one_piece=True)
    world.bindings.fail_when(lambda name, number: False)
    assert world.pool.free_frames == 10
    world.check()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_sizes_keeps_all_frames(seed: int) -> None:
    chance, world = random.Random(seed), World(60)
    for size in (1, 1, 1, 7, 20, 30):
        world.pool.add_frames(size, in_one_piece=True)
    mapped: dict[int, LayerSpan] = {}
    for _ in range(60):
        layer = chance.randrange(len(world.ranges))
        if layer in mapped:
            world.pool.unmap_kv([mapped.pop(layer)])
        else:
            wanted = chance.randint(1, 25)
            layers = [each for each in (layer, (layer + 1) % len(world.ranges)) if each not in mapped]
            spans = [world.at(each, 0, wanted) for each in layers]
            if wanted * len(spans) > world.pool.free_frames:
                with pytest.raises(PoolFullError):
                    world.pool.map_kv(spans, in_one_piece=True)
                continue
            world.pool.map_kv(spans, in_one_piece=chance.random() < 0.7)
            mapped.update(zip(layers, spans, strict=True))
        assert world.pool.free_frames == 60 - sum(each.span.count for each in mapped.values())
        world.check()


def test_where_any_part_can_be_mapped_nothing_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = FramePool(MemfdVmm(4096), "replica 0")
    pool.add_frames(10, in_one_piece=True)
    area = pool.vmm.reserve(10, "k 0")
    monkeypatch.setattr(pool.vmm, "create_frames", None)
    pool.map_kv([LayerSpan(0, Span(area, 0, 6))], in_one_piece=True)
    pool.unmap_kv([LayerSpan(0, Span(area, 2, 3))])
    assert pool.free_frames == 7
    pool.check()
