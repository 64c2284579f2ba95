"""What replicas on GPUs share, between real processes: parameters to restore from, KV of other replicas' slots,
activations. Both on one GPU, or on two with access to each other."""

from __future__ import annotations

import os
import signal
import socket

import pytest
import torch
from torch import nn

from gpu_checks.other_process import TIMEOUT_S, other_process
from kunserve_sgl.memory.borrowed_region import BorrowedRegion
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.errors import ChecksumMismatchError
from kunserve_sgl.memory.frame_export import receive_export, send_export
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_parameters import LayerParameters
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.slot_space import KvBuffer, SlotSpace, plan_slot_space
from kunserve_sgl.memory.vmm_cuda import CudaVmm

FRAME_BYTES = 2 << 20
LAYERS = 3
HIDDEN = 2048
ROW_BYTES = 2048
PARTS = [(0, 2, (2, 0)), (1, 1, (1,))]  # first granule, granules, layers: of replica 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with its driver"),
]


@pytest.fixture(params=["the same GPU", "two GPUs"])
def other_gpu(request: pytest.FixtureRequest) -> int:
    gpu = torch.cuda.current_device()
    if request.param == "the same GPU":
        return gpu
    other = (gpu + 1) % torch.cuda.device_count()
    reachable = other != gpu and torch.cuda.can_device_access_peer(other, gpu)
    if not reachable or not torch.cuda.can_device_access_peer(gpu, other):
        pytest.skip("needs two GPUs with access to each other")
    return other


def make_layers(gpu: int) -> tuple[nn.ModuleList, LayerParameters, FramePool]:
    """The same parameters in every process."""
    torch.manual_seed(1)
    layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, dtype=torch.bfloat16) for _ in range(LAYERS))
    layers.requires_grad_(False).to(torch.device("cuda", gpu))
    pool = FramePool(CudaVmm(gpu, FRAME_BYTES), f"process {os.getpid()}")
    parameters = LayerParameters(pool)
    parameters.adopt(layers, list(layers))
    return layers, parameters, pool


def lend_layer(sock: socket.socket, gpu: int) -> None:
    """Lends layer 1, with a wrong byte at first, and then waits to be killed."""
    _, parameters, pool = make_layers(gpu)
    loan = pool.loans.lend("borrower", parameters.frames_of(1))
    with pool.vmm.export_frames(loan.frames) as export:
        send_export(sock, export, TIMEOUT_S)
    while order := sock.recv(1):
        assert order == b"f"
        parameters.region(1)[12345] ^= 4
        torch.cuda.synchronize(gpu)
        sock.sendall(b"k")


def test_a_layer_is_restored_from_another_process_even_if_that_is_killed(other_gpu: int) -> None:
    gpu = torch.cuda.current_device()
    layers, parameters, pool = make_layers(gpu)
    x = torch.randn(5, HIDDEN, dtype=torch.bfloat16, device=f"cuda:{gpu}")
    before = layers[1](x)
    parameters.drop(1)
    free = pool.free_frames
    with other_process(lend_layer, other_gpu) as (sock, process):
        with receive_export(sock, TIMEOUT_S) as export:
            source = BorrowedRegion(pool, "lender", 1, export, 1)
        sock.sendall(b"f")
        assert sock.recv(1) == b"k"
        with pytest.raises(ChecksumMismatchError):
            parameters.restore(1, source)
        assert pool.free_frames == free
        sock.sendall(b"f")
        assert sock.recv(1) == b"k"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(TIMEOUT_S)
        with source:
            parameters.restore(1, source)
    assert torch.equal(layers[1](x), before)
    pool.check()
    assert pool.snapshot().borrowed == 0


