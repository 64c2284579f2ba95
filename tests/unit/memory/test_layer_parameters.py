"""Layer parameters: moved into regions, dropped and restored."""

from __future__ import annotations

import gc
import mmap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layer_models import TOKENS, Decoder, tensors_of
from layer_setup import LAYERS, AdoptedModel, describe, inside, scribble_on_free_frames
from torch import nn

from cuda_model.driver import make_fake_cuda
from kunserve_sgl.memory.errors import (
    ChecksumMismatchError,
    LayerDroppedError,
    LayerStateError,
    StaleReferenceError,
)
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.layer_parameters import LayerParameters, LayerState
from kunserve_sgl.memory.layer_scan import SelectionRules
from kunserve_sgl.memory.layer_sources import BufferSource, LayerSource, RestoreTarget
from kunserve_sgl.memory.storage import StorageWatch, storage_id
from kunserve_sgl.memory.vmm_memfd import MemfdVmm


def test_the_model_answers_the_same_from_its_regions(adopted: AdoptedModel) -> None:
    adopted.assert_same_answers()
    snapshot = adopted.pool.snapshot()
    assert snapshot.parameters == snapshot.total == sum(report.frames for report in adopted.reports)
    assert dict(snapshot.parameters_by_layer) == {report.layer: report.frames for report in adopted.reports}


def test_every_tensor_keeps_its_object_shape_strides_and_offset(adopted: AdoptedModel) -> None:
    assert [describe(layer) for layer in adopted.layers] == adopted.described
    attention = adopted.layers[0].attention
    assert storage_id(attention.kv_b) == storage_id(attention.w_kc)
    assert attention.kv_b.untyped_storage().nbytes() == 4 * 64 * 512
    assert attention.weight_t.stride() == (1, 128)
    assert adopted.layers[0].up.weight is adopted.layers[0].down.weight


def test_own_tensors_lie_in_the_region_and_shared_ones_do_not(adopted: AdoptedModel) -> None:
    left_out = {"attention.rotary.cos_sin_cache", "attention.workspace", "attention.sort_indices"}
    left_out |= {"attention.packed.blocks.0", "attention.empty_indices"}
    shared = [{"norm.bias"}, {"norm.bias"}, {"norm.weight"}]
    for number, layer in enumerate(adopted.layers):
        span = adopted.parameters.span(number)
        for name, tensor in tensors_of(layer).items():
            assert inside(tensor, span) == (name not in left_out | shared[number]), name
            if inside(tensor, span):
                assert tensor.untyped_storage().data_ptr() % 256 == 0


def test_reports_add_up(adopted: AdoptedModel) -> None:
    for report in adopted.reports:
        assert report.tensor_bytes + report.lost_bytes == report.frames * adopted.pool.vmm.frame_bytes
        assert {kept.name for kept in report.kept_out} >= {"attention.workspace"}
    assert len({report.checksum for report in adopted.reports}) == LAYERS


def test_the_old_memory_is_gone() -> None:
    pool = FramePool(MemfdVmm(16384), "replica 0")
    model = Decoder(LAYERS)
    own = ("attention.qkv.weight", "attention.kv_b", "attention.w_vc", "attention.zero_points", "up.weight")
    watches = [StorageWatch(tensors_of(layer)[name]) for layer in model.layers for name in own]
    assert not any(watch.is_dead for watch in watches)
    LayerParameters(pool).adopt(model, list(model.layers))
    assert all(watch.is_dead for watch in watches)


