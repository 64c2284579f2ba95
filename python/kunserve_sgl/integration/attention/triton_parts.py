"""Parts of attention by Triton: SGLang's decode kernel where each request has one query, ours for all else.

SGLang's has a natural log-sum-exp for each of its splits of the keys (`decode_attention.py`, stage 1 of 0.5.17); what
comes of all of them is as SGLang's decode context parallelism computes it. Untried on CUDA; tests interpret it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from kunserve_sgl.cpu_attention import attention_kernel as columns
from kunserve_sgl.cpu_attention.merging import State
from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan
from kunserve_sgl.cuda_attention import part_kernel
from kunserve_sgl.exchange.attention_work import AttentionShape
from kunserve_sgl.exchange.device_copies import on_device
from kunserve_sgl.integration.attention.part_attention import PartKernels, PlannedPart


def is_decode(plan: AttentionPlan) -> bool:
    """Tells whether each request has one query."""
    return bool((plan.requests[:, columns.QUERY_COUNT] == 1).all())


def seen_slots(plan: AttentionPlan) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns, of a plan in which each request has one query, where the slots begin that each sees, int64 (requests +
    1,), and these, int64 (entries,)."""
    begins = plan.requests[:, columns.TABLE_OFFSET] + plan.visible[:, 0]
    lengths = plan.visible[:, 1] - plan.visible[:, 0]
    pointers = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    flat = np.repeat(begins - pointers[:-1], lengths) + np.arange(pointers[-1])
    return pointers, plan.table[flat].astype(np.int64)


class TritonKernels(PartKernels):
    """Attends by Triton, in bfloat16, float16 or float32."""

    def __init__(self, device: torch.device, kv_splits: int) -> None:
        """`kv_splits` is into how many splits the keys of a request go at most that decodes, as
        --triton-attention-num-kv-splits says."""
        self.device = device
        self._kv_splits = kv_splits

    @override
    def part(self, plan: AttentionPlan, shape: AttentionShape) -> PlannedPart:
        if is_decode(plan):
            return _DecodePart(plan, self.device, self._kv_splits)
        return _ExtendPart(part_kernel.tables_of(plan, self.device))


class _ExtendPart(PlannedPart):
    def __init__(self, tables: part_kernel.PartTables) -> None:
        self._tables = tables

    @override
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, logit_cap: float
    ) -> State:
        return part_kernel.attend(self._tables, query, key, value, scale=scale, logit_cap=logit_cap)


class _DecodePart(PlannedPart):
    def __init__(self, plan: AttentionPlan, device: torch.device, kv_splits: int) -> None:
        pointers, slots = on_device(device, *seen_slots(plan))
        self._pointers, self._slots = pointers.to(torch.int32), slots
        self._splits = torch.full((plan.query_tokens,), kv_splits, dtype=torch.int32, device=device)
        self._kv_splits = kv_splits

    @override
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, logit_cap: float
    ) -> State:
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

        rows, heads, _ = query.shape
        v_head_dim = value.shape[2]
        output = torch.empty(rows, heads, v_head_dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows, heads, self._kv_splits, v_head_dim, dtype=torch.float32, device=query.device)
        # A split that nothing falls into is left as it is.
        lses = torch.full((rows, heads, self._kv_splits), float("-inf"), device=query.device)
        decode_attention_fwd(
            *(query, key, value, output, self._pointers, self._slots, sums, lses, self._splits, self._kv_splits),
            *(scale, 1.0, 1.0),
            logit_cap=logit_cap,
        )
        return output, torch.logsumexp(lses, dim=-1)
