"""What SGLang's attention backends get of a KV pool over elastic memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kunserve_sgl.integration.runner.elastic_pools import ElasticMHATokenToKVPool, ElasticMLATokenToKVPool
from kunserve_sgl.memory.virtual_range import hole_at
from kunserve_sgl.replica.replica_memory import MemoryOptions, ReplicaMemory

LAYERS, SLOTS, PAGE = 2, 256, 1
# What kernels get: every accessor of a pool that returns tensors of one layer.
ACCESSORS = ("get_key_buffer", "get_value_buffer", "get_kv_buffer")


@pytest.fixture(params=["mha", "mla"])
def pool(request: pytest.FixtureRequest) -> Any:
    """Of the second replica of two: its own slots, and all that have memory but the sink, lie behind the other's."""
    options = MemoryOptions(4096, reserve_frames=0, max_replicas=2, max_slots=SLOTS)
    memory = ReplicaMemory(options, "cpu", 0, replica=1, owner="replica 1")
    common: dict[str, Any] = {
        "page_size": PAGE,
        "dtype": torch.float32,
        "layer_num": LAYERS,
        "device": "cpu",
        "enable_memory_saver": False,
        "memory": memory,
    }
    if request.param == "mha":
        return ElasticMHATokenToKVPool(SLOTS, head_num=2, head_dim=16, **common)
    return ElasticMLATokenToKVPool(SLOTS, kv_lora_rank=32, qk_rope_head_dim=16, **common)


def test_kernels_get_tensors_that_begin_with_memory(pool: Any) -> None:
    """Triton's launcher refuses others on CUDA."""
    for layer in range(LAYERS):
        for name in ACCESSORS:
            found = getattr(pool, name)(layer)
            for tensor in found if isinstance(found, tuple) else (found,):
                assert hole_at(tensor.data_ptr()) is None, f"{name} of layer {layer}"
                assert hole_at(tensor[pool.elastic.space.sink.stop :].data_ptr()) is not None, "the other replica's"
                assert hole_at(tensor[pool.elastic.slots.first :].data_ptr()) is None


def test_slots_are_copied_by_whole_buffers(pool: Any) -> None:
    own = pool.elastic.slots
    buffer = pool.get_key_buffer(1)
    buffer[own.first] = 3.0
    pool.copy_slots(torch.tensor([own.first + 1]), torch.tensor([own.first]), [1])
    assert bool((buffer[own.first + 1] == 3.0).all())
    assert not bool(pool.get_key_buffer(0)[own.first + 1].any())
