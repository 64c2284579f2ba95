"""Parts by FlashInfer: which parts it gets, and what it is told. In place of its wrapper, which needs a GPU, is one in
torch that takes nothing but what the real one's signatures take, and gives a log-sum-exp of base 2 as that does."""

from __future__ import annotations

import inspect
import math
from typing import Any

import flashinfer
import numpy as np
import pytest
import torch
from attention_world import Requests, interpret_triton, runs

from kunserve_sgl.cpu_attention.merging import State
from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan, PagedAttention, plan_part
from kunserve_sgl.cuda_attention.merging import DeviceMergePlan
from kunserve_sgl.exchange.attention_work import QUERY, order_tensors
from kunserve_sgl.integration.attention import flashinfer_parts
from kunserve_sgl.integration.attention.flashinfer_parts import FlashInferKernels, causal_rule
from kunserve_sgl.integration.attention.triton_parts import TritonKernels

CPU = torch.device("cpu")
REAL = flashinfer.BatchPrefillWithPagedKVCacheWrapper


class Wrapper:
    """Attends as FlashInfer's documentation says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        inspect.signature(REAL.__init__).bind(self, *args, **kwargs)
        self.plans: list[dict[str, Any]] = []

    def plan(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(REAL.plan).bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.plans.append(bound.arguments)

    def run(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        bound = inspect.signature(REAL.run).bind(self, *args, **kwargs)
        assert bound.arguments["return_lse"]
        told = self.plans[-1]
        query, (key, value) = bound.arguments["q"], bound.arguments["paged_kv_cache"]
        assert key.shape[1] == value.shape[1] == told["page_size"] == 1, "(pages, page size, heads, dim)"
        assert query.shape[1:] == (told["num_qo_heads"], told["head_dim_qk"])
        assert (query.dtype, key.dtype) == (told["q_data_type"], told["kv_data_type"])
        assert told["paged_kv_last_page_len"].tolist() == [1] * (len(told["qo_indptr"]) - 1)
        for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"):
            assert told[name].dtype == torch.int32
        outputs, lses = [], []
        group = told["num_qo_heads"] // told["num_kv_heads"]
        rows, entries = told["qo_indptr"].tolist(), told["paged_kv_indptr"].tolist()
        for i in range(len(rows) - 1):
            slots = told["paged_kv_indices"][entries[i] : entries[i + 1]].long()
            q = query[rows[i] : rows[i + 1]].float()
            k, v = (each[slots, 0].float().repeat_interleave(group, 1) for each in (key, value))
            scores = torch.einsum("qhd,khd->hqk", q, k) * told["sm_scale"]
            if told["logits_soft_cap"]:
                scores = told["logits_soft_cap"] * torch.tanh(scores / told["logits_soft_cap"])
            if told["causal"]:
                ends = len(slots) - len(q) + 1 + torch.arange(len(q))
                scores.masked_fill_(torch.arange(len(slots)) >= ends.unsqueeze(1), -torch.inf)
            lses.append(torch.logsumexp(scores, -1).T / math.log(2.0))
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).nan_to_num(0.0))
        return torch.cat(outputs).to(query.dtype), torch.cat(lses)


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "BatchPrefillWithPagedKVCacheWrapper", Wrapper)
    interpret_triton(monkeypatch)


def batch(cached: list[int], new: list[int], homes: list[list[int]], **values: Any) -> Requests:
    return Requests(cached, new, homes, **{"head_dim": 64, "v_head_dim": 64, "dtype": torch.float16, **values})


def plans_of(requests: Requests) -> dict[int, AttentionPlan]:
    return {
        home: plan_part(*part.slots.arrays, sliding_window=requests.window) for home, part in requests.divide().items()
    }


DECODE = batch([40, 5], [1, 1], [runs((20, 1), (21, 0)), runs((3, 0), (3, 1))])
PREFIX_ELSEWHERE = batch([30, 20], [5, 9], [runs((30, 1), (5, 0)), runs((20, 1), (9, 0))])
PREFIX_AT_BOTH = batch([30], [5], [runs((10, 0), (10, 1), (15, 0))], logit_cap=5.0)
NEW_AT_TWO_HOMES = batch([10], [6], [runs((10, 0), (3, 0), (3, 1))])
SOME_OF_EACH = batch([10, 10], [6, 6], [runs((10, 1), (6, 0)), runs((10, 0), (6, 1))])
A_WINDOW = batch([30], [6], [runs((36, 0))], window=8)
A_WINDOW_OF_ONE_QUERY = batch([30], [1], [runs((31, 0))], window=8)


@pytest.mark.parametrize(
    ("requests", "rules"),
    [
        (PREFIX_ELSEWHERE, {0: True, 1: False}),
        (PREFIX_AT_BOTH, {0: True, 1: False}),
        (NEW_AT_TWO_HOMES, {0: None, 1: None}),
        (SOME_OF_EACH, {0: None, 1: None}),
        (A_WINDOW, {0: None}),
        (DECODE, {0: True, 1: True}),
    ],
)
def test_the_rule_of_a_part(requests: Requests, rules: dict[int, bool | None]) -> None:
    assert {home: causal_rule(plan) for home, plan in plans_of(requests).items()} == rules


@pytest.mark.parametrize(
    ("requests", "by_flashinfer"),
    [
        (DECODE, 2),
        (PREFIX_ELSEWHERE, 2),
        (PREFIX_AT_BOTH, 2),
        (NEW_AT_TWO_HOMES, 0),
        (SOME_OF_EACH, 0),
        (A_WINDOW, 0),
        (A_WINDOW_OF_ONE_QUERY, 1),
    ],
)
def test_parts_that_are_merged_give_what_the_whole_gives(requests: Requests, by_flashinfer: int) -> None:
    flashinfer_kernels = FlashInferKernels(CPU, TritonKernels(CPU, 2))
    states: list[State] = []
    key, value = (each.nan_to_num(0.0) for each in (requests.key, requests.value))
    parts = requests.divide()
    for home, plan in plans_of(requests).items():
        part = flashinfer_kernels.part(plan, requests.shape)
        query = order_tensors(parts[home], requests.query, None, None)[QUERY]
        assert query is not None
        for _ in range(2):  # two layers
            found = part.attend(query, key, value, requests.scale, requests.logit_cap)
        states.append(found)
    output, lse = DeviceMergePlan(sum(requests.new), [part.tokens for part in parts.values()], CPU).merge(
        states, torch.float32
    )
    whole = batch(requests.cached, requests.new, requests.homes, window=requests.window, logit_cap=requests.logit_cap)
    whole.query, whole.key, whole.value = (each.float() for each in (requests.query, requests.key, requests.value))
    expected, expected_lse = whole.undivided(PagedAttention(), torch.float32)
    torch.testing.assert_close(output, expected, rtol=0, atol=4e-3 * expected.abs().max().item())
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2e-3)
    wrapper: Any = flashinfer_kernels._wrapper
    assert len(wrapper.plans) == by_flashinfer, "a part is planned once for its layers"


def test_a_part_is_planned_again_when_another_one_was_in_between() -> None:
    flashinfer_kernels = FlashInferKernels(CPU, TritonKernels(CPU, 2))
    one, other = (flashinfer_kernels.part(plan, DECODE.shape) for plan in plans_of(DECODE).values())
    key = DECODE.key.nan_to_num(0.0)
    for part in (one, one, other, one):
        part.attend(DECODE.query, key, key, 1.0, 0.0)
    wrapper: Any = flashinfer_kernels._wrapper
    assert len(wrapper.plans) == 3


def test_no_plan_is_written_over_before_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer copies each out of the same pinned buffer, and waits for none of these copies."""
    told: list[str] = []
    plan = Wrapper.plan

    def noted(self: Wrapper, *args: Any, **kwargs: Any) -> None:
        told.append("plan")
        plan(self, *args, **kwargs)

    monkeypatch.setattr(Wrapper, "plan", noted)
    monkeypatch.setattr(flashinfer_parts, "finish", lambda device: told.append("finish"))
    flashinfer_kernels = FlashInferKernels(CPU, TritonKernels(CPU, 2))
    key = DECODE.key.nan_to_num(0.0)
    for plan_of_part in plans_of(DECODE).values():
        flashinfer_kernels.part(plan_of_part, DECODE.shape).attend(DECODE.query, key, key, 1.0, 0.0)
    assert told == ["finish", "plan"] * 2


@pytest.mark.parametrize("values", [{"head_dim": 48, "v_head_dim": 48}, {"dtype": torch.float32}])
def test_what_flashinfer_does_not_have_goes_to_others(values: dict[str, Any]) -> None:
    requests = batch([9], [1], [runs((10, 0))], **values)
    part = FlashInferKernels(CPU, TritonKernels(CPU, 2)).part(plans_of(requests)[0], requests.shape)
    _, lse = part.attend(requests.query * 0, requests.key, requests.value, 1.0, 0.0)
    torch.testing.assert_close(lse, torch.full_like(lse, np.log(10.0)))
