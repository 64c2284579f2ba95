"""What every virtual memory backend must do; subclasses supply the backend."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest
import torch

from kunserve_sgl.memory.errors import (
    AlreadyMappedError,
    ClosedError,
    ForeignFrameError,
    ForeignRangeError,
    FrameInUseError,
    FrameSizeError,
    NotMappedError,
    OutOfRangeError,
    TransferError,
    ViewInUseError,
)
from kunserve_sgl.memory.frame_export import FrameExport, receive_export, send_export
from kunserve_sgl.memory.virtual_range import Frame, Span, VirtualRange
from kunserve_sgl.memory.vmm import VmmBackend
from open_files import open_files

MakeVmm = Callable[[], VmmBackend]


def state_of(vmm: VmmBackend, *ranges: VirtualRange) -> object:
    """All that a refused operation must leave alone."""
    return (
        [dict(r.frames) for r in ranges],
        dict(vmm._position),
        set(vmm._frames),
        set(vmm._imported),
        set(vmm._ranges),
    )


class VmmContract:
    """Run as a test class by naming a subclass `Test...` with a `make_vmm` fixture."""

    @pytest.fixture
    def make_vmm(self) -> MakeVmm:
        raise NotImplementedError

    @pytest.fixture
    def vmm(self, make_vmm: MakeVmm) -> Iterator[VmmBackend]:
        vmm = make_vmm()
        yield vmm
        vmm.close()

    def fill(self, vmm: VmmBackend, span: Span, value: int) -> None:
        start, stop = span.start_bytes, span.stop_bytes
        vmm.tensor(span.virtual_range, start, stop - start).fill_(value)

    def values(self, vmm: VmmBackend, span: Span) -> list[int]:
        """The first and last byte of every frame of a span."""
        start, stop = span.start_bytes, span.stop_bytes
        frames = vmm.tensor(span.virtual_range, start, stop - start).view(span.count, vmm.frame_bytes)
        return [int(value) for row in frames.cpu() for value in (row[0], row[-1])]

    def test_a_frame_keeps_its_bytes_wherever_it_is_mapped(self, vmm: VmmBackend) -> None:
        here, there = vmm.reserve(4, "here"), vmm.reserve(8, "there")
        frames = vmm.create_frames(4)
        vmm.map(Span(here, 0, 4), frames)
        for position in range(4):
            self.fill(vmm, Span(here, position, 1), 10 + position)
        assert vmm.unmap(Span(here, 1, 2)) == frames[1:3]
        vmm.map(Span(there, 5, 2), (frames[2], frames[1]))
        assert self.values(vmm, Span(there, 5, 2)) == [12, 12, 11, 11]
        assert self.values(vmm, Span(here, 0, 1)) == [10, 10]
        assert self.values(vmm, Span(here, 3, 1)) == [13, 13]
        assert vmm.places[frames[2]] == (there, 5)
        assert vmm.places[frames[0]] == (here, 0)

    def test_frames_of_one_creation_do_not_overlap(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(6, "area")
        a, b = vmm.create_frames(3), vmm.create_frames(3)
        vmm.map(Span(area, 0, 6), (a[2], b[0], a[0], b[2], b[1], a[1]))
        for position in range(6):
            self.fill(vmm, Span(area, position, 1), position)
        assert self.values(vmm, Span(area, 0, 6)) == [v for p in range(6) for v in (p, p)]

    def test_an_address_stays_the_same_over_unmap_and_map(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(3, "area")
        frames = vmm.create_frames(3)
        vmm.map(Span(area, 0, 3), frames)
        address = vmm.tensor(area, vmm.frame_bytes, 8).data_ptr()
        vmm.unmap(Span(area, 0, 3))
        vmm.map(Span(area, 0, 3), frames)
        assert vmm.tensor(area, vmm.frame_bytes, 8).data_ptr() == address == area.address + vmm.frame_bytes

    def test_a_huge_range_is_reserved_and_used_sparsely(self, vmm: VmmBackend) -> None:
        area = vmm.reserve((256 << 30) // vmm.frame_bytes, "huge")
        whole = vmm.virtual_tensor(area, 0, area.size_bytes)
        assert whole.numel() == 256 << 30
        last = area.frame_count - 1
        vmm.map(Span(area, last, 1), vmm.create_frames(1))
        whole[-5:] = 7
        assert whole[-6:].tolist()[1:] == [7] * 5
        del whole

    @pytest.mark.parametrize(("first", "count"), [(-1, 1), (4, 1), (3, 2), (0, 5), (0, -1)])
    def test_a_span_outside_its_range_is_refused(self, vmm: VmmBackend, first: int, count: int) -> None:
        area = vmm.reserve(4, "area")
        frames = vmm.create_frames(5)
        before = state_of(vmm, area)
        with pytest.raises(OutOfRangeError):
            vmm.map(Span(area, first, count), frames[: max(count, 0)])
        with pytest.raises(OutOfRangeError):
            vmm.unmap(Span(area, first, count))
        assert state_of(vmm, area) == before

    def test_the_number_of_frames_must_fit_the_span(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(4, "area")
        with pytest.raises(OutOfRangeError, match="2 frames were given for a span of 3"):
            vmm.map(Span(area, 0, 3), vmm.create_frames(2))
        assert not area.frames

    def test_mapping_twice_is_refused(self, vmm: VmmBackend) -> None:
        area, other = vmm.reserve(4, "area"), vmm.reserve(4, "other")
        frames = vmm.create_frames(4)
        vmm.map(Span(area, 1, 1), frames[:1])
        before = state_of(vmm, area, other)
        with pytest.raises(AlreadyMappedError, match="position 1"):
            vmm.map(Span(area, 0, 3), frames[1:])
        with pytest.raises(AlreadyMappedError, match="is mapped already"):
            vmm.map(Span(other, 0, 2), (frames[1], frames[0]))
        with pytest.raises(AlreadyMappedError, match="twice"):
            vmm.map(Span(other, 0, 2), (frames[1], frames[1]))
        assert state_of(vmm, area, other) == before

    def test_unmapping_twice_is_refused(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(4, "area")
        frames = vmm.create_frames(3)
        vmm.map(Span(area, 0, 3), frames)
        vmm.unmap(Span(area, 1, 1))
        before = state_of(vmm, area)
        for first, count in ((1, 1), (0, 3), (0, 2), (3, 1)):
            with pytest.raises(NotMappedError):
                vmm.unmap(Span(area, first, count))
        assert state_of(vmm, area) == before

    def test_foreign_frames_and_ranges_are_refused(self, vmm: VmmBackend, make_vmm: MakeVmm) -> None:
        other = make_vmm()
        area, foreign_area = vmm.reserve(4, "area"), other.reserve(4, "foreign")
        own, foreign = vmm.create_frames(1), other.create_frames(1)
        before = state_of(vmm, area)
        for frames in (foreign, (Frame(10**9, 0),), (Frame(own[0].arena, 1),)):
            with pytest.raises(ForeignFrameError):
                vmm.map(Span(area, 0, 1), frames)
            with pytest.raises(ForeignFrameError):
                vmm.destroy_frames(frames)
            with pytest.raises(ForeignFrameError):
                vmm.export_frames(frames)
            assert frames[0] not in vmm.places
        with pytest.raises(ForeignRangeError):
            vmm.map(Span(foreign_area, 0, 1), own)
        with pytest.raises(ForeignRangeError):
            vmm.release(foreign_area)
        with pytest.raises(ForeignRangeError):
            vmm.tensor(foreign_area, 0, 1)
        assert state_of(vmm, area) == before
        other.close()

    def test_destroyed_frames_and_released_ranges_are_gone(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(4, "area")
        frames = vmm.create_frames(3)
        vmm.map(Span(area, 0, 1), frames[:1])
        with pytest.raises(FrameInUseError):
            vmm.destroy_frames(frames)
        with pytest.raises(FrameInUseError):
            vmm.release(area)
        vmm.unmap(Span(area, 0, 1))
        vmm.destroy_frames((frames[2], frames[0]))
        with pytest.raises(ForeignFrameError):
            vmm.map(Span(area, 0, 1), frames[:1])
        vmm.map(Span(area, 0, 1), frames[1:2])
        vmm.unmap(Span(area, 0, 1))
        vmm.release(area)
        with pytest.raises(ForeignRangeError):
            vmm.map(Span(area, 0, 1), frames[1:2])

    @pytest.mark.parametrize("count", [0, -1])
    def test_empty_requests_for_memory_are_refused(self, vmm: VmmBackend, count: int) -> None:
        with pytest.raises(OutOfRangeError):
            vmm.reserve(count, "empty")
        with pytest.raises(OutOfRangeError):
            vmm.create_frames(count)

    def test_a_frame_size_that_cannot_be_mapped_is_refused(self, vmm: VmmBackend) -> None:
        for frame_bytes in (0, -vmm.frame_bytes, vmm.frame_bytes + 1):
            with pytest.raises(FrameSizeError, match=f"frame_bytes is {frame_bytes}"):
                VmmBackend.__init__(vmm, frame_bytes, 4096, vmm.device)

    def test_a_tensor_needs_mapped_memory(self, vmm: VmmBackend) -> None:
        size = vmm.frame_bytes
        area = vmm.reserve(4, "area")
        vmm.map(Span(area, 1, 2), vmm.create_frames(2))
        assert vmm.tensor(area, size, 2 * size).numel() == 2 * size
        for start, length in ((0, 1), (size - 1, 2), (2 * size, size + 1), (3 * size, 1)):
            with pytest.raises(NotMappedError):
                vmm.tensor(area, start, length)
        for start, length in ((-1, 2), (0, 0), (4 * size - 1, 2)):
            with pytest.raises(OutOfRangeError):
                vmm.tensor(area, start, length)
            with pytest.raises(OutOfRangeError):
                vmm.virtual_tensor(area, start, length)

    def test_a_living_tensor_keeps_its_memory_mapped(self, vmm: VmmBackend) -> None:
        size = vmm.frame_bytes
        area = vmm.reserve(4, "area")
        vmm.map(Span(area, 0, 4), vmm.create_frames(4))
        view = vmm.tensor(area, size, size).view(torch.int16)[3:7]
        view.fill_(21)
        before = state_of(vmm, area)
        with pytest.raises(ViewInUseError):
            vmm.unmap(Span(area, 0, 4))
        with pytest.raises(ViewInUseError):
            vmm.close()
        assert state_of(vmm, area) == before
        vmm.unmap(Span(area, 2, 2))
        vmm.unmap(Span(area, 0, 1))
        assert view.tolist() == [21] * 4
        del view
        vmm.unmap(Span(area, 1, 1))

    def test_a_living_virtual_tensor_keeps_the_addresses_only(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(2, "area")
        whole = vmm.virtual_tensor(area, 0, area.size_bytes)
        vmm.map(Span(area, 1, 1), vmm.create_frames(1))
        whole[vmm.frame_bytes :].fill_(9)
        vmm.unmap(Span(area, 1, 1))
        with pytest.raises(ViewInUseError):
            vmm.release(area)
        del whole
        vmm.release(area)

    def test_zeroing_clears_a_span_and_nothing_else(self, vmm: VmmBackend, make_vmm: MakeVmm) -> None:
        area = vmm.reserve(6, "area")
        frames = vmm.create_frames(6)
        vmm.map(Span(area, 0, 5), (frames[5], frames[0], frames[1], frames[3], frames[2]))
        self.fill(vmm, Span(area, 0, 5), 9)
        seen = vmm.tensor(area, 0, 5 * vmm.frame_bytes)
        vmm.zero(Span(area, 1, 3))
        assert self.values(vmm, Span(area, 0, 5)) == [9, 9, 0, 0, 0, 0, 0, 0, 9, 9]
        assert int(seen.count_nonzero()) == 2 * vmm.frame_bytes
        seen[vmm.frame_bytes] = 4
        assert self.values(vmm, Span(area, 1, 1)) == [4, 0]
        for span in (Span(area, 4, 2), Span(area, 5, 1)):
            with pytest.raises(NotMappedError):
                vmm.zero(span)
        assert self.values(vmm, Span(area, 4, 1)) == [9, 9]
        del seen

    def test_zeroing_reaches_a_borrower(self, vmm: VmmBackend, make_vmm: MakeVmm) -> None:
        borrower = make_vmm()
        here, there = vmm.reserve(2, "here"), borrower.reserve(2, "there")
        frames = vmm.create_frames(2)
        vmm.map(Span(here, 0, 2), frames)
        self.fill(vmm, Span(here, 0, 2), 9)
        with vmm.export_frames(frames) as export:
            borrower.map(Span(there, 0, 2), borrower.import_frames(export))
        borrower.zero(Span(there, 1, 1))
        assert self.values(vmm, Span(here, 0, 2)) == [9, 9, 0, 0]
        vmm.zero(Span(here, 0, 1))
        assert self.values(borrower, Span(there, 0, 2)) == [0, 0, 0, 0]
        borrower.close()

    def test_unmapping_waits_for_the_fences_first(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(2, "area")
        vmm.map(Span(area, 0, 2), vmm.create_frames(2))
        mapped_when_waited: list[int] = []

        class Fence:
            def synchronize(self) -> None:
                mapped_when_waited.append(len(area.frames))

        vmm.unmap(Span(area, 0, 2), after=[Fence(), Fence()])
        assert mapped_when_waited == [2, 2]
        assert not area.frames

    def test_a_fence_that_fails_leaves_everything_mapped(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(2, "area")
        vmm.map(Span(area, 0, 2), vmm.create_frames(2))

        class Broken:
            def synchronize(self) -> None:
                raise RuntimeError("an earlier kernel failed")

        before = state_of(vmm, area)
        with pytest.raises(RuntimeError, match="an earlier kernel failed"):
            vmm.unmap(Span(area, 0, 2), after=[Broken()])
        assert state_of(vmm, area) == before
        self.fill(vmm, Span(area, 0, 2), 1)

    def test_exported_frames_share_their_bytes(self, vmm: VmmBackend, make_vmm: MakeVmm) -> None:
        borrower = make_vmm()
        frames = vmm.create_frames(5)
        here, there = vmm.reserve(5, "here"), borrower.reserve(9, "there")
        vmm.map(Span(here, 0, 5), frames)
        for position in range(5):
            self.fill(vmm, Span(here, position, 1), 50 + position)
        left, right = socket.socketpair()
        with left, right, vmm.export_frames((frames[4], frames[1], frames[2])) as sent:
            send_export(left, sent, 5.0)
            received = receive_export(right, 5.0)
        with received:
            assert received.frame_count == 3
            assert not set(received.fds) & set(sent.fds)
            borrowed = borrower.import_frames(received)
        borrower.map(Span(there, 3, 3), borrowed)
        assert self.values(borrower, Span(there, 3, 3)) == [54, 54, 51, 51, 52, 52]
        self.fill(borrower, Span(there, 4, 1), 99)
        assert self.values(vmm, Span(here, 0, 5)) == [50, 50, 99, 99, 52, 52, 53, 53, 54, 54]
        assert borrower.own_frame_count == 0
        with pytest.raises(ForeignFrameError, match="was imported"):
            borrower.export_frames(borrowed)
        borrower.unmap(Span(there, 3, 3))
        borrower.destroy_frames(borrowed)
        with pytest.raises(ForeignFrameError):
            borrower.map(Span(there, 3, 3), borrowed)
        assert self.values(vmm, Span(here, 1, 1)) == [99, 99]
        borrower.close()

    def test_frames_of_another_size_or_kind_are_not_imported(self, vmm: VmmBackend) -> None:
        frames = vmm.create_frames(1)
        with vmm.export_frames(frames) as export:
            wrong_size = FrameExport(export.backend, export.frame_bytes * 2, export.runs, export.fds)
            wrong_kind = FrameExport("abacus", export.frame_bytes, export.runs, export.fds)
            before = state_of(vmm)
            for wrong in (wrong_size, wrong_kind):
                with pytest.raises(TransferError, match="cannot import"):
                    vmm.import_frames(wrong)
            assert state_of(vmm) == before

    def test_export_and_import_leave_no_descriptor_open(self, vmm: VmmBackend, make_vmm: MakeVmm) -> None:
        borrower = make_vmm()
        frames = vmm.create_frames(4)
        before = open_files()
        for _ in range(3):
            with vmm.export_frames(frames) as export:
                borrowed = borrower.import_frames(export)
            borrower.destroy_frames(borrowed)
        assert open_files() <= before
        borrower.close()

    def test_a_closed_backend_refuses_everything(self, vmm: VmmBackend) -> None:
        area = vmm.reserve(2, "area")
        frames = vmm.create_frames(2)
        vmm.map(Span(area, 0, 1), frames[:1])
        vmm.close()
        vmm.close()
        calls: list[Callable[[], object]] = [
            lambda: vmm.reserve(1, "more"),
            lambda: vmm.create_frames(1),
            lambda: vmm.map(Span(area, 1, 1), frames[1:]),
            lambda: vmm.unmap(Span(area, 0, 1)),
            lambda: vmm.tensor(area, 0, 1),
            lambda: vmm.virtual_tensor(area, 0, 1),
            lambda: vmm.zero(Span(area, 0, 1)),
            lambda: vmm.export_frames(frames),
            lambda: vmm.import_frames(FrameExport(vmm.name, vmm.frame_bytes, (), ())),
            lambda: vmm.destroy_frames(frames),
            lambda: vmm.release(area),
        ]
        for call in calls:
            with pytest.raises(ClosedError):
                call()
