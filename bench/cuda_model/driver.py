"""A CUDA driver over CPU memory: the calls that KunServe makes, with CUDA's rules enforced and failures on demand.

Memory is real, so bytes can be checked; it is unreadable until access was granted, as on a GPU. All memory of a GPU
lies in one anonymous file, so that tens of thousands of handles take no more mappings than a process may have. A call
that breaks a rule of CUDA answers with CUDA_ERROR_INVALID_VALUE and is listed in `broken_rules`. Every call is logged,
for tests of their order and for `transition_cost.py`, which counts them.
"""

from __future__ import annotations

import itertools
import mmap
import os
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from cuda.bindings import driver as real

from kunserve_sgl.memory.cuda_driver import CudaDriver
from kunserve_sgl.memory.libc import LIBC
from kunserve_sgl.memory.vmm_cuda import CudaVmm

GRANULARITY_BYTES = 64 << 10
_OK = real.CUresult.CUDA_SUCCESS
_INVALID = real.CUresult.CUDA_ERROR_INVALID_VALUE
_PUNCH_HOLE = 0x02 | 0x01
_FIXED = 0x10
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


class _GpuMemory:
    """The memory of all GPUs of the machine, which processes share: one sparse file, of which nothing is used twice."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("modelled-gpu-memory", os.MFD_CLOEXEC)
        self._end = 0
        self._holders: dict[int, int] = {}
        self._exported: dict[int, _Piece] = {}
        self._names = itertools.count(1)

    def create(self, size_bytes: int, gpu: int) -> _Piece:
        piece = _Piece(self._end, size_bytes, gpu, next(self._names))
        self._end += size_bytes
        os.ftruncate(self.fd, self._end)
        return piece

    def hold(self, piece: _Piece) -> None:
        self._holders[piece.offset] = self._holders.get(piece.offset, 0) + 1

    def let_go(self, piece: _Piece) -> None:
        self._holders[piece.offset] -= 1
        if not self._holders[piece.offset]:
            del self._holders[piece.offset]
            LIBC.fallocate(self.fd, _PUNCH_HOLE, piece.offset, piece.size_bytes)

    def export(self, piece: _Piece) -> int:
        """A descriptor that stands for the piece; its file is empty."""
        self._exported[piece.number] = piece
        return os.memfd_create(f"fake-gpu{piece.gpu}-{piece.number}", os.MFD_CLOEXEC)

    def behind(self, fd: int) -> _Piece:
        name = os.readlink(f"/proc/self/fd/{fd}").removeprefix("/memfd:fake-gpu").split()[0]
        return self._exported[int(name.split("-")[1])]


@dataclass(frozen=True)
class _Piece:
    offset: int
    size_bytes: int
    gpu: int
    number: int


@dataclass
class _Allocation:
    piece: _Piece
    imported: bool = False
    released: bool = False
    mapped: int = 0


@dataclass
class _Mapping:
    size_bytes: int
    handle: int
    granted_to: tuple[int, ...] = ()


_MEMORY = _GpuMemory()


class FakeBindings:
    """Stands in for the module `cuda.bindings.driver`."""

    CUresult = real.CUresult
    CUdevice_attribute = real.CUdevice_attribute
    CUmemAccessDesc = real.CUmemAccessDesc
    CUmemAccess_flags = real.CUmemAccess_flags
    CUmemAllocationGranularity_flags = real.CUmemAllocationGranularity_flags
    CUmemAllocationHandleType = real.CUmemAllocationHandleType
    CUmemAllocationProp = real.CUmemAllocationProp
    CUmemAllocationType = real.CUmemAllocationType
    CUmemLocationType = real.CUmemLocationType

    def __init__(
        self,
        *,
        memory_frames: int = 1 << 16,
        peers: frozenset[tuple[int, int]] = frozenset(),
        granularity_bytes: int = GRANULARITY_BYTES,
    ) -> None:
        self.granularity_bytes = granularity_bytes
        self.memory_bytes = memory_frames * granularity_bytes
        self.cached_bytes = 0  # that torch would give back
        self.emptied_caches = 0
        self.peers = peers
        self.gpus = 1 + max((gpu for pair in peers for gpu in pair), default=0)
        self.unsupported: set[Any] = set()
        self.log: list[tuple[Any, ...]] = []
        self.broken_rules: list[str] = []
        self.allocations: dict[int, _Allocation] = {}
        self.mappings: dict[int, _Mapping] = {}
        self.reservations: dict[int, int] = {}
        self._reserved: list[int] = []  # first addresses, ascending
        self._places: dict[int, int] = {}  # number of a mapped granule of addresses to where its mapping begins
        self._used_bytes = 0
        self._next_handle = 1000
        self._fail: Callable[[str, int], bool] = lambda name, number: False
        self._calls = 0

    def fail_when(self, condition: Callable[[str, int], bool]) -> None:
        """Lets a call fail where `condition(name, number)` holds; calls are numbered from now on, from 0."""
        self._fail, self._calls = condition, 0

    def calls(self, *names: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.log if not names or entry[0] in names]

    def _enter(self, name: str, *arguments: Any) -> bool:
        self.log.append((name, *arguments))
        number, self._calls = self._calls, self._calls + 1
        return not self._fail(name, number)

    def _rule(self, holds: bool, text: str) -> bool:
        if not holds:
            self.broken_rules.append(text)
        return holds

    def cuInit(self, flags: int) -> tuple[Any]:
        return (_OK,)

    def cuDeviceGetAttribute(self, attribute: Any, gpu: int) -> tuple[Any, int]:
        return _OK, int(attribute not in self.unsupported)

    def cuMemGetAllocationGranularity(self, prop: Any, option: Any) -> tuple[Any, int]:
        minimum = real.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._rule(option == minimum, "granularity: not the minimum")
        return _OK, self.granularity_bytes

    def cuDeviceCanAccessPeer(self, gpu: int, peer: int) -> tuple[Any, int]:
        return _OK, int((gpu, peer) in self.peers)

    def cuDeviceGetCount(self) -> tuple[Any, int]:
        return _OK, self.gpus

    def cuDeviceGetUuid(self, gpu: int) -> tuple[Any, Any]:
        return _OK, SimpleNamespace(bytes=bytes([0xA0 + gpu]) * 16)

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> tuple[Any, int]:
        if not self._enter("cuMemAddressReserve", size, alignment):
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        fine = size % self.granularity_bytes == 0 and alignment.bit_count() == 1 and (address, flags) == (0, 0)
        if not self._rule(fine, "reserve: arguments"):
            return _INVALID, 0
        raw = int(LIBC.mmap(None, size + alignment, 0, _RESERVED, -1, 0))
        start = -(-raw // alignment) * alignment
        if start > raw:
            LIBC.munmap(raw, start - raw)
        if start + size < raw + size + alignment:
            LIBC.munmap(start + size, raw + alignment - start)
        self.reservations[start] = size
        insort(self._reserved, start)
        return _OK, start

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any]:
        if not self._enter("cuMemAddressFree", address, size):
            return (_INVALID,)
        inside = [at for at in self.mappings if address <= at < address + size]  # seldom called
        if not self._rule(self.reservations.get(address) == size and not inside, "free: still mapped"):
            return (_INVALID,)
        del self.reservations[address]
        self._reserved.remove(address)
        LIBC.munmap(address, size)
        return (_OK,)

    def cuMemCreate(self, size: int, prop: Any, flags: int) -> tuple[Any, int]:
        if not self._enter("cuMemCreate", size):
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        fine = (
            size % self.granularity_bytes == 0
            and flags == 0
            and prop.type == real.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
            and prop.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            and prop.requestedHandleTypes == real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        )
        if not self._rule(fine, "create: arguments"):
            return _INVALID, 0
        if self._used_bytes + size > self.memory_bytes:
            return real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        self._used_bytes += size
        return _OK, self._new_handle(_Allocation(_MEMORY.create(size, prop.location.id)))

    def cuMemRelease(self, handle: int) -> tuple[Any]:
        if not self._enter("cuMemRelease", handle):
            return (_INVALID,)
        known = handle in self.allocations and not self.allocations[handle].released
        if not self._rule(known, "release: unknown handle"):
            return (_INVALID,)
        self.allocations[handle].released = True
        self._forget_unused(self.allocations[handle])
        return (_OK,)

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> tuple[Any]:
        if not self._enter("cuMemMap", address, size, handle):
            return (_INVALID,)
        allocation = self.allocations.get(handle)
        fine = (
            allocation is not None
            and not allocation.released
            and size == allocation.piece.size_bytes
            and (offset, flags) == (0, 0)
            and self._is_reserved(address, size)
            and not any(place in self._places for place in self._granules(address, size))
        )
        if not self._rule(fine, "map: arguments"):
            return (_INVALID,)
        assert allocation is not None
        LIBC.mmap(address, size, 0, mmap.MAP_SHARED | _FIXED, _MEMORY.fd, allocation.piece.offset)
        self.mappings[address] = _Mapping(size, handle)
        self._places.update(dict.fromkeys(self._granules(address, size), address))
        allocation.mapped += 1
        return (_OK,)

    def cuMemSetAccess(self, address: int, size: int, descriptions: list[Any], count: int) -> tuple[Any]:
        gpus = tuple(description.location.id for description in descriptions)
        if not self._enter("cuMemSetAccess", address, size, gpus):
            return (_INVALID,)
        flags = real.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        covered = self._whole_mappings(address, size)
        fine = (
            count == len(descriptions) > 0
            and all(description.flags == flags for description in descriptions)
            and bool(covered)
        )
        if not self._rule(fine, "access: range not mapped entirely"):
            return (_INVALID,)
        for at in covered:
            self.mappings[at].granted_to = gpus
        LIBC.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        return (_OK,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any]:
        if not self._enter("cuMemUnmap", address, size):
            return (_INVALID,)
        covered = self._whole_mappings(address, size)
        if not self._rule(bool(covered), "unmap: not whole mappings, one behind the other"):
            return (_INVALID,)
        LIBC.mmap(address, size, 0, _RESERVED | _FIXED, -1, 0)
        for place in self._granules(address, size):
            del self._places[place]
        for at in covered:
            allocation = self.allocations[self.mappings.pop(at).handle]
            allocation.mapped -= 1
            self._forget_unused(allocation)
        return (_OK,)

    def cuMemExportToShareableHandle(self, handle: int, kind: Any, flags: int) -> tuple[Any, int]:
        if not self._enter("cuMemExportToShareableHandle", handle):
            return _INVALID, 0
        return _OK, _MEMORY.export(self.allocations[handle].piece)

    def cuMemImportFromShareableHandle(self, fd: int, kind: Any) -> tuple[Any, int]:
        if not self._enter("cuMemImportFromShareableHandle", fd):
            return _INVALID, 0
        return _OK, self._new_handle(_Allocation(_MEMORY.behind(fd), imported=True))

    def cuMemGetAllocationPropertiesFromHandle(self, handle: int) -> tuple[Any, Any]:
        prop = real.CUmemAllocationProp()
        if not self._enter("cuMemGetAllocationPropertiesFromHandle", handle):
            return _INVALID, prop
        prop.location.type = real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = self.allocations[handle].piece.gpu
        return _OK, prop

    def live_handles(self) -> int:
        return sum(not allocation.released for allocation in self.allocations.values())

    def state(self) -> tuple[Any, ...]:
        """Everything that a failed operation must leave as it was."""
        mappings = {at: (m.size_bytes, m.handle, m.granted_to) for at, m in self.mappings.items()}
        live = {handle for handle, allocation in self.allocations.items() if not allocation.released}
        return mappings, live, dict(self.reservations)

    def _new_handle(self, allocation: _Allocation) -> int:
        self._next_handle += 1
        self.allocations[self._next_handle] = allocation
        _MEMORY.hold(allocation.piece)
        return self._next_handle

    def _forget_unused(self, allocation: _Allocation) -> None:
        """Memory goes with the last of its handles and mappings."""
        if allocation.released and not allocation.mapped:
            _MEMORY.let_go(allocation.piece)
            self._used_bytes -= 0 if allocation.imported else allocation.piece.size_bytes

    def _granules(self, address: int, size: int) -> range:
        return range(address // self.granularity_bytes, (address + size) // self.granularity_bytes)

    def _is_reserved(self, address: int, size: int) -> bool:
        found = bisect_right(self._reserved, address) - 1
        return found >= 0 and address + size <= self._reserved[found] + self.reservations[self._reserved[found]]

    def _whole_mappings(self, address: int, size: int) -> list[int]:
        """Where the mappings begin that lie one behind the other from `address` on and end with `size`; none where
        there is a hole, or one is cut."""
        covered, at = [], address
        while at < address + size and at in self.mappings:
            covered.append(at)
            at += self.mappings[at].size_bytes
        return covered if at == address + size else []


class FakeDriver(CudaDriver):
    """The real driver wrapper over fake bindings; waiting for the GPU is noted in the same log."""

    def __init__(self, bindings: FakeBindings) -> None:
        super().__init__(bindings)
        self.bindings = bindings

    def empty_cache(self) -> None:
        self.bindings.emptied_caches += 1
        self.bindings.memory_bytes += self.bindings.cached_bytes
        self.bindings.cached_bytes = 0

    def synchronize(self, device: int) -> None:
        self.bindings.log.append(("synchronize", device))


def make_fake_cuda(bindings: FakeBindings, *, gpu: int = 0, peer_gpus: tuple[int, ...] = ()) -> CudaVmm:
    """A CUDA backend whose memory, and therefore whose tensors, are on a CPU."""
    vmm = CudaVmm(gpu, GRANULARITY_BYTES, peer_gpus=peer_gpus, driver=FakeDriver(bindings))
    vmm.device = torch.device("cpu")
    return vmm
