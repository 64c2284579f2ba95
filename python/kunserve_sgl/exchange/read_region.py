"""The region of a layer at another replica, read by messages as the layer is restored from it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable

from typing_extensions import override

from kunserve_sgl.exchange.memory_reads import LoanReader, LoanSpan
from kunserve_sgl.memory.errors import RestoreSourceError, TransferError
from kunserve_sgl.memory.layer_sources import LentRegion, RestoreTarget
from kunserve_sgl.memory.virtual_range import Fence


class ReadRegion(LentRegion):
    """Restores one layer from what `reader` reads at `owner`, as long as that lives. It waits for it a moment at a
    time: a part may be none."""

    def __init__(self, owner: str, layer: int, reader: LoanReader, count: Callable[[int], None]) -> None:
        """`count` is told how many bytes have been read."""
        self.owner = owner
        self.layer = layer
        self._reader = reader
        self._count = count

    @property
    @override
    def name(self) -> str:
        return f"parameters of layer {self.layer} at {self.owner}"

    @override
    def fill_in_parts(self, target: RestoreTarget, part_bytes: int) -> Generator[int, None, None]:
        self.require_layer(target)
        before = 0
        try:
            for done in self._reader.transfer([LoanSpan(0, 0, target.region)], part_bytes):
                self._count(done - before)
                before = done
                yield done
        except TransferError as error:
            raise RestoreSourceError(str(error)) from error

    @override
    def close(self, after: Iterable[Fence] | None = None) -> None:
        self._reader.close()
