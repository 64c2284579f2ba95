"""What a source of a dropped layer's bytes is, and the plainest one: another buffer."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
from typing_extensions import override

from kunserve_sgl.memory.errors import RestoreSourceError
from kunserve_sgl.memory.virtual_range import Fence


@dataclass(frozen=True, slots=True, eq=False)
class RestoreTarget:
    """Gives the memory of a layer that waits for its bytes.

    `region` is a uint8 tensor (used bytes,) over all of them; gaps between tensors are zero and stay so.
    `tensors` maps each tensor's dotted name within the layer to a tensor of its shape and strides over its
    part of the region. Nothing of it may be kept once `fill` returns: a tensor that lives on keeps the memory
    mapped.
    """

    layer: int
    region: torch.Tensor
    tensors: Mapping[str, torch.Tensor]


class LayerSource(Protocol):
    """Supplies the bytes of a dropped layer."""

    def fill(self, target: RestoreTarget) -> None:
        """Writes every tensor of the layer. The writing is finished on the current stream when this returns.
        Raises RestoreSourceError where the source has no such layer."""
        ...

    def fill_in_parts(self, target: RestoreTarget, part_bytes: int) -> Generator[int, None, None]:
        """Does what `fill` does, about `part_bytes` at a time. It yields after each part how many bytes of the region
        are written, from its start on: none before the end where it writes in another order. A source that cannot do it
        in parts does all in the first."""
        self.fill(target)
        yield target.region.numel()


class PartedSource(LayerSource, Protocol):
    """Is a source that supplies a layer in parts, and at once as one part."""

    @override
    def fill(self, target: RestoreTarget) -> None:
        for _ in self.fill_in_parts(target, target.region.numel()):
            pass


class LentRegion(PartedSource, Protocol):
    """Is the region of a layer at a peer that has lent it, however it is read."""

    owner: str
    layer: int

    def require_layer(self, target: RestoreTarget) -> None:
        """Raises RestoreSourceError where `target` is another layer."""
        if target.layer != self.layer:
            raise RestoreSourceError(f"{self.name} cannot be the source of layer {target.layer}")

    @property
    def name(self) -> str:
        """Says to people whose memory this is."""
        ...

    def close(self, after: Iterable[Fence] | None = None) -> None:
        """Ends the use of the loan here; tell the owner afterwards. `after` is as in `VmmBackend.unmap`. Closing twice
        is allowed. Raises MappingFailedError, with nothing changed."""
        ...

    def __enter__(self) -> LentRegion:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def copy_in_parts(target: torch.Tensor, source: torch.Tensor, part_bytes: int) -> Generator[int, None, None]:
    """Copies `source` to `target`, uint8 (size,) each, and yields as `LayerSource.fill_in_parts`."""
    for start in range(0, target.numel(), part_bytes):
        stop = min(start + part_bytes, target.numel())
        target[start:stop].copy_(source[start:stop])
        yield stop


class BufferSource(PartedSource):
    """Copies from buffers that hold whole regions, such as a peer's region or what a transfer received."""

    def __init__(self, buffers: Mapping[int, torch.Tensor]) -> None:
        """`buffers` maps a layer to a uint8 tensor (used bytes,) with the layout of its region, on any
        device."""
        self._buffers = buffers

    @override
    def fill_in_parts(self, target: RestoreTarget, part_bytes: int) -> Generator[int, None, None]:
        buffer = self._buffers.get(target.layer)
        if buffer is None:
            raise RestoreSourceError(f"there is no buffer for layer {target.layer}")
        if buffer.dtype != torch.uint8 or buffer.shape != target.region.shape:
            raise RestoreSourceError(
                f"the buffer for layer {target.layer} is {buffer.dtype} {tuple(buffer.shape)}; "
                f"its region is uint8 {tuple(target.region.shape)}"
            )
        yield from copy_in_parts(target.region, buffer, part_bytes)
