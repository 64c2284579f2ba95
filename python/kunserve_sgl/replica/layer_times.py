"""How long the layers take at this rank, and what follows for how far a segment goes at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

import torch

from kunserve_sgl.exchange.layer_clock import LayerClock
from kunserve_sgl.policy.cutting import ChunkCost, CostFit, slice_end
from kunserve_sgl.replica.batch_shape import BatchShape


class LayerTimes:
    """Measures own and others' layers together at one rank, and fits a cost model to them."""

    def __init__(self, device: torch.device, layer_count: int, decides: bool) -> None:
        """`decides` says whether this rank cuts batches; the others measure nothing."""
        self._layer_count = layer_count
        self._decides = decides
        self._clock = LayerClock(device)
        self._fit = CostFit()

    @property
    def cost(self) -> ChunkCost | None:
        """Gives the fitted model, over all layers; None until batches of different enough sizes have run."""
        return self._fit.cost

    def measure(self, shape: BatchShape, layers: int) -> AbstractContextManager[None]:
        """Takes the time of the block, which runs `layers` layers on a batch of that shape. Does not wait for the
        device."""
        return self._clock.measure(partial(self._note, shape, layers))

    def pace(self) -> None:
        """Waits until the device has at most the last measured block to do, so that what is called next starts soon."""
        self._clock.pace()

    def slice_end(self, start: int, end: int, shape: BatchShape) -> int:
        """Returns up to which layer [start, end) run before this rank looks for other work: `end` where that is not
        far."""
        return slice_end(start, end, self._layer_count, shape.amount, self._fit.cost)

    def _note(self, shape: BatchShape, layers: int, seconds: float) -> None:
        """Notes a measurement as if all layers were alike: if so many took that long, all take `layer_count / layers`
        times as long."""
        if self._decides:
            self._fit.add(shape.amount, seconds * self._layer_count / layers)
