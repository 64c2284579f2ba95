"""The activations of a batch on its way through its hosts: tensors in a buffer that all members of a group map.

The batch's owner provides the buffer. Whoever holds the batch reads the tensors, computes, and writes the next ones
over them; a message then passes the batch on. So one buffer per owner is enough, and nothing is copied twice. Pieces
of a batch that are under way at the same time each have a place of their own in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.execution.work import TensorNote
from kunserve_sgl.memory.shared_buffer import SharedBuffer

_ALIGNMENT_BYTES = 64
_NOTHING = "none"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class ActivationBuffer:
    """Reads and writes named tensors in a buffer that several processes map."""

    def __init__(self, shared: SharedBuffer) -> None:
        self._memory = shared.tensor(torch.uint8, (shared.size_bytes,))

    def write(
        self, tensors: Mapping[str, torch.Tensor | None], keep: torch.Tensor | None, place: int = 0
    ) -> tuple[TensorNote, ...]:
        """Writes the tensors one behind the other, from byte `place` on; of each only the rows `keep` where that is
        given, int64[n].

        The writing is finished when this returns: the next holder may be another device or process.
        Raises InvariantError where the buffer is too small.
        """
        notes: list[TensorNote] = []
        at = place
        for name, tensor in tensors.items():
            if tensor is None:
                notes.append(TensorNote(name, _NOTHING, ()))
                continue
            part = tensor if keep is None else tensor.index_select(0, keep)
            note = TensorNote(name, str(part.dtype).removeprefix("torch."), tuple(part.shape))
            self._view(note, at).copy_(part)
            notes.append(note)
            at = _behind(at, part.numel() * part.element_size())
        if self._memory.device.type == "cuda":
            torch.cuda.current_stream(self._memory.device).synchronize()
        return tuple(notes)

    def read(self, notes: Sequence[TensorNote], place: int = 0) -> dict[str, torch.Tensor | None]:
        """Copies of the tensors from byte `place` on; the buffer is written over while they are in use."""
        tensors: dict[str, torch.Tensor | None] = {}
        at = place
        for note in notes:
            if note.dtype == _NOTHING:
                tensors[note.name] = None
                continue
            view = self._view(note, at)
            tensors[note.name] = view.clone()
            at = _behind(at, view.numel() * view.element_size())
        return tensors

    def _view(self, note: TensorNote, at: int) -> torch.Tensor:
        dtype = _DTYPES.get(note.dtype)
        if dtype is None:
            raise InvariantError(f"activations of type {note.dtype}; accepted: {', '.join(_DTYPES)}")
        size_bytes = dtype.itemsize
        for extent in note.shape:
            size_bytes *= extent
        if at + size_bytes > self._memory.numel():
            raise InvariantError(
                f"{note.name} {note.shape} of {note.dtype} ends {at + size_bytes - self._memory.numel()} bytes behind "
                f"the activation buffer of {self._memory.numel()} bytes"
            )
        return self._memory[at : at + size_bytes].view(dtype).view(note.shape)


def buffer_bytes(tokens: int, hidden_size: int, tensors: int, dtype: torch.dtype, pieces: int = 1) -> int:
    """Bytes that `tensors` tensors (tokens, hidden_size) take, also if they are cut into so many pieces by tokens."""
    return tensors * (_behind(0, tokens * hidden_size * dtype.itemsize) + (pieces - 1) * _ALIGNMENT_BYTES)


def _behind(at: int, size_bytes: int) -> int:
    return -(-(at + size_bytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
