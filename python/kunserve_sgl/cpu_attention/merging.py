"""Merges partial results of attention over disjoint sets of keys, in float32.

Method: a softmax over a union of sets follows from the maxima and sums over each of them (Milakov and Gimelshein 2018,
"Online normalizer calculation for softmax", section 3.1; Dao et al. 2022, "FlashAttention"; so flash-decoding, Dao et
al. 2023, puts its splits together). With w = exp(lse) of each part: output = sum(w * output) / sum(w), lse =
log(sum(w)), computed relative to the largest LSE so far. LSEs are natural logarithms.

Merged results are those of the whole but for rounding: the last bits depend on how the keys were divided. They depend
neither on the other tokens nor on which part was ready first, as parts are added in the order of the plan. Knows torch
and numba alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kunserve_sgl.cpu_attention.attention_kernel import compiled

State = tuple[torch.Tensor, torch.Tensor]
"""What attention over one part gave: output, float32 (tokens, heads, v_head_dim), and the natural LSE, float32 (tokens,
heads). LSE is -inf where a token saw nothing; what the output holds there has no influence."""

_Floats = npt.NDArray[np.float32]

_F0 = np.float32(0.0)
_F1 = np.float32(1.0)
_NEG_INF = np.float32(-np.inf)


@compiled
def _add(
    tokens: npt.NDArray[np.int64], output: _Floats, lse: _Floats, sums: _Floats, largest: _Floats, totals: _Floats
) -> None:
    """Adds one part to what has been merged; `totals` is 0 where that is nothing. A NaN that was seen stays."""
    for row in range(len(tokens)):
        token = tokens[row]
        for head in range(lse.shape[1]):
            own = lse[row, head]
            if own == _NEG_INF:
                continue
            source = output[row, head]
            target = sums[token, head]
            if totals[token, head] == _F0:
                for d in range(len(target)):
                    target[d] = source[d]
                largest[token, head] = own
                totals[token, head] = _F1
            elif own > largest[token, head]:
                shrink = np.float32(math.exp(largest[token, head] - own))
                for d in range(len(target)):
                    target[d] = target[d] * shrink + source[d]
                largest[token, head] = own
                totals[token, head] = totals[token, head] * shrink + _F1
            else:
                weight = np.float32(math.exp(own - largest[token, head]))
                for d in range(len(target)):
                    target[d] += weight * source[d]
                totals[token, head] += weight


@compiled
def _finish(sums: _Floats, largest: _Floats, totals: _Floats) -> None:
    """Turns sums into output, and `largest` into LSE."""
    for token in range(len(sums)):
        for head in range(totals.shape[1]):
            target = sums[token, head]
            total = totals[token, head]
            if total == _F0:
                for d in range(len(target)):
                    target[d] = _F0
                largest[token, head] = _NEG_INF
            elif total != _F1:  # nothing is computed for who is in one part only
                for d in range(len(target)):
                    target[d] /= total
                largest[token, head] += np.float32(math.log(total))


class MergePlan:
    """Says how the parts of one batch come together; it is made once per batch and serves all its layers."""

    def __init__(self, tokens: int, parts: Sequence[npt.NDArray[np.integer[Any]]]) -> None:
        """`parts` are for each part the tokens of the batch that it has results for, integers (n,), ascending, in
        [0, tokens). A token may be in any number of parts. Raises ValueError where they are not."""
        self.tokens = tokens
        self.device = torch.device("cpu")
        self._parts = [np.array(part, np.int64) for part in parts]
        for part in self._parts:
            if part.ndim != 1 or (len(part) and (part[0] < 0 or part[-1] >= tokens or (part[1:] <= part[:-1]).any())):
                raise ValueError(f"tokens of a part must ascend and lie in [0, {tokens}), got {part.tolist()}")

    def merge(self, states: Sequence[State], output_dtype: torch.dtype) -> State:
        """Merges the results of all parts, in the order of the plan's parts, on the CPU.

        Nothing is computed for a token of which one part only has seen something: that is passed on bit by bit.

        Returns:
            output (tokens, heads, v_head_dim) of `output_dtype`, and LSE float32 (tokens, heads). A token that saw
            nothing in any part, or is in none, has output 0 and LSE -inf.

        Raises:
            ValueError: the results are not those of the plan's parts, or do not fit together.
        """
        heads, v_head_dim = self._check(states)
        output = torch.empty(self.tokens, heads, v_head_dim)
        largest, totals = torch.empty(self.tokens, heads), torch.zeros(self.tokens, heads)
        merged = output.numpy(), largest.numpy(), totals.numpy()
        for tokens, (part_output, part_lse) in zip(self._parts, states, strict=True):
            _add(tokens, _array(part_output), _array(part_lse), *merged)
        _finish(*merged)
        return output.to(output_dtype), largest

    def _check(self, states: Sequence[State]) -> tuple[int, int]:
        shapes = [(tuple(output.shape), tuple(lse.shape)) for output, lse in states]
        fits = len(states) == len(self._parts) > 0 and all(
            len(output) == 3 and lse == output[:2] and output == (len(part), *shapes[0][0][1:])
            for (output, lse), part in zip(shapes, self._parts, strict=True)
        )
        if not fits:
            tokens = [len(part) for part in self._parts]
            raise ValueError(f"output and lse {shapes} do not fit together, or not to parts of {tokens} tokens")
        for tensor in (tensor for state in states for tensor in state):
            if tensor.dtype != torch.float32 or tensor.device.type != self.device.type:
                raise ValueError(
                    f"results to merge must be float32 on {self.device}, got {tensor.dtype} on {tensor.device}"
                )
        _, heads, v_head_dim = shapes[0][0]
        return heads, v_head_dim


def warm_up() -> None:
    """Compiles what merging needs, or loads it from the disk cache, so that no request waits for it."""
    MergePlan(1, [np.zeros(1, np.int64)]).merge([(torch.zeros(1, 1, 1), torch.zeros(1, 1))], torch.float32)


def _array(tensor: torch.Tensor) -> _Floats:
    array: _Floats = tensor.detach().contiguous().numpy()
    return array
