"""Virtual memory and layer parameters on a real GPU: the same contract as everywhere, and what only a GPU can
show."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "unit" / "memory"))

from vmm_contract import MakeVmm, VmmContract

from gpu_checks.other_process import TIMEOUT_S, other_process
from kunserve_sgl.memory.checksum import ChecksumAlgorithm, mixed_sums
from kunserve_sgl.memory.errors import LayerDroppedError, PeerAccessError
from kunserve_sgl.memory.frame_export import receive_export, send_export
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.host_copy import HostCopy
from kunserve_sgl.memory.layer_parameters import LayerParameters
from kunserve_sgl.memory.layer_sources import BufferSource
from kunserve_sgl.memory.virtual_range import LayerSpan, Span
from kunserve_sgl.memory.vmm_cuda import CudaVmm

FRAME_BYTES = 2 << 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with its driver"),
]


class TestContract(VmmContract):
    @pytest.fixture
    def make_vmm(self) -> MakeVmm:
        return lambda: CudaVmm(torch.cuda.current_device(), FRAME_BYTES)


@pytest.fixture
def vmm() -> Iterator[CudaVmm]:
    vmm = CudaVmm(torch.cuda.current_device(), FRAME_BYTES)
    yield vmm
    vmm.close()


def test_unmapping_waits_for_a_stream_that_still_writes(vmm: CudaVmm) -> None:
    area = vmm.reserve(8, "area")
    frames = vmm.create_frames(8)
    span = Span(area, 0, 8)
    vmm.map(span, frames)
    side = torch.cuda.Stream()
    tensor = vmm.tensor(area, 0, area.size_bytes).view(torch.int32)
    tensor.zero_()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2000):
            tensor.add_(1)
    del tensor
    vmm.unmap(span, after=[side])
    vmm.map(span, frames)
    assert vmm.tensor(area, 0, area.size_bytes).view(torch.int32).unique().tolist() == [2000]


def test_a_captured_graph_runs_again_after_its_memory_came_back(vmm: CudaVmm) -> None:
    area = vmm.reserve(1, "weights")
    frames = vmm.create_frames(1)
    span = Span(area, 0, 1)
    vmm.map(span, frames)
    weights = vmm.tensor(area, 0, FRAME_BYTES).view(torch.float32)
    weights.fill_(3.0)
    out = torch.zeros(FRAME_BYTES // 4, device=vmm.device)
    torch.add(weights, 1.0, out=out)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        torch.add(weights, 1.0, out=out)
    del weights
    vmm.unmap(span)
    vmm.map(span, frames)
    vmm.tensor(area, 0, FRAME_BYTES).view(torch.float32).fill_(5.0)
    graph.replay()
    assert out.unique().tolist() == [6.0]


def borrow_and_double(sock: socket.socket, gpu: int) -> None:
    """Another process: maps the frames it is lent, doubles every byte, says so, and returns them."""
    pool = FramePool(CudaVmm(gpu, FRAME_BYTES), "borrower")
    area = pool.vmm.reserve(4, "k 0")
    with receive_export(sock, TIMEOUT_S) as export:
        pool.loans.borrow("owner", 1, export, [LayerSpan(0, Span(area, 1, 3))])
    pool.vmm.tensor(area, FRAME_BYTES, 3 * FRAME_BYTES).mul_(2)
    pool.loans.return_loan("owner", 1)
    pool.check()
    sock.sendall(b"done")


@pytest.mark.parametrize("other_gpu", [False, True])
def test_another_process_uses_lent_frames(vmm: CudaVmm, other_gpu: bool) -> None:
    gpu = torch.cuda.current_device()
    borrower_gpu = (gpu + 1) % torch.cuda.device_count() if other_gpu else gpu
    if other_gpu and (borrower_gpu == gpu or not torch.cuda.can_device_access_peer(borrower_gpu, gpu)):
        pytest.skip("needs a second GPU with access to the first")
    pool = FramePool(vmm, "owner")
    pool.add_frames(3)
    area = vmm.reserve(3, "k 0")
    pool.map_kv([LayerSpan(0, Span(area, 0, 3))])
    vmm.tensor(area, 0, area.size_bytes).fill_(21)
    torch.cuda.synchronize()
    with other_process(borrow_and_double, borrower_gpu) as (ours, process):
        loan = pool.loans.lend("borrower", vmm.frames_at(Span(area, 0, 3)))
        with vmm.export_frames(loan.frames) as export:
            send_export(ours, export, TIMEOUT_S)
        assert ours.recv(4) == b"done"
        pool.loans.end_loan(loan.loan_id)
    assert process.exitcode == 0
    assert vmm.tensor(area, 0, area.size_bytes).unique().tolist() == [42]


def test_a_gpu_without_access_is_refused() -> None:
    gpu = torch.cuda.current_device()
    others = [other for other in range(torch.cuda.device_count()) if other != gpu]
    strangers = [other for other in others if not torch.cuda.can_device_access_peer(other, gpu)]
    if not strangers:
        pytest.skip("needs a second GPU without access to the first")
    with pytest.raises(PeerAccessError):
        CudaVmm(gpu, FRAME_BYTES, peer_gpus=strangers[:1])


def test_the_checksum_is_the_same_on_gpu_and_host() -> None:
    data = torch.randint(0, 256, (3 * FRAME_BYTES + 256,), dtype=torch.uint8)
    assert mixed_sums(data.cuda()) == mixed_sums(data)


def test_layers_are_dropped_and_restored_on_the_gpu(vmm: CudaVmm) -> None:
    """No second copy stays: the regions take what the parameters took, to a frame per layer."""
    layers = nn.ModuleList(nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(6))
    layers.requires_grad_(False)
    x = torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    before = run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info()
    pool = FramePool(vmm, "replica 0")
    parameters = LayerParameters(pool)
    reports = parameters.adopt(layers, list(layers))
    assert {report.checksum.algorithm for report in reports} == {ChecksumAlgorithm.MIXED_SUMS}
    torch.cuda.empty_cache()
    free_after, _ = torch.cuda.mem_get_info()
    assert free_before - free_after < (len(layers) + 32) * FRAME_BYTES
    assert torch.equal(run(), before)
    buffers = {number: parameters.region(number).clone() for number in range(3)}
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    copies = HostCopy(f"/proc/self/fd/{fd}", {number: parameters.region(number).numel() for number in range(3, 6)})
    for number in range(3, 6):
        assert copies.keep(number, parameters.region(number), parameters.report(number).checksum)
        if number == 4:
            copies.pin()
    for number in range(6):
        parameters.drop(number)
    assert pool.free_frames == pool.snapshot().total
    with pytest.raises(LayerDroppedError):
        run()
    for number in range(6):
        parameters.restore(number, BufferSource(buffers) if number < 3 else copies)
    assert torch.equal(run(), before)
    pool.check()
    for number in range(6):
        parameters.drop(number)
    pool.remove_frames(pool.snapshot().total)
