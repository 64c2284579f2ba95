"""Attention to parts of batches in SGLang's pool on any device, for one thread and the stream that is current there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from typing_extensions import override

from kunserve_sgl.cpu_attention.merging import State
from kunserve_sgl.cpu_attention.paged_attention import NO_WINDOW, AttentionPlan, plan_part
from kunserve_sgl.exchange.attention_parts import PartSlots
from kunserve_sgl.exchange.attention_service import BatchPart, PartAttention
from kunserve_sgl.exchange.attention_work import LSE, OUTPUT, QUERY, AttentionShape
from kunserve_sgl.exchange.device_copies import host_memory, on_device
from kunserve_sgl.exchange.tensor_layout import Activations, unpack
from kunserve_sgl.integration.attention.pool_parts import PoolParts


class PlannedPart(Protocol):
    """Is a part that has been planned for layers of one shape."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, logit_cap: float
    ) -> State:
        """Gives attention to the current stream, and returns output and natural LSE, float32. Query is (rows, heads,
        head_dim), key and value (slots, kv_heads, head_dim and v_head_dim)."""
        ...


class PartKernels(Protocol):
    """Plans parts on one device, for one thread."""

    def part(self, plan: AttentionPlan, shape: AttentionShape) -> PlannedPart:
        """Makes the part of a plan of `plan_part`, for layers of this shape."""
        ...


class PoolAttention(PartAttention):
    """Attends to parts of batches in SGLang's pool (MHA, GQA, MQA, and MLA in its absorbed form, as far as the kernels
    have it)."""

    def __init__(
        self, kernels: PartKernels, pool: Any, layers: Iterable[Any], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Takes `pool`, `layers` and `dtype` as `PoolParts` does. Nobody else uses `kernels` while this is used."""
        self.device = device
        self.kernels = kernels
        self.parts = PoolParts(pool, layers, dtype)

    @override
    def shape(self, layer: int) -> AttentionShape:
        return self.parts.shape(layer)

    @override
    def part(self, slots: PartSlots) -> BatchPart:
        return _PoolPart(self, slots)

    def warm_up(self) -> None:
        """Runs attention of each kind once, over slot 0, which no request has, and writes there: what is compiled and
        loaded then keeps no batch waiting, nor is it loaded while another stream waits for a peer."""
        for layer in {self.shape(layer): layer for layer in self.parts.layers}.values():
            shape = self.shape(layer)
            for queries in (1, 16, 32, 64):
                one, zero = np.ones(1, np.int64), np.zeros(1, np.int32)
                memory = host_memory(shape.order_bytes(queries, 1), self.device).zero_()
                tensors = unpack(shape.order_notes(queries, 1), memory.to(self.device))
                for position in {0, queries // 2}:  # the second is no causal rule of a whole request
                    slots = PartSlots(queries * one, 0 * one, one, zero, zero + position)
                    self.part(slots).attend(layer, tensors)


class _PoolPart(BatchPart):
    def __init__(self, attention: PoolAttention, slots: PartSlots) -> None:
        self._attention = attention
        self._slots = slots
        (self._new_slots,) = on_device(attention.device, slots.new_slots)
        self._planned: dict[tuple[int, AttentionShape], PlannedPart] = {}  # by sliding window and shape

    @override
    def attend(self, layer: int, tensors: Activations) -> Activations:
        parts = self._attention.parts
        kind = window, shape = parts.window(layer), parts.shape(layer)
        planned = self._planned.get(kind)
        if planned is None:
            plan = plan_part(*self._slots.arrays, sliding_window=NO_WINDOW if window < 0 else window)
            planned = self._planned[kind] = self._attention.kernels.part(plan, shape)
        parts.store(layer, self._new_slots, tensors)
        query, own = tensors[QUERY], parts.layers[layer]
        assert query is not None
        key, value = parts.pool.get_key_buffer(layer), parts.pool.get_value_buffer(layer)
        output, lse = planned.attend(query, key, value, own.scaling, own.logit_cap or 0.0)
        return {OUTPUT: output, LSE: lse}
