"""Random drops, restores and KV growth over one pool: the model answers as before, or refuses to answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from layer_models import TOKENS
from layer_setup import LAYERS, AdoptedModel

from cuda_model.driver import FakeBindings
from kunserve_sgl.memory.errors import ChecksumMismatchError, LayerDroppedError, PoolFullError
from kunserve_sgl.memory.layer_parameters import LayerState
from kunserve_sgl.memory.layer_sources import BufferSource
from kunserve_sgl.memory.virtual_range import LayerSpan, Span

layer_numbers = st.integers(0, LAYERS - 1)


class ParametersAndKv(RuleBasedStateMachine):
    """Frames go back and forth between layers and a KV buffer, which overwrites them."""

    bindings: FakeBindings | None = None

    @initialize()
    def start(self) -> None:
        self.adopted = AdoptedModel(self.bindings)
        self.kv = self.adopted.pool.vmm.reserve(self.adopted.pool.snapshot().total, "kv")
        self.kv_frames = 0
        self.dropped: set[int] = set()

    def teardown(self) -> None:
        for number in sorted(self.dropped):
            self.shrink_kv(self.kv_frames)
            self.restore(number)
        self.adopted.assert_same_answers()

    @rule(number=layer_numbers)
    def drop(self, number: int) -> None:
        if number not in self.dropped:
            self.adopted.parameters.drop(number)
            self.dropped.add(number)

    @rule(number=layer_numbers)
    def restore(self, number: int) -> None:
        if number not in self.dropped:
            return
        if self.adopted.pool.free_frames < self.adopted.reports[number].frames:
            with pytest.raises(PoolFullError):
                self.adopted.parameters.restore(number, self.adopted.source)
            return
        self.adopted.parameters.restore(number, self.adopted.source)
        self.dropped.discard(number)

    @rule(number=layer_numbers, data=st.data())
    def restore_wrong_bytes(self, number: int, data: st.DataObject) -> None:
        if number not in self.dropped or self.adopted.pool.free_frames < self.adopted.reports[number].frames:
            return
        wrong = self.adopted.copies[number].clone()
        wrong[data.draw(st.integers(0, wrong.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
        with pytest.raises(ChecksumMismatchError):
            self.adopted.parameters.restore(number, BufferSource({number: wrong}))

    @rule(count=st.integers(1, 9), value=st.integers(0, 255))
    def grow_kv(self, count: int, value: int) -> None:
        count = min(count, self.adopted.pool.free_frames)
        if count:
            size = self.adopted.pool.vmm.frame_bytes
            self.adopted.pool.map_kv([LayerSpan(0, Span(self.kv, self.kv_frames, count))])
            self.adopted.pool.vmm.tensor(self.kv, self.kv_frames * size, count * size).fill_(value)
            self.kv_frames += count

    @precondition(lambda self: self.kv_frames)
    @rule(count=st.integers(1, 9))
    def shrink_kv(self, count: int) -> None:
        count = min(count, self.kv_frames)
        if count:
            self.kv_frames -= count
            self.adopted.pool.unmap_kv([LayerSpan(0, Span(self.kv, self.kv_frames, count))])

    @invariant()
    def every_frame_is_accounted_for(self) -> None:
        self.adopted.pool.check()
        snapshot = self.adopted.pool.snapshot()
        resident = [number for number in range(LAYERS) if number not in self.dropped]
        assert dict(snapshot.parameters_by_layer) == {n: self.adopted.reports[n].frames for n in resident}
        assert snapshot.kv == self.kv_frames
        for number in range(LAYERS):
            state = LayerState.DROPPED if number in self.dropped else LayerState.RESIDENT
            assert self.adopted.parameters.state(number) is state

    @invariant()
    def the_model_answers_as_before_or_refuses(self) -> None:
        if self.dropped:
            with pytest.raises(LayerDroppedError, match=f"layer {min(self.dropped)} "):
                self.adopted.model(TOKENS)
        else:
            assert torch.equal(self.adopted.model(TOKENS), self.adopted.before)


_SETTINGS = settings(
    max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestParametersAndKv = ParametersAndKv.TestCase
TestParametersAndKv.settings = _SETTINGS
