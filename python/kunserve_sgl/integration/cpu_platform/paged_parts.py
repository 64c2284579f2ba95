"""Parts of attention on a CPU, by `cpu_attention`."""

from __future__ import annotations

import torch
from typing_extensions import override

from kunserve_sgl.cpu_attention.merging import State
from kunserve_sgl.cpu_attention.paged_attention import NO_WINDOW, AttentionPlan, PagedAttention
from kunserve_sgl.exchange.attention_work import AttentionShape
from kunserve_sgl.integration.attention.part_attention import PartKernels, PlannedPart


class PagedKernels(PartKernels):
    """Attends by a `PagedAttention`, which nobody else uses while this is used."""

    def __init__(self, attention: PagedAttention) -> None:
        self._attention = attention

    @override
    def part(self, plan: AttentionPlan, shape: AttentionShape) -> PlannedPart:
        return _PagedPart(self._attention, plan)


class _PagedPart(PlannedPart):
    def __init__(self, attention: PagedAttention, plan: AttentionPlan) -> None:
        self._attention = attention
        self._plan = plan

    @override
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, logit_cap: float
    ) -> State:
        return self._attention.attend(
            self._plan,
            query,
            key,
            value,
            scale=scale,
            logit_cap=logit_cap,
            sliding_window=NO_WINDOW if self._plan.window is None else self._plan.window,
            output_dtype=torch.float32,
        )
