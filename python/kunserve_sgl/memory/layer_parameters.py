"""The parameters of the decoder layers, one region of frames for each layer: moved in, dropped, restored.

A resident layer's tensors are views into its region. Dropping a layer gives each of them an empty tensor,
makes calls of the layer's modules fail with LayerDroppedError, and then takes the frames away; the region
stays reserved, so that a restored layer has its old addresses, which captured graphs rely on. The guard costs
nothing while a layer is resident: it is a forward hook that exists only while the layer is dropped.

Two things are beyond the guard, and must not be done while a layer is dropped: replaying a captured graph
that contains the layer, and using the address of a tensor that was noted earlier.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kunserve_sgl.memory.checksum import Checksum, running_checksum
from kunserve_sgl.memory.errors import ChecksumMismatchError, LayerStateError, ViewInUseError
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_region import LayerRegion
from kunserve_sgl.memory.layer_scan import KeptOutTensor, LayerContents, SelectionRules, scan_layers
from kunserve_sgl.memory.layer_sources import LayerSource, RestoreTarget
from kunserve_sgl.memory.region_layout import lay_out
from kunserve_sgl.memory.storage import tensor_at
from kunserve_sgl.memory.virtual_range import Fence, Frame, LayerSpan, Span


class LayerState(enum.Enum):
    """Says whether a layer can run: RESTORING has memory, but not yet all of its bytes."""

    RESIDENT = "resident"
    DROPPED = "dropped"
    RESTORING = "restoring"


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Says what one layer occupies. `lost_bytes` is the part of its frames that holds no tensor."""

    layer: int
    frames: int
    tensor_bytes: int
    lost_bytes: int
    checksum: Checksum
    kept_out: tuple[KeptOutTensor, ...]


@dataclass(slots=True, eq=False)
class _Layer:
    region: LayerRegion
    checksum: Checksum
    state: LayerState = LayerState.RESIDENT

    @property
    def span(self) -> LayerSpan:
        return LayerSpan(self.region.layer, self.region.span)


