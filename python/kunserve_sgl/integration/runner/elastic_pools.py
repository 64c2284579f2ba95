"""SGLang's KV pools over elastic memory: the same layout per layer, but over the global slot space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from typing_extensions import override

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.slot_space import KvBuffer
from kunserve_sgl.replica.replica_memory import ReplicaMemory


class ElasticMHATokenToKVPool(MHATokenToKVPool):  # type: ignore[misc]
    """Holds K and V buffers, each (slots of everybody, heads, head dimension). Only slots with memory may be touched.

    `size` bounds slot ids, which are global; it is not a capacity. The capacity is the allocator's `size`. CUDA graphs
    keep the bound they were captured with, so it must not change when the capacity does.
    """

    size: int
    elastic: ElasticKv

    def __init__(self, size: int, *args: Any, memory: ReplicaMemory, **kwargs: Any) -> None:
        self._memory = memory
        super().__init__(size, *args, **kwargs)

    def _create_buffers_normal(self) -> None:
        if self.use_hnd or self.kv_cache_layout == "vectorized_5d":
            raise ConfigurationError("KunServe needs the KV cache layout with one row per slot (NHD)")
        item_bytes = self.store_dtype.itemsize
        row_bytes = {"k": self.head_num * self.head_dim * item_bytes, "v": self.head_num * self.v_head_dim * item_bytes}
        buffers = kv_buffers(self.layer_num, row_bytes)
        k_buffers, v_buffers = buffers[: self.layer_num], buffers[self.layer_num :]
        self.elastic = self._memory.create_kv(buffers, self.page_size, self.size)
        k_shape, v_shape = (self.head_num, self.head_dim), (self.head_num, self.v_head_dim)
        self.k_buffer = [self.elastic.tensor(buffer, self.store_dtype, k_shape) for buffer in k_buffers]
        self.v_buffer = [self.elastic.tensor(buffer, self.store_dtype, v_shape) for buffer in v_buffers]
        self.size = self.elastic.space.slot_count - self.page_size

    @override
    def get_kv_size_bytes(self) -> tuple[int, int]:
        mapped = self.elastic.mapped_bytes
        return mapped["k"], mapped["v"]

    def copy_slots(self, target: torch.Tensor, source: torch.Tensor, layers: Sequence[int]) -> None:
        """Copies the rows `source` to `target`, int64[n] each and disjoint, in these layers."""
        _copy_rows([buffers[layer] for buffers in (self.k_buffer, self.v_buffer) for layer in layers], target, source)


class ElasticMLATokenToKVPool(MLATokenToKVPool):  # type: ignore[misc]
    """Holds one buffer per layer, (slots of everybody, 1, latent dimension). See ElasticMHATokenToKVPool."""

    size: int
    elastic: ElasticKv

    def __init__(self, size: int, *args: Any, memory: ReplicaMemory, **kwargs: Any) -> None:
        self._memory = memory
        super().__init__(size, *args, **kwargs)

    def _create_buffers(self) -> None:
        buffers = kv_buffers(self.layer_num, {"latent": self.kv_cache_dim * self.store_dtype.itemsize})
        self.elastic = self._memory.create_kv(buffers, self.page_size, self.size)
        shape = (1, self.kv_cache_dim)
        self.kv_buffer = [self.elastic.tensor(buffer, self.store_dtype, shape) for buffer in buffers]
        self.size = self.elastic.space.slot_count - self.page_size

    @override
    def get_kv_size_bytes(self) -> int:
        return self.elastic.mapped_bytes["latent"]

    def copy_slots(self, target: torch.Tensor, source: torch.Tensor, layers: Sequence[int]) -> None:
        """Copies the rows `source` to `target`, int64[n] each and disjoint, in these layers."""
        _copy_rows([self.kv_buffer[layer] for layer in layers], target, source)


def kv_buffers(layers: int, row_bytes: Mapping[str, int]) -> list[KvBuffer]:
    """Returns a buffer of each of these kinds for each layer, all of the first kind first."""
    return [KvBuffer(layer, name, size) for name, size in row_bytes.items() for layer in range(layers)]


def _copy_rows(buffers: list[torch.Tensor], target: torch.Tensor, source: torch.Tensor) -> None:
    for buffer in buffers:
        buffer[target] = buffer[source]
