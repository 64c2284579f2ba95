"""Slot space and elastic KV: alignment, growth and shrinkage on real memory; bytes stay where they were put."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from kunserve_sgl.errors import ConfigurationError, InvariantError
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.errors import PoolFullError
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.slot_space import KvBuffer, SlotRange, granule_slots, plan_slot_space
from kunserve_sgl.memory.virtual_range import hole_at
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

FRAME_BYTES = 4096
LAYERS = 3
HEADS, DIM = 2, 24  # a row of 192 bytes: boundaries meet every 64 slots and 3 frames


def mha_buffers(row_bytes: int = HEADS * DIM * 4) -> list[KvBuffer]:
    return [KvBuffer(layer, name, row_bytes) for layer in range(LAYERS) for name in ("k", "v")]


@pytest.mark.parametrize(
    ("row_bytes", "frame_bytes", "page_size", "slots"),
    [
        (2048, 2 << 20, 1, 1024),  # Llama-3.1-8B bfloat16
        (1152, 2 << 20, 1, 16384),  # MLA: 512 + 64 in bfloat16
        (1152, 2 << 20, 64, 16384),
        (256, 4096, 1, 16),
        (256, 4096, 64, 64),
        (192, 4096, 1, 64),
        (8192, 4096, 1, 1),
    ],
)
def test_granule_is_the_smallest_aligned_count(row_bytes: int, frame_bytes: int, page_size: int, slots: int) -> None:
    buffers = [KvBuffer(0, "k", row_bytes)]
    assert granule_slots(buffers, frame_bytes, page_size) == slots
    assert not any(smaller % page_size == 0 and smaller * row_bytes % frame_bytes == 0 for smaller in range(1, slots))


def test_replicas_share_no_slot() -> None:
    space = plan_slot_space(mha_buffers(), FRAME_BYTES, 16, replica_count=3, replica_slots=200)
    owned = [space.sink, *(space.slots_of(replica, 0, space.replica_granules) for replica in range(3))]
    covered = [slot for slots in owned for slot in range(slots.first, slots.stop)]
    assert covered == list(range(space.slot_count))
    assert space.replica_granules * space.granule_slots >= 200
    for slots in owned:
        assert slots.first % 16 == 0


def test_beyond_the_reserved_space_names_the_flag() -> None:
    space = plan_slot_space(mha_buffers(), FRAME_BYTES, 1, replica_count=1, replica_slots=64)
    with pytest.raises(ConfigurationError, match="--kunserve-max-slots"):
        space.slots_of(0, 1, 1)
    with pytest.raises(ConfigurationError, match="accepted: 0 to 0"):
        space.slots_of(1, 0, 1)


@pytest.fixture
def kv() -> Iterator[ElasticKv]:
    vmm = MemfdVmm(FRAME_BYTES)
    pool = FramePool(vmm, "replica 1")
    pool.add_frames(18 * 10)
    space = plan_slot_space(mha_buffers(), FRAME_BYTES, 16, replica_count=2, replica_slots=1000)
    elastic = ElasticKv(pool, space, mha_buffers(), replica=1)
    yield elastic
    pool.check()
    vmm.close()


def tensors(kv: ElasticKv) -> dict[KvBuffer, torch.Tensor]:
    return {buffer: kv.tensor(buffer, torch.float32, (HEADS, DIM)) for buffer in mha_buffers()}


def test_sink_is_there_from_the_start(kv: ElasticKv) -> None:
    assert kv.frames_per_granule == 18
    assert kv._pool.snapshot().kv == 18
    assert kv.slots.count == 0
    for tensor in tensors(kv).values():
        assert tensor.shape == (kv.space.slot_count, HEADS, DIM)
        tensor[0] = 1.0  # what a padded token does
        assert tensor[1 : kv.space.sink.stop].abs().max() == 0


def test_the_first_address_of_every_buffer_has_memory_at_all_times(kv: ElasticKv) -> None:
    """Triton's launcher asks the driver about the address of each tensor that a kernel gets: one in a hole is refused,
    whatever the kernel touches. Kernels get whole buffers, which begin with the sink."""
    layers = sorted({buffer.layer for buffer in mha_buffers()})
    assert kv.space.sink.first == 0
    sink = kv.frames_behind(kv.space.sink, layers)
    for change in (lambda: kv.grow(2), lambda: kv.shrink(1), lambda: kv.shrink(1)):
        change()
        assert kv.frames_behind(kv.space.sink, layers) == sink
    for tensor in tensors(kv).values():
        assert hole_at(tensor.data_ptr()) is None
        assert hole_at(tensor[kv.space.sink.stop :].data_ptr()) is not None, "the first slots of another replica"
    with pytest.raises(InvariantError):
        kv.shrink(1)
    assert kv.frames_behind(kv.space.sink, layers) == sink


def test_bytes_survive_growth_and_shrinkage_elsewhere(kv: ElasticKv) -> None:
    """Random growth and shrinkage; every slot that stays keeps its value, every new one is zero."""
    chance = random.Random(3)
    buffers = tensors(kv)
    expected: dict[int, float] = {}
    for step in range(300):
        if chance.random() < 0.5:
            granules = chance.randrange(0, 4)
            free = kv._pool.free_frames // kv.frames_per_granule
            if granules > free:
                before = kv.slots
                with pytest.raises(PoolFullError):
                    kv.grow(granules)
                assert kv.slots == before
                continue
            added = kv.grow(granules)
            for tensor in buffers.values():
                assert added.count == 0 or tensor[added.first : added.stop].abs().max() == 0
            for slot in range(added.first, added.stop):
                expected[slot] = step + slot / 1000
                for index, tensor in enumerate(buffers.values()):
                    tensor[slot] = expected[slot] + index
        else:
            taken = kv.shrink(chance.randrange(0, kv.granules + 1))
            for slot in range(taken.first, taken.stop):
                del expected[slot]
        assert sorted(expected) == list(range(kv.slots.first, kv.slots.stop))
        for index, tensor in enumerate(buffers.values()):
            for slot in expected:
                assert tensor[slot, 0, 0] == torch.tensor(expected[slot] + index)
        snapshot = kv._pool.snapshot()
        assert snapshot.kv == 18 * (1 + kv.granules)
        assert sum(kv.mapped_bytes.values()) == snapshot.kv * FRAME_BYTES


def test_new_memory_is_zero_although_the_frames_were_used(kv: ElasticKv) -> None:
    added = kv.grow(9)
    for tensor in tensors(kv).values():
        tensor[added.first : added.stop] = float("nan")
    kv.shrink(9)
    added = kv.grow(9)
    for tensor in tensors(kv).values():
        assert tensor[added.first : added.stop].abs().max() == 0


def test_shrinking_below_nothing_is_refused(kv: ElasticKv) -> None:
    kv.grow(2)
    with pytest.raises(InvariantError, match="3 granules cannot be taken from 2"):
        kv.shrink(3)
    assert kv.slots == SlotRange(kv.space.slots_of(1, 0, 1).first, 2 * kv.space.granule_slots)
    assert kv.last_slots(1) == kv.space.slots_of(1, 1, 1)
