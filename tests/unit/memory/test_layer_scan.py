"""What is found to belong to one layer only, and what is left out and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from layer_models import HIDDEN, Decoder
from torch import nn

from kunserve_sgl.memory.layer_scan import KeptOutReason, LayerContents, SelectionRules, scan_layers
from kunserve_sgl.memory.tensor_walk import TensorKind

CPU = torch.device("cpu")


def scan(model: Decoder, rules: SelectionRules | None = None) -> tuple[LayerContents, ...]:
    return scan_layers(model, list(model.layers), CPU, rules or SelectionRules())


def moved(contents: LayerContents) -> set[str]:
    return {each.name for group in contents.groups for each in group.tensors}


def left(contents: LayerContents) -> dict[str, KeptOutReason]:
    return {each.name: each.reason for each in contents.kept_out}


def test_a_layer_moves_with_everything_that_is_its_own() -> None:
    first, second, third = scan(Decoder())
    own = {
        "attention.qkv.weight",
        "attention.qkv.bias",
        "attention.weight_t",
        "attention.scale",
        "attention.zero_points",
        "attention.kv_b",
        "attention.w_kc",
        "attention.w_kc._base",
        "attention.w_vc",
        "attention.w_vc._base",
        "up.weight",
        "up.bias",
        "down.bias",
    }
    assert moved(first) - own == {"norm.weight"}
    assert moved(second) - own == {"norm.weight"}
    assert moved(third) - own == {"norm.bias"}
    assert own <= moved(first)
    assert [contents.layer for contents in (first, second, third)] == [0, 1, 2]


def test_what_is_left_out_is_named_with_its_reason() -> None:
    first, _, third = scan(Decoder())
    assert left(first) == {
        "norm.bias": KeptOutReason.SHARED,
        "attention.rotary.cos_sin_cache": KeptOutReason.SHARED,
        "attention.packed.blocks.0": KeptOutReason.SMALL_ATTRIBUTE,
        "attention.workspace": KeptOutReason.SCRATCH,
        "attention.sort_indices": KeptOutReason.SMALL_ATTRIBUTE,
    }
    assert left(third)["norm.weight"] is KeptOutReason.SHARED, "the head holds a view of it"
    sizes = {each.name: each.size_bytes for each in first.kept_out}
    assert sizes["norm.bias"] == 4 * HIDDEN
    assert sizes["attention.workspace"] == 100_000


def test_the_rules_decide_about_attributes() -> None:
    rules = SelectionRules(min_attribute_bytes=1000, scratch_names=frozenset({"blocks"}))
    first, _, _ = scan(Decoder(), rules)
    assert {"attention.packed.blocks.0", "attention.workspace"} <= moved(first)
    assert left(first)["attention.sort_indices"] is KeptOutReason.SMALL_ATTRIBUTE


def test_tensors_of_one_storage_form_one_group() -> None:
    first, _, _ = scan(Decoder())
    groups = [{each.name for each in group.tensors} for group in first.groups]
    assert {"attention.kv_b", "attention.w_kc", "attention.w_kc._base"} in groups
    assert {"attention.w_vc", "attention.w_vc._base"} in groups
    assert {"up.weight"} in groups
    assert len({id(each.tensor) for group in first.groups for each in group.tensors}) == len(moved(first))
    kinds = {each.name: each.kind for group in first.groups for each in group.tensors}
    assert kinds["attention.zero_points"] is TensorKind.BUFFER
    assert kinds["attention.w_kc"] is TensorKind.ATTRIBUTE


def test_only_the_used_part_of_a_storage_moves() -> None:
    model = Decoder(2)
    checkpoint = torch.zeros(1 << 20)
    model.layers[0].up.bias = nn.Parameter(checkpoint[70_001:70_011], requires_grad=False)
    model.layers[0].down.bias = nn.Parameter(checkpoint[70_100:70_300:3], requires_grad=False)
    del checkpoint
    contents, _ = scan(model)
    (group,) = (group for group in contents.groups if group.name == "up.bias")
    assert group.start_bytes == 4 * 70_001 // 256 * 256
    assert group.start_bytes + group.size_bytes == 4 * (70_100 + 66 * 3 + 1)


def test_a_storage_shared_by_two_layers_through_different_tensors_stays() -> None:
    model = Decoder(3)
    both = torch.zeros(2, 3 * HIDDEN, dtype=torch.bfloat16)
    for number in (0, 1):
        model.layers[number].up.bias = nn.Parameter(both[number], requires_grad=False)
    first, second, third = scan(model)
    assert left(first)["up.bias"] is left(second)["up.bias"] is KeptOutReason.SHARED
    assert "up.bias" in moved(third)


def test_tensors_elsewhere_or_of_another_kind_stay() -> None:
    model = Decoder(2)
    model.layers[0].register_buffer("away", torch.empty(5, device="meta"))
    model.layers[0].register_buffer("sparse", torch.eye(5).to_sparse())
    model.layers[0].register_buffer("conjugate", torch.ones(5, dtype=torch.complex64).conj())
    first, _ = scan(model)
    assert left(first)["away"] is KeptOutReason.OTHER_DEVICE
    assert left(first)["sparse"] is left(first)["conjugate"] is KeptOutReason.NOT_PLAIN


def test_modules_of_one_layer_are_told_from_shared_ones() -> None:
    model = Decoder()
    first, second, _ = scan(model)
    rotary = model.layers[0].attention.rotary
    assert rotary not in first.modules
    assert model.layers[0] in first.modules
    assert model.layers[0].attention in first.modules
    assert not set(first.modules) & set(second.modules)


def test_a_container_that_holds_itself_is_walked_once() -> None:
    model = Decoder(2)
    loop: list[object] = [torch.zeros(100_000)]
    loop.append(loop)
    model.layers[0].loop = loop
    first, _ = scan(model)
    assert "loop.0" in moved(first)


class Slots:
    __slots__ = ("empty", "view")

    def __init__(self, view: torch.Tensor) -> None:
        self.view = view

    def method(self) -> None: ...


@dataclass
class Config:
    correction: torch.Tensor


class Hidden(nn.Module):
    """A module that the model does not know, because it is in a list."""

    def __init__(self, view: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(view, requires_grad=False)


HOLDERS: dict[str, Callable[[torch.Tensor], object]] = {
    "dataclass": Config,
    "slots": Slots,
    "method": lambda view: Slots(view).method,
    "partial": lambda view: partial(torch.add, other=view),
    "closure": lambda view: lambda: view,
    "default": lambda view: lambda x=view: x,
    "set in an object": lambda view: SimpleNamespace(all={view}),
    "hidden module": lambda view: [Hidden(view)],
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_view_inside_an_object_moves_with_its_tensor(kind: str) -> None:
    model = Decoder(2)
    model.layers[0].holder = HOLDERS[kind](model.layers[0].up.weight.data[2:])
    first, _ = scan(model)
    (group,) = (group for group in first.groups if group.name == "up.weight")
    found = [each for each in group.tensors if each.kind is TensorKind.IN_OBJECT]
    assert all(each.name.startswith("holder.") for each in found)
    assert model.layers[0].up.weight[2:].data_ptr() in {each.tensor.data_ptr() for each in found}


def test_what_only_an_object_holds_stays() -> None:
    model = Decoder(2)
    model.layers[0].holder = Config(torch.zeros(1 << 20))
    first, _ = scan(model)
    assert not any(name.startswith("holder") for name in moved(first) | left(first).keys())


def test_a_view_in_an_object_that_others_have_too_keeps_its_tensor_out() -> None:
    model = Decoder(2)
    both = Config(model.layers[0].up.weight.data)
    model.layers[0].holder, model.layers[1].holder = both, [both]
    first, second = scan(model)
    assert left(first)["up.weight"] is KeptOutReason.SHARED
    assert "up.weight" in moved(second)
    model = Decoder(2)
    model.head.holder = Config(model.layers[0].up.weight.data)
    first, _ = scan(model)
    assert left(first)["up.weight"] is KeptOutReason.SHARED, "the head would find it empty"


def test_objects_that_hold_modules_and_their_own_tensors_change_nothing() -> None:
    """As SGLang's layer communicator: it has the layer's norms, and all layers may share what it refers to."""
    expected = [moved(contents) for contents in scan(Decoder(2))]
    model = Decoder(2)
    everything = SimpleNamespace(model=model, weights=[layer.up.weight for layer in model.layers])
    everything.itself = everything
    for layer in model.layers:
        layer.communicator = SimpleNamespace(norm=layer.norm, shared=everything)
    assert [moved(contents) for contents in scan(model)] == expected
