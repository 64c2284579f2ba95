"""A model whose layers live in a pool, for the tests of layer parameters."""

from __future__ import annotations

import pytest
import torch
from layer_models import TOKENS, Decoder, tensors_of
from torch import nn

from cuda_model.driver import FakeBindings, make_fake_cuda
from kunserve_sgl.memory.errors import (
    LayerDroppedError,
)
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_parameters import LayerParameters, LayerState
from kunserve_sgl.memory.layer_sources import BufferSource
from kunserve_sgl.memory.virtual_range import LayerSpan, Span
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

LAYERS = 3


class AdoptedModel:
    """A model whose layers were adopted, what it answered before, and what its tensors were."""

    def __init__(self, bindings: FakeBindings | None) -> None:
        self.bindings = bindings
        self.pool = FramePool(MemfdVmm(16384) if bindings is None else make_fake_cuda(bindings), "replica 0")
        self.model = Decoder(LAYERS)
        self.layers = list(self.model.layers)
        self.before = self.model(TOKENS)
        self.described = [describe(layer) for layer in self.layers]
        self.parameters = LayerParameters(self.pool)
        self.reports = self.parameters.adopt(self.model, self.layers)
        self.copies = {layer: self.parameters.region(layer).clone() for layer in range(LAYERS)}

    @property
    def source(self) -> BufferSource:
        return BufferSource(self.copies)

    def scribble(self) -> None:
        """Leaves every free frame full of bytes that no layer has."""
        scribble_on_free_frames(self.pool)

    def assert_same_answers(self) -> None:
        assert torch.equal(self.model(TOKENS), self.before)

    def assert_dropped(self, layer: int, frames_free: int) -> None:
        assert self.parameters.state(layer) is LayerState.DROPPED
        assert self.pool.free_frames == frames_free
        assert layer not in self.pool.snapshot().parameters_by_layer
        with pytest.raises(LayerDroppedError):
            self.model(TOKENS)
        self.pool.check()


def scribble_on_free_frames(pool: FramePool) -> None:
    area = pool.vmm.reserve(pool.free_frames, "scribble")
    spans = [LayerSpan(0, Span(area, 0, pool.free_frames))]
    pool.map_kv(spans)
    pool.vmm.tensor(area, 0, area.size_bytes).fill_(0xA5)
    pool.unmap_kv(spans)
    pool.vmm.release(area)


def describe(layer: nn.Module) -> dict[str, tuple[object, ...]]:
    return {
        name: (id(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
        for name, tensor in tensors_of(layer).items()
    }


def inside(tensor: torch.Tensor, span: Span) -> bool:
    return span.address <= tensor.data_ptr() < span.address + span.count * span.virtual_range.frame_bytes
