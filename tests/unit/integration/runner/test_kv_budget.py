"""What the KV cache may take: never more than there is, and the same for all replicas on a GPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange.activations import buffer_bytes
from kunserve_sgl.integration.runner.elastic_pools import kv_buffers
from kunserve_sgl.integration.runner.memory_budget import (
    activation_buffer_bytes,
    bytes_of_slots,
    least_fraction,
    measured_together,
    most_prefill_tokens,
    part_of_gpu,
    slots_that_fit,
)
from kunserve_sgl.policy.cutting import MOST_PIECES

GIB = 1 << 30
FRAME_BYTES = 2 << 20
DEADLINE_S = 300.0
LLAMA_8B = kv_buffers(32, {"k": 2048, "v": 2048})


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("fraction", [0.5, 0.88, 0.95])
def test_all_replicas_fit_on_the_gpu_and_leave_what_the_fraction_leaves(replicas: int, fraction: float) -> None:
    """With models and contexts of any size, which are no longer free when it is measured."""
    total = 141 * GIB
    for used in (0, 16 * GIB * replicas, 70 * GIB):
        free = total - used
        part = part_of_gpu(free, total, replicas, fraction)
        left = free - replicas * part
        assert left == pytest.approx(total * (1 - fraction), abs=2 * replicas)
    assert part_of_gpu(round(total * (1 - least_fraction(free, total))), total, replicas, 0.9) > 0
    assert abs(part_of_gpu(free, total, replicas, least_fraction(free, total))) <= 1


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    "buffers",
    [
        LLAMA_8B,
        kv_buffers(27, {"latent": 1152}),
        kv_buffers(8, {"k": 512, "v": 512}),
        kv_buffers(4, {"k": 192, "v": 96}),
    ],
    ids=["8B", "latent", "small", "uneven"],
)
def test_slots_and_sink_fit_and_no_granule_more_would(buffers: list, page_size: int) -> None:  # type: ignore[type-arg]
    row_bytes = sum(buffer.row_bytes for buffer in buffers)
    one = slots_that_fit(1 << 60, buffers, FRAME_BYTES, page_size)
    granule = next(slots for slots in range(page_size, one, page_size) if fits_frames(buffers, slots))
    for budget in (2 * granule * row_bytes - 1, 2 * granule * row_bytes, 15 * GIB, 15 * GIB + 12345):
        slots = slots_that_fit(budget, buffers, FRAME_BYTES, page_size)
        assert slots % granule == 0
        assert (slots + granule) * row_bytes <= budget or slots == 0
        assert (slots + 2 * granule) * row_bytes > budget


def fits_frames(buffers: list, slots: int) -> bool:  # type: ignore[type-arg]
    return all(slots * buffer.row_bytes % FRAME_BYTES == 0 for buffer in buffers)


@pytest.mark.parametrize(
    ("chunk", "tokens"), [(8192, 8192), (-1, 131072), (None, 131072), (0, 131072)], ids=["chunk", "off", "none", "zero"]
)
def test_the_activation_buffer_holds_the_largest_batch(chunk: int | None, tokens: int) -> None:
    assert most_prefill_tokens(chunk, 16384, 131072) == tokens
    assert most_prefill_tokens(-1, 200000, 131072) == 200000
    size = activation_buffer_bytes(tokens, 2048, 4096, torch.bfloat16, FRAME_BYTES)
    needed = buffer_bytes(tokens + 2048, 4096, 2, torch.bfloat16, MOST_PIECES)
    assert needed <= size < needed + FRAME_BYTES
    assert size % FRAME_BYTES == 0
    assert size >= 2 * (tokens + 2048) * 4096 * 2


def test_nobody_measures_before_all_have_loaded_and_all_get_the_least(tmp_path: Path) -> None:
    members, loaded = 3, threading.Barrier(3)
    arrived: list[int] = []

    def join(me: int) -> int:
        def measure() -> int:
            assert len(arrived) == members
            return 100 - me

        loaded.wait(DEADLINE_S)
        arrived.append(me)
        return measured_together(FileStore(str(tmp_path / "store")), members, me, measure, DEADLINE_S)

    with ThreadPoolExecutor(members) as pool:
        assert list(pool.map(join, range(members))) == [98, 98, 98]


def test_who_has_not_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(TransientError, match=r"of the 3 replicas that share this GPU, number \[0, 2\] has not loaded"):
        measured_together(FileStore(str(tmp_path / "store")), 3, 1, lambda: 1, 0.1)


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_replica_that_is_started_again_has_as_many_slots_as_before(page_size: int) -> None:
    for budget in (GIB, 7 * GIB + 12345, 60 * GIB):
        slots = slots_that_fit(budget, LLAMA_8B, FRAME_BYTES, page_size)
        again = bytes_of_slots(slots, LLAMA_8B, FRAME_BYTES, page_size)
        assert again <= budget
        assert slots_that_fit(again, LLAMA_8B, FRAME_BYTES, page_size) == slots
