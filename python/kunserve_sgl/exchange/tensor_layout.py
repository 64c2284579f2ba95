"""How the tensors of one hand-over lie in bytes: one behind the other, in the order of their notes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.work import TensorNote

ALIGNMENT_BYTES = 64
NOTHING = "none"  # the type of a tensor that is not there


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {_name_of(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Activations = dict[str, torch.Tensor | None]
"""What comes out of a layer, by name: "hidden_states", and in most models "residual", each (tokens, hidden size) in
the model's type and on its device. None stands for a tensor that the model has not made yet."""


def notes_of(tensors: Activations, keep: torch.Tensor | None) -> tuple[TensorNote, ...]:
    """Returns what the other side has to know of `tensors`, of each only the rows `keep` where that is given,
    int64[n]."""
    notes = []
    for name, tensor in tensors.items():
        if tensor is None:
            notes.append(TensorNote(name, NOTHING, ()))
            continue
        shape = tuple(tensor.shape) if keep is None else (keep.numel(), *tensor.shape[1:])
        notes.append(TensorNote(name, _NAMES.get(tensor.dtype) or _name_of(tensor.dtype), shape))
    return tuple(notes)


def packed_bytes(notes: Sequence[TensorNote]) -> int:
    """Counts the bytes that the tensors of `notes` take: 0 where there is nothing but None and tensors without
    elements. Raises InvariantError for a type that is none of activations."""
    return sum(aligned(_size_bytes(note)) for note in notes)


def pack(tensors: Activations, keep: torch.Tensor | None, memory: torch.Tensor) -> None:
    """Copies `tensors` into `memory`, uint8[at least packed_bytes], in stream order where it is on a GPU."""
    copy_into(unpack(notes_of(tensors, keep), memory), tensors, keep)


def copy_into(views: Activations, tensors: Activations, keep: torch.Tensor | None) -> None:
    """Copies `tensors`, of each only the rows `keep` where that is given, int64[n], into `views` of the same names, in
    stream order where they are on a GPU."""
    for name, tensor in tensors.items():
        view = views[name]
        if tensor is not None and view is not None:
            view.copy_(tensor if keep is None else tensor.index_select(0, keep))


def unpack(notes: Sequence[TensorNote], memory: torch.Tensor) -> Activations:
    """Makes the tensors of `notes` as views of `memory`, uint8[at least packed_bytes], which begins at a multiple of 64
    bytes."""
    tensors: Activations = {}
    at = 0
    for note in notes:
        if note.dtype == NOTHING:
            tensors[note.name] = None
            continue
        size_bytes = _size_bytes(note)
        if size_bytes:
            tensors[note.name] = memory[at : at + size_bytes].view(_DTYPES[note.dtype]).view(note.shape)
        else:
            tensors[note.name] = torch.empty(note.shape, dtype=_DTYPES[note.dtype], device=memory.device)
        at += aligned(size_bytes)
    return tensors


def _size_bytes(note: TensorNote) -> int:
    if note.dtype == NOTHING:
        return 0
    dtype = _DTYPES.get(note.dtype)
    if dtype is None:
        raise InvariantError(f"activations of type {note.dtype}; accepted: {', '.join(_DTYPES)}")
    return math.prod(note.shape) * dtype.itemsize


def aligned(size_bytes: int) -> int:
    """Rounds a tensor's size up to what it takes: whole multiples of `ALIGNMENT_BYTES`."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
