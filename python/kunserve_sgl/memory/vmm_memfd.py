"""Virtual memory on a CPU: frames are pages of anonymous files, mapped with mmap(MAP_FIXED).

An anonymous file (memfd) has no name, so nothing is left behind however a process ends. Frames created
together share one file; frames next to each other in a file and in a range are mapped by one call. Exporting
a frame hands out its file: the importer could map other frames of it, and is trusted not to.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kunserve_sgl.memory.errors import MappingFailedError, OutOfMemoryError, TransferError
from kunserve_sgl.memory.frame_export import FrameExport, FrameRun
from kunserve_sgl.memory.libc import LIBC
from kunserve_sgl.memory.virtual_range import Frame, Span, new_arena
from kunserve_sgl.memory.vmm import VmmBackend

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
# Address space without memory, and without counting against the machine's commit limit.
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
# The size can never change again, so no process can make another one's mapped frame fault by truncating the
# file.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(slots=True)
class _FrameFile:
    """Keeps one anonymous file open and counts those of its frames that this backend knows."""

    fd: int
    identity: tuple[int, int]
    imported: bool
    frame_count: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Names frames that follow each other both in the request and in their file."""

    offset: int
    arena: int
    first: int
    count: int


class MemfdVmm(VmmBackend):
    """Maps pages of anonymous files. `frame_bytes` is a multiple of the operating system's page."""

    name = "host"
    keeps_pieces_whole = False  # of a file any part can be mapped

    def __init__(self, frame_bytes: int) -> None:
        """Raises FrameSizeError."""
        super().__init__(frame_bytes, mmap.PAGESIZE, torch.device("cpu"))
        self._files: dict[int, _FrameFile] = {}
        # What is mapped stays so. The end of the process needs no help.
        weakref.finalize(self, _close_all, self._files).atexit = False

    def _reserve(self, size_bytes: int) -> int:
        try:
            return self._mmap(None, size_bytes, _PROT_NONE, _RESERVED, -1, 0)
        except OSError as error:
            raise OutOfMemoryError(f"cannot reserve {size_bytes} bytes of address space: {error}") from error

    def _release(self, address: int, size_bytes: int) -> None:
        if LIBC.munmap(address, size_bytes):
            raise OutOfMemoryError(f"munmap of {size_bytes} bytes: {_os_error()}")

    def _create(self, frames: Sequence[Frame], in_one_piece: bool) -> None:
        fd = -1
        try:
            fd = os.memfd_create("kunserve-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, len(frames) * self.frame_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise OutOfMemoryError(f"cannot create {len(frames)} frames: {error}") from error
        self._files[frames[0].arena] = _FrameFile(fd, _identity(fd), False, len(frames))

    def _destroy(self, frames: Sequence[Frame]) -> None:
        runs = list(_runs(sorted(frames)))
        for run in runs:
            file = self._files[run.arena]
            # Closing the last frame's file gives all its memory back; an importer has none to give.
            if file.imported or run.count == file.frame_count:
                continue
            self._punch_holes(run)
        for run in runs:
            file = self._files[run.arena]
            file.frame_count -= run.count
            if file.frame_count == 0:
                os.close(file.fd)
                del self._files[run.arena]

    def _map(self, address: int, frames: Sequence[Frame]) -> None:
        try:
            self._map_runs(address, frames)
        except OSError as error:
            self._undo(lambda: self._cover(address, len(frames) * self.frame_bytes))
            raise MappingFailedError(f"mapping {len(frames)} frames: {_hint(error)}") from error

    def _unmap(self, address: int, frames: Sequence[Frame]) -> None:
        try:
            self._cover(address, len(frames) * self.frame_bytes)
        except OSError as error:
            # A fixed mapping that fails may have removed what was there, so it is mapped again.
            self._undo(lambda: self._map_runs(address, frames))
            raise MappingFailedError(f"unmapping {len(frames)} frames: {_hint(error)}") from error

    def _export(self, frames: Sequence[Frame]) -> FrameExport:
        slots: dict[int, int] = {}
        runs = tuple(FrameRun(slots.setdefault(run.arena, len(slots)), run.first, run.count) for run in _runs(frames))
        fds: list[int] = []
        try:
            for arena in slots:
                fds.append(_duplicate(self._files[arena].fd))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise OutOfMemoryError(f"cannot export {len(frames)} frames: {error}") from error
        return FrameExport(self.name, self.frame_bytes, runs, tuple(fds))

    def _import(self, export: FrameExport) -> tuple[Frame, ...]:
        opened: dict[int, _FrameFile] = {}
        try:
            arenas = [self._arena_behind(fd, opened) for fd in export.fds]
            frames = tuple(
                Frame(arenas[run.fd_slot], number)
                for run in export.runs
                for number in range(run.first, run.first + run.count)
            )
            self._check_importable(frames, opened)
        except (OSError, TransferError) as error:
            for file in opened.values():
                os.close(file.fd)
            raise TransferError(f"cannot import {export.frame_count} frames: {error}") from error
        self._files.update(opened)
        for frame in frames:
            self._files[frame.arena].frame_count += 1
        return frames

    def _arena_behind(self, fd: int, opened: dict[int, _FrameFile]) -> int:
        """Returns the arena of the file behind `fd`; a file not seen before is added to `opened`."""
        identity = _identity(fd)
        for arena, file in (*self._files.items(), *opened.items()):
            if file.identity == identity:
                if not file.imported:
                    raise TransferError("the frames belong to this process already")
                return arena
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise TransferError("the file is not sealed, so its owner could shrink it under a mapping")
        arena = new_arena()
        opened[arena] = _FrameFile(_duplicate(fd), identity, True, 0)
        return arena

    def _check_importable(self, frames: Sequence[Frame], opened: dict[int, _FrameFile]) -> None:
        files = self._files | opened
        sizes = {arena: os.fstat(files[arena].fd).st_size for arena in {frame.arena for frame in frames}}
        for frame in frames:
            if (frame.number + 1) * self.frame_bytes > sizes[frame.arena]:
                raise TransferError(f"frame {frame.number} is outside its file of {sizes[frame.arena]} bytes")
        if len(set(frames)) != len(frames) or not self._frames.isdisjoint(frames):
            raise TransferError("a frame was imported already")

    def _synchronize(self) -> None:
        """Does nothing: CPU tensors are used by the thread that unmaps them, so no work is in flight."""

    def _zero(self, span: Span, frames: Sequence[Frame]) -> None:
        for run in _runs(frames):
            self._punch_holes(run)

    def _punch_holes(self, run: _Run) -> None:
        """Gives the memory of frames back; they read as zero afterwards, wherever they are mapped."""
        offset, size_bytes = run.first * self.frame_bytes, run.count * self.frame_bytes
        if LIBC.fallocate(self._files[run.arena].fd, _PUNCH_HOLE_KEEP_SIZE, offset, size_bytes):
            raise OutOfMemoryError(f"giving {run.count} frames back: {_os_error()}")

    def _map_runs(self, address: int, frames: Sequence[Frame]) -> None:
        for run in _runs(frames):
            self._mmap(
                address + run.offset * self.frame_bytes,
                run.count * self.frame_bytes,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_SHARED | _MAP_FIXED,
                self._files[run.arena].fd,
                run.first * self.frame_bytes,
            )

    def _cover(self, address: int, size_bytes: int) -> None:
        """Puts unusable address space over whatever is mapped."""
        self._mmap(address, size_bytes, _PROT_NONE, _RESERVED | _MAP_FIXED, -1, 0)

    def _mmap(self, address: int | None, size_bytes: int, prot: int, flags: int, fd: int, offset: int) -> int:
        """Calls mmap(2). Raises OSError."""
        mapped: int | None = LIBC.mmap(address, size_bytes, prot, flags, fd, offset)
        if mapped is None or mapped == _MAP_FAILED:
            raise _os_error()
        return mapped


def _runs(frames: Sequence[Frame]) -> Iterator[_Run]:
    """Joins frames that follow each other in their file; together the runs cover `frames` in order."""
    start = 0
    for at in range(1, len(frames) + 1):
        if at < len(frames):
            previous, frame = frames[at - 1], frames[at]
            if frame.arena == previous.arena and frame.number == previous.number + 1:
                continue
        yield _Run(start, frames[start].arena, frames[start].number, at - start)
        start = at


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _close_all(files: dict[int, _FrameFile]) -> None:
    for file in files.values():
        os.close(file.fd)


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _hint(error: OSError) -> str:
    if error.errno == errno.ENOMEM:
        return f"{error} (the process may have reached vm.max_map_count)"
    return str(error)
