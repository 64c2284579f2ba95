"""Where a rank is: in the deployment, and on which device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.messages import Device
from kunserve_sgl.memory.cuda_driver import CudaDriver


@dataclass(frozen=True, slots=True)
class Place:
    """Says where a rank is: `rank` of the `ranks` that each of the `replicas` has. `device` has its index on CUDA."""

    replica: int
    rank: int
    replicas: int
    ranks: int
    device: torch.device


def device_of(device: torch.device, options: KunserveOptions) -> Device:
    """Says where memory of `device` is, for everybody on this machine; nothing of it where nobody maps that."""
    if device.type != "cuda" or options.attends_by_message:
        return Device()
    return Device(*CudaDriver().identity(device.index or 0))
