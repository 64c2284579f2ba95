"""An own batch on its way through the pipeline: cut into pieces that follow each other, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import PPProxyTensors

from kunserve_sgl.exchange.activations import buffer_bytes
from kunserve_sgl.integration.runner.foreign_batch import BatchShape, rebuild, rows_to_keep

Tensors = dict[str, torch.Tensor | None]


class StageTensors(PPProxyTensors):  # type: ignore[misc]
    """What comes out of the layers before. SGLang's SDAR models use it as a dictionary, which upstream's class is no
    more than half of."""

    def get(self, key: str, default: torch.Tensor | None = None) -> torch.Tensor | None:
        found: torch.Tensor | None = self.tensors.get(key, default)
        return found


@dataclass
class Piece:
    """Tokens [first, first + shape.tokens) of the batch. `batch` is what the model runner takes for them, `keep` the
    indices of the tokens that the owner needs in the end, None for all. `place` is its part of the buffer in bytes.

    On its way: `at` is the next segment of the route, `layer` the next layer, where it has begun with the segment
    here, `tensors` what came out of the last layers, `order` the number under which it is with other replicas."""

    index: int
    first: int
    shape: BatchShape
    batch: Any
    keep: torch.Tensor | None
    place: int
    at: int = 0
    layer: int = 0
    tensors: Tensors | None = None
    order: int | None = None
    has_only_kept: bool = False

    @property
    def state(self) -> StageTensors | None:
        return None if self.tensors is None else StageTensors(self.tensors)


def whole_batch(batch: Any, shape: BatchShape) -> list[Piece]:
    """One piece, which needs no rebuilding."""
    return [Piece(0, 0, shape, batch, rows_to_keep(batch), 0)]


def cut(batch: Any, shape: BatchShape, sizes: Sequence[int], embedded: Tensors, runner: Any) -> list[Piece]:
    """Pieces of `sizes` tokens; `embedded` are the batch's activations before the first layer."""
    keep = rows_to_keep(batch)
    pieces = []
    first = place = 0
    for index, part in enumerate(shape.cut(sizes)):
        end = first + part.tokens
        piece = Piece(
            index,
            first,
            part,
            rebuild(part, runner.server_args.attention_backend, runner.device),
            None if keep is None else keep[(keep >= first) & (keep < end)] - first,
            place,
            tensors={name: None if tensor is None else tensor[first:end] for name, tensor in embedded.items()},
        )
        pieces.append(piece)
        first = end
        place += buffer_bytes(part.tokens, runner.model_config.hidden_size, 2, runner.dtype)
    return pieces


def join(pieces: Sequence[Piece], tokens: int) -> StageTensors:
    """The whole batch's activations, each (tokens, hidden). Those that nobody keeps are zero, and nobody reads them."""
    if len(pieces) == 1 and not pieces[0].has_only_kept:
        state = pieces[0].state
        assert state is not None
        return state
    joined: Tensors = {}
    for piece in pieces:
        assert piece.tensors is not None
        for name, part in piece.tensors.items():
            if part is None:
                joined[name] = None
                continue
            whole = joined.get(name)
            if whole is None:
                whole = joined[name] = part.new_zeros((tokens, *part.shape[1:]))
            if piece.has_only_kept:
                assert piece.keep is not None
                whole[piece.first + piece.keep] = part
            else:
                whole[piece.first : piece.first + piece.shape.tokens] = part
    return StageTensors(joined)