def test_layers_that_have_not_been_loaded_wait_for_their_bytes(adopted: AdoptedModel) -> None:
    """Those of a model like `adopted`, which lends them."""
    bindings = adopted.bindings
    pool = FramePool(MemfdVmm(16384) if bindings is None else make_fake_cuda(bindings), "replica 1")
    model = Decoder(LAYERS)
    layers = list(model.layers)
    expected = [report.checksum for report in adopted.reports]
    watches = []
    with torch.no_grad():
        for layer in layers:
            for name in ("attention.qkv.weight", "attention.kv_b", "up.weight"):
                tensors_of(layer)[name].fill_(7)
                watches.append(StorageWatch(tensors_of(layer)[name]))
    described = [describe(layer) for layer in layers]
    parameters = LayerParameters(pool)
    reports = parameters.adopt(model, layers, checksums=expected)
    assert all(watch.is_dead for watch in watches)
    assert [(report.frames, report.checksum) for report in reports] == [
        (report.frames, report.checksum) for report in adopted.reports
    ]
    assert pool.free_frames == pool.snapshot().total == sum(report.frames for report in reports)
    assert [parameters.state(layer) for layer in range(LAYERS)] == [LayerState.DROPPED] * LAYERS
    with pytest.raises(LayerDroppedError):
        model(TOKENS)
    with pytest.raises(ChecksumMismatchError):
        parameters.restore(0, BufferSource({0: torch.zeros_like(adopted.copies[0])}))
    for layer in range(LAYERS):
        assert parameters.size_bytes(layer) == adopted.parameters.region(layer).numel()
        parameters.restore(layer, adopted.source)
    assert [describe(layer) for layer in layers] == described
    assert pool.free_frames == 0
    adopted.parameters.verify(0)
    parameters.drop(1)
    parameters.restore(1, adopted.source)


def test_nothing_else_may_hold_what_has_not_been_loaded() -> None:
    pool = FramePool(MemfdVmm(16384), "replica 1")
    model = Decoder(LAYERS)
    layers = list(model.layers)
    other = Decoder(LAYERS)
    expected = [report.checksum for report in LayerParameters(pool).adopt(other, list(other.layers))]
    held = tensors_of(layers[1])["up.weight"].data
    with pytest.raises(StaleReferenceError, match="layer 1: the memory of"):
        LayerParameters(pool).adopt(model, layers, checksums=expected)
    assert tensors_of(layers[1])["up.weight"].data_ptr() == held.data_ptr()


def resident_kib(kind: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1])
    raise AssertionError(kind)


def test_no_second_copy_stays_in_memory() -> None:
    """Private memory shrinks by what the model had; the regions' memory is as large as their frames."""
    layers = nn.ModuleList(nn.Linear(3072, 3072, bias=False) for _ in range(4))
    for layer in layers:
        # Not from malloc, which may serve a block from what earlier tests have freed, and keep it when it is freed.
        private_memory = mmap.mmap(-1, 3072 * 3072 * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        weight = torch.frombuffer(private_memory, dtype=torch.float32).view(3072, 3072)
        layer.weight = nn.Parameter(weight.fill_(0.5), requires_grad=False)
    del private_memory, weight, layer
    gc.collect()  # what earlier tests left must not vanish between two looks
    size_kib = 4 * 3072 * 3072 * 4 // 1024
    private, shared = resident_kib("RssAnon"), resident_kib("RssShmem")
    pool = FramePool(MemfdVmm(2 << 20), "replica 0")
    parameters = LayerParameters(pool)
    parameters.adopt(layers, list(layers))
    assert resident_kib("RssAnon") - private < -0.9 * size_kib
    assert 0.99 * size_kib < resident_kib("RssShmem") - shared < 1.02 * size_kib
    for number in range(4):
        parameters.drop(number)
    assert resident_kib("RssShmem") - shared < 0.02 * size_kib
    pool.remove_frames(pool.free_frames)
    pool.vmm.close()


def test_a_dropped_layer_frees_its_frames_and_refuses_calls(adopted: AdoptedModel) -> None:
    adopted.parameters.drop(1)
    adopted.assert_dropped(1, adopted.reports[1].frames)
    x = torch.zeros(7, 64)
    with pytest.raises(LayerDroppedError, match="decoder layer 1 is dropped here"):
        adopted.layers[1](x)
    with pytest.raises(LayerDroppedError, match="decoder layer 1"):
        adopted.layers[1].attention.qkv(x)
    with torch.no_grad():
        for number in (0, 2):
            assert adopted.layers[number](x).shape == (7, 64)
        assert torch.equal(adopted.layers[1].attention.rotary(x), x)


def test_nothing_of_a_dropped_layer_can_be_touched(adopted: AdoptedModel) -> None:
    """Even code that goes round the modules' calls gets an empty tensor and an error, not a fault."""
    layer = adopted.layers[1]
    adopted.parameters.drop(1)
    span = adopted.parameters.span(1)
    for name, tensor in tensors_of(layer).items():
        assert not inside(tensor, span), name
        tensor.sum()
    for weight in (layer.up.weight, layer.attention.qkv.weight):
        with pytest.raises(RuntimeError):
            nn.functional.linear(torch.zeros(1, 64, dtype=weight.dtype), weight)
    with pytest.raises((RuntimeError, LayerDroppedError)):
        layer.forward(torch.zeros(7, 64))


def test_the_guard_exists_only_while_the_layer_is_dropped(adopted: AdoptedModel) -> None:
    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in adopted.model.modules())

    assert hooks() == 0
    adopted.parameters.drop(1)
    assert hooks() > 0
    adopted.parameters.restore(1, adopted.source)
    assert hooks() == 0


