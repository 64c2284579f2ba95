"""A copy of the layers in host memory, one for the same rank of all replicas of a machine.

It is a file of anonymous memory that somebody else keeps open, so that it stays while replicas come and go, and is gone
when the server is. A record for each layer says where its bytes are and what their checksum is; a layer without one is
not there, or is being written. Nobody leads and nobody waits: of those who want to write a layer the first has a lock,
which ends with its process, and the others need not, because all write the same bytes. Who reads takes no lock: the
checksum says whether the bytes were whole.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.checksum import Checksum, ChecksumAlgorithm
from kunserve_sgl.memory.errors import OutOfMemoryError, RestoreSourceError
from kunserve_sgl.memory.layer_sources import PartedSource, RestoreTarget, copy_in_parts
from kunserve_sgl.memory.libc import LIBC
from kunserve_sgl.memory.storage import tensor_at

logger = logging.getLogger(__name__)

# Offset and size in bytes, checksum, and the name of its algorithm, which is empty where the layer is not there.
_RECORD = struct.Struct("<QQ16s16s")
_RECORD_BYTES = 64
_MAP_FAILED = ctypes.c_void_p(-1).value
# Of cudaHostRegister: the mapping cannot be written to.
_REGISTER_READ_ONLY = 8


def _named(algorithm: ChecksumAlgorithm) -> bytes:
    return algorithm.value.encode().ljust(16, b"\0")


_ALGORITHMS = {_named(each): each for each in ChecksumAlgorithm}


@dataclass(frozen=True, slots=True)
class _Place:
    """Says where the bytes of a layer are in the file."""

    offset: int
    size_bytes: int


class HostCopy(PartedSource):
    """Restores layers from the copy, and keeps it."""

    def __init__(self, path: str, sizes_bytes: Mapping[int, int]) -> None:
        """`path` leads to the file, `sizes_bytes` are those of the regions of the layers. Raises ConfigurationError
        where there is no such file."""
        self._places: dict[int, _Place] = {}
        end = _whole_pages(_RECORD_BYTES * (max(sizes_bytes) + 1))
        for layer, size_bytes in sorted(sizes_bytes.items()):
            self._places[layer] = _Place(end, size_bytes)
            end += _whole_pages(size_bytes)
        self.size_bytes = end
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(self._fd).st_size < end:
                os.ftruncate(self._fd, end)  # all make it the same size
        except OSError as error:
            raise ConfigurationError(f"--kunserve-host-copy: {path} cannot be used: {error}") from error
        self._pinned: torch.Tensor | None = None

    @property
    def missing_bytes(self) -> int:
        """Counts the bytes of layers that nobody has written yet."""
        return sum(place.size_bytes for layer, place in self._places.items() if self._checksum(layer) is None)

    def has(self, layer: int, checksum: Checksum) -> bool:
        """Tells whether the copy of a layer is the one with this checksum, by its record."""
        return self._checksum(layer) == checksum

    def keep(self, layer: int, region: torch.Tensor, checksum: Checksum) -> bool:
        """Writes the layer's bytes, a uint8 tensor (used bytes,) with that checksum, unless they are there or another
        process writes them. Returns whether they were written here. Raises OutOfMemoryError where there is no memory
        for them; the layer is then not there."""
        if self.has(layer, checksum) or not self._lock(layer):
            return False
        try:
            if self.has(layer, checksum):
                return False
            place = self._places[layer]
            self._write_record(layer, b"")
            os.posix_fallocate(self._fd, place.offset, place.size_bytes)
            with self._mapped(place, mmap.PROT_READ | mmap.PROT_WRITE) as copy:
                copy.copy_(region)
            name = _named(checksum.algorithm)
            record = _RECORD.pack(place.offset, place.size_bytes, checksum.value.to_bytes(16, "little"), name)
            self._write_record(layer, record)
        except OSError as error:
            raise OutOfMemoryError(f"{place.size_bytes} bytes for the copy of layer {layer}: {error}") from error
        finally:
            self._unlock(layer)
        return True

    def pin(self) -> None:
        """Maps the copy for good and registers it with CUDA, so that a restore runs at the speed of the bus. A driver
        that cannot is no reason to fail: copies are slower then."""
        address = self._mmap(0, self.size_bytes, mmap.PROT_READ)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        error = runtime.cudaHostRegister(address, self.size_bytes, _REGISTER_READ_ONLY)
        if int(error) != 0:
            LIBC.munmap(address, self.size_bytes)
            logger.warning("KunServe: the copy in host memory is not pinned: cudaHostRegister says %s", error)
            return
        self._pinned = tensor_at(address, self.size_bytes, torch.device("cpu"))

    @override
    def fill_in_parts(self, target: RestoreTarget, part_bytes: int) -> Generator[int, None, None]:
        place = self._places[target.layer]
        if self._checksum(target.layer) is None:
            raise RestoreSourceError(f"it has no layer {target.layer}: whoever began to write it has not ended")
        if place.size_bytes != target.region.numel():
            raise RestoreSourceError(f"it has {place.size_bytes} bytes of the layer, not {target.region.numel()}")
        if self._pinned is not None:
            copy = self._pinned[place.offset : place.offset + place.size_bytes]
            yield from copy_in_parts(target.region, copy, part_bytes)
            return
        try:
            with self._mapped(place, mmap.PROT_READ) as copy:
                yield from copy_in_parts(target.region, copy, part_bytes)
        except OSError as error:
            raise RestoreSourceError(str(error)) from error

    def close(self) -> None:
        """Closes the file, whose layers stay for others."""
        if self._pinned is not None:
            address, self._pinned = self._pinned.data_ptr(), None
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(address)
            LIBC.munmap(address, self.size_bytes)
        os.close(self._fd)

    def _checksum(self, layer: int) -> Checksum | None:
        """Returns what the record says; None where the layer is not there, or not where this process expects it. While
        another writes the record, what is read may be a part of it, which says nothing either."""
        record = os.pread(self._fd, _RECORD.size, layer * _RECORD_BYTES)
        offset, size_bytes, value, algorithm = _RECORD.unpack(record.ljust(_RECORD.size, b"\0"))
        known = _ALGORITHMS.get(algorithm)
        if known is None or _Place(offset, size_bytes) != self._places[layer]:
            return None
        return Checksum(known, int.from_bytes(value, "little"))

    def _write_record(self, layer: int, record: bytes) -> None:
        os.pwrite(self._fd, record.ljust(_RECORD.size, b"\0"), layer * _RECORD_BYTES)

    def _lock(self, layer: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, _RECORD_BYTES, layer * _RECORD_BYTES)
        except (BlockingIOError, PermissionError):  # POSIX leaves it open which
            return False
        return True

    def _unlock(self, layer: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, _RECORD_BYTES, layer * _RECORD_BYTES)

    @contextmanager
    def _mapped(self, place: _Place, protection: int) -> Iterator[torch.Tensor]:
        """Maps the bytes of a layer for as long as they are copied: uint8 (used bytes,). Nothing of it may be kept."""
        address = self._mmap(place.offset, place.size_bytes, protection)
        try:
            yield tensor_at(address, place.size_bytes, torch.device("cpu"))
        finally:
            LIBC.munmap(address, place.size_bytes)

    def _mmap(self, offset: int, size_bytes: int, protection: int) -> int:
        address = LIBC.mmap(None, size_bytes, protection, mmap.MAP_SHARED, self._fd, offset)
        if address is None or address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"mmap of {size_bytes} bytes: {os.strerror(code)}")
        return int(address)


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
