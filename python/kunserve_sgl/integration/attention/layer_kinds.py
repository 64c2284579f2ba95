"""Kinds of attention layers that attention over paged keys, in parts or as a whole, does not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kunserve_sgl.cpu_attention.paged_attention import NO_WINDOW


def attends_both_ways(layer: Any) -> bool:
    """Tells whether the causal rule is off for this layer."""
    from sglang.srt.layers.radix_attention import AttentionType

    return bool(layer.attn_type == AttentionType.ENCODER_ONLY)


def missing(layer: Any) -> Iterator[str]:
    """Names what this layer needs and what is not there."""
    from sglang.srt.layers.radix_attention import AttentionType

    both_ways = attends_both_ways(layer)
    needs = {
        "cross attention": layer.is_cross_attention,
        f"attn_type {layer.attn_type.value}": layer.attn_type == AttentionType.DECODER_BIDIRECTIONAL,
        "chunked local attention (irope)": layer.use_irope,
        f"pos_encoding_mode {layer.pos_encoding_mode}": layer.pos_encoding_mode != "NONE",
        f"logit_capping_method {layer.logit_capping_method}": layer.logit_cap and layer.logit_capping_method != "tanh",
        "temperature by length (xai_temperature_len)": layer.xai_temperature_len > 0,
        "a sliding window in both directions": both_ways and layer.sliding_window_size != NO_WINDOW,
    }
    yield from (name for name, wanted in needs.items() if wanted)
