"""One decoder layer's region: how the model's tensors become views of it, and how they let go of it.

The tensor objects (parameters, buffers, attributes) stay those the model was built with and only their data
changes, so whoever holds the object sees every change.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from kunserve_sgl.memory.checksum import Checksum, checksum
from kunserve_sgl.memory.errors import LayerDroppedError, LayerStateError, StaleReferenceError
from kunserve_sgl.memory.layer_scan import LayerContents, StorageGroup
from kunserve_sgl.memory.region_layout import RegionLayout
from kunserve_sgl.memory.storage import holders, storage_id
from kunserve_sgl.memory.tensor_walk import FoundTensor
from kunserve_sgl.memory.virtual_range import Span, VirtualRange
from kunserve_sgl.memory.vmm import VmmBackend


@dataclass(frozen=True, slots=True, eq=False)
class _Placed:
    """Places a tensor of the model in one part of the region. Offsets and strides are in elements."""

    found: FoundTensor
    part: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class LayerRegion:
    """Binds the tensors of one layer to a virtual range. Whoever attaches has mapped the range."""

    def __init__(
        self, vmm: VmmBackend, contents: LayerContents, layout: RegionLayout, virtual_range: VirtualRange
    ) -> None:
        self._vmm = vmm
        self.contents = contents
        self.layout = layout
        self.virtual_range = virtual_range
        self._hooks: list[RemovableHandle] = []
        self._placed = tuple(
            _place(found, part, group.start_bytes)
            for part, group in enumerate(contents.groups)
            for found in group.tensors
        )
        self._late: tuple[_Placed, ...] = ()

    @property
    def layer(self) -> int:
        """Numbers the decoder layer whose region this is."""
        return self.contents.layer

    @property
    def span(self) -> Span:
        """Gives all positions of the region, mapped or not."""
        return Span(self.virtual_range, 0, self.layout.frame_count)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names the layer's tensors, each by its place in the layer."""
        return tuple(placed.found.name for placed in self._placed)

    def bytes(self) -> torch.Tensor:
        """Returns a uint8 tensor (used bytes,) over the mapped region."""
        return self._vmm.tensor(self.virtual_range, 0, self.layout.used_bytes)

    def checksum(self) -> Checksum:
        """Computes the checksum of the mapped region, gaps included. Whatever writes to it must be finished."""
        return checksum(self.bytes())

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Makes views with the shapes and strides of the layer's tensors, by name; the model's own are left alone."""
        parts = self._parts()
        return {placed.found.name: _view(parts[placed.part], placed) for placed in self._placed}

    def zero_gaps(self) -> None:
        """Zeroes what lies between the tensors: the checksum covers it, and fresh frames hold whatever was there
        before."""
        region = self.bytes()
        for offset, size in self.layout.gaps():
            region[offset : offset + size].zero_()

    def move_in(self) -> Checksum:
        """Copies the tensors' old memory into the region, binds them to it, lets go of the old memory, and
        returns the region's checksum.

        Raises StaleReferenceError where somebody else holds the old memory: a copy would stay, and its holder
        would not follow when the layer changes. The tensors then have their old memory.
        """
        region = self.bytes()
        self.zero_gaps()
        for group, offset in zip(self.contents.groups, self.layout.offsets_bytes, strict=True):
            region[offset : offset + group.size_bytes].copy_(_old_bytes(group))
        loaded = checksum(region)
        with self._keeping_old_data():
            self.attach()
        return loaded

    def forget_old(self) -> None:
        """Lets go of the tensors' old memory, and leaves them as `detach` does. Raises as `move_in`."""
        with self._keeping_old_data():
            self._empty()
        self._refuse_calls()

    def attach(self) -> None:
        """Lets the model's tensors be views of the region, and its modules be called."""
        parts = self._parts()
        for placed in (*self._placed, *self._late):
            placed.found.tensor.data = _view(parts[placed.part], placed)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def detach(self) -> None:
        """Leaves the model's tensors empty, and makes calls of its modules fail with LayerDroppedError."""
        self._refuse_calls()
        self._forget_lost()
        self._empty()

    def _empty(self) -> None:
        for placed in (*self._placed, *self._late):
            placed.found.tensor.data = torch.empty(0, dtype=placed.dtype, device=self._vmm.device)

    def _refuse_calls(self) -> None:
        message = f"decoder layer {self.layer} is dropped here; only a replica that hosts the layer can run it"

        def refuse(module: torch.nn.Module, arguments: Any) -> None:
            raise LayerDroppedError(message)

        for module in self.contents.modules:
            self._hooks.append(module.register_forward_pre_hook(refuse, prepend=True))

    def require_in_place(self) -> None:
        """Raises LayerStateError where a tensor was replaced: a drop would lose it, and a restore would bring
        its old bytes back."""
        for placed in self._placed:
            if not (placed.found.is_in_place and self._is_in_region(placed)):
                raise LayerStateError(
                    f"layer {self.layer}: {placed.found.name} was given other memory after it moved in"
                )

    def bind_late(self, contents: LayerContents) -> None:
        """Lets tensors that a later scan finds over the region come and go with it: views that the layer made when
        it ran, such as a cache of a weight in another dtype that is the weight's own."""
        parts = {storage_id(each.found.tensor): each.part for each in self._placed if self._is_in_region(each)}
        known = {id(placed.found.tensor) for placed in self._placed}
        self._late = tuple(
            _place(found, parts[storage_id(found.tensor)], 0)
            for group in contents.groups
            for found in group.tensors
            if id(found.tensor) not in known and storage_id(found.tensor) in parts
        )

    def held_elsewhere(self) -> list[str]:
        """Returns names of the layer's tensors over whose memory something else has a tensor too, so that it could not
        be unmapped. The layer is attached."""
        self._forget_lost()
        held = set(self._shared_parts([placed.found.tensor for placed in self._placed]))
        spans = [
            (start, start + size)
            for start, size in zip(self.layout.offsets_bytes, self.layout.sizes_bytes, strict=True)
        ]
        # Beside the parts there may be a view of the whole region, or one from before a drop that failed.
        views = Counter((view.start_bytes, view.stop_bytes) for view in self.virtual_range.live_views())
        for first, last in (views - Counter(spans)).elements():
            held.update(part for part, (start, stop) in enumerate(spans) if start < last and first < stop)
        return [self.contents.groups[part].name for part in sorted(held)]

    def _is_in_region(self, placed: _Placed) -> bool:
        expected = self.virtual_range.address + self.layout.offsets_bytes[placed.part]
        return placed.found.tensor.untyped_storage().data_ptr() == expected

    def _forget_lost(self) -> None:
        """Forgets those of the late tensors that were given other memory since: they are no concern of the region any
        more."""
        self._late = tuple(placed for placed in self._late if self._is_in_region(placed))

    def _parts(self) -> list[torch.Tensor]:
        """Makes one tensor, and so one storage, for each storage that the layer had: strides, offsets and sharing
        stay."""
        return [
            self._vmm.tensor(self.virtual_range, offset, size)
            for offset, size in zip(self.layout.offsets_bytes, self.layout.sizes_bytes, strict=True)
        ]

    @contextmanager
    def _keeping_old_data(self) -> Iterator[None]:
        """Puts the old data back if the block fails, or if an old storage is still held by others after it."""
        old = [placed.found.tensor.data for placed in self._placed]
        try:
            yield
            held = self._shared_parts(old)
            # It may be garbage in a reference cycle, left by the loader; only then a second look.
            if held and gc.collect():
                held = self._shared_parts(old)
            if held:
                names = [self.contents.groups[part].name for part in held]
                raise StaleReferenceError(
                    f"layer {self.layer}: the memory of {names} is held by something that is not found in the "
                    "layer's modules, so it cannot be moved"
                )
        except BaseException:
            for placed, data in zip(self._placed, old, strict=True):
                placed.found.tensor.data = data
            raise

    def _shared_parts(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """Finds the parts whose storages have more holders than the layer's own tensors. `tensors` are those now over
        the storages, one for each of `_placed`."""
        own = Counter(placed.part for placed in (*self._placed, *self._late))
        storages = {placed.part: each.untyped_storage() for placed, each in zip(self._placed, tensors, strict=True)}
        return [part for part, storage in storages.items() if holders(storage) > own[part]]


def _place(found: FoundTensor, part: int, start_bytes: int) -> _Placed:
    """Notes where a tensor lies within its part; `start_bytes` is the byte of the tensor's storage that is the first of
    the part."""
    tensor = found.tensor
    offset = int(tensor.storage_offset()) - start_bytes // tensor.element_size()
    strides = tuple(int(stride) for stride in tensor.stride())
    return _Placed(found, part, tensor.dtype, tensor.shape, strides, offset)


def _view(part: torch.Tensor, placed: _Placed) -> torch.Tensor:
    empty = torch.empty(0, dtype=placed.dtype, device=part.device)
    return empty.set_(part.untyped_storage(), placed.offset, placed.shape, placed.strides)


def _old_bytes(group: StorageGroup) -> torch.Tensor:
    """Returns a uint8 view of the bytes of a storage that move."""
    old = group.tensors[0].tensor
    empty = torch.empty(0, dtype=torch.uint8, device=old.device)
    return empty.set_(old.untyped_storage(), group.start_bytes, (group.size_bytes,), (1,))
