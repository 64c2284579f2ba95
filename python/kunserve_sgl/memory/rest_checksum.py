"""The checksum of what a model has beside its decoder layers: embedding, norm and head, which every replica keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from kunserve_sgl.memory.checksum import checksum

_WORD_BYTES = 8


def rest_checksum(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> str:
    """Computes a checksum of the parameters and persistent buffers of `model` that none of `layers` has. It takes a
    pass over their bytes."""
    in_layers = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    state = model.state_dict(keep_vars=True)
    found = hashlib.sha256()
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in in_layers:
            found.update(f"{name} {checksum(_bytes_of(tensor.detach()))}\n".encode())
    return found.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    lacking = -flat.numel() % _WORD_BYTES
    return torch.nn.functional.pad(flat, (0, lacking)) if lacking else flat
