"""Copies between a CPU and the device of a rank, and the stream in which a thread gives that its work.

On a CPU nothing is copied. On CUDA, which none of this has run on, all goes through pinned memory, so that one copy is
waited for and not each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 16  # elements of int64


def on_device(device: torch.device, *arrays: npt.NDArray[np.integer]) -> list[torch.Tensor]:
    """Returns the arrays as int64 tensors on the device, which went there together, in stream order. Each begins at a
    multiple of 128 bytes, as one by itself would: Triton compiles its kernels anew for another alignment."""
    if device.type == "cpu":
        return [torch.from_numpy(array.astype(np.int64)) for array in arrays]
    starts = np.cumsum([0, *(-(-array.size // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
    packed = torch.empty(starts[-1], dtype=torch.int64, pin_memory=True)
    memory = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        memory[start : start + array.size] = array.reshape(-1)
    there = packed.to(device, non_blocking=True)
    return [there[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=False)]


def host_memory(size_bytes: int, device: torch.device) -> torch.Tensor:
    """Makes uint8 (size_bytes,) on the CPU, from which copies to `device` and back go at the speed of the bus."""
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's bytes on the CPU, uint8 (bytes,), when the current stream has made them. `tensor` is
    contiguous; one that is on the CPU is not copied."""
    flat = tensor.view(-1).view(torch.uint8)
    if tensor.device.type == "cpu":
        return flat
    memory = host_memory(flat.numel(), tensor.device)
    memory.copy_(flat, non_blocking=True)
    finish(tensor.device)
    return memory


def fill(target: torch.Tensor, data: bytes | memoryview) -> None:
    """Copies `data` to `target`, uint8 of as many bytes, contiguous. It is there when this returns."""
    if target.device.type == "cpu":
        target.view(-1).numpy()[:] = np.frombuffer(data, np.uint8)
        return
    memory = host_memory(target.numel(), target.device)
    memory.numpy()[:] = np.frombuffer(data, np.uint8)
    target.view(-1).copy_(memory, non_blocking=True)
    finish(target.device)


def fill_rows(table: torch.Tensor, rows: npt.NDArray[np.int64], data: bytes | memoryview) -> None:
    """Copies `data` to the rows `rows`, int64 (n,), of `table`, uint8 (m, bytes of a row). It is there when this
    returns."""
    if table.device.type == "cpu":
        table.numpy()[rows] = np.frombuffer(data, np.uint8).reshape(len(rows), -1)
        return
    memory = torch.empty(len(rows), table.shape[1], dtype=torch.uint8, device=table.device)
    fill(memory, data)
    table.index_copy_(0, torch.from_numpy(rows).to(table.device), memory)
    finish(table.device)


def finish(device: torch.device) -> None:
    """Waits for what the current stream has been given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Gives the device what the block asks for in a stream of its own, on that device: a thread begins on the first
    one, and in the stream that all threads share. The block waits for no other stream, so it cannot be part of a
    circle of waits; what it reads has been waited for by who tells it to read."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield
