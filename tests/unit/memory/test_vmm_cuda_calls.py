"""Order and arguments of the CUDA backend's driver calls, and what is left after any one of them fails."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from cuda.bindings import driver as real
from vmm_contract import state_of

from cuda_model.driver import GRANULARITY_BYTES, FakeBindings, FakeDriver, make_fake_cuda
from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.memory.errors import (
    BackendUnavailableError,
    ClosedError,
    FrameSizeError,
    MappingFailedError,
    OutOfMemoryError,
    PeerAccessError,
    SplitPieceError,
    TransferError,
)
from kunserve_sgl.memory.frame_export import FrameExport, FrameRun
from kunserve_sgl.memory.virtual_range import Span
from kunserve_sgl.memory.vmm_cuda import CudaVmm

SIZE = GRANULARITY_BYTES


class LoggedFence:
    def __init__(self, bindings: FakeBindings, name: str) -> None:
        self.bindings, self.name = bindings, name

    def synchronize(self) -> None:
        self.bindings.log.append(("fence", self.name))


def test_one_handle_per_frame_and_one_grant_per_span() -> None:
    bindings = FakeBindings(peers=frozenset({(2, 0)}))
    vmm = make_fake_cuda(bindings, peer_gpus=(2,))
    area = vmm.reserve(10, "area")
    frames = vmm.create_frames(4)
    assert bindings.calls("cuMemCreate") == [("cuMemCreate", SIZE)] * 4
    handles = [vmm._handles[frame] for frame in frames]
    bindings.log.clear()
    vmm.map(Span(area, 3, 4), frames)
    base = area.address + 3 * SIZE
    assert bindings.log == [
        *(("cuMemMap", base + n * SIZE, SIZE, handles[n]) for n in range(4)),
        ("cuMemSetAccess", base, 4 * SIZE, (0, 2)),
    ]


def test_unmapping_waits_for_the_given_work_only() -> None:
    bindings = FakeBindings()
    vmm = make_fake_cuda(bindings)
    area = vmm.reserve(4, "area")
    vmm.map(Span(area, 0, 4), vmm.create_frames(4))
    bindings.log.clear()
    vmm.unmap(Span(area, 0, 2), after=[LoggedFence(bindings, "forward"), LoggedFence(bindings, "exchange")])
    assert bindings.log == [
        ("fence", "forward"),
        ("fence", "exchange"),
        ("cuMemUnmap", area.address, 2 * SIZE),
    ]
    bindings.log.clear()
    vmm.unmap(Span(area, 2, 1))
    assert bindings.log == [("synchronize", 0), ("cuMemUnmap", area.address + 2 * SIZE, SIZE)]
    bindings.log.clear()
    vmm.close()
    names = [entry[0] for entry in bindings.log]
    assert names == ["synchronize", "cuMemUnmap", "cuMemAddressFree"] + ["cuMemRelease"] * 4
    assert bindings.live_handles() == 0


def test_a_piece_costs_one_call_of_each_kind_and_stays_whole() -> None:
    bindings = FakeBindings()
    vmm, borrower = make_fake_cuda(bindings), make_fake_cuda(bindings)
    area, other = vmm.reserve(6, "area"), borrower.reserve(6, "other")
    piece, single = vmm.create_frames(3, in_one_piece=True), vmm.create_frames(1)
    assert bindings.calls("cuMemCreate") == [("cuMemCreate", 3 * SIZE), ("cuMemCreate", SIZE)]
    vmm.map(Span(area, 1, 4), (*piece, *single))
    vmm.tensor(area, SIZE, 4 * SIZE).view(4, SIZE)[:] = torch.tensor([[1], [2], [3], [4]], dtype=torch.uint8)
    before = bindings.state(), state_of(vmm, area)
    for attempt in (
        lambda: vmm.unmap(Span(area, 1, 2)),
        lambda: vmm.unmap(Span(area, 2, 3)),
        lambda: vmm.export_frames(piece[:2]),
        lambda: vmm.export_frames((piece[1], piece[0], piece[2])),
    ):
        with pytest.raises(SplitPieceError, match="3 frames that were created in one piece"):
            attempt()
    assert (bindings.state(), state_of(vmm, area)) == before
    with vmm.export_frames((*single, *piece)) as export:
        assert len(export.fds) == 2
        borrowed = borrower.import_frames(export)
    borrower.map(Span(other, 0, 4), borrowed)
    assert borrower.tensor(other, 0, 4 * SIZE).view(4, SIZE)[:, 7].tolist() == [4, 1, 2, 3]
    bindings.log.clear()
    borrower.unmap(Span(other, 0, 4), after=())
    borrower.destroy_frames(borrowed)
    vmm.unmap(Span(area, 1, 4), after=())
    with pytest.raises(SplitPieceError):
        vmm.destroy_frames(piece[1:])
    with pytest.raises(SplitPieceError):
        vmm.map(Span(area, 0, 2), piece[:2])
    vmm.destroy_frames((*piece, *single))
    names = [entry[0] for entry in bindings.log]
    assert names == ["cuMemUnmap", "cuMemRelease", "cuMemRelease"] * 2
    assert (bindings.live_handles(), bindings.mappings, bindings.broken_rules) == (0, {}, [])


def test_a_gpu_without_room_for_a_piece_keeps_nothing() -> None:
    bindings = FakeBindings(memory_frames=5)
    vmm = make_fake_cuda(bindings)
    with pytest.raises(OutOfMemoryError, match=f"one piece of {6 * SIZE} bytes"):
        vmm.create_frames(6, in_one_piece=True)
    assert (bindings.live_handles(), vmm.own_frame_count) == (0, 0)


def run_everything(vmm: CudaVmm, borrower: CudaVmm) -> None:
    """Every operation once, so that each driver call of the backend happens."""
    area, other = vmm.reserve(6, "area"), borrower.reserve(6, "other")
    frames = vmm.create_frames(5)
    piece = vmm.create_frames(2, in_one_piece=True)
    vmm.map(Span(area, 4, 2), piece)
    vmm.unmap(Span(area, 4, 2))
    vmm.destroy_frames(piece)
    vmm.map(Span(area, 0, 4), frames[:4])
    with vmm.export_frames(frames[1:3]) as export:
        borrowed = borrower.import_frames(export)
    borrower.map(Span(other, 1, 2), borrowed)
    borrower.unmap(Span(other, 1, 2))
    borrower.destroy_frames(borrowed)
    vmm.unmap(Span(area, 1, 3))
    vmm.unmap(Span(area, 0, 1))
    vmm.release(area)
    borrower.release(other)


def open_gpu_files() -> int:
    gc.collect()  # what earlier tests left must not vanish between two looks
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum("memfd:fake-gpu" in str(link.readlink()) for link in links)


def count_driver_calls() -> int:
    bindings = FakeBindings()
    run_everything(make_fake_cuda(bindings), make_fake_cuda(bindings))
    return len([entry for entry in bindings.log if entry[0] != "synchronize"])


@pytest.mark.parametrize("failing", range(count_driver_calls()))
def test_whichever_call_fails_the_operation_is_undone_or_the_backend_stops(failing: int) -> None:
    files_before = open_gpu_files()
    bindings = FakeBindings()
    vmm, borrower = make_fake_cuda(bindings), make_fake_cuda(bindings)
    steps: list[tuple[object, object]] = []

    def snapshot() -> tuple[object, object]:
        ranges = (*vmm._ranges, *borrower._ranges)
        return bindings.state(), (state_of(vmm, *ranges), state_of(borrower, *ranges))

    for backend in (vmm, borrower):
        for name in ("reserve", "create_frames", "map", "unmap", "import_frames", "destroy_frames", "release"):
            original = getattr(backend, name)

            def wrapped(*args: object, _original: object = original, **kwargs: object) -> object:
                steps.append(snapshot())
                return _original(*args, **kwargs)  # type: ignore[operator]

            setattr(backend, name, wrapped)
        original_export = backend.export_frames

        def wrapped_export(frames: object, _original: object = original_export) -> object:
            steps.append(snapshot())
            return _original(frames)  # type: ignore[operator]

        backend.export_frames = wrapped_export  # type: ignore[method-assign,assignment]

    # A GPU without memory is asked once more, when torch has given back what it can.
    bindings.fail_when(lambda name, number: number == failing or (number == failing + 1 and name == "cuMemCreate"))
    with pytest.raises((TransientError, InvariantError)) as raised:
        run_everything(vmm, borrower)
    failed_call = [entry for entry in bindings.log if entry[0] != "synchronize"][failing][0]
    bindings.fail_when(lambda name, number: False)
    assert bindings.broken_rules == []
    if failed_call == "cuMemRelease":
        # Memory that the driver will not take back cannot be accounted for any more.
        assert isinstance(raised.value, InvariantError)
        broken = borrower if borrower._closed_because else vmm
        with pytest.raises(ClosedError):
            broken.create_frames(1)
        return
    assert isinstance(raised.value, TransientError)
    assert snapshot() == steps[-1], f"{failed_call} failed and left a trace"
    for backend in (vmm, borrower):
        backend.close()
    assert (bindings.live_handles(), bindings.mappings, bindings.reservations) == (0, {}, {})
    assert open_gpu_files() == files_before


def test_a_failure_that_cannot_be_undone_stops_the_backend() -> None:
    bindings = FakeBindings()
    vmm = make_fake_cuda(bindings)
    area = vmm.reserve(4, "area")
    frames = vmm.create_frames(4)
    bindings.fail_when(lambda name, number: number >= 2)
    with pytest.raises(InvariantError, match="could not be undone"):
        vmm.map(Span(area, 0, 4), frames)
    with pytest.raises(ClosedError, match="could not be undone"):
        vmm.create_frames(1)


def test_a_full_gpu_says_how_far_it_got_and_keeps_nothing() -> None:
    bindings = FakeBindings(memory_frames=5)
    vmm = make_fake_cuda(bindings)
    vmm.create_frames(2)
    with pytest.raises(OutOfMemoryError, match="had memory for 3 of 9 frames"):
        vmm.create_frames(9)
    assert bindings.live_handles() == 2
    assert len(vmm.create_frames(3)) == 3


def test_a_full_gpu_is_asked_again_when_torch_has_given_back_what_it_keeps() -> None:
    bindings = FakeBindings(memory_frames=5)
    vmm = make_fake_cuda(bindings)
    bindings.cached_bytes = 2 * SIZE
    assert len(vmm.create_frames(7)) == 7
    assert bindings.emptied_caches == 1
    with pytest.raises(OutOfMemoryError):
        vmm.create_frames(1)
    assert bindings.emptied_caches == 2
    bindings.fail_when(lambda name, number: False)
    assert (bindings.live_handles(), bindings.broken_rules) == (7, [])


def test_frames_of_a_gpu_without_peer_access_are_refused() -> None:
    bindings = FakeBindings(peers=frozenset({(1, 0)}))
    owner = make_fake_cuda(bindings, gpu=0)
    reachable, unreachable = make_fake_cuda(bindings, gpu=1), make_fake_cuda(bindings, gpu=2)
    frames = owner.create_frames(3)
    before = bindings.live_handles()
    with owner.export_frames(frames) as export:
        with pytest.raises(PeerAccessError, match="GPU 2 cannot access memory of GPU 0"):
            unreachable.import_frames(export)
        assert bindings.live_handles() == before
        assert len(reachable.import_frames(export)) == 3
    with pytest.raises(PeerAccessError, match="GPU 3 cannot access memory of GPU 0"):
        make_fake_cuda(bindings, gpu=0, peer_gpus=(3,))


def test_an_export_has_one_descriptor_for_each_piece() -> None:
    bindings = FakeBindings()
    vmm, borrower = make_fake_cuda(bindings), make_fake_cuda(bindings)
    with vmm.export_frames(vmm.create_frames(2)) as export:
        for runs in ((FrameRun(0, 0, 2),), (FrameRun(0, 1, 1), FrameRun(1, 0, 1)), (FrameRun(0, 0, 1),)):
            with pytest.raises(TransferError, match="one file descriptor for each piece"):
                borrower.import_frames(FrameExport("cuda", SIZE, runs, export.fds))


def test_the_frame_size_follows_the_granularity() -> None:
    with pytest.raises(FrameSizeError, match=re.escape(f"multiple of {SIZE} bytes")):
        CudaVmm(0, SIZE // 2, driver=FakeDriver(FakeBindings()))
    vmm = CudaVmm(0, 3 * SIZE, driver=FakeDriver(FakeBindings()))
    assert str(vmm.device) == "cuda:0"


def test_addresses_are_aligned_to_a_power_of_two() -> None:
    bindings = FakeBindings()
    for multiple, alignment in ((1, 1), (3, 1), (6, 2), (8, 8)):
        CudaVmm(0, multiple * SIZE, driver=FakeDriver(bindings)).reserve(2, "area")
        assert bindings.log[-1] == ("cuMemAddressReserve", 2 * multiple * SIZE, alignment * SIZE)
    assert bindings.broken_rules == []


@pytest.mark.parametrize(
    "attribute",
    [
        real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
    ],
)
def test_a_gpu_without_the_feature_is_refused(attribute: real.CUdevice_attribute) -> None:
    bindings = FakeBindings()
    bindings.unsupported.add(attribute)
    with pytest.raises(BackendUnavailableError, match=attribute.name):
        make_fake_cuda(bindings)


def test_a_failing_call_is_named() -> None:
    bindings = FakeBindings()
    vmm = make_fake_cuda(bindings)
    area = vmm.reserve(2, "area")
    frames = vmm.create_frames(2)
    bindings.fail_when(lambda name, number: name == "cuMemSetAccess")
    with pytest.raises(MappingFailedError, match="cuMemSetAccess failed: CUDA_ERROR_INVALID_VALUE"):
        vmm.map(Span(area, 0, 2), frames)


def test_a_gpu_names_itself_and_those_whose_memory_it_can_access() -> None:
    driver = FakeDriver(FakeBindings(peers=frozenset({(0, 2), (1, 0), (2, 0)})))
    names = {gpu: f"a{gpu}" * 16 for gpu in range(3)}
    assert driver.identity(0) == (names[0], (names[2],))
    assert driver.identity(1) == (names[1], (names[0],))
    assert FakeDriver(FakeBindings()).identity(0) == (names[0], ())
