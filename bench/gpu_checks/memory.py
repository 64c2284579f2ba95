"""Checks of virtual memory by itself: what the machine has (F0), and what the driver's calls take (F1)."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cuda_model.costs import TABLE
from gpu_checks.other_process import other_process
from gpu_checks.place import CheckError, Place
from gpu_checks.runner import Result, Status, Table
from kunserve_sgl.memory.cuda_driver import CudaDriver
from kunserve_sgl.memory.frame_export import receive_export, send_export
from kunserve_sgl.memory.virtual_range import Span
from kunserve_sgl.memory.vmm import VmmBackend
from kunserve_sgl.memory.vmm_cuda import CudaVmm
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

COSTS = "call_costs.json"
CALLS = {  # as the driver names them; None for a further frame of a call on several
    "create": "cuMemCreate",
    "create_piece": None,
    "map": "cuMemMap",
    "set_access_one": "cuMemSetAccess",
    "set_access_span": None,
    "unmap_one": "cuMemUnmap",
    "unmap_span": None,
    "export": "cuMemExportToShareableHandle",
    "import": "cuMemImportFromShareableHandle",
    "owner": "cuMemGetAllocationPropertiesFromHandle",
    "release": "cuMemRelease",
}
_SPANS = {"create": "create_piece", "set_access_one": "set_access_span", "unmap_one": "unmap_span"}
CUDA_FRAME_BYTES, CPU_FRAME_BYTES = 2 << 20, 64 << 10
CUDA_FRAMES, CPU_FRAMES = (1024, 4096), (64, 256)
_TIMEOUT_S = 60.0
# What the checks import and SGLang does not bring.
_MODULES = ("sglang", "kunserve_sgl", "cuda.bindings", "sgl_kernel", "pytest", "pytest_timeout", "hypothesis", "psutil")
_FOR_CUDA = ("cuda.bindings", "sgl_kernel")


def check_machine(place: Place) -> Result:
    """F0: the modules are there, and a frame of one process can be read and written by another."""
    wanted = [name for name in _MODULES if place.is_cuda or name not in _FOR_CUDA]
    if missing := [name for name in wanted if not _is_there(name)]:
        raise CheckError(f"not installed: {', '.join(missing)}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    figures = {"open files": f"{soft} (hard limit {hard})", "cores": str(len(os.sched_getaffinity(0)))}
    skipped = {}
    if place.is_cuda:
        names = ("name", "driver_version", "memory.total", "memory.used", "compute_mode")
        figures |= dict(zip(names, nvidia_smi(*names), strict=True))
        figures["granularity"] = f"{CudaDriver().granularity_bytes(torch.cuda.current_device())} bytes"
        figures["compilers"] = ", ".join(name for name in ("nvcc", "ninja", "g++") if shutil.which(name)) or "none"
    else:
        skipped["nvidia-smi"] = "there is no GPU"
        figures["granularity"] = f"{mmap.ALLOCATIONGRANULARITY} bytes"
    vmm = make_vmm(place)
    began_s = time.perf_counter()
    _share_one_frame(vmm, place)
    figures["a frame shared with another process"] = f"{time.perf_counter() - began_s:.1f} s"
    return Result(Status.PASSED, figures=figures, skipped=skipped)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what it lies in
        return False


def nvidia_smi(*names: str) -> list[str]:
    """What `nvidia-smi` says of the first GPU.

    Raises:
        CheckError: it says nothing.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise CheckError(f"nvidia-smi: {error}") from error
    return [value.strip() for value in done.stdout.splitlines()[0].split(",")]


def make_vmm(place: Place) -> VmmBackend:
    """The backend of the device."""
    return CudaVmm(torch.cuda.current_device(), CUDA_FRAME_BYTES) if place.is_cuda else MemfdVmm(CPU_FRAME_BYTES)


def _share_one_frame(vmm: VmmBackend, place: Place) -> None:
    area = vmm.reserve(1, "shared")
    vmm.map(Span(area, 0, 1), vmm.create_frames(1))
    ours = vmm.tensor(area, 0, vmm.frame_bytes).fill_(20)
    _synchronize(place)
    with other_process(_double, place) as (near, _):
        with vmm.export_frames(vmm.frames_at(Span(area, 0, 1))) as export:
            send_export(near, export, _TIMEOUT_S)
        if near.recv(1) != b"k":
            raise CheckError("the other process ended before it had doubled the frame's bytes")
    if values := [value for value in ours.unique().tolist() if value != 40]:
        raise CheckError(f"after another process has doubled every byte of 20 in a frame, some are {values[0]}")


def _double(sock: socket.socket, place: Place) -> None:
    vmm = make_vmm(place)
    area = vmm.reserve(1, "theirs")
    with receive_export(sock, _TIMEOUT_S) as export:
        vmm.map(Span(area, 0, 1), vmm.import_frames(export))
    vmm.tensor(area, 0, vmm.frame_bytes).mul_(2)
    _synchronize(place)
    sock.sendall(b"k")


def _synchronize(place: Place) -> None:
    if place.is_cuda:
        torch.cuda.synchronize()


