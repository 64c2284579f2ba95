"""Checks of kernels: the tests that need a GPU (F2), and attention over a KV buffer with holes (F3)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from gpu_checks.memory import make_vmm
from gpu_checks.place import CheckError, Place
from gpu_checks.runner import Result, Status
from kunserve_sgl.memory.virtual_range import Span, VirtualRange
from kunserve_sgl.memory.vmm import VmmBackend

_ROOT = Path(__file__).parents[2]
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)")
# Slot ids at which an offset of 1,024 elements per slot does not fit into 31 bits any more.
_FAR_SLOT = 2_150_000
_QUERY_HEADS, _KV_HEADS, _HEAD_DIM = 16, 8, 128
_KV_SPLITS = 8
# Of outputs of size one; what is read from a wrong slot is off by its whole size.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def check_gpu_tests(place: Place) -> Result:
    """F2: tests/gpu, up to the first that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-x", "-q", "-rs", "-p", "no:cacheprovider"],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
    counts = {what: number for number, what in _COUNTS.findall(last)}
    if done.returncode:
        raise CheckError(f"pytest ended with status {done.returncode}: {last}")
    if place.is_cuda and "passed" not in counts:
        raise CheckError(f"no test has run: {last}")
    if "passed" not in counts:
        return Result(Status.SKIPPED, f"there is no GPU; pytest has collected {counts.get('skipped', '0')} tests")
    return Result(Status.PASSED, figures=counts)


