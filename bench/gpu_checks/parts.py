"""Checks of attention by message (F10): parts of batches over several homes, merged, against attention over all KV."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpu_checks.place import CheckError, Place
from gpu_checks.runner import Result, Status, Table
from kunserve_sgl.cpu_attention.paged_attention import plan_part
from kunserve_sgl.cuda_attention.merging import DeviceMergePlan
from kunserve_sgl.exchange.attention_parts import AttentionPart, divide_batch
from kunserve_sgl.exchange.attention_work import QUERY, AttentionShape, order_tensors
from kunserve_sgl.integration.attention.flashinfer_parts import FlashInferKernels
from kunserve_sgl.integration.attention.part_attention import PartKernels
from kunserve_sgl.integration.attention.triton_parts import TritonKernels

# Of outputs of about the size of one: of what is rounded to the type of the model before it is multiplied. A part that
# has the wrong weight is off by its whole size, and so it is with a log-sum-exp of the wrong base.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_LSE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_KV_SPLITS = 8
_HEAD_DIM = 128
_PRECISION = "TRITON_F32_DEFAULT"
_ROUNDS = 20


@dataclass(frozen=True)
class _Case:
    """A batch: per request its cached tokens, its new ones, and homes in runs of (tokens, home)."""

    name: str
    cached: Sequence[int]
    new: Sequence[int]
    runs: Sequence[Sequence[tuple[int, int]]]
    q_heads: int
    kv_heads: int
    logit_cap: float = 0.0
    window: int = -1


def _cases(scale: int) -> Iterator[_Case]:
    """Small batches, of prompts `scale` times as long."""
    long = 40 * scale
    decode = [[(long, 1), (1, 0)], [(5, 0), (3, 1)], [(long // 2, 2), (long // 2 + 1, 1)]]
    for name, q_heads, kv_heads in (("GQA", 8, 2), ("MQA", 4, 1), ("MHA", 2, 2)):
        yield _Case(f"decode, {name}", [long, 7, long], [1, 1, 1], decode, q_heads, kv_heads)
    extend = [[(long, 1), (17, 0)], [(9, 0)], [(long, 2), (long, 1), (30, 0)]]
    for name, q_heads, kv_heads in (("GQA", 8, 2), ("MQA", 4, 1)):
        yield _Case(f"extend, prefix elsewhere, {name}", [long, 0, 2 * long], [17, 9, 30], extend, q_heads, kv_heads)
    mixed = [[(long, 1), *[(3, 0), (3, 2)] * 5], [(long, 0), (1, 1)]]
    yield _Case("new tokens at two homes, and a decode", [long, long], [30, 1], mixed, 8, 2)
    capped = [[(long, 1), (20, 0)]]
    yield _Case("extend, a logit cap", [long], [20], capped, 8, 2, logit_cap=5.0)
    yield _Case("extend, a window", [long], [20], capped, 8, 2, window=25)
    yield _Case("decode, a window that hides a home", [long + 19], [1], capped, 8, 2, window=10)


class _Batch:
    """A case with random queries, keys and values, on a device."""

    def __init__(self, case: _Case, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.dtype = case, device, dtype
        self.lengths = np.add(case.cached, case.new)
        homes = np.concatenate([np.full(tokens, home) for runs in case.runs for tokens, home in runs])
        total = int(self.lengths.sum())
        self.slots = 1 + torch.randperm(total).numpy()  # slot 0 is the padding's
        self.parts = divide_batch(self.slots, homes.astype(np.int64), self.lengths, np.array(case.new))
        shape = (1 + total, case.kv_heads, head_dim)
        self.key, self.value = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        self.query = (2 * torch.randn(sum(case.new), case.q_heads, head_dim, device=device)).to(dtype)
        name = str(dtype).removeprefix("torch.")
        self.shape = AttentionShape(case.q_heads, case.kv_heads, head_dim, head_dim, head_dim, name)
        self.scale = head_dim**-0.5

    def planned(self, kernels: PartKernels) -> list[Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
        return [self._part(kernels, part) for part in self.parts.values()]

    def _part(self, kernels: PartKernels, part: AttentionPart) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        planned = kernels.part(plan_part(*part.slots.arrays, sliding_window=self.case.window), self.shape)
        query = order_tensors(part, self.query, None, None)[QUERY]
        assert query is not None
        # Only the KV of this home: what is read from elsewhere is no number.
        key, value = torch.full_like(self.key, torch.nan), torch.full_like(self.value, torch.nan)
        for mine, whole in ((key, self.key), (value, self.value)):
            own = torch.from_numpy(part.slots.slots.astype(np.int64)).to(self.device)
            mine[own], mine[0] = whole[own], 0
        return lambda: planned.attend(query, key, value, self.scale, self.case.logit_cap)

    def merge(self, states: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [part.tokens for part in self.parts.values()]
        return DeviceMergePlan(len(self.query), rows, self.device).merge(states, torch.float32)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """By torch over all KV, in float32: output, and the natural log-sum-exp."""
        outputs, lses = [], []
        begin, group = 0, self.case.q_heads // self.case.kv_heads
        queries = self.query.float().split(list(self.case.new))
        for length, query in zip(self.lengths.tolist(), queries, strict=True):
            own = torch.from_numpy(self.slots[begin : begin + length]).to(self.device)
            begin += length
            key, value = (each[own].float().repeat_interleave(group, 1) for each in (self.key, self.value))
            scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
            if self.case.logit_cap:
                scores = self.case.logit_cap * torch.tanh(scores / self.case.logit_cap)
            position = torch.arange(length - len(query), length, device=self.device).unsqueeze(1)
            others = torch.arange(length, device=self.device)
            hidden = others > position
            if self.case.window >= 0:
                hidden |= others < position - self.case.window
            scores.masked_fill_(hidden, -torch.inf)
            lses.append(torch.logsumexp(scores, -1).T)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
        return torch.cat(outputs), torch.cat(lses)


def check_parts(place: Place) -> Result:
    """F10: parts by Triton and by FlashInfer, merged, give what attention over all KV gives, with its log-sum-exp."""
    device = torch.device("cuda", torch.cuda.current_device()) if place.is_cuda else torch.device("cpu")
    skipped = {}
    if not place.is_cuda:
        from kunserve_sgl.integration.cpu_platform import kernels

        kernels.install()
        skipped = {"flashinfer": "there is no CPU in it", "bfloat16, float16": "the interpreter is for float32"}
    # Else SGLang's decode kernel multiplies float32 as TF32, which has as few bits as float16. Triton reads it when it
    # compiles, and keeps what it has compiled apart.
    os.environ[_PRECISION] = "ieee"
    by_triton = TritonKernels(device, _KV_SPLITS)
    dtypes = [torch.float32, torch.float16, torch.bfloat16] if place.is_cuda else [torch.float32]
    head_dim, scale = (_HEAD_DIM, 16) if place.is_cuda else (16, 1)
    rows = [row for dtype in dtypes for row in _rows("triton", by_triton, dtype, head_dim, scale, device)]
    if place.is_cuda:
        if missing := [spec.name for spec in flashinfer_specs() if not spec.is_compiled]:
            skipped["flashinfer"] = f"to compile {' and '.join(missing)} takes minutes, and the cache has it not"
        else:
            flashinfer = FlashInferKernels(device, by_triton)
            rows += _rows("flashinfer", flashinfer, torch.bfloat16, head_dim, scale, device)
    columns = ["kernels", "type", "batch", "homes", "output off by", "LSE off by"]
    if place.is_cuda:
        columns.append("us for all parts and merging")
    figures = {"batches": str(len(rows)), "head dimensions": str(head_dim)}
    return Result(Status.PASSED, figures=figures, skipped=skipped, tables=[Table("merged parts", columns, rows)])


def flashinfer_specs() -> list[Any]:
    """What FlashInfer compiles for this check, without and with a logit cap: much more than its deadline has time for.
    With FLASHINFER_CUDA_ARCH_LIST set, `build` of each compiles it where there is no GPU."""
    from flashinfer.jit import gen_batch_prefill_module

    dtype = torch.bfloat16  # of queries, KV and output
    return [
        gen_batch_prefill_module(
            "fa2", dtype, dtype, dtype, torch.int32, _HEAD_DIM, _HEAD_DIM, 0, False, is_capped, False
        )
        for is_capped in (False, True)
    ]


def _rows(
    name: str, kernels: PartKernels, dtype: torch.dtype, head_dim: int, scale: int, device: torch.device
) -> Iterator[list[str]]:
    for case in _cases(scale):
        batch = _Batch(case, head_dim, dtype, device)
        parts = batch.planned(kernels)
        output, lse = batch.merge([part() for part in parts])
        expected, expected_lse = batch.expected()
        off, lse_off = _distance(output, expected), _distance(lse, expected_lse)
        what = f"{name}, {dtype}, {case.name}"
        if not off < _TOLERANCE[dtype] * max(1.0, expected.abs().max().item()):
            raise CheckError(f"{what}: an output is off by {off:.3g}")
        if not lse_off < _LSE_TOLERANCE[dtype] * max(1.0, expected_lse.abs().max().item()):
            raise CheckError(f"{what}: a log-sum-exp is off by {lse_off:.3g}; it has to be a natural logarithm")
        homes = str(len(batch.parts))
        row = [name, str(dtype).removeprefix("torch."), case.name, homes, f"{off:.1e}", f"{lse_off:.1e}"]
        if device.type == "cuda":
            row.append(f"{_microseconds(batch, parts):.0f}")
        print(", ".join(row), flush=True)
        yield row


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where something is no number."""
    return float((found - expected).abs().nan_to_num(float("inf")).max())


def _microseconds(batch: _Batch, parts: list[Callable[[], tuple[torch.Tensor, torch.Tensor]]]) -> float:
    """What a layer takes, of which all parts are on one GPU, one after the other."""
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    for _ in range(_ROUNDS):
        batch.merge([part() for part in parts])
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began_s) / _ROUNDS
