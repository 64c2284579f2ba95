"""Which tensors a module holds: as parameters, buffers and attributes, and inside objects that are no modules."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_REGISTRIES = ("_parameters", "_buffers", "_modules")
# Objects on the way from a module's attribute to a tensor. What is further away is hardly the module's own.
_MOST_OBJECTS = 4


class TensorKind(enum.Enum):
    """Says how a module holds a tensor."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    ATTRIBUTE = "attribute"
    IN_OBJECT = "inside an object that is no module"


@dataclass(frozen=True, slots=True, eq=False)
class FoundTensor:
    """Says of a tensor object where it was found: its dotted name within the layer, and the module with the name of the
    attribute that is the tensor, which is None where the tensor is inside a container or an object or is the base of a
    view."""

    name: str
    kind: TensorKind
    tensor: torch.Tensor
    module: torch.nn.Module
    attribute: str | None

    @property
    def is_in_place(self) -> bool:
        """Tells whether the module still holds this tensor; False where it has been given another since."""
        return self.attribute is None or getattr(self.module, self.attribute, None) is self.tensor


def tensors_of(module: torch.nn.Module, prefix: str) -> Iterator[FoundTensor]:
    """Finds the tensors that a module itself holds, not those of its children, each followed by the tensor it is a
    view of: autograd keeps that one alive, and with it the old memory."""
    for name, key, kind, tensor in _named_tensors_of(module, prefix):
        yield FoundTensor(name, kind, tensor, module, key)
        if tensor._base is not None:
            yield FoundTensor(f"{name}._base", kind, tensor._base, module, None)


def tensors_in_objects(
    module: torch.nn.Module, prefix: str, modules: Collection[int], held: Collection[int]
) -> Iterator[FoundTensor]:
    """Finds the tensors that `module` holds through objects, partial functions, closures and modules that the model
    does not know. `modules` are the ids of those it knows, which are not entered, and `held` those of tensors that are
    left out, because `tensors_of` finds them."""
    seen: set[int] = set()
    for key, value in vars(module).items():
        if key in _REGISTRIES:
            continue
        for name, tensor in _tensors_behind(value, f"{prefix}{key}", modules, seen, 0):
            for each, label in ((tensor, name), (tensor._base, f"{name}._base")):
                if each is not None and id(each) not in held:
                    yield FoundTensor(label, TensorKind.IN_OBJECT, each, module, None)


def _named_tensors_of(
    module: torch.nn.Module, prefix: str
) -> Iterator[tuple[str, str | None, TensorKind, torch.Tensor]]:
    for kind, registry in ((TensorKind.PARAMETER, module._parameters), (TensorKind.BUFFER, module._buffers)):
        for key, tensor in registry.items():
            if tensor is not None:
                yield f"{prefix}{key}", key, kind, tensor
    for key, value in vars(module).items():
        if key not in _REGISTRIES:
            for name, tensor in _tensors_within(value, f"{prefix}{key}", set()):
                yield name, key if tensor is value else None, TensorKind.ATTRIBUTE, tensor


def _tensors_within(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Finds tensors in an attribute and in lists, tuples and dictionaries inside it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
        seen.add(id(value))
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors_within(item, f"{name}.{key}", seen)


def _tensors_behind(
    value: Any, name: str, modules: Collection[int], seen: set[int], objects: int
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    if id(value) in seen or id(value) in modules or objects > _MOST_OBJECTS:
        return
    seen.add(id(value))
    if isinstance(value, (list, tuple, set, frozenset)):
        parts: Iterator[tuple[Any, Any]] = iter(enumerate(value))
    elif isinstance(value, dict):
        parts = iter(value.items())
    else:
        parts, objects = _parts_of(value), objects + 1
    for key, part in parts:
        yield from _tensors_behind(part, f"{name}.{key}", modules, seen, objects)


def _parts_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what an object refers to by name. Nothing of the object is called: that could have effects."""
    if isinstance(value, (type, types.ModuleType)):
        return
    if isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, types.FunctionType):
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield key, cell.cell_contents
            except ValueError:  # the variable has no value yet
                continue
        yield "defaults", (value.__defaults__, value.__kwdefaults__)
    for slot in _slots_of(type(value)):  # type: ignore[arg-type]
        try:
            yield slot.__name__, slot.__get__(value)
        except AttributeError:  # the slot has no value
            continue
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return
    if isinstance(attributes, Mapping):
        yield from list(attributes.items())


@functools.cache
def _slots_of(cls: type) -> tuple[types.MemberDescriptorType, ...]:
    if cls.__module__ == "builtins":
        return ()
    return tuple(
        slot for base in cls.__mro__ for slot in vars(base).values() if isinstance(slot, types.MemberDescriptorType)
    )
