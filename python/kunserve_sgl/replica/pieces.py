"""A batch on its way through its layer hosts: cut into pieces, which are micro-batches, and joined again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kunserve_sgl.exchange.activations import buffer_bytes
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.policy.cutting import MOST_PIECES
from kunserve_sgl.replica.batch_shape import BatchShape, Int64s
from kunserve_sgl.replica.layer_runner import Batch, LayerRunner

TENSORS_PER_TOKEN = 2
"""Of `Activations`, at most: the hidden states and the residual."""


def activation_bytes(most_tokens: int, hidden_size: int, dtype: torch.dtype) -> int:
    """Counts the bytes that a replica's own batches take between layer hosts, in as many pieces as there can be."""
    return buffer_bytes(most_tokens, hidden_size, TENSORS_PER_TOKEN, dtype, MOST_PIECES)


@dataclass
class Piece:
    """Knows how far tokens [first, first + shape.tokens) of an own batch have come.

    batch: what the engine takes for these tokens.
    keep: indices, int64[n], of those whose activations are needed behind the last layer; None for all.
    place: where its part of the activation buffer begins, in bytes.
    at: index of the next segment of the route; layer: the next layer, where a segment has been begun here.
    state: what came out of the last layer that ran, one row per token; None before the embedding.
    order: the number under which it is with other replicas; None while it is here.
    has_only_kept: whether `state` has, or will come back with, the rows `keep` only.
    """

    index: int
    first: int
    shape: BatchShape
    batch: Batch
    keep: Int64s | None
    place: int
    at: int = 0
    layer: int = 0
    state: Activations | None = None
    order: int | None = None
    has_only_kept: bool = False


def whole_batch(batch: Batch, shape: BatchShape, runner: LayerRunner) -> list[Piece]:
    """Returns the batch as one piece, which needs no rebuilding."""
    return [Piece(0, 0, shape, batch, runner.rows_to_keep(batch), 0)]


def cut(
    batch: Batch, shape: BatchShape, sizes: Sequence[int], embedded: Activations, runner: LayerRunner
) -> list[Piece]:
    """Returns pieces of `sizes` tokens, in order; `embedded` is what the whole batch brings to the first layer."""
    keep = runner.rows_to_keep(batch)
    pieces = []
    first = place = 0
    for index, part in enumerate(shape.cut(sizes)):
        end = first + part.tokens
        piece = Piece(
            index,
            first,
            part,
            runner.rebuild(part),
            None if keep is None else keep[(keep >= first) & (keep < end)] - first,
            place,
            state={name: None if tensor is None else tensor[first:end] for name, tensor in embedded.items()},
        )
        pieces.append(piece)
        first = end
        place += buffer_bytes(part.tokens, runner.hidden_size, TENSORS_PER_TOKEN, runner.dtype)
    return pieces


def join(pieces: Sequence[Piece], tokens: int) -> Activations:
    """Returns what came out of the last layer, for all `tokens` tokens of the batch. Rows that nobody keeps are zero,
    and nobody reads them."""
    if len(pieces) == 1 and not pieces[0].has_only_kept:
        state = pieces[0].state
        assert state is not None
        return state
    joined: Activations = {}
    for piece in pieces:
        assert piece.state is not None
        for name, part in piece.state.items():
            if part is None:
                joined[name] = None
                continue
            whole = joined.get(name)
            if whole is None:
                whole = joined[name] = part.new_zeros((tokens, *part.shape[1:]))
            if piece.has_only_kept:
                assert piece.keep is not None
                whole[torch.from_numpy(piece.first + piece.keep).to(part.device)] = part
            else:
                whole[piece.first : piece.first + piece.shape.tokens] = part
    return joined
