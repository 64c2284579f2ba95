"""Attention of SGLang's layers over keys and values in its pool, of a whole batch or of the part at one home."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan, PagedAttention, plan_part
from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.attention_parts import PartSlots
from kunserve_sgl.exchange.attention_service import KvPart, PartAttention
from kunserve_sgl.exchange.attention_work import LSE, OUTPUT, QUERY, AttentionShape
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.integration.attention.pool_parts import PoolParts, holds_keys_of


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
    if not holds_keys_of(pool, layer):
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


class PoolAttention(PartAttention):
    """Attends to parts of batches in SGLang's pool (MHA, GQA, MQA, MLA in its absorbed form), for one thread."""

    def __init__(self, attention: PagedAttention, pool: Any, layers: Iterable[Any], dtype: torch.dtype) -> None:
        """Takes `pool`, `layers` and `dtype` as `PoolParts` does. Nobody else uses `attention` while this is used."""
        self._attention = attention
        self._parts = PoolParts(pool, layers, dtype)

    @override
    def shape(self, layer: int) -> AttentionShape:
        return self._parts.shape(layer)

    @override
    def part(self, slots: PartSlots) -> KvPart:
        return _PoolPart(self._attention, self._parts, slots)


class _PoolPart(KvPart):
    def __init__(self, attention: PagedAttention, parts: PoolParts, slots: PartSlots) -> None:
        self._attention = attention
        self._parts = parts
        self._slots = slots
        self._new_slots = torch.from_numpy(slots.new_slots.astype(np.int64))
        self._plans: dict[int, AttentionPlan] = {}  # by sliding window

    @override
    def attend(self, layer: int, tensors: Activations) -> Activations:
        window = self._parts.window(layer)
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = plan_part(*self._slots.arrays, sliding_window=window)
        self._parts.store(layer, self._new_slots, tensors)
        query, own = tensors[QUERY], self._parts.layers[layer]
        assert query is not None
        output, lse = attend_in_pool(self._attention, self._parts.pool, query, own, plan, output_dtype=torch.float32)
        return {OUTPUT: output, LSE: lse}
