"""What is found to belong to one layer only, and what is left out and why."""

from __future__ import annotations

import torch
from layer_models import HIDDEN, Decoder
from torch import nn

from kunserve_sgl.memory.layer_scan import KeptOutReason, LayerContents, SelectionRules, TensorKind, scan_layers

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
