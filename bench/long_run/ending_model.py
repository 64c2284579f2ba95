"""A tiny model whose answers end by themselves after some ten tokens, as those of a real one do: a random model goes on
to the limit, and a client that names none would get all of the KV cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import PRESETS, SPECIAL_TOKENS, TinyModelSpec

# Of the logit of the token that ends an answer, in those of the other tokens. With 1.8 answers have 55 tokens on the
# average, every fourth ends within 5, every tenth is longer than 150.
_END_SPREAD = 1.8
_END_TOKEN = len(SPECIAL_TOKENS) - 1


def write_ending_model(directory: Path, *, preset: str = "tiny", seed: int = 0) -> str:
    """Write the model in float32, and name it."""
    sizes_of_preset: dict[str, Any] = dict(PRESETS[preset])
    sizes = write_tiny_model(TinyModelSpec(dtype="float32", seed=seed, **sizes_of_preset), directory)
    weights_file = directory / "model.safetensors"
    weights = load_file(weights_file)
    head = weights["lm_head.weight"]
    digest = hashlib.blake2b(f"{seed}/end".encode(), digest_size=4).digest()
    noise = torch.randint(
        -(2**23),
        2**23,
        head.shape[1:],
        generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")),
        dtype=torch.int32,
    )
    noise = noise.to(head.dtype)
    spread = head[_END_TOKEN + 1 :].std()
    head[_END_TOKEN] = noise / noise.std() * spread * _END_SPREAD
    save_file(weights, weights_file, metadata={"format": "pt"})
    return f"{preset} llama of {sizes.parameters / 1e6:.1f} M random parameters whose answers end"
