"""The pool of request rows: global numbers, memory only where it is needed, and a ledger that misses no change."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from kunserve_sgl.errors import ConfigurationError, InvariantError
from kunserve_sgl.exchange.row_ledger import apply_update
from kunserve_sgl.integration.runner.request_rows import KunserveReqToTokenPool
from kunserve_sgl.memory.errors import MappingFailedError
from kunserve_sgl.memory.row_memory import RowMemory, plan_row_space
from kunserve_sgl.memory.virtual_range import hole_at
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

FRAME_BYTES = 4096
REPLICAS = 3
ROWS = 6
# 404 bytes per row, so frames end inside rows and neighbours share them.
WIDTH = 101
HOST = 2


@dataclass
class Request:
    """What the pool looks at in SGLang's request."""

    req_pool_idx: int | None = None
    inflight_middle_chunks: int = 0
    kv_committed_len: int = 0
    prefix_indices: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def make_pool(replica: int = 1, block_frames: int = 1) -> KunserveReqToTokenPool:
    return KunserveReqToTokenPool(
        ROWS, WIDTH, "cpu", MemfdVmm(FRAME_BYTES), replica, REPLICAS, block_frames * FRAME_BYTES
    )


def test_rows_of_replicas_are_disjoint_and_leave_the_padding_row() -> None:
    space = plan_row_space(ROWS, REPLICAS)
    assert space.rows_per_replica == 8
    assert [row for replica in range(REPLICAS) for row in space.rows_of(replica)] == list(range(1, space.row_count))
    assert plan_row_space(1, 1).row_count == 2
    with pytest.raises(ConfigurationError, match="accepted: 0 to 2"):
        space.rows_of(3)


def test_capacity_is_the_replicas_own() -> None:
    pool = make_pool()
    own = list(range(9, 15))
    assert pool.size == pool.available_size() == ROWS
    requests = [Request() for _ in range(ROWS)]
    assert pool.alloc(requests) == own
    assert pool.alloc([Request()]) is None
    assert pool.req_generation[own].tolist() == [1] * ROWS
    assert pool.req_to_token.shape == (len(pool.req_generation), WIDTH)
    for request in requests[:2]:
        pool.free(request)
    assert pool.available_size() == 2
    again = [Request(), Request()]
    pool.free(requests[4])
    assert pool.alloc(again) == own[:2], "the lowest free row comes first"
    pool.clear()
    assert pool.free_slots == own
    assert not pool.req_generation.any()