class _Clock:
    """Microseconds per frame, by call."""

    def __init__(self) -> None:
        self.us: dict[str, float] = {}

    @contextmanager
    def times(self, call: str, frames: int) -> Iterator[None]:
        began_s = time.perf_counter()
        yield
        self.us[call] = self.us.get(call, 0.0) + 1e6 * (time.perf_counter() - began_s) / frames


def cuda_costs(driver: CudaDriver, gpu: int, frames: int, frame_bytes: int, at_a_time: int = 256) -> dict[str, float]:
    """Microseconds per frame of each of CALLS on `frames` frames, by a call for each; those named `_span` and
    `_piece` are one call for all of them. Descriptors are open for so many frames at a time."""
    clock = _Clock()
    size_bytes = frames * frame_bytes
    address = driver.reserve(size_bytes, frame_bytes)
    places = range(address, address + size_bytes, frame_bytes)
    with clock.times("create", frames):
        handles = [driver.create(frame_bytes, gpu) for _ in places]
    with clock.times("map", frames):
        for at, handle in zip(places, handles, strict=True):
            driver.map(at, frame_bytes, handle)
    with clock.times("set_access_one", frames):
        for at in places:
            driver.allow_access(at, frame_bytes, (gpu,))
    with clock.times("unmap_one", frames):
        for at in places:
            driver.unmap(at, frame_bytes)
    for at, handle in zip(places, handles, strict=True):
        driver.map(at, frame_bytes, handle)
    with clock.times("set_access_span", frames):
        driver.allow_access(address, size_bytes, (gpu,))
    with clock.times("unmap_span", frames):
        driver.unmap(address, size_bytes)
    for first in range(0, frames, at_a_time):
        some = handles[first : first + at_a_time]
        with clock.times("export", frames):
            fds = [driver.export_fd(handle) for handle in some]
        try:
            with clock.times("import", frames):
                imported = [driver.import_fd(fd) for fd in fds]
        finally:
            for fd in fds:
                os.close(fd)
        with clock.times("owner", frames):
            for handle in imported:
                driver.device_of(handle)
        for handle in imported:
            driver.release(handle)
    with clock.times("release", frames):
        for handle in handles:
            driver.release(handle)
    with clock.times("create_piece", frames):
        piece = driver.create(size_bytes, gpu)
    driver.release(piece)
    driver.free(address, size_bytes)
    return clock.us


def host_costs(make: Callable[[], VmmBackend], frames: int) -> dict[str, float]:
    """The same for a backend over files, through its own interface. No two frames follow each other in a file, so that
    each takes a call. Access comes with the mapping, and nobody asks for an owner: those calls are left out."""
    clock = _Clock()
    owner, borrower = make(), make()
    area = owner.reserve(frames, "costs")
    whole = Span(area, 0, frames)
    with clock.times("create", 2 * frames):
        created = owner.create_frames(2 * frames)
    scattered = created[::2]
    with clock.times("map", frames):
        owner.map(whole, scattered)
    with clock.times("unmap_one", frames):
        for position in range(frames):
            owner.unmap(Span(area, position, 1))
    owner.map(whole, scattered)
    with clock.times("unmap_span", frames):
        owner.unmap(whole)
    with clock.times("export", frames):
        export = owner.export_frames(scattered)
    with export, clock.times("import", frames):
        borrower.import_frames(export)
    with clock.times("release", 2 * frames):
        owner.destroy_frames(created)
    owner.close()
    borrower.close()
    return clock.us


def check_call_costs(place: Place) -> Result:
    """F1: microseconds per frame of every call, at two numbers of frames. Those at the larger number go to COSTS, for
    `transition_cost.py --costs`."""
    costs: dict[int, Mapping[str, float]] = {}
    for frames in CUDA_FRAMES if place.is_cuda else CPU_FRAMES:
        if place.is_cuda:
            torch.zeros(1, device="cuda")  # the calls need a context
            costs[frames] = cuda_costs(CudaDriver(), torch.cuda.current_device(), frames, CUDA_FRAME_BYTES)
        else:
            costs[frames] = host_costs(lambda: MemfdVmm(CPU_FRAME_BYTES), frames)
    most = max(costs)
    where = "on a GPU" if place.is_cuda else "on a CPU: memfd and mmap"
    table = measured_table(costs[most], most, f"measured {where}, {most} frames")
    (place.output / COSTS).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return Result(Status.PASSED, tables=[cost_table(costs)], data={"us_per_frame": costs})


def measured_table(us: Mapping[str, float], frames: int, source: str) -> dict[str, Any]:
    """The table of call costs (`cuda_model/costs.py`) with what was measured of `frames` frames in its place."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    for call, name in CALLS.items():
        if name is not None and call in us:
            further_us = 0.0
            if (span := _SPANS.get(call)) in us:
                further_us = max(0.0, (us[span] * frames - us[call]) / (frames - 1))
            table["calls"][name] = {"call_us": us[call], "further_frame_us": further_us, "source": source}
    return table


def cost_table(costs: Mapping[int, Mapping[str, float]]) -> Table:
    """Calls over numbers of frames."""
    rows: Sequence[Sequence[Any]] = [
        [call, *(f"{each[call]:.2f}" if call in each else "-" for each in costs.values())] for call in CALLS
    ]
    return Table("us per frame", ["call", *(f"{frames} frames" for frames in costs)], rows)