def make_kv(gpu: int, replica: int) -> tuple[ElasticKv, FramePool, list[KvBuffer], SlotSpace]:
    buffers = [KvBuffer(layer, name, ROW_BYTES) for name in ("k", "v") for layer in range(LAYERS)]
    space = plan_slot_space(buffers, FRAME_BYTES, 1, 2, 4 * FRAME_BYTES // ROW_BYTES)
    pool = FramePool(CudaVmm(gpu, FRAME_BYTES), f"replica {replica}")
    pool.add_frames(len(buffers) * 5)
    return ElasticKv(pool, space, buffers, replica), pool, buffers, space


def part_values(kv: ElasticKv, buffers: list[KvBuffer]) -> list[torch.Tensor]:
    """Views of what PARTS name, part by part and buffer by buffer."""
    views = []
    for first, granules, layers in PARTS:
        slots = kv.space.slots_of(0, first, granules)
        for buffer in buffers:
            if buffer.layer in layers:
                views.append(kv.tensor(buffer, torch.float32, (-1,))[slots.first : slots.stop])
    return views


def double_lent_kv(sock: socket.socket, gpu: int) -> None:
    """Replica 1 maps replica 0's frames behind the same slots, and doubles what is there."""
    kv, pool, buffers, space = make_kv(gpu, 1)
    with receive_export(sock, TIMEOUT_S) as export:
        kv.borrow("replica 0", 1, export, [(space.slots_of(0, first, n), layers) for first, n, layers in PARTS])
    for view in part_values(kv, buffers):
        view.mul_(2)
    pool.loans.return_loan("replica 0", 1)
    pool.check()
    sock.sendall(b"k")


def test_kv_of_some_layers_is_used_by_another_process(other_gpu: int) -> None:
    kv, pool, buffers, space = make_kv(torch.cuda.current_device(), 0)
    kv.grow(1)
    kv.map_hosted(space.slots_of(0, 1, 1), [0, 1, 2])
    for number, view in enumerate(part_values(kv, buffers)):
        assert not view.any(), "new memory is zero"
        view.fill_(number + 1)
    torch.cuda.synchronize()
    frames = [f for first, n, layers in PARTS for f in kv.frames_behind(space.slots_of(0, first, n), layers)]
    loan = pool.loans.lend("replica 1", frames)
    with other_process(double_lent_kv, other_gpu) as (sock, process):
        with pool.vmm.export_frames(frames) as export:
            send_export(sock, export, TIMEOUT_S)
        assert sock.recv(1) == b"k"
    assert process.exitcode == 0
    pool.loans.end_loan(loan.loan_id)
    for number, view in enumerate(part_values(kv, buffers)):
        assert view.unique().tolist() == [2 * (number + 1)]
    kv.unmap_hosted(space.slots_of(0, 1, 1), [0, 1, 2])
    pool.check()


def answer_in_buffer(sock: socket.socket, gpu: int) -> None:
    """Adds one to what it reads and writes it behind, until the socket closes."""
    vmm = CudaVmm(gpu, FRAME_BYTES)
    with receive_export(sock, TIMEOUT_S) as export:
        buffer = SharedBuffer.open(vmm, export)
    while sock.recv(1):
        buffer.tensor(torch.int64, (50,), 8 * 50).copy_(buffer.tensor(torch.int64, (50,)) + 1)
        torch.cuda.synchronize(gpu)
        sock.sendall(b"k")
    buffer.close()
    vmm.close()


def test_two_processes_take_turns_in_a_shared_buffer(other_gpu: int) -> None:
    vmm = CudaVmm(torch.cuda.current_device(), FRAME_BYTES)
    buffer = SharedBuffer.create(vmm, 3 * FRAME_BYTES)
    with other_process(answer_in_buffer, other_gpu) as (sock, process):
        with buffer.export() as export:
            send_export(sock, export, TIMEOUT_S)
        for turn in range(100):
            values = torch.arange(50, device=vmm.device) * turn
            buffer.tensor(torch.int64, (50,)).copy_(values)
            torch.cuda.synchronize()
            sock.sendall(b"w")
            assert sock.recv(1) == b"k"
            assert torch.equal(buffer.tensor(torch.int64, (50,), 8 * 50), values + 1)
    assert process.exitcode == 0
    buffer.close()
    vmm.close()