class _Buffer:
    """K or V of one layer, (slots, heads, dim): a tensor over addresses of which a few frames have memory."""

    def __init__(self, vmm: VmmBackend, slots: int, dtype: torch.dtype, label: str) -> None:
        self.row_bytes = _KV_HEADS * _HEAD_DIM * dtype.itemsize
        self.frame_slots = vmm.frame_bytes // self.row_bytes
        self.range: VirtualRange = vmm.reserve(slots // self.frame_slots, label)
        self._vmm = vmm
        tensor = vmm.virtual_tensor(self.range, 0, self.range.size_bytes)
        self.tensor = tensor.view(dtype).view(-1, _KV_HEADS, _HEAD_DIM)

    def map_around(self, slot: int) -> range:
        """Puts a frame behind the slot, and returns the slots in it."""
        position = slot // self.frame_slots
        span = Span(self.range, position, 1)
        self._vmm.map(span, self._vmm.create_frames(1))
        self._vmm.zero(span)
        return range(position * self.frame_slots, (position + 1) * self.frame_slots)


def check_holes(place: Place) -> Result:
    """F3: decode, extend and store_cache touch the slots that they are given, and no others, of a buffer in which
    nothing but a few frames is mapped. The first frame is, as in every KV buffer of a server."""
    torch.manual_seed(0)
    vmm = make_vmm(place)
    dtype = torch.bfloat16 if place.is_cuda else torch.float32
    skipped = {}
    if not place.is_cuda:
        from kunserve_sgl.integration.cpu_platform import kernels

        kernels.install()
    frame_slots = vmm.frame_bytes // (_KV_HEADS * _HEAD_DIM * dtype.itemsize)
    space = -(-(_FAR_SLOT + 2 * frame_slots) // frame_slots) * frame_slots
    k, v = (_Buffer(vmm, space, dtype, label) for label in ("k", "v"))
    mapped: list[int] = []
    for slot in (0, space // 3, _FAR_SLOT):
        mapped += k.map_around(slot)
        v.map_around(slot)
    order = torch.randperm(len(mapped) - 1)
    slots = (torch.tensor(mapped)[1:][order]).to(vmm.device)  # without slot 0, which is the padding's
    values = [torch.randn(len(slots), _KV_HEADS, _HEAD_DIM, dtype=dtype, device=vmm.device) for _ in range(2)]
    if place.is_cuda:
        _store(k.tensor, v.tensor, slots, *values)
    else:
        skipped["store_cache"] = "a CUDA kernel"
        for buffer, each in zip((k, v), values, strict=True):
            buffer.tensor[slots] = each
    worst = {
        "decode": _decode_error(k.tensor, v.tensor, slots, *values),
        "extend": _extend_error(k.tensor, v.tensor, slots, *values),
    }
    for name, error in worst.items():
        if not error < _TOLERANCE[dtype]:
            raise CheckError(f"{name}: an output is off by {error:.3g}; accepted: less than {_TOLERANCE[dtype]:g}")
    figures = {f"{name} off by at most": f"{error:.1e}" for name, error in worst.items()}
    figures["slots"] = f"{len(mapped)} of {space} mapped, up to {max(mapped)}"
    return Result(Status.PASSED, figures=figures, skipped=skipped)


def _store(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor) -> None:
    from sglang.kernels.ops.kvcache.kvcache import store_cache

    flat = [each.flatten(1) for each in (new_k, new_v, k, v)]
    store_cache(*flat, slots)
    for name, buffer, new in (("k", k, new_k), ("v", v, new_v)):
        if not torch.equal(buffer[slots], new):
            raise CheckError(f"store_cache: {name} does not hold what was stored")


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """In float32: q (queries, heads, dim) over k and v (tokens, kv heads, dim), of which query i sees `seen[i]`."""
    group = _QUERY_HEADS // _KV_HEADS
    k, v = (each.float().repeat_interleave(group, dim=1) for each in (k, v))
    scores = torch.einsum("qhd,thd->hqt", q.float(), k) / _HEAD_DIM**0.5
    hidden = torch.arange(len(k), device=q.device)[None, :] >= seen[:, None]
    weights = scores.masked_fill(hidden[None], float("-inf")).softmax(-1)
    return torch.einsum("hqt,thd->qhd", weights, v)


def _pointers(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _decode_error(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor
) -> float:
    """The largest difference to torch, of two requests that have a part of the slots each."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    lengths = [min(37, len(slots) // 2), min(70, len(slots) // 2)]
    q = torch.randn(len(lengths), _QUERY_HEADS, _HEAD_DIM, dtype=k.dtype, device=k.device)
    out = torch.full_like(q, float("nan"))
    logits = torch.empty(len(lengths), _QUERY_HEADS, _KV_SPLITS, _HEAD_DIM, device=k.device)
    sums = torch.empty(len(lengths), _QUERY_HEADS, _KV_SPLITS, device=k.device)
    splits = torch.full((len(lengths),), _KV_SPLITS, dtype=torch.int32, device=k.device)
    indices = slots[: sum(lengths)]
    pointers = _pointers(lengths, k.device)
    decode_attention_fwd(
        *(q, k, v, out, pointers, indices, logits, sums, splits, _KV_SPLITS, _HEAD_DIM**-0.5, 1.0, 1.0)
    )
    worst = 0.0
    for number, (first, stop) in enumerate(zip(pointers.tolist(), pointers.tolist()[1:], strict=False)):
        seen = torch.tensor([stop - first], device=k.device)
        expected = _attention(q[number : number + 1], new_k[first:stop], new_v[first:stop], seen)
        worst = max(worst, _distance(out[number : number + 1], expected))
    return worst


def _extend_error(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, new_k: torch.Tensor, new_v: torch.Tensor
) -> float:
    """The largest difference to torch, of one request with a prefix in the slots."""
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    prefix, tokens = min(45, len(slots)), 11
    q = torch.randn(tokens, _QUERY_HEADS, _HEAD_DIM, dtype=k.dtype, device=k.device)
    own_k, own_v = (torch.randn(tokens, _KV_HEADS, _HEAD_DIM, dtype=k.dtype, device=k.device) for _ in range(2))
    out = torch.full_like(q, float("nan"))
    extend_attention_fwd(
        *(q, own_k, own_v, out, k, v, _pointers([tokens], k.device), _pointers([prefix], k.device), slots[:prefix]),
        *(None, True, None, tokens, 1.0, 1.0),
    )
    seen = torch.arange(prefix + 1, prefix + tokens + 1, device=k.device)
    return _distance(out, _attention(q, torch.cat([new_k[:prefix], own_k]), torch.cat([new_v[:prefix], own_v]), seen))


def _distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; infinite where an output is no number."""
    return float((out.float() - expected).abs().nan_to_num(float("inf")).max())