@pytest.mark.parametrize("replica", range(REPLICAS))
def test_only_mapped_rows_take_memory_and_keep_their_content(replica: int) -> None:
    pool = make_pool(replica)
    others = [other for other in range(REPLICAS) if other != replica]
    own = pool.req_to_token[list(pool.own_rows)]
    assert not own.any()
    assert not pool.req_to_token[0].any()
    at_start = pool.memory.mapped_bytes
    assert at_start <= 3 * FRAME_BYTES
    pool.req_to_token[list(pool.own_rows)] = 7
    for other in others:
        pool.map_rows_of(other)
        pool.map_rows_of(other)
        rows = np.array(pool.space.rows_of(other))
        pool.reach(rows[-1:])
        assert not pool.req_to_token[rows].any()
        pool.apply_update(rows, rows * 0, rows * 0 + WIDTH, np.full(len(rows) * WIDTH, 10 + other, np.int32))
    assert pool.memory.mapped_bytes == -(-pool.req_to_token.nbytes // FRAME_BYTES) * FRAME_BYTES
    pool.unmap_rows_of(others[0])
    assert not pool.memory.is_mapped(others[0])
    assert (pool.req_to_token[list(pool.space.rows_of(others[1]))] == 10 + others[1]).all()
    pool.unmap_rows_of(others[1])
    pool.unmap_rows_of(others[1])
    assert pool.memory.mapped_bytes == at_start
    assert hole_at(pool.req_to_token.data_ptr()) is None, "kernels get the whole table"
    assert (pool.req_to_token[list(pool.own_rows)] == 7).all()
    pool.map_rows_of(others[0])
    with pytest.raises(InvariantError, match="its own"):
        pool.unmap_rows_of(replica)


def test_rows_of_others_take_memory_block_by_block_as_batches_have_them() -> None:
    """A block of 8 KiB has 20 rows; 64 rows of each replica are in blocks 0 to 3 and 3 to 6."""
    vmm = MemfdVmm(FRAME_BYTES)
    memory = RowMemory(vmm, plan_row_space(64, 2), WIDTH, 2 * FRAME_BYTES)
    memory.map_replica(0)
    assert memory.mapped_bytes == 4 * 2 * FRAME_BYTES
    with pytest.raises(InvariantError, match="replica 1, whose rows have no memory"):
        memory.extend_to(65)
    memory.map_replica(1, rows=1)
    memory.extend_to(70)
    assert memory.mapped_bytes == 4 * 2 * FRAME_BYTES, "the block at the border has them"
    memory.table[70] = 7
    memory.extend_to(100)
    memory.map_replica(1, rows=1)
    assert memory.mapped_bytes == 5 * 2 * FRAME_BYTES
    assert (memory.table[70] == 7).all()
    assert not memory.table[100].any()
    memory.extend_to(128)
    assert memory.mapped_bytes == -(-memory.table.nbytes // FRAME_BYTES) * FRAME_BYTES
    memory.unmap_replica(1)
    memory.unmap_replica(1)
    assert memory.mapped_bytes == 4 * 2 * FRAME_BYTES
    assert vmm.own_frame_count == 8
    assert memory.is_mapped(0)
    assert not memory.is_mapped(1)


def test_rows_of_many_replicas_in_one_frame() -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    memory = RowMemory(vmm, plan_row_space(2, 8), 8)
    for replica in range(8):
        memory.map_replica(replica)
        assert memory.mapped_bytes == FRAME_BYTES
    for replica in range(8):
        memory.unmap_replica(replica)
    assert memory.mapped_bytes == FRAME_BYTES, "the padding row keeps its frame"
    assert vmm.own_frame_count == 1


def test_a_failed_mapping_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    memory = RowMemory(vmm, plan_row_space(64, 2), WIDTH, FRAME_BYTES)
    frames = vmm.own_frame_count

    map_frames, calls = vmm._map, []

    def refuse_the_third(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise MappingFailedError("no")
        map_frames(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(vmm, "_map", refuse_the_third)
        with pytest.raises(MappingFailedError):
            memory.map_replica(1)
    assert vmm.own_frame_count == frames
    assert not memory.is_mapped(1)
    memory.map_replica(1)
    assert memory.is_mapped(1)


def send(pool: KunserveReqToTokenPool, rows: list[int], lengths: list[int], host_table: np.ndarray) -> list[int]:
    """Sends a batch's rows to the host; returns how many entries went per row."""
    index, ends = np.array(rows), np.array(lengths)
    table = pool.req_to_token.numpy()
    starts, values = pool.ledger.update_for(HOST, index, ends, table)
    apply_update(host_table, index, starts, ends, values)
    for row, length in zip(rows, lengths, strict=True):
        assert (host_table[row, :length] == table[row, :length]).all()
    return (ends - starts).tolist()


def test_a_host_that_has_the_prefixes_needs_no_update_but_the_new_slots() -> None:
    owner, host = make_pool(1), make_pool(2)
    host.map_rows_of(1)
    requests = [Request(), Request()]
    rows = np.array(owner.alloc(requests), np.int32)
    slots = torch.arange(100, 110)
    owner.write((int(rows[0]), slice(0, 3)), slots[:3])
    owner.write((int(rows[1]), slice(0, 2)), slots[3:5])

    def update(lengths: list[int], prefixes: list[int]) -> object:
        return owner.update_for(HOST, rows, np.array(lengths, np.int32), np.array(prefixes, np.int32))

    assert update([3, 2], [0, 0]) is None  # prompts of which it has all that came before: nothing
    host.enter(torch.tensor([*rows[[0, 0, 0, 1, 1]]]), torch.tensor([0, 1, 2, 0, 1]), slots[:5])
    assert update([4, 3], [3, 2]) is None
    owner.ledger.rewritten(int(rows[1]), 1)
    found = update([5, 4], [4, 3])
    assert isinstance(found, tuple)
    starts, values = found
    assert starts.tolist() == [4, 1]
    assert len(values) == 4
    for row, length in zip(rows.tolist(), (3, 2), strict=True):
        assert host.req_to_token[row, :length].tolist() == owner.req_to_token[row, :length].tolist()


def test_rewriting_the_same_prefix_keeps_it_known_and_other_slots_do_not() -> None:
    pool, request = make_pool(), Request()
    host_table = np.zeros(pool.req_to_token.shape, np.int32)
    pool.alloc([request])
    row = request.req_pool_idx
    assert row is not None
    slots = torch.arange(100, 200)
    pool.write((row, slice(0, 10)), slots[:10])
    assert send(pool, [row], [10], host_table) == [10]
    # The next chunk of the prefill.
    request.inflight_middle_chunks, request.prefix_indices = 1, slots[:10]
    pool.alloc([request])
    pool.write((row, slice(0, 10)), slots[:10])
    pool.write((row, slice(10, 20)), slots[10:20])
    assert send(pool, [row], [20], host_table) == [10]
    # The radix cache found the same tokens in other slots, from position 13 to 15.
    shared = slots[5:20].clone()
    shared[8:11] = torch.tensor([7, 8, 9])
    pool.write((row, slice(5, 20)), shared)
    assert send(pool, [row], [20], host_table) == [7]
    pool.write((torch.tensor([row]), torch.tensor([20])), torch.tensor([55], dtype=torch.int32))
    assert send(pool, [row], [21], host_table) == [1]
    pool.free(request)
    following = Request()
    pool.free_slots.sort()
    pool.alloc([following])
    assert following.req_pool_idx == row
    pool.write((row, slice(0, 3)), slots[50:53])
    assert send(pool, [row], [3], host_table) == [3]


def test_a_request_that_was_cut_back_is_sent_from_there() -> None:
    pool, request = make_pool(), Request()
    host_table = np.zeros(pool.req_to_token.shape, np.int32)
    pool.alloc([request])
    row = request.req_pool_idx
    assert row is not None
    pool.write((row, slice(0, 10)), torch.arange(100, 110))
    send(pool, [row], [10], host_table)
    request.kv_committed_len, request.prefix_indices = 4, torch.arange(100, 104)
    pool.alloc([request])
    # As on CUDA, where a kernel writes.
    pool.req_to_token[row, 4:12] = torch.arange(300, 308, dtype=torch.int32)
    assert send(pool, [row], [12], host_table) == [8]


def test_moved_slots_are_sent_again() -> None:
    pool = make_pool()
    host_table = np.zeros(pool.req_to_token.shape, np.int32)
    requests = [Request() for _ in range(3)]
    rows = pool.alloc(requests)
    assert rows is not None
    for position, row in enumerate(rows):
        pool.write((row, slice(0, 10)), torch.arange(10) + 100 * position)
    own = list(pool.own_rows)
    expected = pool.req_to_token[own]
    expected[own.index(rows[1]), 4] = 999
    send(pool, rows, [10] * 3, host_table)
    widths = []

    def moved(slots: torch.Tensor) -> torch.Tensor:
        widths.append(slots.shape[1])
        return torch.where(slots == 104, torch.full_like(slots, 999), slots)

    pool.replace_slots(moved, dict.fromkeys(rows, 10))
    pool.replace_slots(moved, dict.fromkeys(rows[1:], 10))
    assert widths == [10, WIDTH], "where a length is not known, the whole row is looked at"
    assert (pool.req_to_token[own] == expected).all()
    assert send(pool, rows, [10] * 3, host_table) == [0, 6, 0]


@pytest.mark.parametrize("seed", range(10))
def test_a_host_never_has_a_wrong_entry(seed: int) -> None:
    chance = random.Random(seed)
    pool = make_pool()
    host_table = np.zeros(pool.req_to_token.shape, np.int32)
    live: dict[int, tuple[Request, int]] = {}
    for step in range(500):
        action = chance.random()
        if action < 0.2 and len(live) < ROWS:
            request, length = Request(), chance.randrange(1, 20)
            given = pool.alloc([request])
            assert given is not None
            pool.write((given[0], slice(0, length)), torch.randint(0, 5, (length,)))
            live[given[0]] = request, length
        elif action < 0.3 and live:
            row = chance.choice(list(live))
            pool.free(live.pop(row)[0])
        elif action < 0.5 and live:
            row = chance.choice(list(live))
            start = chance.randrange(live[row][1])
            pool.write((row, slice(start, live[row][1])), torch.randint(0, 5, (live[row][1] - start,)))
        elif action < 0.7 and live:
            grown = [row for row in live if live[row][1] < WIDTH]
            ends = torch.tensor([live[row][1] for row in grown])
            pool.write((torch.tensor(grown), ends), torch.randint(0, 5, (len(grown),), dtype=torch.int32))
            for row in grown:
                live[row] = live[row][0], live[row][1] + 1
        elif action < 0.75:
            lengths = {row: length for row, (_, length) in live.items()} if step % 2 else {}
            pool.replace_slots(lambda slots, step=step: torch.where(slots == step % 5, slots + 10, slots), lengths)
        elif live:
            rows = chance.sample(list(live), chance.randrange(1, len(live) + 1))
            send(pool, rows, [live[row][1] for row in rows], host_table)
