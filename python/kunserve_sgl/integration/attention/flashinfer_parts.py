"""Parts of attention by FlashInfer, where its causal rule is that of the part; by other kernels where it is not.

FlashInfer puts the queries of a request at the end of its keys. So a part is for it that has all of the new tokens of
each request (causal), or none (not causal), or one query for each request; new tokens at several homes are not. Its
log-sum-exp has base 2 (`flashinfer/attention/state.cuh`, 0.6), and its output is of the type of the queries, so a part
is rounded to that before it is merged. Untried on CUDA; tests have a stand-in with its signatures.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from kunserve_sgl.cpu_attention import attention_kernel as columns
from kunserve_sgl.cpu_attention.merging import State
from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan
from kunserve_sgl.exchange.attention_work import AttentionShape
from kunserve_sgl.exchange.device_copies import finish, on_device
from kunserve_sgl.integration.attention.part_attention import PartKernels, PlannedPart
from kunserve_sgl.integration.attention.triton_parts import is_decode, seen_slots

_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends
_HEAD_DIMS = (64, 128, 256)
_DTYPES = ("bfloat16", "float16")
_LN_2 = math.log(2.0)


def causal_rule(plan: AttentionPlan) -> bool | None:
    """Tells whether the queries of each request see its slots as the last so many of them (True), or all see all of
    them (False). None where it is neither."""
    counts, lengths = plan.requests[:, columns.QUERY_COUNT], plan.requests[:, columns.KV_END]
    numbers = np.arange(plan.query_tokens) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = np.repeat(lengths, counts)
    begins_are_first = not plan.visible[:, 0].any()
    if begins_are_first and (plan.visible[:, 1] == ends - np.repeat(counts, counts) + 1 + numbers).all():
        return True
    if begins_are_first and (plan.visible[:, 1] == ends).all():
        return False
    return None


class FlashInferKernels(PartKernels):
    """Attends by one of FlashInfer's wrappers, which holds the plan of one part at a time."""

    def __init__(self, device: torch.device, others: PartKernels) -> None:
        """`others` attend to what FlashInfer does not."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self.device = device
        self._others = others
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        self._planned: tuple[Any, ...] = ()

    @override
    def part(self, plan: AttentionPlan, shape: AttentionShape) -> PlannedPart:
        fits = shape.head_dim == shape.v_head_dim and shape.head_dim in _HEAD_DIMS and shape.dtype in _DTYPES
        rule = True if is_decode(plan) else causal_rule(plan)
        if rule is None or not fits:
            return self._others.part(plan, shape)
        return _Part(self, plan, rule)

    def run(
        self, part: _Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, logit_cap: float
    ) -> State:
        """Attends to a part; plans it, unless it was the last one."""
        wanted = part, scale, logit_cap
        if self._planned != wanted:
            self._planned = ()
            # A plan goes to the device out of one pinned buffer, in stream order, and the next is written into it.
            finish(self.device)
            self._wrapper.plan(
                part.query_pointers,
                part.pointers,
                part.slots,
                torch.ones(len(part.pointers) - 1, dtype=torch.int32),
                query.shape[1],
                key.shape[1],
                query.shape[2],
                1,  # slots per page
                causal=part.is_causal,
                sm_scale=scale,
                logits_soft_cap=logit_cap,
                q_data_type=query.dtype,
                kv_data_type=key.dtype,
            )
            self._planned = wanted
        output, lse = self._wrapper.run(query, (key.unsqueeze(1), value.unsqueeze(1)), return_lse=True)
        return output.float(), lse * _LN_2


class _Part(PlannedPart):
    def __init__(self, kernels: FlashInferKernels, plan: AttentionPlan, is_causal: bool) -> None:
        self._kernels = kernels
        self.is_causal = is_causal
        counts = plan.requests[:, columns.QUERY_COUNT]
        if is_decode(plan):
            pointers, slots = seen_slots(plan)
        else:
            pointers = np.concatenate([np.zeros(1, np.int64), np.cumsum(plan.requests[:, columns.KV_END])])
            slots = plan.table.astype(np.int64)
        # FlashInfer reads pointers on the CPU to plan, and takes them along.
        self.query_pointers = torch.from_numpy(np.concatenate([np.zeros(1), np.cumsum(counts)]).astype(np.int32))
        self.pointers = torch.from_numpy(pointers.astype(np.int32))
        (on_it,) = on_device(kernels.device, slots)
        self.slots = on_it.to(torch.int32)

    @override
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, logit_cap: float
    ) -> State:
        return self._kernels.run(self, query, key, value, scale, logit_cap)
