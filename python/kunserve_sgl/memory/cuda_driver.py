"""The CUDA driver calls that virtual memory needs, typed, each failing with the call and its error's name.

The module with the calls is given, so that tests can supply one that runs without a GPU; by default it is
`cuda.bindings.driver`, imported when the first driver object is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from kunserve_sgl.errors import TransientError
from kunserve_sgl.memory.errors import BackendUnavailableError


class CudaCallError(TransientError):
    """Says that a driver call failed; `call` is its name and `code` the name of the driver's error."""

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call} failed: {code}")
        self.call = call
        self.code = code


class CudaDriver:
    """Calls the driver for virtual memory. Handles, addresses and sizes are plain integers, sizes in bytes; every
    method raises CudaCallError where the driver refuses."""

    def __init__(self, bindings: Any | None = None) -> None:
        """Starts the driver. `bindings` has the functions and types of `cuda.bindings.driver`. Raises
        BackendUnavailableError."""
        if bindings is None:
            try:
                bindings = importlib.import_module("cuda.bindings.driver")
                started = bindings.cuInit(0)
            except (ImportError, RuntimeError) as error:
                raise BackendUnavailableError(f"the CUDA driver cannot be loaded: {error}") from error
            if started[0] != bindings.CUresult.CUDA_SUCCESS:
                raise BackendUnavailableError(f"the CUDA driver cannot be started: {started[0].name}")
        self._bindings = bindings
        self._fd_type = bindings.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def require_support(self, device: int) -> None:
        """Raises BackendUnavailableError where `device` cannot map memory or export it as file
        descriptors."""
        attributes = self._bindings.CUdevice_attribute
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
        ):
            if not self._call("cuDeviceGetAttribute", attribute, device):
                raise BackendUnavailableError(f"GPU {device} lacks {attribute.name}, which KunServe needs")

    def granularity_bytes(self, device: int) -> int:
        """Returns the smallest unit that can be created and mapped on `device`."""
        flags = self._bindings.CUmemAllocationGranularity_flags
        minimum = flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._call("cuMemGetAllocationGranularity", self._properties(device), minimum))

    def reserve(self, size_bytes: int, alignment_bytes: int) -> int:
        """Reserves address space, which costs no memory, and returns its first address."""
        return int(self._call("cuMemAddressReserve", size_bytes, alignment_bytes, 0, 0))

    def free(self, address: int, size_bytes: int) -> None:
        """Gives address space that `reserve` returned back, as a whole. Nothing is mapped in it any more."""
        self._call("cuMemAddressFree", address, size_bytes)

    def create(self, size_bytes: int, device: int) -> int:
        """Creates physical memory on `device` that can be exported as a file descriptor, and returns its handle. Where
        there is none, torch has to give back what it keeps for later first."""
        try:
            return int(self._call("cuMemCreate", size_bytes, self._properties(device), 0))
        except CudaCallError as error:
            if error.code != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
        self.empty_cache()
        return int(self._call("cuMemCreate", size_bytes, self._properties(device), 0))

    def empty_cache(self) -> None:
        """Lets torch give the memory back that it holds and has no use for now."""
        torch.cuda.empty_cache()

    def release(self, handle: int) -> None:
        """Lets go of a handle. The memory goes when nothing maps it and no other handle or descriptor is left."""
        self._call("cuMemRelease", handle)

    def map(self, address: int, size_bytes: int, handle: int) -> None:
        """Maps the memory of `handle` from its first byte on; nobody can touch it before `allow_access`."""
        self._call("cuMemMap", address, size_bytes, 0, handle, 0)

    def unmap(self, address: int, size_bytes: int) -> None:
        """Takes the memory away from addresses that `map` mapped. Work that touches them must be finished."""
        self._call("cuMemUnmap", address, size_bytes)

    def allow_access(self, address: int, size_bytes: int, devices: Sequence[int]) -> None:
        """Lets `devices` read and write a range that is mapped entirely."""
        descriptions = []
        for device in devices:
            description = self._bindings.CUmemAccessDesc()
            description.location.type = self._bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            description.location.id = device
            description.flags = self._bindings.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            descriptions.append(description)
        self._call("cuMemSetAccess", address, size_bytes, descriptions, len(descriptions))

    def export_fd(self, handle: int) -> int:
        """Returns an open file descriptor of the memory; the caller closes it."""
        return int(self._call("cuMemExportToShareableHandle", handle, self._fd_type, 0))

    def import_fd(self, fd: int) -> int:
        """Returns a handle of another process's memory. `fd` stays the caller's to close."""
        return int(self._call("cuMemImportFromShareableHandle", fd, self._fd_type))

    def device_of(self, handle: int) -> int:
        """Returns the device, as this process numbers them, on which the memory behind `handle` lies."""
        return int(self._call("cuMemGetAllocationPropertiesFromHandle", handle).location.id)

    def can_access(self, device: int, peer: int) -> bool:
        """Tells whether `device` can read and write the memory of `peer` directly."""
        return bool(self._call("cuDeviceCanAccessPeer", device, peer))

    def identity(self, device: int) -> tuple[str, tuple[str, ...]]:
        """Returns the UUID of `device` and those of the other devices whose memory it can access, of those that this
        process sees. A UUID has 32 digits in hexadecimal, and is the same in every process, however each numbers its
        devices; a part of a GPU (MIG) has its own."""
        others = [other for other in range(int(self._call("cuDeviceGetCount"))) if other != device]
        reached = [other for other in others if self.can_access(device, other)]
        uuid, *uuids = [bytes(self._call("cuDeviceGetUuid", each).bytes).hex() for each in (device, *reached)]
        return uuid, tuple(uuids)

    def synchronize(self, device: int) -> None:
        """Waits for everything `device` was asked to do by this process."""
        torch.cuda.synchronize(device)

    def _properties(self, device: int) -> Any:
        properties = self._bindings.CUmemAllocationProp()
        properties.type = self._bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = self._bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = device
        properties.requestedHandleTypes = self._fd_type
        return properties

    def _call(self, name: str, *arguments: Any) -> Any:
        """Returns the value that a driver call gives beside its status, or None. Raises CudaCallError."""
        status, *values = getattr(self._bindings, name)(*arguments)
        if status != self._bindings.CUresult.CUDA_SUCCESS:
            raise CudaCallError(name, status.name)
        return values[0] if values else None
