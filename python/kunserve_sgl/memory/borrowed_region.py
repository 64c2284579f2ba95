"""The region of a layer at another replica, mapped here for as long as the layer is restored from it."""

from __future__ import annotations

from collections.abc import Generator, Iterable

from typing_extensions import override

from kunserve_sgl.memory.errors import RestoreSourceError
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_sources import LentRegion, RestoreTarget, copy_in_parts
from kunserve_sgl.memory.virtual_range import Fence, LayerSpan, Span


class BorrowedRegion(LentRegion):
    """Restores one layer from the frames that `LayerParameters.frames_of` gave at `owner`.

    The addresses are of no other use and are given back with the loan. It does not matter whether the owner still
    lives: its memory stays as long as it is mapped here, and the checksum proves the bytes.
    """

    def __init__(self, pool: FramePool, owner: str, loan_id: int, export: FrameExport, layer: int) -> None:
        """Maps the frames of loan `loan_id` of `owner`. `export` stays the caller's to close. Raises as
        `FrameLoans.borrow`; then nothing is kept."""
        self._pool = pool
        self.owner = owner
        self._loan_id = loan_id
        self.layer = layer
        label = f"parameters of layer {layer} at {owner}"
        self._range = pool.vmm.reserve(export.frame_count, label)
        try:
            pool.loans.borrow(owner, loan_id, export, self._spans)
        except BaseException:
            pool.vmm.release(self._range)
            raise
        self._closed = False

    @property
    @override
    def name(self) -> str:
        return self._range.label

    @override
    def fill_in_parts(self, target: RestoreTarget, part_bytes: int) -> Generator[int, None, None]:
        self.require_layer(target)
        size_bytes = target.region.numel()
        frames = -(-size_bytes // self._pool.vmm.frame_bytes)
        if frames != self._range.frame_count:
            raise RestoreSourceError(f"{self._range.label}: {self._range.frame_count} frames, not {frames}")
        yield from copy_in_parts(target.region, self._pool.vmm.tensor(self._range, 0, size_bytes), part_bytes)

    @override
    def close(self, after: Iterable[Fence] | None = None) -> None:
        """Returns the loan and gives the addresses back."""
        if self._closed:
            return
        self._pool.loans.return_loan(self.owner, self._loan_id, after)
        self._closed = True
        self._pool.vmm.release(self._range)

    @property
    def _spans(self) -> list[LayerSpan]:
        return [LayerSpan(self.layer, Span(self._range, 0, self._range.frame_count))]
