"""All memory of one replica's rank that KunServe manages: frames, the parameters of layers, and the KV cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.addresses import host_copy_path
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.host_memory import free_host_bytes
from kunserve_sgl.memory.checksum import Checksum
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.errors import ChecksumMismatchError, LayerStateError, OutOfMemoryError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.host_copy import HostCopy
from kunserve_sgl.memory.kv_staging import KvStaging
from kunserve_sgl.memory.layer_parameters import LayerParameters, LayerState
from kunserve_sgl.memory.rest_checksum import rest_checksum
from kunserve_sgl.memory.slot_space import KvBuffer, SlotRange, granule_slots, plan_slot_space
from kunserve_sgl.memory.source_chain import NamedSource, restore_from, restoring_from
from kunserve_sgl.memory.virtual_range import Fence
from kunserve_sgl.memory.vmm import VmmBackend
from kunserve_sgl.policy.plan import Extent, KvPart, ReplicaFacts

logger = logging.getLogger(__name__)

CUDA_FRAME_BYTES = 2 << 20
CPU_FRAME_BYTES = 64 << 10


@dataclass(frozen=True)
class MemoryOptions:
    """Holds what the flags say of memory. `frame_bytes` and `max_slots` are None where the default is meant."""

    frame_bytes: int | None
    reserve_frames: int
    max_replicas: int
    max_slots: int | None


class ReplicaMemory:
    """Holds a rank's memory. Built when the model has been loaded; the KV cache is added when SGLang knows its size."""

    def __init__(
        self,
        options: MemoryOptions,
        device: str,
        device_index: int,
        replica: int,
        owner: str,
        vmm: VmmBackend | None = None,
    ) -> None:
        """`vmm` is the backend where it is not the one that `make_vmm` makes. Raises ConfigurationError."""
        if replica >= options.max_replicas:
            raise ConfigurationError(
                f"--kunserve-max-replicas {options.max_replicas}: there is a replica {replica}; "
                f"accepted: {replica + 1} or more"
            )
        self.options = options
        self.replica = replica
        self.vmm = vmm if vmm is not None else make_vmm(options.frame_bytes, device, device_index)
        self.frames = FramePool(self.vmm, owner)
        self.parameters = LayerParameters(self.frames)
        self._host_copy: HostCopy | None = None
        # Where layers come back from if not from a peer, in this order. Whoever builds this memory adds them.
        self.sources: list[NamedSource] = []
        self._kv: ElasticKv | None = None
        self._parameter_frames = 0
        # Slots whose KV of a layer is at home here, beside the base slots.
        self._hosted: dict[tuple[SlotRange, int], None] = {}
        # Memory aside for KV that is on its way to another home, or here.
        self._staged: dict[tuple[SlotRange, int], KvStaging] = {}

    def adopt_parameters(
        self,
        model: torch.nn.Module,
        layers: Sequence[torch.nn.Module],
        checksums: Sequence[Checksum] | None = None,
    ) -> None:
        """Moves every layer's parameters into frames, and sets the reserve aside. Cost: two passes over the
        parameter bytes (copy, checksum). With `checksums` the layers have not been loaded, and are to be restored."""
        started_at_s = time.perf_counter()
        reports = self.parameters.adopt(model, layers, checksums=checksums)
        self.layer_count = len(layers)
        self._rest = partial(rest_checksum, model, layers)
        self.rest_checksum = self._rest()
        self._parameter_frames = sum(report.frames for report in reports)
        if self.options.reserve_frames:
            # Before SGLang measures what is left for the KV cache, so that it counts them as taken.
            self.frames.add_frames(self.options.reserve_frames)
        tensor_bytes = sum(report.tensor_bytes for report in reports)
        lost_bytes = sum(report.lost_bytes for report in reports)
        logger.info(
            "KunServe: parameters of %d layers in %d frames of %d bytes, %.1f MiB, %.2f %% lost to rounding, %.2f s; "
            "%d frames in reserve",
            len(reports),
            self._parameter_frames,
            self.vmm.frame_bytes,
            tensor_bytes / 2**20,
            100 * lost_bytes / max(1, tensor_bytes + lost_bytes),
            time.perf_counter() - started_at_s,
            self.options.reserve_frames,
        )

    def require_parameters(self) -> None:
        """Raises ChecksumMismatchError where the parameters are not those that were taken as the right ones last. All
        layers are here."""
        for layer in range(self.layer_count):
            self.parameters.verify(layer)
        if self._rest() != self.rest_checksum:
            raise ChecksumMismatchError("embedding, norm or head have another checksum")

    def renew_parameters(self) -> None:
        """Takes new weights, which have been written on purpose, as the right ones from now on. A layer whose tensors
        were replaced, not written to, cannot be dropped any more; `LayerParameters.drop` refuses it."""
        for layer in range(self.layer_count):
            try:
                self.parameters.renew_checksum(layer)
            except LayerStateError as error:
                logger.error("KunServe: %s; it will not be dropped", error)
        self.rest_checksum = self._rest()
        try:
            self._keep_copies(range(self.layer_count))
        except OutOfMemoryError as error:
            logger.error("KunServe: the copy in host memory is not renewed: %s", error)

    def share_host_copy(self, options: KunserveOptions, rank: int) -> None:
        """Keeps a copy of all layers in host memory, together with the same rank of the other replicas of this
        deployment, as the first source beside a peer. Raises ConfigurationError."""
        started_at_s = time.perf_counter()
        sizes_bytes = {layer: self.parameters.size_bytes(layer) for layer in range(self.layer_count)}
        copy = HostCopy(host_copy_path(options, rank), sizes_bytes)
        missing_bytes, free_bytes = copy.missing_bytes, free_host_bytes()
        if missing_bytes > free_bytes:
            raise ConfigurationError(
                f"--kunserve-host-copy: the copy takes {missing_bytes} bytes more of host memory, of which "
                f"{free_bytes} are free; accepted where there is as much"
            )
        self._host_copy = copy
        try:
            written = self._keep_copies(range(self.layer_count))
        except OutOfMemoryError as error:
            raise ConfigurationError(f"--kunserve-host-copy: {error}") from error
        if self.vmm.device.type == "cuda":
            copy.pin()
        self.sources.insert(0, NamedSource("the copy in host memory", copy))
        logger.info(
            "KunServe: copy of the layers in host memory, %.1f MiB, %d of %d written here, %.2f s",
            copy.size_bytes / 2**20,
            written,
            self.layer_count,
            time.perf_counter() - started_at_s,
        )

    def _keep_copies(self, layers: Iterable[int]) -> int:
        """Sees to it that the copies of those of `layers` that are resident are the right ones, where there is a host
        copy; returns how many were written here. Raises OutOfMemoryError."""
        copy, written = self._host_copy, 0
        if copy is None:
            return 0
        resident = [layer for layer in layers if self.parameters.state(layer) is LayerState.RESIDENT]
        for _ in range(2):  # what another process was writing may not have come to its end
            for layer in resident:
                checksum = self.parameters.report(layer).checksum
                written += copy.keep(layer, self.parameters.region(layer), checksum)
        return written

    def report_undroppable(self) -> None:
        """Says in the log which resident layers could not be dropped now, and why. A drop that wants one is refused."""
        for reason in self.parameters.undroppable(range(self.layer_count)):
            logger.warning("KunServe: a drop would be refused: %s", reason)

    @property
    def kv(self) -> ElasticKv:
        """Returns the KV cache. Raises ConfigurationError before `create_kv`."""
        if self._kv is None:
            raise ConfigurationError("the KV cache has not been built yet")
        return self._kv

    def create_kv(self, buffers: Sequence[KvBuffer], page_size: int, base_tokens: int) -> ElasticKv:
        """Makes buffers for the whole slot space, with memory behind the sink and `base_tokens` slots of this
        replica."""
        frame_bytes = self.vmm.frame_bytes
        max_slots = self.options.max_slots
        if max_slots is None:
            # Enough for all frames this replica could ever turn into KV, if its layers lived on all the others.
            spare_frames = self._parameter_frames + self.options.reserve_frames
            row_bytes = sum(buffer.row_bytes for buffer in buffers)
            max_slots = base_tokens + self.options.max_replicas * spare_frames * frame_bytes // row_bytes
        elif max_slots < base_tokens:
            raise ConfigurationError(
                f"--kunserve-max-slots {max_slots}: the KV cache has {base_tokens} slots; accepted: those or more"
            )
        granule = granule_slots(buffers, frame_bytes, page_size)
        # A power of two of granules: replicas whose free memory differs a little at start agree on the space.
        granules = 1 << (-(-max_slots // granule) - 1).bit_length()
        space = plan_slot_space(buffers, frame_bytes, page_size, self.options.max_replicas, granules * granule)
        base_granules = -(-base_tokens // granule)
        frames = sum(granule * buffer.row_bytes // frame_bytes for buffer in buffers)
        self.frames.add_frames(frames)  # for the sink
        self._kv = ElasticKv(self.frames, space, buffers, self.replica)
        self._kv.create_base(base_granules)
        logger.info(
            "KunServe: KV cache of %d slots in %d frames; %d slots per granule of %d frames, addresses for %d slots",
            base_tokens,
            (1 + base_granules) * frames,
            granule,
            frames,
            space.slot_count,
        )
        self.frames.check()
        return self._kv

    def facts(self, row_count: int) -> ReplicaFacts:
        """Returns what planning has to know of this rank's memory. `row_count` is that of the request rows of all
        replicas."""
        one_granule = self.kv.space.slots_of(self.replica, 0, 1)
        layers = range(self.layer_count)
        return ReplicaFacts(
            replica=self.replica,
            frame_bytes=self.vmm.frame_bytes,
            granule_slots=self.kv.space.granule_slots,
            base_granules=self.kv.granules,
            max_granules=self.kv.space.replica_granules,
            free_frames=self.frames.free_frames,
            layer_frames=tuple(self.parameters.report(layer).frames for layer in layers),
            granule_frames=tuple(self.kv.frames_for(one_granule, [layer]) for layer in layers),
            row_count=row_count,
            least_granules=self.kv.least_granules,
        )

    # What a transition moves

    def slots(self, extent: Extent) -> SlotRange:
        """Returns the slots of an extent, this replica's or another's."""
        return self.kv.space.slots_of(extent.replica, extent.first_granule, extent.granules)

    def map_kv(self, part: KvPart) -> None:
        """Puts free frames behind slots whose KV is at home here, all of an extent: an extent comes and goes as a
        whole. Raises as `ElasticKv.map_hosted`."""
        slots = self.slots(part.extent)
        self.kv.map_hosted(slots, part.layers, in_one_piece=True)
        self._hosted.update(dict.fromkeys((slots, layer) for layer in part.layers))

    def unmap_kv(self, part: KvPart, after: Iterable[Fence] | None = None) -> None:
        """Frees the frames behind slots that nobody uses any more. `after` is as in `VmmBackend.unmap`. Raises as
        `ElasticKv.unmap_hosted`."""
        slots = self.slots(part.extent)
        self.kv.unmap_hosted(slots, part.layers, after)
        for layer in part.layers:
            del self._hosted[slots, layer]

    @property
    def hosted(self) -> tuple[tuple[SlotRange, int], ...]:
        """Lists the slots that `map_kv` has mapped, with the layer of each."""
        return tuple(self._hosted)

    def unmap_hosted(self, slots: SlotRange, layer: int) -> None:
        """Frees the frames behind slots that are in `hosted`; the device has finished what touches them. Raises as
        `ElasticKv.unmap_hosted`."""
        self.kv.unmap_hosted(slots, [layer], after=())
        del self._hosted[slots, layer]

    # KV of one layer of an extent that changes its home

    def take_home(self, extent: Extent, layer: int) -> None:
        """Puts free frames behind slots whose KV of a layer comes home here; it runs elsewhere. Raises as
        `ElasticKv.take_back` and `map_hosted`."""
        if self._is_base(extent):
            self.kv.take_back(layer)
        else:
            self.map_kv(KvPart(extent, (layer,)))

    def leave_home(self, extent: Extent, layer: int, after: Iterable[Fence] | None = None) -> None:
        """Frees the frames behind slots whose KV of a layer was at home here. `after` is as in `VmmBackend.unmap`.
        Raises as `ElasticKv.lay_away` and `unmap_hosted`."""
        if self._is_base(extent):
            self.kv.lay_away(layer, after)
        else:
            self.unmap_kv(KvPart(extent, (layer,)), after)

    def stage(self, extent: Extent, layer: int) -> None:
        """Takes free frames, at addresses of their own, for KV that comes home here, where it runs. Raises as
        `KvStaging.take_own`."""
        self._stage(self.slots(extent), layer, KvStaging.take_own)

    def stage_loan(self, slots: SlotRange, layer: int, owner: str, loan_id: int, export: FrameExport) -> None:
        """Maps another replica's frames, at addresses of their own, for KV that gets its home there. Raises as
        `KvStaging.borrow`."""
        self._stage(slots, layer, lambda staging: staging.borrow(owner, loan_id, export))

    def _stage(self, slots: SlotRange, layer: int, fill: Callable[[KvStaging], None]) -> None:
        staging = self.kv.stage(slots, layer)
        try:
            fill(staging)
        except BaseException:
            staging.close()
            raise
        self._staged[slots, layer] = staging

    def staging(self, extent: Extent, layer: int) -> KvStaging:
        """Returns what `stage` or `stage_loan` has made."""
        return self._staged[self.slots(extent), layer]

    def take_staged(self, extent: Extent, layer: int, after: Iterable[Fence] | None = None) -> None:
        """Lets the memory aside take its place behind the slots, where there is none. `after` is as in
        `VmmBackend.unmap`. Raises as `KvStaging.take_place`."""
        slots = self.slots(extent)
        staging = self._staged[slots, layer]
        if staging.loan is not None:
            staging.take_place(after)
        else:
            self.kv.take_staged(staging, slots, layer, after)
            if not self._is_base(extent):
                self._hosted[slots, layer] = None
        del self._staged[slots, layer]
        staging.close(after=())

    def unstage(self, slots: SlotRange, layer: int, after: Iterable[Fence] | None = None) -> None:
        """Frees the memory aside, or returns its loan. `after` is as in `VmmBackend.unmap`. Raises as
        `KvStaging.close`."""
        self._staged[slots, layer].close(after)
        del self._staged[slots, layer]

    @property
    def staged(self) -> tuple[tuple[SlotRange, int], ...]:
        """Lists the slots that have memory aside, with the layer of each."""
        return tuple(self._staged)

    def _is_base(self, extent: Extent) -> bool:
        return extent.replica == self.replica and extent.first_granule == 0

    @property
    def resident_layers(self) -> tuple[int, ...]:
        """Lists the layers whose parameters are here, ascending."""
        layers = range(self.layer_count)
        return tuple(layer for layer in layers if self.parameters.state(layer) is LayerState.RESIDENT)

    def drop_layer(self, layer: int, after: Iterable[Fence] | None = None) -> int:
        """Drops a layer's parameters; returns the bytes that became free. `after` is as in `VmmBackend.unmap`. Raises
        as `LayerParameters.drop`."""
        frames = self.parameters.report(layer).frames
        self.parameters.drop(layer, after)
        return frames * self.vmm.frame_bytes

    def restore_layer(self, layer: int, peer: NamedSource | None = None) -> str:
        """Brings a dropped layer back, from `peer` if it can, else from one of `sources`; returns the name of the one
        that it came from. Raises as `restore_from`."""
        taken = restore_from(self.parameters, layer, self._sources_with(peer))
        self._renew_copy(layer)
        return taken

    def restoring_layer(self, layer: int, peer: NamedSource | None, part_bytes: int) -> Generator[None, None, str]:
        """Does what `restore_layer` does part by part, as `LayerParameters.restoring`."""
        taken = yield from restoring_from(self.parameters, layer, self._sources_with(peer), part_bytes)
        self._renew_copy(layer)
        return taken

    def _sources_with(self, peer: NamedSource | None) -> list[NamedSource]:
        return self.sources if peer is None else [peer, *self.sources]

    def _renew_copy(self, layer: int) -> None:
        try:
            self._keep_copies([layer])
        except OutOfMemoryError as error:
            logger.error("KunServe: the copy in host memory still lacks layer %d: %s", layer, error)


def make_vmm(frame_bytes: int | None, device: str, device_index: int) -> VmmBackend:
    """Makes the backend for `device` ("cuda" or "cpu")."""
    if device == "cuda":
        from kunserve_sgl.memory.vmm_cuda import CudaVmm

        return CudaVmm(gpu=device_index, frame_bytes=frame_bytes or CUDA_FRAME_BYTES)
    if device == "cpu":
        from kunserve_sgl.memory.vmm_memfd import MemfdVmm

        return MemfdVmm(frame_bytes or CPU_FRAME_BYTES)
    raise ConfigurationError(f"--device {device}: KunServe manages memory of these devices only: cuda, cpu")


def named_replica(replica: int) -> str:
    """Names a replica as the books of frames do."""
    return f"replica {replica}"
