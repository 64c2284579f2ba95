"""Norms and rotary embeddings of float32 layers on a CPU, compiled: SGLang's ways are chains of small operators, which
take a fifth of a decode step of a tiny model. What is not usual goes SGLang's way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.utils.multi_platform import MultiPlatformOp
from sglang.srt.platforms import current_platform

from kunserve_sgl.cpu_attention.attention_kernel import compiled


def install() -> None:
    """Lets layers that are made from now on in this process use these. Idempotent."""
    key = current_platform.get_dispatch_key_name()
    MultiPlatformOp.register_oot_forward(RMSNorm, _norm, key)
    MultiPlatformOp.register_oot_forward(RotaryEmbedding, _rotate, key)


def _norm(
    layer: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> Any:
    """As `RMSNorm.forward_native`: x * weight / sqrt(mean(x^2) + eps) over the last dimension of x (rows, hidden size),
    to which `residual` of the same shape is added first; with one, that sum is returned too."""
    weight = layer.weight
    if (
        post_residual_addition is not None
        or layer.variance_size_override is not None
        or layer.override_orig_dtype is not None
        or x.dim() != 2
        or x.shape[1] != layer.hidden_size
        or not (x.dtype == weight.dtype == torch.float32)
    ):
        return layer.forward_native(x, residual, post_residual_addition)
    x, epsilon = x.contiguous(), np.float32(layer.variance_epsilon)
    output = torch.empty_like(x)
    if residual is None:
        _norm_rows(x.numpy(), weight.detach().numpy(), epsilon, output.numpy())
        return output
    total = x + residual
    _norm_rows(total.numpy(), weight.detach().numpy(), epsilon, output.numpy())
    return output, total


@compiled
def _norm_rows(x: Any, weight: Any, epsilon: np.float32, output: Any) -> None:
    rows, width = x.shape
    for row in range(rows):
        squares = np.float32(0.0)
        for i in range(width):
            squares += x[row, i] * x[row, i]
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(width) + epsilon)
        for i in range(width):
            output[row, i] = x[row, i] * scale * weight[i]


def _rotate(
    layer: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> Any:
    """As `RotaryEmbedding.forward_native`: turns the first `rotary_dim` numbers of each head of query and key (tokens,
    heads * head size) by the angles of the tokens' `positions` (tokens,)."""
    cache = layer.cos_sin_cache
    if (
        offsets is not None
        or fused_set_kv_buffer_arg is not None
        or hasattr(layer, "sin_cos_cache")
        or not (positions.dim() == 1 and query.dim() == key.dim() == cache.dim() == 2)
        or not (query.dtype == key.dtype == cache.dtype == torch.float32)
    ):
        return layer.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
    query, key = query.contiguous(), key.contiguous()
    turned = torch.empty_like(query), torch.empty_like(key)
    places = positions.contiguous().numpy(), cache.contiguous().numpy()
    shape = layer.head_size, layer.rotary_dim, bool(layer.is_neox_style)
    if not _rotate_rows(query.numpy(), key.numpy(), *places, *shape, turned[0].numpy(), turned[1].numpy()):
        raise IndexError(f"positions {positions.tolist()}: accepted: 0 to {len(cache) - 1}")
    return turned


@compiled
def _rotate_rows(
    query: Any,
    key: Any,
    positions: Any,
    cache: Any,
    head_size: int,
    rotary_dim: int,
    is_in_halves: bool,
    turned_query: Any,
    turned_key: Any,
) -> bool:
    half = rotary_dim // 2
    apart, step = (half, 1) if is_in_halves else (1, 2)
    for given, turned in ((query, turned_query), (key, turned_key)):
        rows, width = given.shape
        for row in range(rows):
            position = positions[row]
            if not 0 <= position < len(cache):
                return False
            for head in range(0, width, head_size):
                for i in range(half):
                    cosine, sine = cache[position, i], cache[position, half + i]
                    at = head + step * i
                    first, second = given[row, at], given[row, at + apart]
                    turned[row, at] = first * cosine - second * sine
                    turned[row, at + apart] = second * cosine + first * sine
                for i in range(head + rotary_dim, head + head_size):
                    turned[row, i] = given[row, i]
    return True
