"""Merges partial results of attention on the device on which they are, in float32.

The method is that of `cpu_attention.merging`: with w = exp(lse) of each part, output = sum(w * output) / sum(w), lse =
log(sum(w)), computed relative to the largest LSE so far, parts in the order of the plan. LSEs are natural logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kunserve_sgl.cpu_attention.merging import MergePlan, State
from kunserve_sgl.exchange.attention_parts import Int64s
from kunserve_sgl.exchange.device_copies import on_device

_NOTHING = float("-inf")


class DeviceMergePlan(MergePlan):
    """Says how the parts of one batch come together on a device; it is made once per batch and serves all its
    layers."""

    def __init__(self, tokens: int, parts: Sequence[Int64s], device: torch.device) -> None:
        """Takes `tokens` and `parts` as `MergePlan` does."""
        super().__init__(tokens, parts)
        self.device = device
        self._rows = on_device(device, *self._parts)

    def merge(self, states: Sequence[State], output_dtype: torch.dtype) -> State:
        """Merges as `MergePlan.merge` does, in the current stream. A token of which one part only has seen something
        gets that bit by bit."""
        heads, v_head_dim = self._check(states)
        if len(states) == 1 and len(self._parts[0]) == self.tokens:
            output, lse = states[0]
            return torch.where((lse == _NOTHING).unsqueeze(-1), 0.0, output).to(output_dtype), lse
        sums = torch.zeros(self.tokens, heads, v_head_dim, device=self.device)
        totals = torch.zeros(self.tokens, heads, device=self.device)
        largest = torch.full_like(totals, _NOTHING)
        for rows, (output, lse) in zip(self._rows, states, strict=True):
            before = largest.index_select(0, rows)
            after = torch.maximum(before, lse)
            base = torch.where(after == _NOTHING, 0.0, after)
            shrink, weight = torch.exp(before - base), torch.exp(lse - base)
            added = torch.where((lse == _NOTHING).unsqueeze(-1), 0.0, output * weight.unsqueeze(-1))
            sums.index_copy_(0, rows, sums.index_select(0, rows) * shrink.unsqueeze(-1) + added)
            totals.index_copy_(0, rows, totals.index_select(0, rows) * shrink + weight)
            largest.index_copy_(0, rows, after)
        divisor = torch.where(totals > 0, totals, 1.0)
        return (sums / divisor.unsqueeze(-1)).to(output_dtype), largest + torch.log(divisor)
