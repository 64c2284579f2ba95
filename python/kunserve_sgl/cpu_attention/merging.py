"""Merges partial results of attention over disjoint sets of keys, in float32.

Method: a softmax over a union of sets follows from the maxima and sums over each of them (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax", section 3.1; Dao et al. 2022, "FlashAttention"; so flash-decoding, Dao et
al. 2023, puts its splits together). With w = exp(lse) of each part: output = sum(w * output) / sum(w), lse =
log(sum(w)), computed relative to the largest LSE. LSEs are natural logarithms.

Merged results are those of the whole but for rounding: the last bits depend on how the keys were divided. They depend
neither on the other tokens nor on which part was ready first, as parts are added in the order of the plan. Knows torch
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

State = tuple[torch.Tensor, torch.Tensor]
"""What attention over one part gave: output (tokens, heads, v_head_dim) of any floating type, of which float32 loses
nothing, and the natural LSE, float32 (tokens, heads). LSE is -inf where a token saw nothing; what the output holds
there has no influence."""

_Index = torch.Tensor | None  # int64 (n,); None for all, in order


@dataclass(frozen=True)
class _Place:
    """Says where the rows of one part go: `alone_rows` to `alone_tokens` of the result, as these are in no other part;
    `shared_rows` to `shared_places` among the tokens that are merged."""

    alone_rows: _Index
    alone_tokens: torch.Tensor
    shared_rows: _Index
    shared_places: _Index
    shared_count: int


class MergePlan:
    """Says how the parts of one batch come together; it is made once per batch and serves all its layers."""

    def __init__(self, tokens: int, parts: Sequence[torch.Tensor]) -> None:
        """`parts` are for each part the tokens of the batch that it has results for, integers (n,), each once and in
        [0, tokens). A token may be in any number of parts. Raises ValueError where they are not."""
        times = torch.zeros(tokens, dtype=torch.int64)
        indices = [part.to(torch.int64) for part in parts]
        for index in indices:
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < tokens:
                raise ValueError(f"tokens of a part must lie in [0, {tokens}), got {index.tolist()}")
            counts = torch.bincount(index, minlength=tokens)
            if counts.numel() and counts.max() > 1:
                raise ValueError(f"a token is twice in one part: {index.tolist()}")
            times += counts
        several = torch.nonzero(times > 1).squeeze(1)
        place = torch.full((tokens,), -1, dtype=torch.int64)
        place[several] = torch.arange(len(several))
        self.tokens = tokens
        self._rows = [len(index) for index in indices]
        self._several = several
        self._places = [_placed(index, place[index], len(several)) for index in indices]

    def merge(self, states: Sequence[State], output_dtype: torch.dtype) -> State:
        """Merges the results of all parts, in the order of the plan's parts, on the CPU.

        A token that is in one part only gets what that says, bit by bit if the types are the same: nothing is computed.

        Returns:
            output (tokens, heads, v_head_dim) of `output_dtype`, and LSE float32 (tokens, heads). A token that saw
            nothing in any part, or is in none, has output 0 and LSE -inf.

        Raises:
            ValueError: the results are not those of the plan's parts, or do not fit together.
        """
        heads, v_head_dim = self._common_shape(states)
        if len(self._several) == self.tokens:
            output, lse = _merged(self._places, states, self.tokens)
            return output.to(output_dtype), lse
        output = torch.zeros((self.tokens, heads, v_head_dim), dtype=output_dtype)
        lse = torch.full((self.tokens, heads), -math.inf)
        for place, (part_output, part_lse) in zip(self._places, states, strict=True):
            if len(place.alone_tokens):
                own_lse = _taken(part_lse, place.alone_rows)
                output[place.alone_tokens] = _seen(_taken(part_output, place.alone_rows), own_lse).to(output_dtype)
                lse[place.alone_tokens] = own_lse
        if len(self._several):
            merged_output, lse[self._several] = _merged(self._places, states, len(self._several))
            output[self._several] = merged_output.to(output_dtype)
        return output, lse

    def _common_shape(self, states: Sequence[State]) -> tuple[int, int]:
        shapes = [(tuple(output.shape), tuple(lse.shape)) for output, lse in states]
        fits = len(states) == len(self._rows) and all(
            len(output) == 3 and lse == output[:2] and output[0] == rows and output[1:] == shapes[0][0][1:]
            for (output, lse), rows in zip(shapes, self._rows, strict=True)
        )
        if not fits or not states:
            raise ValueError(f"output and lse {shapes} do not fit together, or not to parts of {self._rows} tokens")
        heads, v_head_dim = shapes[0][0][1:]
        return heads, v_head_dim


def _placed(tokens: torch.Tensor, places: torch.Tensor, several: int) -> _Place:
    alone = torch.nonzero(places < 0).squeeze(1)
    shared = torch.nonzero(places >= 0).squeeze(1)
    shared_places = places[shared]
    in_order = len(shared) == several and bool((shared_places == torch.arange(several)).all())
    return _Place(
        None if not len(shared) else alone,
        tokens[alone],
        None if not len(alone) else shared,
        None if in_order else shared_places,
        len(shared),
    )


def _merged(places: Sequence[_Place], states: Sequence[State], tokens: int) -> State:
    shared = [
        (place.shared_places, _taken(output, place.shared_rows), _taken(lse, place.shared_rows))
        for place, (output, lse) in zip(places, states, strict=True)
        if place.shared_count
    ]
    heads, v_head_dim = shared[0][1].shape[1:]
    largest = torch.full((tokens, heads), -math.inf)
    for index, _, lse in shared:
        if index is None:
            torch.maximum(largest, lse, out=largest)
        else:
            largest[index] = torch.maximum(largest[index], lse)
    # -inf - -inf is NaN; any finite reference gives weight 0.
    reference = largest.masked_fill(largest == -math.inf, 0.0)
    total = torch.zeros_like(largest)
    sums = torch.zeros((tokens, heads, v_head_dim))
    for index, output, lse in shared:
        weight = torch.exp(lse - _taken(reference, index))
        # Not by weight 0, which may be one too small for float32: a NaN in a value that was seen must reach the output.
        weighted = _seen(output.float(), lse) * weight.unsqueeze(-1)
        if index is None:
            total += weight
            sums += weighted
        else:
            total[index] += weight
            sums[index] += weighted
    share = total.masked_fill(total == 0, 1.0).unsqueeze(-1)
    return sums.div_(share), reference + torch.log(total)


def _seen(output: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Returns `output` with 0 where nothing was seen."""
    unseen = lse == -math.inf
    return output.masked_fill(unseen.unsqueeze(-1), 0.0) if unseen.any() else output


def _taken(tensor: torch.Tensor, index: _Index) -> torch.Tensor:
    return tensor if index is None else tensor.index_select(0, index)
