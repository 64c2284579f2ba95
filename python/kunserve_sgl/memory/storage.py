"""Facts about torch storages that have no public call: made from an address, watched, and counted.

All use of torch's private storage calls is here; `tests/unit/memory/test_storage.py` fails where a torch
release changes one of them.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef


def tensor_at(address: int, size_bytes: int, device: torch.device) -> torch.Tensor:
    """Makes a uint8 tensor (size_bytes,) over memory that somebody else keeps, with a storage of its own.

    The device is given, not asked for: asking the driver which device a pointer is on, as
    `__cuda_array_interface__` does, fails on unmapped memory and names the peer's device on imported memory.
    """
    storage = torch._C._construct_storage_from_data_pointer(address, device, size_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size_bytes,), (1,))


def storage_id(tensor: torch.Tensor) -> int:
    """Identifies the storage of a tensor while the storage lives."""
    return int(tensor.untyped_storage()._cdata)


def holders(storage: torch.UntypedStorage) -> int:
    """Counts the tensors that use a storage, whether Python or C++ keeps them. `storage` itself is not counted."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count - 1


class StorageWatch:
    """Tells whether a storage still lives, without keeping it alive."""

    __slots__ = ("_reference",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self._reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    @property
    def is_dead(self) -> bool:
        """Tells whether the last tensor over the storage is gone."""
        return bool(self._reference.expired())  # type: ignore[no-untyped-call]
