"""The layout of a layer's region, and that rounding to frames loses little for models people serve."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sgl.memory.region_layout import ALIGNMENT_BYTES, lay_out

CUDA_FRAME_BYTES = 2 << 20


@given(st.lists(st.integers(0, 10_000), min_size=1), st.sampled_from([4096, 65536]))
def test_parts_are_aligned_ordered_and_apart(sizes: list[int], frame_bytes: int) -> None:
    layout = lay_out(sizes, frame_bytes)
    end = 0
    for offset, size in zip(layout.offsets_bytes, layout.sizes_bytes, strict=True):
        assert offset % ALIGNMENT_BYTES == 0
        assert end <= offset < end + ALIGNMENT_BYTES
        end = offset + size
    assert end <= layout.used_bytes < end + ALIGNMENT_BYTES
    assert layout.used_bytes <= layout.region_bytes < layout.used_bytes + frame_bytes
    assert layout.lost_bytes == layout.frame_count * frame_bytes - sum(sizes)


@given(st.lists(st.integers(1, 2000), min_size=1))
def test_parts_and_gaps_fill_the_used_bytes_exactly(sizes: list[int]) -> None:
    layout = lay_out(sizes, 4096)
    covered = bytearray(layout.used_bytes)
    parts = [*zip(layout.offsets_bytes, layout.sizes_bytes, strict=True), *layout.gaps()]
    for offset, size in parts:
        for at in range(offset, offset + size):
            covered[at] += 1
    assert set(covered) <= {1}


@dataclass(frozen=True)
class Config:
    """Numbers of a published config.json."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 128
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0

    def tensor_bytes(self, tensor_parallel: int) -> list[int]:
        """Sizes of one decoder layer's tensors in bf16, fused and split over `tensor_parallel` ranks as
        SGLang does: qkv and gate-up in one tensor each, experts stacked, norms and router whole on every
        rank; KV heads are not split further than one per rank."""
        q_heads, kv_heads = self.heads // tensor_parallel, max(1, self.kv_heads // tensor_parallel)
        qkv_rows = (q_heads + 2 * kv_heads) * self.head_dim
        inner = self.intermediate // tensor_parallel
        elements = [qkv_rows * self.hidden, self.hidden * q_heads * self.head_dim, self.hidden, self.hidden]
        if self.qkv_bias:
            elements.append(qkv_rows)
        if self.qk_norm:
            elements += [self.head_dim, self.head_dim]
        if self.experts:
            elements += [self.experts * self.hidden]
        copies = max(1, self.experts)
        elements += [copies * 2 * inner * self.hidden, copies * self.hidden * inner]
        return [2 * count for count in elements]


QWEN_14B = Config("Qwen2.5-14B", 48, 5120, 40, 8, 13824, qkv_bias=True)
QWEN_72B = Config("Qwen2.5-72B", 80, 8192, 64, 8, 29568, qkv_bias=True)
LLAMA_8B = Config("Llama-3.1-8B", 32, 4096, 32, 8, 14336)
LLAMA_70B = Config("Llama-3.1-70B", 80, 8192, 64, 8, 28672)
MIXTRAL = Config("Mixtral-8x7B", 32, 4096, 32, 8, 14336, experts=8)
QWEN_MOE = Config("Qwen3-30B-A3B", 48, 2048, 32, 4, 768, qk_norm=True, experts=128)


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (QWEN_14B, 13.2),
        (QWEN_72B, 70.2),
        (LLAMA_8B, 6.98),
        (LLAMA_70B, 68.5),
        (MIXTRAL, 46.4),
        (QWEN_MOE, 29.9),
    ],
    ids=lambda value: value.name if isinstance(value, Config) else "",
)
def test_the_configs_add_up_to_the_published_models(config: Config, billions: float) -> None:
    """Decoder parameters without embedding and head: the published count less 2 x vocabulary x hidden."""
    assert sum(config.tensor_bytes(1)) / 2 * config.layers / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("config", "tensor_parallel"),
    [
        (QWEN_14B, 1),
        (QWEN_14B, 2),
        (QWEN_72B, 1),
        (QWEN_72B, 4),
        (QWEN_72B, 8),
        (LLAMA_8B, 1),
        (LLAMA_70B, 1),
        (LLAMA_70B, 4),
        (LLAMA_70B, 8),
        (MIXTRAL, 1),
        (MIXTRAL, 2),
        (QWEN_MOE, 1),
        (QWEN_MOE, 2),
    ],
    ids=lambda value: value.name if isinstance(value, Config) else f"tp{value}",
)
def test_rounding_to_frames_loses_less_than_one_percent(config: Config, tensor_parallel: int) -> None:
    layout = lay_out(config.tensor_bytes(tensor_parallel), CUDA_FRAME_BYTES)
    assert 0 < layout.lost_bytes / layout.region_bytes < 0.01
