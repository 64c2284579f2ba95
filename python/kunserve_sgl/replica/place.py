"""Where a rank is: in the deployment, and on which device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from kunserve_sgl.args import KunserveOptions, RemoteAttentionBy
from kunserve_sgl.control.messages import Device
from kunserve_sgl.memory.cuda_driver import CudaDriver

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Place:
    """Says where a rank is: `rank` of the `ranks` that each of the `replicas` has. `device` has its index on CUDA."""

    replica: int
    rank: int
    replicas: int
    ranks: int
    device: torch.device


def device_of(device: torch.device, options: KunserveOptions) -> Device:
    """Says where memory of `device` is, for everybody who may map it; nothing of it where nobody does. Raises OSError
    where the server's directory is not there."""
    way = options.way_to_peers
    if way is RemoteAttentionBy.MESSAGE:
        return Device()
    gpu, reaches = CudaDriver().identity(device.index or 0) if device.type == "cuda" else ("", ())
    return Device(gpu, reaches, machine_of(options.kunserve_directory) if way is RemoteAttentionBy.AUTO else "")


def machine_of(directory: str) -> str:
    """Names the machine and the directory as this process finds it there. Who finds the same connects to the same
    sockets in it, and takes descriptors over them. Raises OSError where it is not there."""
    found = os.stat(directory)
    return f"{_BOOT_ID.read_text().strip()} {found.st_dev:x} {found.st_ino:x}"
