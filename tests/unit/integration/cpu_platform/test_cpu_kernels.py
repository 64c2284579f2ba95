"""Triton kernels on a machine without an accelerator: interpreted, on the tensors themselves."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from sglang.kernels.ops.elementwise import elementwise
from triton.runtime import autotuner, jit

from kunserve_sgl.integration.cpu_platform import kernels
from kunserve_sgl.memory.virtual_range import Span, hole_at
from kunserve_sgl.memory.vmm_memfd import MemfdVmm


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in (
        (elementwise, "fused_gate_sigmoid_mul_add"),
        (jit.JITFunction, "run"),
        (jit.JITFunction, "__call__"),
        (autotuner.Autotuner, "run"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    kernels.install()


@triton.jit
def _twice(x):
    return x + x


@triton.autotune(configs=[triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 16})], key=["count"])
@triton.jit
def _add_twice(out, x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(out + at, tl.load(out + at, mask=inside) + _twice(tl.load(x + at, mask=inside)), mask=inside)


def test_a_kernel_runs_without_a_device() -> None:
    x, out = torch.randn(21), torch.randn(21)
    expected = out + 2 * x
    _add_twice[lambda meta: (triton.cdiv(21, meta["BLOCK"]),)](out, x, 21)
    assert torch.equal(out, expected)


def test_a_kernel_touches_only_what_it_is_told_to() -> None:
    """A KV buffer has addresses for all slots there may ever be, and memory behind few."""
    vmm = MemfdVmm(4096)
    area = vmm.reserve(4, "kv")
    vmm.map(Span(area, 1, 1), vmm.create_frames(1))
    whole = vmm.virtual_tensor(area, 0, area.size_bytes).view(torch.float32)
    slots = whole[1024 : 1024 + 21]
    slots.zero_()
    x = torch.randn(21)
    _add_twice[lambda meta: (triton.cdiv(21, meta["BLOCK"]),)](slots, x, 21)
    assert torch.equal(slots, 2 * x)


def test_a_tensor_that_begins_in_a_hole_is_refused_as_on_cuda() -> None:
    """Whatever of it the kernel would touch."""
    vmm = MemfdVmm(4096)
    area = vmm.reserve(4, "kv")
    vmm.map(Span(area, 1, 1), vmm.create_frames(1))
    whole = vmm.virtual_tensor(area, 0, area.size_bytes).view(torch.float32)
    grid = (1,)
    for begin in (0, 1023, 2048):
        with pytest.raises(ValueError, match=rf"_add_twice gets .*'kv', 4 frames, 1 mapped\) at byte {4 * begin}$"):
            _add_twice[grid](whole[begin:], torch.zeros(1), 0)
    _add_twice[grid](whole[2047:], torch.zeros(1), 0)
    with pytest.raises(ValueError, match="begins in a hole"):
        _add_twice[grid](out=torch.zeros(1), x=whole, count=0)
    vmm.unmap(Span(area, 1, 1))
    with pytest.raises(ValueError, match="begins in a hole"):
        _add_twice[grid](whole[1024:], torch.zeros(1), 0)
    address = whole.data_ptr()
    del whole
    assert hole_at(address) is not None
    vmm.release(area)
    assert hole_at(address) is None


def test_the_gate_of_a_shared_expert() -> None:
    """The replacement is what the kernel computes."""
    replaced = elementwise.fused_gate_sigmoid_mul_add
    hidden, gate, shared, final = torch.randn(5, 32), torch.randn(32), torch.randn(5, 32), torch.randn(5, 32)
    expected = final.clone()
    elementwise._fused_gate_sigmoid_mul_add_kernel[(5,)](hidden, gate, shared, expected, hidden_dim=32, BLOCK_SIZE=32)
    assert not torch.equal(expected, final)
    replaced(hidden, gate, shared, final)
    assert torch.allclose(final, expected, atol=1e-6)
