"""A buffer that several processes map: real processes, real descriptors, and what is left when one of them dies."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from borrower_process import TIMEOUT_S, make_context

from cuda_model.driver import FakeBindings, make_fake_cuda
from kunserve_sgl.memory.errors import (
    ForeignFrameError,
    MappingFailedError,
    OutOfMemoryError,
    OutOfRangeError,
    TransferError,
    ViewInUseError,
)
from kunserve_sgl.memory.frame_export import receive_export, send_export
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.vmm import VmmBackend
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

FRAME_BYTES = 64 << 10


@pytest.fixture(params=["host", "cuda with a fake driver"])
def vmms(request: pytest.FixtureRequest) -> Iterator[tuple[VmmBackend, VmmBackend]]:
    """The backends of two processes, in this one."""
    if request.param == "host":
        pair: tuple[VmmBackend, VmmBackend] = MemfdVmm(FRAME_BYTES), MemfdVmm(FRAME_BYTES)
        yield pair
    else:
        bindings = FakeBindings()
        pair = make_fake_cuda(bindings), make_fake_cuda(bindings)
        yield pair
        assert bindings.broken_rules == []
        assert bindings.state() == ({}, set(), {}), "something is still mapped, held or reserved"
    for vmm in pair:
        assert vmm.own_frame_count == 0
        vmm.close()


def test_what_one_writes_the_other_reads(vmms: tuple[VmmBackend, VmmBackend]) -> None:
    buffer = SharedBuffer.create(vmms[0], 3 * FRAME_BYTES - 5)
    assert buffer.size_bytes == 3 * FRAME_BYTES
    with buffer.export() as export:
        other = SharedBuffer.open(vmms[1], export)
    with pytest.raises(ForeignFrameError):
        other.export()
    values = torch.arange(60_000, dtype=torch.int16).view(100, 600)
    buffer.tensor(torch.int16, (100, 600), 256).copy_(values)
    assert torch.equal(other.tensor(torch.int16, [100, 600], 256), values)
    other.tensor(torch.float32, (8,), buffer.size_bytes - 32).fill_(2.5)
    assert buffer.tensor(torch.float32, (8,), buffer.size_bytes - 32).tolist() == [2.5] * 8
    assert buffer.tensor(torch.bfloat16, (0, 7)).shape == (0, 7)
    for dtype, shape, offset_bytes in (
        (torch.float32, (8,), buffer.size_bytes - 28),
        (torch.float32, (8,), 2),
        (torch.uint8, (1,), -1),
    ):
        with pytest.raises(OutOfRangeError):
            buffer.tensor(dtype, shape, offset_bytes)
    for each in (buffer, other):
        tensor = each.tensor(torch.uint8, (1,))
        with pytest.raises(ViewInUseError):
            each.close()
        del tensor
        each.close()
        each.close()


def test_a_buffer_that_cannot_be_mapped_leaves_nothing() -> None:
    bindings = FakeBindings(memory_frames=4)
    vmm, other = make_fake_cuda(bindings), make_fake_cuda(bindings)
    empty = bindings.state()
    with pytest.raises(OutOfMemoryError):
        SharedBuffer.create(vmm, 5 * FRAME_BYTES)
    for name in ("cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"):
        bindings.fail_when(lambda called, number, name=name: called == name)  # type: ignore[misc]
        with pytest.raises((OutOfMemoryError, MappingFailedError)):
            SharedBuffer.create(vmm, 3 * FRAME_BYTES)
        assert bindings.state() == empty
    bindings.fail_when(lambda called, number: False)
    buffer = SharedBuffer.create(vmm, 3 * FRAME_BYTES)
    created = bindings.state()
    with buffer.export() as export:
        for name in ("cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap"):
            bindings.fail_when(lambda called, number, name=name: called == name)  # type: ignore[misc]
            with pytest.raises((OutOfMemoryError, MappingFailedError, TransferError)):
                SharedBuffer.open(other, export)
            assert bindings.state() == created
    bindings.fail_when(lambda called, number: False)
    buffer.close()
    assert bindings.state() == empty
    assert bindings.broken_rules == []


def test_on_the_host_it_takes_memory_only_where_it_was_written() -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    buffer = SharedBuffer.create(vmm, 1 << 30)

    def allocated_bytes() -> int:
        with buffer.export() as export:
            return sum(os.fstat(fd).st_blocks * 512 for fd in export.fds)

    assert allocated_bytes() == 0
    buffer.tensor(torch.uint8, (1,), 5 << 27).fill_(1)
    assert 0 < allocated_bytes() <= 2 << 20
    buffer.close()
    vmm.close()


def answer_in_buffer(sock: socket.socket) -> None:
    """The other process: adds one to what it reads, writes it behind, says so; until the socket closes."""
    vmm = MemfdVmm(FRAME_BYTES)
    with receive_export(sock, TIMEOUT_S) as export:
        buffer = SharedBuffer.open(vmm, export)
    while sock.recv(1):
        buffer.tensor(torch.int64, (50,), 8 * 50).copy_(buffer.tensor(torch.int64, (50,)) + 1)
        sock.sendall(b"r")
    buffer.close()
    vmm.close()


def own_a_buffer(sock: socket.socket) -> None:
    """The other process: owns a buffer, and then waits to be killed."""
    buffer = SharedBuffer.create(MemfdVmm(FRAME_BYTES), FRAME_BYTES)
    buffer.tensor(torch.uint8, (FRAME_BYTES,)).fill_(77)
    with buffer.export() as export:
        send_export(sock, export, TIMEOUT_S)
    signal.pause()


def test_two_processes_take_turns() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    process = make_context().Process(target=answer_in_buffer, args=(theirs,))
    process.start()
    theirs.close()
    vmm = MemfdVmm(FRAME_BYTES)
    buffer = SharedBuffer.create(vmm, 1 << 20)
    with buffer.export() as export:
        send_export(ours, export, TIMEOUT_S)
    for turn in range(200):
        values = torch.arange(50) * turn
        buffer.tensor(torch.int64, (50,)).copy_(values)
        ours.sendall(b"w")
        assert ours.recv(1) == b"r"
        assert torch.equal(buffer.tensor(torch.int64, (50,), 8 * 50), values + 1)
    ours.close()
    process.join(TIMEOUT_S)
    assert process.exitcode == 0
    buffer.close()
    vmm.close()


def kunserve_files() -> list[str]:
    """Anonymous files that this process maps or holds, and named ones that anybody left."""
    gc.collect()  # what earlier tests left must not vanish between two looks
    mapped = re.findall(r"memfd:kunserve\S*", Path("/proc/self/maps").read_text())
    held = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            held.append(os.readlink(link))
        except FileNotFoundError:
            continue  # the descriptor that lists the folder
    named = [name for name in os.listdir("/dev/shm") if "kunserve-frames" in name]  # others' tests have others
    return sorted([*mapped, *(name for name in held if "kunserve" in name), *named])


def test_a_killed_owner_leaves_the_memory_to_those_who_map_it_and_nothing_else() -> None:
    before = kunserve_files()
    ours, theirs = socket.socketpair()
    owner = make_context().Process(target=own_a_buffer, args=(theirs,))
    owner.start()
    theirs.close()
    vmm = MemfdVmm(FRAME_BYTES)
    with ours, receive_export(ours, TIMEOUT_S) as export:
        buffer = SharedBuffer.open(vmm, export)
    assert owner.pid is not None
    os.kill(owner.pid, signal.SIGKILL)
    owner.join(TIMEOUT_S)
    assert owner.exitcode == -signal.SIGKILL
    assert kunserve_files() != before
    assert buffer.tensor(torch.uint8, (FRAME_BYTES,)).unique().tolist() == [77]
    buffer.tensor(torch.uint8, (FRAME_BYTES,)).fill_(78)
    assert buffer.tensor(torch.uint8, (FRAME_BYTES,)).unique().tolist() == [78]
    buffer.close()
    assert kunserve_files() == before
    vmm.close()