class LayerParameters:
    """Owns the regions of all decoder layers of one model. Every operation happens entirely or not at all."""

    def __init__(self, pool: FramePool) -> None:
        self._pool = pool
        self._layers: dict[int, _Layer] = {}
        self._scan: Callable[[], Sequence[LayerContents]] = tuple

    def adopt(
        self,
        model: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        rules: SelectionRules | None = None,
        checksums: Sequence[Checksum] | None = None,
    ) -> tuple[LayerReport, ...]:
        """Moves the parameters of every layer into regions of the pool, and lets go of their old memory.

        `layers[i]` is decoder layer i of `model`, loaded and re-packed. Frames that the pool lacks are
        created, one layer at a time, so that at most one layer exists twice. Raises StaleReferenceError where
        something outside the layer holds a parameter's old memory, OutOfMemoryError, MappingFailedError; the
        layer in question is then as it was, and the layers before it are adopted.

        With `checksums`, one for each of the layers, these have not been loaded: what is in their memory is forgotten,
        and they are dropped, with as many frames free as they take. Restoring brings in the bytes with those checksums.
        """
        if self._layers:
            raise LayerStateError("the layers were adopted already")
        device = self._pool.vmm.device
        self._scan = partial(scan_layers, model, layers, device, rules or SelectionRules())
        for contents in self._scan():
            if contents.groups and checksums is not None:
                self._layers[contents.layer] = self._adopt_empty(contents, checksums[contents.layer])
            elif contents.groups:
                self._layers[contents.layer] = self._adopt_layer(contents)
            if device.type == "cuda":
                # The old memory goes back to the driver, which is where frames come from.
                torch.cuda.empty_cache()
        if checksums is not None:  # when all of the old memory has gone back
            for entry in self._layers.values():
                self._pool.add_frames(entry.region.layout.frame_count, in_one_piece=True)
        return tuple(self.report(layer) for layer in self._layers)

    def report(self, layer: int) -> LayerReport:
        """Says what a layer occupies when it is resident. Raises LayerStateError where it has no region."""
        entry = self._entry(layer)
        layout = entry.region.layout
        return LayerReport(
            layer=layer,
            frames=layout.frame_count,
            tensor_bytes=sum(layout.sizes_bytes),
            lost_bytes=layout.lost_bytes,
            checksum=entry.checksum,
            kept_out=entry.region.contents.kept_out,
        )

    def size_bytes(self, layer: int) -> int:
        """Returns the bytes of a layer's region that are used, as `region` has. Raises LayerStateError where it has no
        region."""
        return self._entry(layer).region.layout.used_bytes

    def state(self, layer: int) -> LayerState:
        """Tells whether a layer is resident, dropped or being restored. Raises LayerStateError where it has no
        region."""
        return self._entry(layer).state

    def tensor_names(self, layer: int) -> tuple[str, ...]:
        """Returns the names of the tensors in a layer's region. Raises LayerStateError where it has none."""
        return self._entry(layer).region.tensor_names

    def span(self, layer: int) -> Span:
        """Returns the positions of a layer's region, mapped or not. Raises LayerStateError where it has none."""
        return self._entry(layer).region.span

    def frames_of(self, layer: int) -> tuple[Frame, ...]:
        """Returns the frames of a resident layer's region, for lending them; see `BorrowedRegion`. The layer cannot be
        dropped while they are lent. Raises LayerStateError."""
        return self._pool.vmm.frames_at(self._entry(layer, LayerState.RESIDENT).region.span)

    def region(self, layer: int) -> torch.Tensor:
        """Returns a uint8 tensor (used bytes,) over a resident layer, for sending it. The layer cannot be dropped while
        the tensor lives. Raises LayerStateError."""
        return self._entry(layer, LayerState.RESIDENT).region.bytes()

    def lent_bytes(self, layer: int) -> torch.Tensor:
        """Returns a uint8 tensor (used bytes,) over a resident layer whose frames are lent, for other threads to read.
        It does not keep them there: nobody may use it when the loan has ended. Raises LayerStateError."""
        region = self._entry(layer, LayerState.RESIDENT).region
        return tensor_at(region.virtual_range.address, region.layout.used_bytes, self._pool.vmm.device)

    def verify(self, layer: int) -> None:
        """Raises ChecksumMismatchError where a resident layer is not what was loaded: something writes to it."""
        self._require_checksum(self._entry(layer, LayerState.RESIDENT), "in memory")

    def renew_checksum(self, layer: int) -> Checksum:
        """Takes a resident layer's bytes as the right ones from now on, after its weights were changed on
        purpose. Raises LayerStateError where a tensor was replaced instead of written to."""
        entry = self._entry(layer, LayerState.RESIDENT)
        entry.region.require_in_place()
        entry.checksum = entry.region.checksum()
        return entry.checksum

    def require_droppable(self, layer: int) -> None:
        """Raises what `drop` would raise for what is known before it: LayerStateError, ViewInUseError. Changes nothing
        that anybody would notice. Views of the layer that its modules have made since it moved in are found here, and
        come and go with it from now on."""
        entry = self._entry(layer, LayerState.RESIDENT)
        entry.region.require_in_place()
        for reason in self._held_elsewhere([entry.region]):
            raise ViewInUseError(reason)

    def undroppable(self, layers: Iterable[int]) -> list[str]:
        """Returns what `require_droppable` would say of those of `layers` that are resident. It costs one scan of the
        model at most, however many there are."""
        reasons, regions = [], []
        for layer in layers:
            try:
                entry = self._entry(layer)
                if entry.state is LayerState.RESIDENT:
                    entry.region.require_in_place()
                    regions.append(entry.region)
            except LayerStateError as error:
                reasons.append(str(error))
        return reasons + self._held_elsewhere(regions)

    def drop(self, layer: int, after: Iterable[Fence] | None = None) -> None:
        """Unmaps a resident layer; its frames become free. `after` as in `VmmBackend.unmap`.

        Raises LayerStateError, also where a tensor was given other memory since it moved in; ViewInUseError
        where something else holds a view of the layer; LedgerError where its frames are lent;
        MappingFailedError. The layer is then resident and usable.
        """
        entry = self._entry(layer, LayerState.RESIDENT)
        self.require_droppable(layer)
        try:
            entry.region.detach()
            self._unmap(entry, after)
        except BaseException:
            entry.region.attach()
            raise
        entry.state = LayerState.DROPPED

    def restore(self, layer: int, source: LayerSource) -> None:
        """Brings a dropped layer back at its old addresses, with bytes from `source`.

        Raises PoolFullError, RestoreSourceError, ChecksumMismatchError; the layer is then still dropped and
        its frames are free. Where the source kept a tensor of a failed restore, raises ViewInUseError as
        well, and `abort_restore` has to follow.
        """
        for _ in self.restoring(layer, source, part_bytes=sys.maxsize):
            pass

    def restoring(self, layer: int, source: LayerSource, part_bytes: int) -> Generator[None, None, None]:
        """Does what `restore` does, about `part_bytes` between two yields: copied, and read for the checksum while they
        are at hand. What the device has been given to do is finished then. Until it has ended, the layer cannot be
        used; closed before, it takes back what it has done."""
        target = self.begin_restore(layer)
        found, done = running_checksum(target.region.device), 0
        try:
            with contextlib.closing(source.fill_in_parts(target, part_bytes)) as parts:
                for end in parts:
                    if done == end:
                        self._wait()
                        yield
                    while done < end:
                        stop = min(end, done + part_bytes)
                        found.update(target.region[done:stop])
                        done = stop
                        self._wait()
                        yield
        except BaseException as error:
            # The frames of the failed call hold the target's tensors, which would keep the region mapped.
            _clear_frames(error)
            del target
            self.abort_restore(layer)
            raise
        del target
        self.finish_restore(layer, found=found.result())

    def begin_restore(self, layer: int) -> RestoreTarget:
        """Maps a dropped layer's region, to be filled part by part; the model cannot use it yet. Raises
        LayerStateError, PoolFullError, MappingFailedError."""
        entry = self._entry(layer, LayerState.DROPPED)
        self._pool.map_parameters([entry.span], in_one_piece=True)
        entry.state = LayerState.RESTORING
        entry.region.zero_gaps()
        return RestoreTarget(layer, entry.region.bytes(), entry.region.tensors())

    def finish_restore(self, layer: int, found: Checksum | None = None) -> None:
        """Proves the bytes, all of which have been written, and lets the model use the layer again. Nothing may hold
        the target any more. `found` is the checksum of the bytes where it has been computed.

        Raises ChecksumMismatchError; the layer is then dropped again and its frames are free.
        """
        entry = self._entry(layer, LayerState.RESTORING)
        try:
            self._require_checksum(entry, "as restored", found)
        except ChecksumMismatchError:
            self.abort_restore(layer)
            raise
        entry.region.attach()
        entry.state = LayerState.RESIDENT

    def abort_restore(self, layer: int) -> None:
        """Gives the frames of a layer that was being restored back to the pool. Raises ViewInUseError while
        the target, or a tensor of it, is held; the layer then waits to be aborted again."""
        entry = self._entry(layer, LayerState.RESTORING)
        self._unmap(entry, None)
        entry.state = LayerState.DROPPED

    def _adopt_layer(self, contents: LayerContents) -> _Layer:
        vmm = self._pool.vmm
        layout = lay_out([group.size_bytes for group in contents.groups], vmm.frame_bytes)
        missing = layout.frame_count - self._pool.free_frames
        if missing > 0:
            self._pool.add_frames(missing, in_one_piece=True)
        virtual_range = vmm.reserve(layout.frame_count, f"parameters of layer {contents.layer}")
        region = LayerRegion(vmm, contents, layout, virtual_range)
        span = LayerSpan(contents.layer, region.span)
        try:
            self._pool.map_parameters([span], in_one_piece=True)
            try:
                return _Layer(region, region.move_in())
            except BaseException as error:
                _clear_frames(error)
                self._pool.unmap_parameters([span])
                raise
        except BaseException:
            vmm.release(virtual_range)
            raise

    def _adopt_empty(self, contents: LayerContents, expected: Checksum) -> _Layer:
        vmm = self._pool.vmm
        layout = lay_out([group.size_bytes for group in contents.groups], vmm.frame_bytes)
        virtual_range = vmm.reserve(layout.frame_count, f"parameters of layer {contents.layer}")
        region = LayerRegion(vmm, contents, layout, virtual_range)
        try:
            region.forget_old()
        except BaseException:
            vmm.release(virtual_range)
            raise
        return _Layer(region, expected, LayerState.DROPPED)

    def _held_elsewhere(self, regions: Sequence[LayerRegion]) -> list[str]:
        """Says why they cannot be taken away, for each of `regions` whose memory something holds that its modules do
        not hold."""

        def held() -> list[tuple[LayerRegion, list[str]]]:
            return [(region, names) for region in regions if (names := region.held_elsewhere())]

        found = held()
        if found:
            self._bind_late()
            found = held()
        # The view may be garbage in a reference cycle, such as an old traceback; only then another look.
        if found and gc.collect():
            found = held()
        return [
            f"layer {region.layer}: the memory of {', '.join(names)} is held by something that the layer's modules do "
            "not hold, so it cannot be taken away"
            for region, names in found
        ]

    def _bind_late(self) -> None:
        for contents in self._scan():
            entry = self._layers.get(contents.layer)
            if entry is not None and entry.state is LayerState.RESIDENT:
                entry.region.bind_late(contents)

    def _unmap(self, entry: _Layer, after: Iterable[Fence] | None) -> None:
        try:
            self._pool.unmap_parameters([entry.span], after)
        except ViewInUseError:
            # The view may be garbage in a reference cycle, such as an old traceback; only then a second try.
            if not gc.collect():
                raise
            self._pool.unmap_parameters([entry.span], after)

    def _wait(self) -> None:
        if self._pool.vmm.device.type == "cuda":
            torch.cuda.current_stream(self._pool.vmm.device).synchronize()

    def _require_checksum(self, entry: _Layer, where: str, found: Checksum | None = None) -> None:
        found = entry.region.checksum() if found is None else found
        if found != entry.checksum:
            raise ChecksumMismatchError(
                f"layer {entry.region.layer} {where} has checksum {found}; at load it was {entry.checksum}"
            )

    def _entry(self, layer: int, state: LayerState | None = None) -> _Layer:
        entry = self._layers.get(layer)
        if entry is None:
            raise LayerStateError(f"layer {layer} has no region; there are regions for {sorted(self._layers)}")
        if state is not None and entry.state is not state:
            raise LayerStateError(f"layer {layer} is {entry.state.value}; it must be {state.value}")
        return entry


def _clear_frames(error: BaseException | None) -> None:
    """Lets go of the local variables of finished calls that an error and its causes keep alive."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
