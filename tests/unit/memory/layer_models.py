"""A small decoder whose layers hold tensors in every way that real and quantised models do."""

from __future__ import annotations

import torch
from torch import nn

HIDDEN = 64


class Rotary(nn.Module):
    """One object for all layers, as in SGLang."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", torch.linspace(-1, 1, HIDDEN), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.cos_sin_cache


class Attention(nn.Module):
    """Parameters that are transposed, quantised, views of each other, or no parameters at all."""

    def __init__(self, rotary: Rotary, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.rotary = rotary
        self.qkv = nn.Linear(HIDDEN, HIDDEN)
        with torch.no_grad():
            self.qkv.weight.copy_(random(HIDDEN, HIDDEN))
            self.qkv.bias.copy_(random(HIDDEN))
        # fp8 per-tensor weights are stored transposed.
        self.weight_t = nn.Parameter(random(HIDDEN, 2 * HIDDEN).to(torch.float8_e4m3fn).t(), requires_grad=False)
        with torch.inference_mode():
            self.scale = nn.Parameter(random(1).abs() + 0.5, requires_grad=False)
        self.register_buffer("zero_points", torch.randint(0, 9, (HIDDEN,), generator=generator, dtype=torch.int8))
        # MLA keeps halves of one projection as plain attributes: one as a view, one re-packed.
        self.kv_b = nn.Parameter(random(HIDDEN, 512), requires_grad=False)
        self.w_kc = self.kv_b.data[:, :256]
        self.w_vc = self.kv_b.data[:, 256:].t().contiguous().t()
        self.packed = {"blocks": [torch.randint(0, 255, (40_000,), generator=generator, dtype=torch.uint8)] * 2}
        self.workspace = torch.zeros(100_000, dtype=torch.uint8)
        self.sort_indices = torch.arange(16)
        self.empty_indices = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rotary(self.qkv(x)) * self.scale + self.zero_points
        y = y @ self.weight_t.float().t()[:HIDDEN, :HIDDEN]
        low = y @ self.w_kc @ self.w_vc.t()
        self.workspace[:8] += 1
        return low[:, self.sort_indices].sum(1, keepdim=True) + y + self.packed["blocks"][0][:HIDDEN]


class Layer(nn.Module):
    def __init__(self, rotary: Rotary, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.attention = Attention(rotary, seed)
        self.up = nn.Linear(HIDDEN, 3 * HIDDEN, dtype=torch.bfloat16)
        self.down = nn.Linear(HIDDEN, 3 * HIDDEN, dtype=torch.bfloat16)
        # Tied inside the layer: two modules, one parameter.
        self.down.weight = self.up.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.attention(self.norm(x)).to(torch.bfloat16)
        return x + (self.up(y) - self.down(y)).float().sum(1, keepdim=True) + y.float()


class Decoder(nn.Module):
    def __init__(self, layer_count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(layer_count)
        self.embedding = nn.Embedding(32, HIDDEN)
        rotary = Rotary()
        self.layers = nn.ModuleList(Layer(rotary, seed) for seed in range(layer_count))
        # Two layers share a bias, and the head shares one with the last layer.
        self.layers[1].norm.bias = self.layers[0].norm.bias
        self.head = nn.Linear(HIDDEN, 32, bias=False)
        self.head_view = [self.layers[layer_count - 1].norm.weight.data[:4]]

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x) / 100
        return self.head(x)


TOKENS = torch.arange(7)


def tensors_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a test layer by name, whatever way it is held."""
    found = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    attention = layer.attention
    assert isinstance(attention, Attention)
    for name in ("w_kc", "w_vc", "workspace", "sort_indices"):
        found[f"attention.{name}"] = getattr(attention, name)
    found["attention.packed.blocks.0"] = attention.packed["blocks"][0]
    return found
