"""The activations of a batch on its way through its layer hosts: tensors in a buffer that all members of a group map.

The batch's owner provides the buffer. Whoever holds the batch takes the tensors, computes, and writes the next ones
over them; a message then passes the batch on. So one buffer per owner is enough, and nothing is copied twice. Pieces
of a batch that are under way at the same time each have a place of their own in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.tensor_layout import (
    ALIGNMENT_BYTES,
    Activations,
    aligned,
    copy_into,
    notes_of,
    packed_bytes,
    unpack,
)
from kunserve_sgl.exchange.work import TensorNote
from kunserve_sgl.memory.shared_buffer import SharedBuffer

_MOST_VIEWS = 64


class _Written(NamedTuple):
    """Keeps what was written last at a place: the next step writes the same kinds of tensors there."""

    kind: Sequence[object]
    notes: tuple[TensorNote, ...]
    views: Activations


class ActivationBuffer:
    """Reads and writes named tensors in a buffer that several processes map. Places are multiples of 64 bytes."""

    def __init__(self, shared: SharedBuffer) -> None:
        self._shared = shared
        self._memory = shared.tensor(torch.uint8, (shared.size_bytes,))
        self._first = self._memory.data_ptr()
        self._stop = self._first + shared.size_bytes
        self._views: dict[tuple[int, tuple[TensorNote, ...]], Activations] = {}
        self._written: dict[int, _Written] = {}  # by place, without `keep`

    def write(self, tensors: Activations, keep: torch.Tensor | None, place: int = 0) -> tuple[TensorNote, ...]:
        """Writes the tensors one behind the other, from byte `place` on; of each only the rows `keep` where that is
        given, int64[n]. Returns what `read` needs at the next holder, which may be another device or process: the
        writing is finished. Raises InvariantError where the buffer is too small."""
        written = self._written.get(place)
        kind = [(name, None if tensor is None else (tensor.shape, tensor.dtype)) for name, tensor in tensors.items()]
        if keep is not None or written is None or written.kind != kind:
            notes = notes_of(tensors, keep)
            written = _Written(kind, notes, self._views_of(notes, place))
            if keep is None:
                if len(self._written) >= _MOST_VIEWS:
                    self._written.clear()
                self._written[place] = written
        copy_into(written.views, self._to_copy(tensors, written.views, keep), keep)
        if self._memory.device.type == "cuda":
            torch.cuda.current_stream(self._memory.device).synchronize()
        return written.notes

    def read(self, notes: Sequence[TensorNote], place: int = 0) -> Activations:
        """Copies the tensors that lie from byte `place` on, in the order of `notes`: the buffer is written over while
        they are in use."""
        views = self._views_of(tuple(notes), place)
        return {name: None if view is None else view.clone() for name, view in views.items()}

    def borrow(self, notes: Sequence[TensorNote], place: int = 0) -> Activations:
        """Returns the tensors where they lie: only for who holds the batch, until it writes. From a GPU's buffer, which
        may be another one's, they are copied."""
        if self._memory.device.type != "cpu":
            return self.read(notes, place)
        return dict(self._views_of(tuple(notes), place))

    def close(self) -> None:
        """Unmaps the buffer here, when the device has finished. It is used no more."""
        self._views.clear()
        self._written.clear()
        del self._memory
        self._shared.close()

    def _to_copy(self, tensors: Activations, views: Activations, keep: torch.Tensor | None) -> Activations:
        """Returns the tensors that `write` has to copy to `views`: not what lies there since `borrow` gave it, and of
        what lies elsewhere in the buffer a copy, as it may be written over before its turn."""
        found: Activations = {}
        for name, tensor in tensors.items():
            if tensor is not None and self._first <= (at := tensor.data_ptr()) < self._stop:
                view = views[name]
                if keep is None and view is not None and view.data_ptr() == at and tensor.is_contiguous():
                    continue
                tensor = tensor.clone()
            found[name] = tensor
        return found

    def _views_of(self, notes: tuple[TensorNote, ...], place: int) -> Activations:
        """Returns the tensors as views. Steps of one size follow each other, so views are kept."""
        key = (place, notes)
        views = self._views.get(key)
        if views is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            views = self._views[key] = unpack(notes, self._part(notes, place))
        return views

    def _part(self, notes: Sequence[TensorNote], place: int) -> torch.Tensor:
        missing = place + packed_bytes(notes) - self._memory.numel()
        if missing > 0:
            raise InvariantError(
                f"{', '.join(f'{note.name} {note.shape} of {note.dtype}' for note in notes)} from byte {place} on end "
                f"{missing} bytes behind the activation buffer of {self._memory.numel()} bytes"
            )
        return self._memory[place:]


def buffer_bytes(tokens: int, hidden_size: int, tensors: int, dtype: torch.dtype, pieces: int = 1) -> int:
    """Counts the bytes that `tensors` tensors (tokens, hidden_size) take, also if they are cut into so many pieces by
    tokens."""
    return tensors * (aligned(tokens * hidden_size * dtype.itemsize) + (pieces - 1) * ALIGNMENT_BYTES)
