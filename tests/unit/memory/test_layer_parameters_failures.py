"""Everything that can go wrong with layer parameters, and that the layer is then whole or dropped, never in
between."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from layer_models import TOKENS, Decoder, tensors_of
from layer_setup import LAYERS, AdoptedModel
from torch import nn

from cuda_model.driver import FakeBindings, make_fake_cuda
from kunserve_sgl.memory.errors import (
    ChecksumMismatchError,
    LayerStateError,
    LedgerError,
    MappingFailedError,
    PoolFullError,
    RestoreSourceError,
    StaleReferenceError,
    ViewInUseError,
)
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_parameters import LayerParameters, LayerState
from kunserve_sgl.memory.layer_sources import BufferSource, LayerSource, RestoreTarget
from kunserve_sgl.memory.virtual_range import LayerSpan, Span
from kunserve_sgl.memory.vmm_memfd import MemfdVmm


@pytest.mark.parametrize("where", [0, 1, -1, -257, 5000])
def test_one_wrong_bit_is_found_and_the_layer_stays_dropped(adopted: AdoptedModel, where: int) -> None:
    adopted.parameters.drop(1)
    adopted.copies[1][where] ^= 4
    with pytest.raises(ChecksumMismatchError, match="layer 1 as restored has checksum"):
        adopted.parameters.restore(1, adopted.source)
    adopted.assert_dropped(1, adopted.reports[1].frames)
    adopted.copies[1][where] ^= 4
    adopted.parameters.restore(1, adopted.source)
    adopted.assert_same_answers()


def test_the_bytes_of_another_layer_are_not_accepted(adopted: AdoptedModel) -> None:
    adopted.parameters.drop(0)
    with pytest.raises(ChecksumMismatchError):
        adopted.parameters.restore(0, BufferSource({0: adopted.copies[1]}))
    adopted.assert_dropped(0, adopted.reports[0].frames)


def test_a_full_pool_leaves_the_layer_dropped(adopted: AdoptedModel) -> None:
    adopted.parameters.drop(0)
    kv = adopted.pool.vmm.reserve(1, "kv")
    adopted.pool.map_kv([LayerSpan(0, Span(kv, 0, 1))])
    with pytest.raises(PoolFullError):
        adopted.parameters.restore(0, adopted.source)
    adopted.assert_dropped(0, adopted.reports[0].frames - 1)
    adopted.pool.unmap_kv([LayerSpan(0, Span(kv, 0, 1))])
    adopted.parameters.restore(0, adopted.source)
    adopted.assert_same_answers()


def test_a_source_that_fails_leaves_the_layer_dropped(adopted: AdoptedModel) -> None:
    class Failing(LayerSource):
        def fill(self, target: RestoreTarget) -> None:
            weight = target.tensors["up.weight"]
            weight.fill_(1)
            raise ConnectionError("the peer is gone")

    adopted.parameters.drop(1)
    with pytest.raises(ConnectionError, match="the peer is gone"):
        adopted.parameters.restore(1, Failing())
    adopted.assert_dropped(1, adopted.reports[1].frames)
    for wrong in ({}, {1: adopted.copies[1][:-1]}, {1: adopted.copies[1].to(torch.int16)}):
        with pytest.raises(RestoreSourceError, match="layer 1"):
            adopted.parameters.restore(1, BufferSource(wrong))
    adopted.assert_dropped(1, adopted.reports[1].frames)
    adopted.parameters.restore(1, adopted.source)
    adopted.assert_same_answers()


def test_a_source_that_keeps_a_tensor_is_found(adopted: AdoptedModel) -> None:
    kept: list[torch.Tensor] = []

    class Keeping(LayerSource):
        def fill(self, target: RestoreTarget) -> None:
            kept.append(target.tensors["up.bias"].fill_(7))

    adopted.parameters.drop(1)
    with pytest.raises(ViewInUseError):
        adopted.parameters.restore(1, Keeping())
    assert adopted.parameters.state(1) is LayerState.RESTORING
    kept.clear()
    adopted.parameters.abort_restore(1)
    adopted.assert_dropped(1, adopted.reports[1].frames)


def test_a_view_held_elsewhere_keeps_the_layer_resident(adopted: AdoptedModel) -> None:
    held = adopted.layers[1].up.weight.data[3:5]
    with pytest.raises(ViewInUseError):
        adopted.parameters.drop(1)
    assert adopted.parameters.state(1) is LayerState.RESIDENT
    adopted.assert_same_answers()
    assert held.isfinite().all()
    region = adopted.parameters.region(0)
    with pytest.raises(ViewInUseError):
        adopted.parameters.drop(0)
    del held, region
    adopted.parameters.drop(1)
    adopted.parameters.drop(0)


def test_what_would_keep_a_layer_is_named_beforehand(adopted: AdoptedModel) -> None:
    for layer in range(LAYERS):
        adopted.parameters.require_droppable(layer)
    before = adopted.pool.snapshot()
    held = hide_in_a_closure(adopted.model)
    with pytest.raises(ViewInUseError, match=r"layer 1: the memory of up.weight is held by something"):
        adopted.parameters.require_droppable(1)
    whole = adopted.parameters.region(0)
    with pytest.raises(ViewInUseError, match=r"layer 0: the memory of norm.weight, .*up.weight.* is held by something"):
        adopted.parameters.require_droppable(0)
    adopted.parameters.require_droppable(2)
    first, second = adopted.parameters.undroppable(range(LAYERS))
    assert first.startswith("layer 0: the memory of norm.weight, ")
    assert second.startswith("layer 1: the memory of up.weight is held by something")
    assert adopted.pool.snapshot() == before
    adopted.assert_same_answers()
    del held, whole
    for layer in range(LAYERS):
        adopted.parameters.require_droppable(layer)
    give_other_data(adopted.model)
    with pytest.raises(LayerStateError, match=r"layer 1: up\.bias was given other memory"):
        adopted.parameters.require_droppable(1)
    assert adopted.parameters.undroppable(range(LAYERS)) == [
        "layer 1: up.bias was given other memory after it moved in"
    ]


def test_a_view_in_a_garbage_cycle_does_not_keep_the_layer(adopted: AdoptedModel) -> None:
    cycle: list[object] = [adopted.layers[1].up.weight.data]
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        adopted.parameters.drop(1)
    finally:
        gc.enable()
    assert adopted.parameters.state(1) is LayerState.DROPPED


def test_a_lent_layer_is_not_dropped(adopted: AdoptedModel) -> None:
    loan = adopted.pool.loans.lend("replica 1", adopted.pool.vmm.frames_at(adopted.parameters.span(1)))
    with pytest.raises(LedgerError, match="lent to replica 1"):
        adopted.parameters.drop(1)
    assert adopted.parameters.state(1) is LayerState.RESIDENT
    adopted.assert_same_answers()
    adopted.pool.loans.end_loan(loan.loan_id)
    adopted.parameters.drop(1)


def test_dropping_waits_for_the_work_that_uses_the_layer(adopted: AdoptedModel) -> None:
    frames_when_waited: list[int] = []

    class Fence:
        def synchronize(self) -> None:
            frames_when_waited.append(adopted.pool.free_frames)

    adopted.parameters.drop(1, after=[Fence()])
    assert frames_when_waited == [0]
    adopted.parameters.restore(1, adopted.source)

    class Broken:
        def synchronize(self) -> None:
            raise RuntimeError("an earlier kernel failed")

    late = adopted.layers[1].late = adopted.layers[1].up.weight.data[:3]
    values = late.clone()
    with pytest.raises(RuntimeError, match="an earlier kernel failed"):
        adopted.parameters.drop(1, after=[Broken()])
    adopted.assert_same_answers()
    assert torch.equal(late, values)
    adopted.parameters.drop(1)


def test_a_driver_failure_leaves_the_layer_as_it_was() -> None:
    bindings = FakeBindings()
    adopted = AdoptedModel(bindings)
    bindings.fail_when(lambda name, number: name == "cuMemUnmap")
    with pytest.raises(MappingFailedError):
        adopted.parameters.drop(1)
    bindings.fail_when(lambda name, number: False)
    assert adopted.parameters.state(1) is LayerState.RESIDENT
    adopted.assert_same_answers()
    adopted.parameters.drop(1)
    bindings.fail_when(lambda name, number: name == "cuMemSetAccess")
    with pytest.raises(MappingFailedError):
        adopted.parameters.restore(1, adopted.source)
    bindings.fail_when(lambda name, number: False)
    adopted.assert_dropped(1, adopted.reports[1].frames)
    adopted.parameters.restore(1, adopted.source)
    adopted.assert_same_answers()


def test_something_that_writes_to_a_layer_is_found(adopted: AdoptedModel) -> None:
    for number in range(LAYERS):
        adopted.parameters.verify(number)
    adopted.layers[1].attention.zero_points[3] += 1
    with pytest.raises(ChecksumMismatchError, match="layer 1 in memory"):
        adopted.parameters.verify(1)
    assert adopted.parameters.state(1) is LayerState.RESIDENT


def hide_in_a_closure(model: Decoder) -> object:
    weight = model.layers[1].up.weight.data
    return lambda: weight


def test_a_pointer_held_outside_is_found_and_nothing_moves() -> None:
    pool = FramePool(MemfdVmm(16384), "replica 0")
    model = Decoder(LAYERS)
    holder = hide_in_a_closure(model)
    before, addresses = model(TOKENS), [t.data_ptr() for t in tensors_of(model.layers[1]).values()]
    parameters = LayerParameters(pool)
    with pytest.raises(StaleReferenceError, match=r"layer 1: the memory of \['up.weight'\] is held"):
        parameters.adopt(model, list(model.layers))
    assert [t.data_ptr() for t in tensors_of(model.layers[1]).values()] == addresses
    assert torch.equal(model(TOKENS), before)
    assert list(pool.snapshot().parameters_by_layer) == [0]
    pool.check()
    assert holder is not None


def test_garbage_of_the_loader_does_not_stop_the_move() -> None:
    pool = FramePool(MemfdVmm(16384), "replica 0")
    model = Decoder(LAYERS)
    gc.disable()
    try:
        cycle: list[object] = [model.layers[0].up.weight.data]
        cycle.append(cycle)
        del cycle
        assert len(LayerParameters(pool).adopt(model, list(model.layers))) == LAYERS
    finally:
        gc.enable()


def test_a_full_machine_stops_the_move_with_the_layer_intact() -> None:
    bindings = FakeBindings(memory_frames=3)
    pool = FramePool(make_fake_cuda(bindings), "replica 0")
    model = Decoder(LAYERS)
    before = model(TOKENS)
    parameters = LayerParameters(pool)
    with pytest.raises(Exception, match="had no memory for"):
        parameters.adopt(model, list(model.layers))
    assert torch.equal(model(TOKENS), before)
    pool.check()


def give_another_object(model: Decoder) -> None:
    model.layers[1].up.bias = nn.Parameter(torch.zeros(192, dtype=torch.bfloat16))


def give_other_data(model: Decoder) -> None:
    model.layers[1].up.bias.data = torch.zeros(192, dtype=torch.bfloat16)


def give_another_attribute(model: Decoder) -> None:
    model.layers[1].attention.w_vc = torch.zeros(64, 256)


@pytest.mark.parametrize(
    ("replace", "name"),
    [
        (give_another_object, "up.bias"),
        (give_other_data, "up.bias"),
        (give_another_attribute, "attention.w_vc"),
    ],
)
def test_a_replaced_tensor_is_neither_lost_nor_brought_back(
    adopted: AdoptedModel, replace: Callable[[Decoder], None], name: str
) -> None:
    replace(adopted.model)
    after = adopted.model(TOKENS)
    assert not torch.equal(after, adopted.before)
    for refused in (adopted.parameters.drop, adopted.parameters.renew_checksum):
        with pytest.raises(LayerStateError, match=f"layer 1: {name} was given other memory"):
            refused(1)
    assert torch.equal(adopted.model(TOKENS), after)


def test_weights_that_were_updated_in_place_get_a_new_checksum(adopted: AdoptedModel) -> None:
    with torch.no_grad():
        adopted.layers[1].up.bias.add_(1)
    after = adopted.model(TOKENS)
    assert not torch.equal(after, adopted.before)
    renewed = adopted.parameters.renew_checksum(1)
    assert renewed == adopted.parameters.report(1).checksum != adopted.reports[1].checksum
    updated = adopted.parameters.region(1).clone()
    adopted.parameters.drop(1)
    with pytest.raises(ChecksumMismatchError):
        adopted.parameters.restore(1, adopted.source)
    adopted.parameters.restore(1, BufferSource({1: updated}))
    assert torch.equal(adopted.model(TOKENS), after)