def test_a_restored_layer_is_the_same_at_the_same_addresses(adopted: AdoptedModel) -> None:
    addresses = [{n: t.data_ptr() for n, t in tensors_of(layer).items()} for layer in adopted.layers]
    for number in range(LAYERS):
        adopted.parameters.drop(number)
    assert adopted.pool.free_frames == adopted.pool.snapshot().total
    adopted.scribble()
    for number in (2, 0, 1):
        adopted.parameters.restore(number, adopted.source)
        adopted.parameters.verify(number)
    assert [{n: t.data_ptr() for n, t in tensors_of(layer).items()} for layer in adopted.layers] == addresses
    assert [describe(layer) for layer in adopted.layers] == adopted.described
    adopted.assert_same_answers()


def test_operations_need_the_right_state(adopted: AdoptedModel) -> None:
    parameters = adopted.parameters
    with pytest.raises(LayerStateError, match="layer 0 is resident; it must be dropped"):
        parameters.restore(0, adopted.source)
    with pytest.raises(LayerStateError, match="layer 0 is resident; it must be restoring"):
        parameters.finish_restore(0)
    parameters.drop(0)
    for refused in (parameters.drop, parameters.region, parameters.verify):
        with pytest.raises(LayerStateError, match="layer 0 is dropped; it must be resident"):
            refused(0)
    target = parameters.begin_restore(0)
    with pytest.raises(LayerStateError, match="layer 0 is restoring; it must be dropped"):
        parameters.begin_restore(0)
    with pytest.raises(LayerDroppedError):
        adopted.model(TOKENS)
    del target
    parameters.abort_restore(0)
    adopted.assert_dropped(0, adopted.reports[0].frames)
    with pytest.raises(LayerStateError, match=r"layer 9 has no region; there are regions for \[0, 1, 2\]"):
        parameters.drop(9)
    with pytest.raises(LayerStateError, match="adopted already"):
        parameters.adopt(adopted.model, adopted.layers)


def test_a_loader_fills_tensor_by_tensor(adopted: AdoptedModel) -> None:
    saved = {name: tensor.detach().clone() for name, tensor in tensors_of(adopted.layers[1]).items()}
    adopted.parameters.drop(1)
    # The loader writes tensors only; what lies between them must not be what the frames held before.
    adopted.scribble()
    asked: list[int] = []

    class Loader(LayerSource):
        def fill(self, target: RestoreTarget) -> None:
            asked.append(target.layer)
            for name, tensor in target.tensors.items():
                tensor.copy_(saved[name.removesuffix("._base")].view_as(tensor) if name in saved else tensor)
            target.tensors["attention.w_vc"].copy_(saved["attention.w_vc"])

    adopted.parameters.restore(1, Loader())
    assert asked == [1]
    adopted.assert_same_answers()


