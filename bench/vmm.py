"""Times virtual memory: map, unmap, drop and restore of a layer, growth of the KV cache, as functions of
frames.

    python bench/vmm.py --backend host
    python bench/vmm.py --backend cuda --json vmm.json

Every operation runs for several numbers of frames, in random order and many times. Printed are percentiles
for each number, and the fixed and the per-frame cost: a least-squares line through the medians (and through
the P90s) over the number of frames. Times are of the real code paths: a drop detaches the model's tensors and
unmaps, a restore maps, copies from a buffer, proves the checksum and attaches; growth maps frames behind all
buffers and zeroes them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.checksum import checksum
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_parameters import LayerParameters
from kunserve_sgl.memory.layer_sources import BufferSource
from kunserve_sgl.memory.slot_space import KvBuffer, plan_slot_space
from kunserve_sgl.memory.virtual_range import Frame, Span
from kunserve_sgl.memory.vmm import VmmBackend
from kunserve_sgl.memory.vmm_cuda import CudaVmm
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

PERCENTILES = (50, 90, 99)
# A layer has a few large tensors and several small ones; each costs one rebinding at a drop and at a restore.
LARGE_TENSORS, SMALL_TENSORS = 4, 8
SMALL_ELEMENTS = 2048


@dataclass(frozen=True)
class Line:
    """time = fixed_us + per_frame_us * frames, by least squares."""

    fixed_us: float
    per_frame_us: float


@dataclass
class Series:
    """Samples in seconds of one operation, by number of frames."""

    samples_s: dict[int, list[float]] = field(default_factory=dict)

    def add(self, frames: int, seconds: float) -> None:
        self.samples_s.setdefault(frames, []).append(seconds)

    def percentile_us(self, frames: int, percent: int) -> float:
        ordered = sorted(self.samples_s[frames])
        return 1e6 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]

    def line(self, percent: int) -> Line:
        points = [(frames, self.percentile_us(frames, percent)) for frames in sorted(self.samples_s)]
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
        return Line(mean_y - slope * mean_x, slope)


class Bench:
    """Runs operations over one backend and collects their times."""

    def __init__(self, vmm: VmmBackend, seed: int) -> None:
        self.vmm = vmm
        self.series: dict[str, Series] = {}
        self.random = random.Random(seed)
        self.recording = True

    @contextmanager
    def timed(self, name: str, frames: int) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        if self.recording:
            self.series.setdefault(name, Series()).add(frames, time.perf_counter() - started)

    def rounds(self, sizes: Sequence[int], repeats: int, run: Callable[[int], None]) -> None:
        """`run` for every size, in a new order each time; a first round warms up and is not recorded."""
        for number in range(repeats + 1):
            self.recording = number > 0
            for size in self.random.sample(list(sizes), len(sizes)):
                run(size)
        self.recording = True

    def _wait(self) -> None:
        if self.vmm.device.type == "cuda":
            torch.cuda.synchronize(self.vmm.device)


def bench_mapping(bench: Bench, sizes: Sequence[int], repeats: int) -> None:
    """Map, first touch and unmap; of frames that follow each other, and of every second frame."""
    vmm = bench.vmm
    area = vmm.reserve(max(sizes), "bench")
    neighbours = vmm.create_frames(2 * max(sizes))
    kinds: dict[str, Sequence[Frame]] = {"neighbours": neighbours[: max(sizes)], "scattered": neighbours[::2]}

    def run(count: int) -> None:
        for kind, frames in kinds.items():
            span = Span(area, 0, count)
            with bench.timed(f"map ({kind})", count):
                vmm.map(span, frames[:count])
            tensor = vmm.tensor(area, 0, count * vmm.frame_bytes)
            with bench.timed(f"first write ({kind})", count):
                tensor.zero_()
            del tensor
            with bench.timed(f"unmap ({kind})", count):
                vmm.unmap(span)

    bench.rounds(sizes, repeats, run)
    vmm.release(area)
    vmm.destroy_frames(neighbours)


def make_layer(size_bytes: int, device: torch.device) -> nn.Module:
    """A module with `size_bytes` of parameters in bf16."""
    layer = nn.Module()
    small = SMALL_TENSORS * SMALL_ELEMENTS
    large = (size_bytes // 2 - small) // LARGE_TENSORS
    for number in range(LARGE_TENSORS + SMALL_TENSORS):
        elements = large if number < LARGE_TENSORS else SMALL_ELEMENTS
        data = torch.randint(-9, 9, (elements,), device=device, dtype=torch.int16).view(torch.bfloat16)
        layer.register_parameter(f"weight_{number}", nn.Parameter(data, requires_grad=False))
    return layer


def bench_layers(bench: Bench, sizes: Sequence[int], repeats: int) -> None:
    """Drop and restore of a layer that fills the given number of frames."""
    pool = FramePool(bench.vmm, "bench")
    model = nn.ModuleList(make_layer(frames * bench.vmm.frame_bytes, bench.vmm.device) for frames in sizes)
    parameters = LayerParameters(pool)
    reports = parameters.adopt(model, list(model))
    numbers = {report.frames: report.layer for report in reports}
    source = BufferSource({number: parameters.region(number).clone() for number in numbers.values()})

    def run(frames: int) -> None:
        with bench.timed("drop layer", frames):
            parameters.drop(numbers[frames])
        with bench.timed("restore layer (copy, checksum)", frames):
            parameters.restore(numbers[frames], source)

    bench.rounds(sorted(numbers), repeats, run)
    for number in numbers.values():
        parameters.drop(number)
    pool.remove_frames(pool.free_frames)


def bench_kv(bench: Bench, sizes: Sequence[int], repeats: int, layers: int, row_bytes: int) -> int:
    """Growth and shrinkage of the KV cache of `layers` layers, K and V. Returns tokens per frame of one
    buffer."""
    buffers = [KvBuffer(layer, kind, row_bytes) for layer in range(layers) for kind in ("k", "v")]
    space = plan_slot_space(buffers, bench.vmm.frame_bytes, 1, 2, 1 << 20)
    pool = FramePool(bench.vmm, "bench")
    granules = sorted({1, 2} | {max(1, frames // (2 * layers)) for frames in sizes})
    pool.add_frames(2 * layers * space.granule_slots * row_bytes // bench.vmm.frame_bytes * (max(granules) + 1))
    kv = ElasticKv(pool, space, buffers, 0)

    def run(count: int) -> None:
        frames = count * kv.frames_per_granule
        with bench.timed("grow KV (map, zero)", frames):
            kv.grow(count)
        with bench.timed("shrink KV", frames):
            kv.shrink(count)

    bench.rounds(granules, repeats, run)
    return space.granule_slots


def throughput_gb_per_s(bench: Bench, size_bytes: int, repeats: int) -> dict[str, float]:
    """Median speed of the checksum and of a copy over a mapped region."""
    frames = -(-size_bytes // bench.vmm.frame_bytes)
    area = bench.vmm.reserve(frames, "speed")
    span = Span(area, 0, frames)
    created = bench.vmm.create_frames(frames)
    bench.vmm.map(span, created)
    region = bench.vmm.tensor(area, 0, frames * bench.vmm.frame_bytes).fill_(7)
    other = region.clone()
    for _ in range(repeats):
        with bench.timed("checksum", frames):
            checksum(region)
        with bench.timed("copy", frames):
            region.copy_(other)
    size = region.numel()
    del region
    bench.vmm.unmap(span)
    bench.vmm.release(area)
    bench.vmm.destroy_frames(created)
    return {name: size / bench.series.pop(name).percentile_us(frames, 50) / 1e3 for name in ("checksum", "copy")}


def reservation_us(vmm: VmmBackend, size_bytes: int) -> float:
    started = time.perf_counter()
    area = vmm.reserve(size_bytes // vmm.frame_bytes, "reservation")
    seconds = time.perf_counter() - started
    vmm.release(area)
    return 1e6 * seconds


def print_series(series: dict[str, Series]) -> None:
    head = " ".join(f"{f'P{percent}':>10}" for percent in PERCENTILES)
    for name, each in series.items():
        print(f"\n{name}\n  {'frames':>8} {head}   (us)")
        for frames in sorted(each.samples_s):
            row = " ".join(f"{each.percentile_us(frames, percent):10.1f}" for percent in PERCENTILES)
            print(f"  {frames:8d} {row}")
        for percent in (50, 90):
            line = each.line(percent)
            print(f"  P{percent}: {line.fixed_us:.1f} us + {line.per_frame_us:.3f} us per frame")


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, VmmBackend]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("host", "cuda"), required=True)
    parser.add_argument("--frame-bytes", type=int, default=2 << 20, help="default: %(default)s")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="samples per size; default: %(default)s")
    parser.add_argument("--kv-layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--kv-row-bytes", type=int, default=2048, help="K of one token; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="order of the operations; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write all samples and lines here")
    parsed = parser.parse_args(arguments)
    if len(set(parsed.frames)) < 2 or min(parsed.frames) < 1:
        parser.error(f"--frames {parsed.frames}: at least two different positive numbers are needed to fit a line")
    for name in ("repeats", "kv_layers", "kv_row_bytes"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        return parsed, make_backend(parsed.backend, parsed.frame_bytes)
    except ConfigurationError as error:
        parser.error(str(error))


def make_backend(name: str, frame_bytes: int) -> VmmBackend:
    if name == "host":
        return MemfdVmm(frame_bytes)
    return CudaVmm(torch.cuda.current_device() if torch.cuda.is_available() else 0, frame_bytes)


def main(arguments: Sequence[str]) -> None:
    parsed, vmm = parse_arguments(arguments)
    bench = Bench(vmm, parsed.seed)
    reserved_us = reservation_us(bench.vmm, 256 << 30)
    bench_mapping(bench, parsed.frames, parsed.repeats)
    bench_layers(bench, parsed.frames, parsed.repeats)
    slots = bench_kv(bench, parsed.frames, parsed.repeats, parsed.kv_layers, parsed.kv_row_bytes)
    speeds = throughput_gb_per_s(bench, max(parsed.frames) * parsed.frame_bytes, parsed.repeats)
    print(f"backend {parsed.backend}, frames of {parsed.frame_bytes} bytes, {parsed.repeats} samples per size")
    print(f"reserving 256 GiB: {reserved_us:.0f} us")
    print_series(bench.series)
    print(
        f"\nKV: one granule is {slots} tokens in {2 * parsed.kv_layers} buffers of {parsed.kv_row_bytes} bytes a token"
    )
    for name, speed in speeds.items():
        print(f"{name}: {speed:.2f} GB/s")
    if parsed.json is not None:
        lines = {
            name: {f"p{percent}": asdict(series.line(percent)) for percent in (50, 90)}
            for name, series in bench.series.items()
        }
        samples = {name: series.samples_s for name, series in bench.series.items()}
        result = {"backend": parsed.backend, "frame_bytes": parsed.frame_bytes, "reserve_256_gib_us": reserved_us}
        result |= {"gb_per_s": speeds, "kv_granule_tokens": slots, "lines": lines, "samples_s": samples}
        parsed.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
