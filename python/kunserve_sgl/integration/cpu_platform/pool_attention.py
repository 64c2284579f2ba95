"""Attention of SGLang's layers over keys and values in its pool, of a whole batch or of the part at one home."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from typing_extensions import override

from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan, PagedAttention, plan_part
from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.attention_parts import PartSlots
from kunserve_sgl.exchange.attention_service import KvPart, PartAttention
from kunserve_sgl.exchange.attention_work import KEY, LSE, OUTPUT, QUERY, VALUE, AttentionShape
from kunserve_sgl.exchange.tensor_layout import Activations


def attend_in_pool(
    attention: PagedAttention,
    pool: Any,
    query: torch.Tensor,
    layer: Any,
    plan: AttentionPlan,
    output_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention of `layer` over the slots of `plan`; writes nothing. Results are those of `attend` in
    `PagedAttention`."""
    key, value = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    if not _holds_keys_of(pool, layer):
        raise InvariantError(
            f"layer {layer.layer_id} wants keys {(layer.tp_k_head_num, layer.qk_head_dim)} per token, "
            f"the cache holds {tuple(key.shape[1:])}"
        )
    return attention.attend(
        plan,
        query.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
        key,
        value,
        scale=layer.scaling,
        logit_cap=layer.logit_cap or 0.0,
        sliding_window=layer.sliding_window_size,
        output_dtype=output_dtype,
    )


def _holds_keys_of(pool: Any, layer: Any) -> bool:
    """Tells whether the rows of a layer's buffer are its keys."""
    return tuple(pool.get_key_buffer(layer.layer_id).shape[1:]) == (layer.tp_k_head_num, layer.qk_head_dim)


class PoolAttention(PartAttention):
    """Attends to parts of batches in SGLang's pool (MHA, GQA, MQA, MLA in its absorbed form), for one thread."""

    def __init__(self, attention: PagedAttention, pool: Any, layers: Iterable[Any], dtype: torch.dtype) -> None:
        """`layers` are SGLang's attention layers, of which those are used whose keys are what the pool holds: MLA has
        another one for its expanded form. `dtype` is that of queries. Nobody else uses `attention` while this is
        used."""
        self._attention = attention
        self._pool = pool
        self._layers = {each.layer_id: each for each in layers if _holds_keys_of(pool, each)}
        self._is_latent = isinstance(pool, MLATokenToKVPool)
        self._dtype = str(dtype).removeprefix("torch.")

    @override
    def shape(self, layer: int) -> AttentionShape:
        own = self._layers[layer]
        value_dim = 0 if self._is_latent else own.v_head_dim
        return AttentionShape(
            own.tp_q_head_num, own.tp_k_head_num, own.qk_head_dim, own.v_head_dim, value_dim, self._dtype
        )

    @override
    def part(self, slots: PartSlots) -> KvPart:
        return _PoolPart(self, slots)

    def attend(self, layer: int, plan: AttentionPlan, new_slots: torch.Tensor, tensors: Activations) -> Activations:
        """Stores the new keys and values at `new_slots`, int64 (n,), and attends; see `KvPart.attend`."""
        query, key, value = tensors[QUERY], tensors[KEY], tensors[VALUE]
        assert query is not None
        if key is not None:
            memory = self._pool.get_key_buffer(layer)
            memory[new_slots] = key.to(memory.dtype)
        if value is not None:
            memory = self._pool.get_value_buffer(layer)
            memory[new_slots] = value.to(memory.dtype)
        own = self._layers[layer]
        output, lse = attend_in_pool(self._attention, self._pool, query, own, plan, output_dtype=torch.float32)
        return {OUTPUT: output, LSE: lse}

    def window(self, layer: int) -> int:
        """Returns the sliding window of a layer, as `plan_part` takes it."""
        return int(self._layers[layer].sliding_window_size)


class _PoolPart(KvPart):
    def __init__(self, pool: PoolAttention, slots: PartSlots) -> None:
        self._pool = pool
        self._slots = slots
        self._new_slots = torch.from_numpy(slots.new_slots.astype(np.int64))
        self._plans: dict[int, AttentionPlan] = {}  # by sliding window

    @override
    def attend(self, layer: int, tensors: Activations) -> Activations:
        window = self._pool.window(layer)
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = plan_part(*self._slots.arrays, sliding_window=window)
        return self._pool.attend(layer, plan, self._new_slots, tensors)