def test_a_restore_can_be_filled_in_parts_between_batches(adopted: AdoptedModel) -> None:
    adopted.parameters.drop(1)
    target = adopted.parameters.begin_restore(1)
    for start in range(0, target.region.numel(), 10_000):
        part = slice(start, start + 10_000)
        target.region[part] = adopted.copies[1][part]
    del target
    adopted.parameters.finish_restore(1)
    adopted.assert_same_answers()


def test_frames_that_are_free_already_are_used_first() -> None:
    pool = FramePool(MemfdVmm(16384), "replica 0")
    pool.add_frames(1000)
    model = Decoder(LAYERS)
    reports = LayerParameters(pool).adopt(model, list(model.layers), SelectionRules())
    assert pool.snapshot().total == 1000
    assert pool.free_frames == 1000 - sum(report.frames for report in reports)


def test_the_checksum_does_not_depend_on_what_the_frames_held() -> None:
    """Two replicas compare checksums, so bytes between tensors must be the same everywhere."""
    checksums = []
    for dirty in (False, True):
        pool = FramePool(MemfdVmm(16384), "replica 0")
        pool.add_frames(200)
        if dirty:
            scribble_on_free_frames(pool)
        model = Decoder(LAYERS)
        checksums.append([report.checksum for report in LayerParameters(pool).adopt(model, list(model.layers))])
    assert checksums[0] == checksums[1]


def test_a_layer_without_tensors_has_no_region() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    pool = FramePool(MemfdVmm(16384), "replica 0")
    parameters = LayerParameters(pool)
    assert [report.layer for report in parameters.adopt(model, list(model))] == [0]
    with pytest.raises(LayerStateError, match="layer 1 has no region"):
        parameters.state(1)


def test_views_that_a_layer_makes_when_it_runs_come_and_go_with_it(adopted: AdoptedModel) -> None:
    """As SGLang's GLM-4-MoE, whose router caches its weight as float32: the weight itself where it is float32."""
    layer = adopted.layers[1]
    holder = SimpleNamespace(kernel=partial(torch.add, layer.attention.kv_b.data[:, 5:9]))
    layer.attention.register_buffer("cache", layer.up.weight.data[3:].t(), persistent=False)
    layer.norm.config = holder
    views = [layer.attention.cache, holder.kernel.args[0]]
    described = [(view.clone(), view.shape, view.stride(), view.storage_offset()) for view in views]
    adopted.parameters.require_droppable(1)
    adopted.parameters.drop(1)
    assert [view.numel() for view in views] == [0, 0]
    adopted.parameters.drop(0)
    adopted.scribble()
    adopted.parameters.restore(1, adopted.source)
    adopted.parameters.restore(0, adopted.source)
    adopted.assert_same_answers()
    for view, (values, *shape) in zip(views, described, strict=True):
        assert torch.equal(view, values)
        assert [view.shape, view.stride(), view.storage_offset()] == shape
        assert inside(view, adopted.parameters.span(1))


def test_a_view_that_the_layer_has_let_go_of_is_left_alone(adopted: AdoptedModel) -> None:
    late = adopted.layers[1].late = adopted.layers[1].up.weight.data
    adopted.parameters.require_droppable(1)
    late.data = torch.full((2, 2), 7.0)
    adopted.parameters.drop(1)
    assert torch.equal(late, torch.full((2, 2), 7.0))
    adopted.parameters.restore(1, adopted.source)
    assert torch.equal(late, torch.full((2, 2), 7.0))
    adopted.assert_same_answers()
    adopted.parameters.drop(1)
