"""What only the memfd backend promises: cost of reservations, joined calls, memory given back, nothing left
behind."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.memory import vmm_memfd
from kunserve_sgl.memory.errors import (
    ClosedError,
    ForeignFrameError,
    MappingFailedError,
    OutOfMemoryError,
    TransferError,
)
from kunserve_sgl.memory.frame_export import FrameExport, FrameRun
from kunserve_sgl.memory.libc import LIBC
from kunserve_sgl.memory.virtual_range import Span
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

FRAME_BYTES = 16 * mmap.PAGESIZE


def status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no {field}")


def allocated_bytes(vmm: MemfdVmm) -> int:
    return sum(os.fstat(file.fd).st_blocks * 512 for file in vmm._files.values())


def mappings_of_frames(vmm: MemfdVmm) -> int:
    """How many mappings of this backend's files the process has."""
    inodes = {str(file.identity[1]) for file in vmm._files.values()}
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:kunserve-frames" in line and line.split()[4] in inodes for line in lines)


def test_reservations_cost_no_memory() -> None:
    vmm = MemfdVmm(2 << 20)
    before = status_kib("VmRSS"), status_kib("VmPTE")
    ranges = [vmm.reserve((256 << 30) // vmm.frame_bytes, f"kv {i}") for i in range(16)]
    tensors = [vmm.virtual_tensor(area, 0, area.size_bytes) for area in ranges]
    grown = status_kib("VmRSS") - before[0], status_kib("VmPTE") - before[1]
    assert sum(tensor.numel() for tensor in tensors) == 16 * (256 << 30)
    assert max(grown) < 1024, f"4 TiB of reservations took {grown} KiB"
    del tensors
    vmm.close()


def test_neighbouring_frames_are_mapped_by_one_call() -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    area = vmm.reserve(64, "area")
    frames = vmm.create_frames(64)
    vmm.map(Span(area, 0, 32), frames[:32])
    assert mappings_of_frames(vmm) == 1
    vmm.map(Span(area, 32, 4), frames[32:64:8])
    assert mappings_of_frames(vmm) == 1 + 3  # the first one continues the mapping before it
    vmm.unmap(Span(area, 0, 36))
    assert mappings_of_frames(vmm) == 0
    vmm.close()


def test_frames_take_memory_when_touched_and_give_it_back_when_destroyed() -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    area = vmm.reserve(8, "area")
    frames = vmm.create_frames(8)
    assert allocated_bytes(vmm) == 0
    vmm.map(Span(area, 0, 8), frames)
    vmm.tensor(area, 0, area.size_bytes).fill_(1)
    assert allocated_bytes(vmm) == 8 * FRAME_BYTES
    vmm.unmap(Span(area, 0, 8))
    assert allocated_bytes(vmm) == 8 * FRAME_BYTES, "a frame keeps its bytes while it exists"
    vmm.destroy_frames(frames[2:5])
    assert allocated_bytes(vmm) == 5 * FRAME_BYTES
    vmm.destroy_frames(frames[:2] + frames[5:])
    assert vmm._files == {}
    vmm.close()


def test_zeroed_frames_give_their_memory_back_until_written() -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    area = vmm.reserve(4, "area")
    vmm.map(Span(area, 0, 4), vmm.create_frames(4))
    vmm.zero(Span(area, 0, 4))
    assert allocated_bytes(vmm) == 0
    tensor = vmm.tensor(area, 0, area.size_bytes).fill_(1)
    vmm.zero(Span(area, 1, 2))
    assert allocated_bytes(vmm) == 2 * FRAME_BYTES
    tensor[FRAME_BYTES] = 1
    assert allocated_bytes(vmm) == 2 * FRAME_BYTES + mmap.PAGESIZE
    del tensor
    vmm.close()


def test_frame_files_have_no_name_and_cannot_change_size() -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    vmm.create_frames(2)
    (file,) = vmm._files.values()
    assert os.fstat(file.fd).st_nlink == 0
    for size in (0, FRAME_BYTES, 3 * FRAME_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(file.fd, size)
    assert not os.get_inheritable(file.fd)
    vmm.close()


@pytest.mark.parametrize("mapped_later", [False, True])
def test_touching_an_unmapped_position_faults_and_reads_nothing(mapped_later: bool) -> None:
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from kunserve_sgl.memory.vmm_memfd import MemfdVmm
from kunserve_sgl.memory.virtual_range import Span
vmm = MemfdVmm({FRAME_BYTES})
area = vmm.reserve(2, "area")
whole = vmm.virtual_tensor(area, 0, area.size_bytes)
vmm.map(Span(area, 0, 2), vmm.create_frames(2))
whole.fill_(5)
frames = vmm.unmap(Span(area, 1, 1))
if {mapped_later}:
    vmm.map(Span(area, 1, 1), frames)
print(int(whole[0]), flush=True)
print(int(whole[{FRAME_BYTES}]), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    if mapped_later:
        assert (done.returncode, done.stdout.split()) == (0, ["5", "5"])
    else:
        assert (done.returncode, done.stdout.split()) == (-signal.SIGSEGV, ["5"])


class FailingMmap:
    """Stands before the C library; the calls whose numbers are in `fail` answer ENOMEM, after having removed
    what was mapped there, as a fixed mapping may."""

    def __init__(self, fail: set[int]) -> None:
        self.real, self.fail, self.calls = LIBC.mmap, fail, 0

    def __call__(self, address: int, size: int, prot: int, flags: int, fd: int, offset: int) -> int | None:
        number, self.calls = self.calls, self.calls + 1
        if number not in self.fail:
            return self.real(address, size, prot, flags, fd, offset)
        assert flags & vmm_memfd._MAP_FIXED
        self.real(address, size, 0, vmm_memfd._RESERVED | vmm_memfd._MAP_FIXED, -1, 0)
        ctypes.set_errno(errno.ENOMEM)
        return vmm_memfd._MAP_FAILED


@pytest.mark.parametrize("failing_call", [0, 1, 2])
def test_a_failed_map_is_undone(failing_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    area = vmm.reserve(6, "area")
    frames = vmm.create_frames(6)
    apart = (frames[0], frames[2], frames[4])
    failing = FailingMmap({failing_call})
    monkeypatch.setattr(LIBC, "mmap", failing)
    with pytest.raises(MappingFailedError, match="mapping 3 frames"):
        vmm.map(Span(area, 1, 3), apart)
    assert failing.calls == failing_call + 2
    assert mappings_of_frames(vmm) == 0
    assert not area.frames
    vmm.map(Span(area, 1, 3), apart)
    vmm.tensor(area, FRAME_BYTES, 3 * FRAME_BYTES).fill_(3)
    vmm.close()


def test_a_failed_unmap_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    area = vmm.reserve(3, "area")
    frames = vmm.create_frames(3)
    vmm.map(Span(area, 0, 3), frames)
    vmm.tensor(area, 0, area.size_bytes).fill_(3)
    monkeypatch.setattr(LIBC, "mmap", FailingMmap({0}))
    with pytest.raises(MappingFailedError, match="unmapping 3 frames"):
        vmm.unmap(Span(area, 0, 3))
    assert vmm.frames_at(Span(area, 0, 3)) == frames
    assert set(vmm.tensor(area, 0, area.size_bytes).tolist()) == {3}
    vmm.close()


def test_a_failure_that_cannot_be_undone_stops_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    area = vmm.reserve(3, "area")
    frames = vmm.create_frames(3)
    monkeypatch.setattr(LIBC, "mmap", FailingMmap({0, 1}))
    with pytest.raises(InvariantError, match="could not be undone"):
        vmm.map(Span(area, 0, 3), frames)
    with pytest.raises(ClosedError, match="could not be undone"):
        vmm.map(Span(area, 0, 3), frames)


def test_address_space_that_does_not_exist_is_refused() -> None:
    vmm = MemfdVmm(2 << 20)
    with pytest.raises(OutOfMemoryError, match="address space"):
        vmm.reserve(1 << 40, "too large")
    vmm.close()


def test_only_whole_sealed_foreign_files_are_imported(tmp_path: Path) -> None:
    owner, borrower = MemfdVmm(FRAME_BYTES), MemfdVmm(FRAME_BYTES)
    frames = owner.create_frames(4)
    with owner.export_frames(frames[1:3]) as export:
        with pytest.raises(TransferError, match="belong to this process"):
            owner.import_frames(export)
        beyond = FrameExport("host", FRAME_BYTES, (FrameRun(0, 3, 2),), export.fds)
        with pytest.raises(TransferError, match="outside its file"):
            borrower.import_frames(beyond)
        twice = FrameExport("host", FRAME_BYTES, (FrameRun(0, 1, 2), FrameRun(0, 2, 1)), export.fds)
        with pytest.raises(TransferError, match="imported already"):
            borrower.import_frames(twice)
        assert borrower._files == {}
        borrowed = borrower.import_frames(export)
        with pytest.raises(TransferError, match="imported already"):
            borrower.import_frames(export)
    with owner.export_frames(frames[:1]) as export:
        more = borrower.import_frames(export)
    assert {frame.arena for frame in more} == {frame.arena for frame in borrowed}, "one file is opened once"
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, FRAME_BYTES)
    with (
        FrameExport("host", FRAME_BYTES, (FrameRun(0, 0, 1),), (fd,)) as unsealed,
        pytest.raises(TransferError, match="not sealed"),
    ):
        borrower.import_frames(unsealed)
    with pytest.raises(ForeignFrameError):
        owner.destroy_frames(borrowed)
    borrower.close()
    owner.close()


def test_a_backend_that_nobody_has_any_more_keeps_no_file_open() -> None:
    vmm = MemfdVmm(FRAME_BYTES)
    area = vmm.reserve(2, "area")
    vmm.map(Span(area, 0, 2), vmm.create_frames(2))
    tensor = vmm.tensor(area, 0, FRAME_BYTES)
    before = len(os.listdir("/proc/self/fd"))
    del vmm, area
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert int(tensor.fill_(3).sum()) == 3 * FRAME_BYTES  # what is mapped stays so
