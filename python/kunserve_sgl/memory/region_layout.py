"""Where the tensors of one layer lie in its region of whole frames, and what rounding to frames costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What CUDA's own allocator guarantees, so kernels that rely on it keep working.
ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class RegionLayout:
    """Lays parts one after another, each at an aligned offset; `used_bytes` ends the last one, aligned. A part holds
    what was one storage of the layer."""

    offsets_bytes: tuple[int, ...]
    sizes_bytes: tuple[int, ...]
    used_bytes: int
    frame_count: int
    frame_bytes: int

    @property
    def region_bytes(self) -> int:
        """Gives the physical memory of the region, in whole frames."""
        return self.frame_count * self.frame_bytes

    @property
    def lost_bytes(self) -> int:
        """Gives the physical memory of the region that holds no tensor: gaps between parts and the end of the last
        frame."""
        return self.region_bytes - sum(self.sizes_bytes)

    def gaps(self) -> Iterable[tuple[int, int]]:
        """Yields offset and size in bytes of every gap before `used_bytes`."""
        starts = (*self.offsets_bytes[1:], self.used_bytes)
        for offset, size, following in zip(self.offsets_bytes, self.sizes_bytes, starts, strict=True):
            if offset + size < following:
                yield offset + size, following - offset - size


def lay_out(sizes_bytes: Sequence[int], frame_bytes: int) -> RegionLayout:
    """Places parts of the given sizes in order."""
    offsets, used_bytes = [], 0
    for size in sizes_bytes:
        offsets.append(used_bytes)
        used_bytes += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return RegionLayout(tuple(offsets), tuple(sizes_bytes), used_bytes, -(-used_bytes // frame_bytes), frame_bytes)
