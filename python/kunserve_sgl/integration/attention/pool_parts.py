"""SGLang's layers and their memory as attention to parts needs them, on any device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

from kunserve_sgl.exchange.attention_work import KEY, VALUE, AttentionShape
from kunserve_sgl.exchange.tensor_layout import Activations


def attention_layers(model: torch.nn.Module) -> list[Any]:
    """Lists SGLang's attention layers in a model."""
    from sglang.srt.layers.radix_attention import RadixAttention

    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def holds_keys_of(pool: Any, layer: Any) -> bool:
    """Tells whether the rows of a layer's buffer are its keys."""
    return tuple(pool.get_key_buffer(layer.layer_id).shape[1:]) == (layer.tp_k_head_num, layer.qk_head_dim)


class PoolParts:
    """Knows the layers of one rank, and stores keys and values for them."""

    def __init__(self, pool: Any, layers: Iterable[Any], dtype: torch.dtype) -> None:
        """`layers` are SGLang's attention layers, of which those are used whose keys are what the pool holds: MLA has
        another one for its expanded form. `dtype` is that of queries."""
        self.pool = pool
        self.layers = {each.layer_id: each for each in layers if holds_keys_of(pool, each)}
        self._is_latent = isinstance(pool, MLATokenToKVPool)
        self._dtype = str(dtype).removeprefix("torch.")

    def shape(self, layer: int) -> AttentionShape:
        """Returns the shape of a layer's attention at this rank."""
        own = self.layers[layer]
        value_dim = 0 if self._is_latent else own.v_head_dim
        return AttentionShape(
            own.tp_q_head_num, own.tp_k_head_num, own.qk_head_dim, own.v_head_dim, value_dim, self._dtype
        )

    def store(self, layer: int, new_slots: torch.Tensor, tensors: Activations) -> None:
        """Stores the new keys and values of an `AttentionOrder` at `new_slots`, int64 (n,), in stream order."""
        key, value = tensors[KEY], tensors[VALUE]
        if key is not None:
            memory = self.pool.get_key_buffer(layer)
            memory[new_slots] = key.to(memory.dtype)
        if value is not None:
            memory = self.pool.get_value_buffer(layer)
            memory[new_slots] = value.to(memory.dtype)

    def window(self, layer: int) -> int:
        """Returns the sliding window of a layer, as `plan_part` takes it."""
        return int(self.layers[layer].sliding_window_size)
