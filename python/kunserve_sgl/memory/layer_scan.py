"""Finds what belongs to exactly one decoder layer: the tensors whose memory can be taken away with the layer.

A storage is movable when every tensor over it is found in one layer. Storages that two layers share, or a
layer and the rest of the model (the rotary embedding's cache is one object for all layers), stay where they
are. So do tensors that kernels write to: their bytes change while the layer serves, and a checksum could not
prove them. What only an object holds that is no module stays too; a view that it holds of a tensor of the layer
moves with that tensor.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kunserve_sgl.memory.region_layout import ALIGNMENT_BYTES
from kunserve_sgl.memory.storage import storage_id
from kunserve_sgl.memory.tensor_walk import FoundTensor, TensorKind, tensors_in_objects, tensors_of

_OUTSIDE = -1


class KeptOutReason(enum.Enum):
    """Says why a tensor of a layer stays where it is when the layer moves; the value is the text for people."""

    SHARED = "its memory is shared with another layer or module"
    SCRATCH = "it is scratch memory"
    SMALL_ATTRIBUTE = "it is a small plain attribute"
    OTHER_DEVICE = "it is on another device"
    NOT_PLAIN = "it is not a plain strided tensor"


@dataclass(frozen=True, slots=True)
class SelectionRules:
    """Says what may move besides parameters and buffers.

    Plain attributes below `min_attribute_bytes` stay: quantised layers keep locks and scratch there, which
    kernels write to, while the attributes that hold weights are large. Buffers and attributes whose last name
    is in `scratch_names` stay, whatever their size.
    """

    min_attribute_bytes: int = 64 << 10
    scratch_names: frozenset[str] = frozenset({"workspace"})


@dataclass(frozen=True, slots=True)
class KeptOutTensor:
    """Names a tensor that stays where it is when its layer moves, with its size and the reason."""

    name: str
    size_bytes: int
    reason: KeptOutReason


@dataclass(frozen=True, slots=True, eq=False)
class StorageGroup:
    """Gathers all tensors of a layer over one storage, and the bytes of it that they use."""

    tensors: tuple[FoundTensor, ...]
    start_bytes: int
    size_bytes: int

    @property
    def name(self) -> str:
        """Names the group by the first of its tensors."""
        return self.tensors[0].name


@dataclass(frozen=True, slots=True, eq=False)
class LayerContents:
    """Says what moves with a layer, what does not and why, and which modules only this layer has."""

    layer: int
    groups: tuple[StorageGroup, ...]
    kept_out: tuple[KeptOutTensor, ...]
    modules: tuple[torch.nn.Module, ...]


def scan_layers(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    device: torch.device,
    rules: SelectionRules,
) -> tuple[LayerContents, ...]:
    """Scans all decoder layers of `model`, in order; layer i is `layers[i]`."""
    in_layer: dict[int, set[int]] = {}
    for index, layer in enumerate(layers):
        for module in layer.modules():
            in_layer.setdefault(id(module), set()).add(index)
    outside = [("", module) for module in model.modules() if id(module) not in in_layer]
    finder = _Finder(model)
    found = [list(finder.find(layer.named_modules())) for layer in layers]
    owners: dict[int, set[int]] = {}
    _note_owners(owners, finder.find(outside), _OUTSIDE)
    for index, tensors in enumerate(found):
        _note_owners(owners, tensors, index)
    return tuple(
        _contents(index, found[index], owners, device, rules, _own_modules(layer, in_layer))
        for index, layer in enumerate(layers)
    )


def _contents(
    index: int,
    found: Sequence[FoundTensor],
    owners: dict[int, set[int]],
    device: torch.device,
    rules: SelectionRules,
    modules: tuple[torch.nn.Module, ...],
) -> LayerContents:
    by_storage: dict[int, list[FoundTensor]] = {}
    kept_out: list[KeptOutTensor] = []
    for each in found:
        if not _is_plain(each.tensor):
            kept_out.append(_kept_out(each, KeptOutReason.NOT_PLAIN))
        elif each.tensor.untyped_storage().nbytes():
            by_storage.setdefault(storage_id(each.tensor), []).append(each)
    groups: list[StorageGroup] = []
    for storage, tensors in by_storage.items():
        group = _group(tensors)
        if not group.size_bytes or all(each.kind is TensorKind.IN_OBJECT for each in tensors):
            continue
        reason = _reason_to_keep_out(group, owners[storage], device, rules)
        if reason is None:
            groups.append(group)
        else:
            kept_out.extend(_kept_out(each, reason) for each in tensors)
    return LayerContents(index, tuple(groups), tuple(kept_out), modules)


def _reason_to_keep_out(
    group: StorageGroup, owners: set[int], device: torch.device, rules: SelectionRules
) -> KeptOutReason | None:
    first = group.tensors[0].tensor
    kinds = {each.kind for each in group.tensors} - {TensorKind.IN_OBJECT}
    if len(owners) > 1:
        return KeptOutReason.SHARED
    if first.device != device:
        return KeptOutReason.OTHER_DEVICE
    if TensorKind.PARAMETER in kinds:
        return None
    if any(each.name.rpartition(".")[2] in rules.scratch_names for each in group.tensors):
        return KeptOutReason.SCRATCH
    if kinds == {TensorKind.ATTRIBUTE} and group.size_bytes < rules.min_attribute_bytes:
        return KeptOutReason.SMALL_ATTRIBUTE
    return None


def _group(tensors: Sequence[FoundTensor]) -> StorageGroup:
    spans = [_used_bytes(each.tensor) for each in tensors]
    # Only what is used moves: a tensor can be a small view of a large storage, such as a whole checkpoint
    # file.
    start_bytes = min(start for start, _ in spans) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    return StorageGroup(tuple(tensors), start_bytes, max(stop for _, stop in spans) - start_bytes)


def _used_bytes(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the first byte of its storage that a tensor uses, and the one after the last."""
    start = int(tensor.storage_offset())
    if tensor.numel() == 0:
        return start * tensor.element_size(), start * tensor.element_size()
    last = start + sum((n - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start * tensor.element_size(), (last + 1) * tensor.element_size()


def _kept_out(each: FoundTensor, reason: KeptOutReason) -> KeptOutTensor:
    return KeptOutTensor(each.name, each.tensor.numel() * each.tensor.element_size(), reason)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not hasattr(tensor, "__tensor_flatten__")
    )


def _own_modules(layer: torch.nn.Module, in_layer: dict[int, set[int]]) -> tuple[torch.nn.Module, ...]:
    return tuple(module for module in layer.modules() if len(in_layer[id(module)]) == 1)


def _note_owners(owners: dict[int, set[int]], tensors: Iterable[FoundTensor], owner: int) -> None:
    for each in tensors:
        if _is_plain(each.tensor):
            owners.setdefault(storage_id(each.tensor), set()).add(owner)


class _Finder:
    """Finds the tensors of modules, those in objects among them; those that the model's modules hold are known."""

    def __init__(self, model: torch.nn.Module) -> None:
        modules = list(model.modules())
        self._modules = {id(module) for module in modules}
        self._held = {id(each.tensor) for module in modules for each in tensors_of(module, "")}

    def find(self, named_modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[FoundTensor]:
        """Finds every tensor object once: parameters before buffers before attributes of each module, and then what is
        in objects."""
        seen: set[int] = set()
        named = [(f"{prefix}." if prefix else "", module) for prefix, module in named_modules]
        held = (each for prefix, module in named for each in tensors_of(module, prefix))
        in_objects = (
            each for prefix, module in named for each in tensors_in_objects(module, prefix, self._modules, self._held)
        )
        for each in itertools.chain(held, in_objects):
            if id(each.tensor) not in seen:
                seen.add(id(each.tensor))
                yield each
