"""Compiled layers of the CPU platform against SGLang's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from kunserve_sgl.integration.cpu_platform import layer_kernels

WIDTH, HEAD = 256, 64


class Layer(SimpleNamespace):
    """The values of a layer, and SGLang's way to compute it, which is counted."""

    def forward_native(self, *args: Any) -> Any:
        self.native += 1
        return self.cls.forward_native(self, *args)


def norm(**values: Any) -> Layer:
    weight = torch.randn(WIDTH)
    usual: dict[str, Any] = {"variance_size_override": None, "override_orig_dtype": None, "fp32_residual": False}
    usual |= {"cast_x_before_out_mul": False, "hidden_size": WIDTH, "variance_epsilon": 1e-5, "weight": weight}
    return Layer(cls=RMSNorm, native=0, **(usual | values))


def rotary(rotary_dim: int = HEAD, *, is_neox_style: bool = True) -> Layer:
    from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

    angles = torch.outer(torch.arange(100.0), torch.rand(rotary_dim // 2))
    cache = torch.cat((angles.cos(), angles.sin()), dim=-1)
    values = {"cos_sin_cache": cache, "head_size": HEAD, "rotary_dim": rotary_dim, "is_neox_style": is_neox_style}
    return Layer(cls=RotaryEmbedding, native=0, _apply_rotary_emb_wrapped=apply_rotary_emb, **values)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("is_added", [True, False])
def test_norms_are_sglangs_whatever_the_other_rows_are(rows: int, is_added: bool) -> None:
    layer, wide = norm(), torch.randn(rows, 2 * WIDTH)
    x, residual = wide[:, :WIDTH], torch.randn(rows, WIDTH) if is_added else None
    found, expected = layer_kernels._norm(layer, x, residual), RMSNorm.forward_native(layer, x, residual)
    assert layer.native == 0
    torch.testing.assert_close(found, expected)
    for row in range(rows):
        alone = layer_kernels._norm(layer, x[row : row + 1], None if residual is None else residual[row : row + 1])
        assert torch.equal((alone[0] if is_added else alone)[0], (found[0] if is_added else found)[row])


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(("rotary_dim", "is_neox_style"), [(HEAD, True), (HEAD, False), (32, True), (32, False)])
def test_rotary_embeddings_are_sglangs(rows: int, rotary_dim: int, is_neox_style: bool) -> None:
    layer = rotary(rotary_dim, is_neox_style=is_neox_style)
    query, key, _ = torch.randn(rows, 8 * HEAD).split([4 * HEAD, 2 * HEAD, 2 * HEAD], dim=-1)
    positions = torch.randint(0, 100, (rows,))
    found = layer_kernels._rotate(layer, positions, query, key)
    expected = RotaryEmbedding.forward_native(layer, positions, query, key)
    assert layer.native == 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_not_usual_goes_sglangs_way() -> None:
    x, other = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    for layer, arguments in (
        (norm(), (x.bfloat16(),)),
        (norm(), (x.view(3, 1, WIDTH),)),
        (norm(), (x, other, other)),
        (norm(variance_size_override=64), (x,)),
        (norm(override_orig_dtype=torch.bfloat16), (x,)),
    ):
        found, expected = layer_kernels._norm(layer, *arguments), RMSNorm.forward_native(layer, *arguments)
        assert layer.native == 1
        torch.testing.assert_close(found, expected)
    layer, positions = rotary(), torch.arange(3)
    layer_kernels._rotate(layer, positions, x.bfloat16(), x.bfloat16())
    layer_kernels._rotate(layer, positions, x, x, torch.ones(3, dtype=torch.int64))
    assert layer.native == 2


def test_positions_outside_the_cache_are_refused() -> None:
    with pytest.raises(IndexError, match="accepted: 0 to 99"):
        layer_kernels._rotate(rotary(), torch.tensor([3, 100]), torch.randn(2, HEAD), torch.randn(2, HEAD))
