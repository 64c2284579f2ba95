"""The KV cache memory of one replica: frames behind its slots, which grow and shrink while it serves.

Memory at this replica lies
- behind all layers of the first granules of its own range: growth appends granules, shrinkage takes the last ones;
  a layer of these may be away, with its KV at home at another replica;
- behind some layers of further slots, its own or another replica's: hosted, mapped and unmapped by extent;
- behind some layers of another replica's slots, in frames of that replica: borrowed.

Who may use which slot is the allocator's business; this module only knows memory.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_loans import BorrowedLoan
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.kv_staging import KvStaging
from kunserve_sgl.memory.slot_space import KvBuffer, SlotRange, SlotSpace
from kunserve_sgl.memory.virtual_range import Fence, Frame, LayerSpan, Span, VirtualRange


class ElasticKv:
    """Spans buffers over the whole global slot space, with frames behind the sink, behind this replica's first slots,
    and behind hosted and borrowed ones.

    Growing by g granules costs `frames_per_granule * g` frames and as many map calls as there are buffers times the
    runs of frames that do not follow each other; new memory is set to zero, at memory speed.
    """

    def __init__(self, pool: FramePool, space: SlotSpace, buffers: Sequence[KvBuffer], replica: int) -> None:
        """Reserves address space and maps the sink. Raises PoolFullError, OutOfMemoryError."""
        self._pool = pool
        self._buffers = tuple(buffers)
        self.space = space
        self.replica = replica
        self._granules = 0
        self._whole_granules = 0
        self._hosted_slots = Counter[int]()
        self._away: set[int] = set()
        self._layers = frozenset(buffer.layer for buffer in self._buffers)
        frame_bytes = pool.vmm.frame_bytes
        self._ranges: dict[KvBuffer, VirtualRange] = {}
        for buffer in self._buffers:
            if space.granule_slots * buffer.row_bytes % frame_bytes:
                raise InvariantError(f"{buffer} has no whole frames per granule of {space.granule_slots} slots")
            frames = space.slot_count * buffer.row_bytes // frame_bytes
            self._ranges[buffer] = pool.vmm.reserve(frames, buffer.label)
        self._map(self._spans(space.sink, self._layers))

    @property
    def frames_per_granule(self) -> int:
        """Counts the frames that one granule takes in all buffers together."""
        frame_bytes = self._pool.vmm.frame_bytes
        return sum(self.space.granule_slots * buffer.row_bytes // frame_bytes for buffer in self._buffers)

    @property
    def granules(self) -> int:
        """Counts the granules of `slots`."""
        return self._granules

    @property
    def slots(self) -> SlotRange:
        """Gives the own slots with memory behind all layers, without the sink and without hosted ones."""
        return self.space.slots_of(self.replica, 0, self._granules)

    @property
    def mapped_bytes(self) -> Mapping[str, int]:
        """Gives the bytes of this replica's memory behind the buffers, by buffer name: the sink and hosted slots
        included, borrowed memory not."""
        total: dict[str, int] = {}
        for buffer in self._buffers:
            granules = 1 + (0 if buffer.layer in self._away else self._granules)
            own = granules * self.space.granule_slots + self._hosted_slots[buffer.layer]
            total[buffer.name] = total.get(buffer.name, 0) + own * buffer.row_bytes
        return total

    def grow(self, granules: int) -> SlotRange:
        """Maps free frames behind the next `granules` and returns their slots.

        Raises PoolFullError or MappingFailedError, AlreadyMappedError where hosted slots follow, InvariantError while a
        layer is away, and ConfigurationError where the reserved address space ends; then nothing has changed.
        """
        self._require_no_layer_away()
        added = self.space.slots_of(self.replica, self._granules, granules)
        self._map(self._spans(added, self._layers))
        self._granules += granules
        return added

    def create_base(self, granules: int) -> SlotRange:
        """Creates the memory of the first `granules`, zero, in one piece per buffer, and returns their slots: lending
        them takes a few calls and descriptors, however many they are. Raises OutOfMemoryError, MappingFailedError, and
        InvariantError where there are slots already."""
        if self._granules:
            raise InvariantError(f"the KV cache has {self._granules} granules already")
        added = self.space.slots_of(self.replica, 0, granules)
        spans = self._spans(added, self._layers)
        self._pool.create_kv(spans)
        for each in spans:
            self._pool.vmm.zero(each.span)
        self._granules = granules
        self._whole_granules = granules if self._pool.vmm.keeps_pieces_whole else 0
        return added

    @property
    def least_granules(self) -> int:
        """Counts the granules that `shrink` has to leave."""
        return max(1, self._whole_granules)

    def last_slots(self, granules: int) -> SlotRange:
        """Returns the slots that `shrink(granules)` would take. Raises InvariantError for more than there are."""
        if not 0 <= granules <= self._granules:
            raise InvariantError(f"{granules} granules cannot be taken from {self._granules}")
        return self.space.slots_of(self.replica, self._granules - granules, granules)

    def shrink(self, granules: int) -> SlotRange:
        """Frees the frames behind the last `granules` and returns their slots, which nobody may use any more.

        Raises LedgerError while a frame is lent, InvariantError while a layer is away, and MappingFailedError; then
        nothing has changed.
        """
        self._require_no_layer_away()
        taken = self.last_slots(granules)
        self._pool.unmap_kv(self._spans(taken, self._layers))
        self._granules -= granules
        return taken

    # Own slots whose KV of a layer is at home elsewhere

    @property
    def away(self) -> tuple[int, ...]:
        """Lists the layers in which `slots` have no memory here, ascending."""
        return tuple(sorted(self._away))

    def lay_away(self, layer: int, after: Iterable[Fence] | None = None) -> None:
        """Frees the frames behind `slots` in a layer. `after` is as in `VmmBackend.unmap`. Raises LedgerError while a
        frame is lent, NotMappedError where the layer is away, MappingFailedError; then nothing has changed."""
        self._pool.unmap_kv(self._spans(self.slots, [layer]), after)
        self._away.add(layer)

    def take_back(self, layer: int) -> None:
        """Puts free frames, set to zero, behind `slots` in a layer that is away, in the pieces in which they were.
        Raises PoolFullError, OutOfMemoryError, MappingFailedError; then nothing has changed."""
        whole = self.space.slots_of(self.replica, 0, self._whole_granules)
        rest = self.space.slots_of(self.replica, self._whole_granules, self._granules - self._whole_granules)
        pieces = self._spans(whole, [layer])
        self._map(pieces, in_one_piece=True)
        try:
            self._map(self._spans(rest, [layer]))
        except BaseException:
            self._pool.unmap_kv(pieces)
            raise
        self._away.remove(layer)

    def _require_no_layer_away(self) -> None:
        if self._away:
            raise InvariantError(f"the KV of layers {list(self.away)} is at home at another replica")

    # Memory beside the slots, for KV that comes from elsewhere

    def stage(self, slots: SlotRange, layer: int) -> KvStaging:
        """Makes a place aside for a layer of `slots`, with nothing in it yet. Raises OutOfMemoryError."""
        return KvStaging(self._pool, self._spans(slots, [layer]), slots.count)

    def take_staged(self, staging: KvStaging, slots: SlotRange, layer: int, after: Iterable[Fence] | None) -> None:
        """Lets this replica's frames in `staging`, which was made for these slots, take their place behind them. There
        is no memory behind them, as of a layer that is away. Raises as `KvStaging.take_place`."""
        staging.take_place(after)
        if slots == self.slots:
            self._away.remove(layer)
            # They are one piece now, whatever they were.
            self._whole_granules = self._granules if self._pool.vmm.keeps_pieces_whole else 0
        else:
            self._hosted_slots[layer] += slots.count

    # Slots of any replica, in some layers. `slots` begin and end at granules; the order of `layers` does not matter.

    def frames_for(self, slots: SlotRange, layers: Collection[int]) -> int:
        """Counts the frames that `slots` take in the buffers of `layers`."""
        return sum(each.span.count for each in self._spans(slots, layers))

    def map_hosted(self, slots: SlotRange, layers: Collection[int], *, in_one_piece: bool = False) -> None:
        """Puts free frames, set to zero, behind `slots` in the buffers of `layers`, which so have their KV home here;
        `in_one_piece` is as in `FramePool.map_kv`, for each buffer.

        Raises PoolFullError, AlreadyMappedError, OutOfMemoryError, MappingFailedError; then nothing has changed.
        """
        self._map(self._spans(slots, layers), in_one_piece=in_one_piece)
        for layer in set(layers):
            self._hosted_slots[layer] += slots.count

    def unmap_hosted(self, slots: SlotRange, layers: Collection[int], after: Iterable[Fence] | None = None) -> None:
        """Frees the frames behind slots that `map_hosted` mapped, or a part of them. `after` is as in
        `VmmBackend.unmap`.

        Raises NotMappedError, LedgerError where a frame is lent or borrowed, MappingFailedError, SplitPieceError for a
        part of a piece, and InvariantError for the sink and for what `shrink` takes; then nothing has changed.
        """
        for kept in (self.space.sink, self.slots):
            if slots.first < kept.stop and kept.first < slots.stop:
                raise InvariantError(f"{slots} overlap {kept}, which are not hosted but the replica's own")
        self._pool.unmap_kv(self._spans(slots, layers), after)
        for layer in set(layers):
            self._hosted_slots[layer] -= slots.count

    def frames_behind(self, slots: SlotRange, layers: Collection[int]) -> tuple[Frame, ...]:
        """Returns the frames behind `slots` in the buffers of `layers`, for lending: buffer by buffer in the order in
        which the buffers were given, which is the same at every replica, and by slot within each. `borrow` maps in this
        order. Raises NotMappedError."""
        frames = (self._pool.vmm.frames_at(each.span) for each in self._spans(slots, layers))
        return tuple(itertools.chain.from_iterable(frames))

    def borrow(
        self,
        owner: str,
        loan_id: int,
        export: FrameExport,
        parts: Sequence[tuple[SlotRange, Collection[int]]],
    ) -> BorrowedLoan:
        """Maps another replica's frames behind slots and layers. `export` has what `frames_behind` gives there for each
        part, one part after the other. `FrameLoans.return_loan` returns them, as a whole. Raises as
        `FrameLoans.borrow`."""
        spans = [span for slots, layers in parts for span in self._spans(slots, layers)]
        return self._pool.loans.borrow(owner, loan_id, export, spans)

    def tensor(self, buffer: KvBuffer, dtype: torch.dtype, row_shape: Sequence[int]) -> torch.Tensor:
        """Returns the whole buffer, (slots of everybody, *row_shape) of `dtype`. Only slots with memory may be touched:
        see `VmmBackend.virtual_tensor`. It begins with the sink, which always has memory; a part of it that does not
        is for no kernel, see `hole_at`."""
        size_bytes = self.space.slot_count * buffer.row_bytes
        flat = self._pool.vmm.virtual_tensor(self._ranges[buffer], 0, size_bytes)
        return flat.view(dtype).view(self.space.slot_count, *row_shape)

    def bytes_behind(self, slots: SlotRange, layer: int) -> list[torch.Tensor]:
        """Returns the bytes behind `slots` in a layer, uint8 (size,) for each of its buffers, in an order that is the
        same everywhere. Only where there is memory they may be touched, as those of `tensor`."""
        vmm = self._pool.vmm
        spans = [each.span for each in self._spans(slots, [layer])]
        return [
            vmm.virtual_tensor(span.virtual_range, span.start_bytes, span.count * vmm.frame_bytes) for span in spans
        ]

    def rows(self, layer: int) -> list[torch.Tensor]:
        """Returns the buffers of a layer as `bytes_behind` orders them, uint8 (slots of everybody, bytes of a slot);
        see `tensor`."""
        return [
            self.tensor(buffer, torch.uint8, (buffer.row_bytes,)) for buffer in self._buffers if buffer.layer == layer
        ]

    def differences(self, layer: int, slots: Iterable[SlotRange]) -> list[str]:
        """Says where memory is behind other slots of a layer's buffers than the sink and `slots`. It takes a pass over
        the frames of the layer."""
        wanted: dict[VirtualRange, set[int]] = {}
        for each in (self.space.sink, *slots):
            for span in self._spans(each, [layer]):
                wanted.setdefault(span.span.virtual_range, set()).update(span.span.positions)
        found = []
        for buffer_range, positions in wanted.items():
            there, label = buffer_range.frames.keys(), buffer_range.label
            if lacking := positions - there:
                found.append(f"{label}: there is no memory at {len(lacking)} frames, first at frame {min(lacking)}")
            if spare := there - positions:
                found.append(f"{label}: nobody wants the memory at {len(spare)} frames, first at frame {min(spare)}")
        return found

    def _spans(self, slots: SlotRange, layers: Collection[int]) -> list[LayerSpan]:
        if slots.first % self.space.granule_slots or slots.count % self.space.granule_slots:
            raise InvariantError(f"{slots} do not begin and end at granules of {self.space.granule_slots} slots")
        if unknown := set(layers) - self._layers:
            raise InvariantError(f"layers {sorted(unknown)} have no KV buffers")
        frame_bytes = self._pool.vmm.frame_bytes
        return [
            LayerSpan(
                buffer.layer,
                Span(
                    self._ranges[buffer],
                    slots.first * buffer.row_bytes // frame_bytes,
                    slots.count * buffer.row_bytes // frame_bytes,
                ),
            )
            for buffer in self._buffers
            if buffer.layer in layers
        ]

    def _map(self, spans: Sequence[LayerSpan], *, in_one_piece: bool = False) -> None:
        """Maps free frames and sets them to zero: they come with the bytes of their last use. Kernels multiply
        masked slots of a page by zero, and zero times a stray NaN would be NaN."""
        self._pool.map_kv(spans, in_one_piece=in_one_piece)
        try:
            for each in spans:
                self._pool.vmm.zero(each.span)
        except BaseException:
            self._pool.unmap_kv(spans)
            raise
