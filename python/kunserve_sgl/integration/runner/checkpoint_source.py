"""The checkpoint on disk as a source of a dropped layer's bytes, read by SGLang's own loader."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.memory.errors import RestoreSourceError
from kunserve_sgl.memory.layer_sources import LoaderSource

# Weights are stored as they are in the checkpoint, apart from splitting and joining.
_PLAIN_METHODS = ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod", "UnquantizedEmbeddingMethod")
# Plain attributes that SGLang's own load_weights makes again: the halves of MLA's projection.
_REMADE = frozenset({"w_kc", "w_vc"})
# What no tensor consists of, so that one the loader has not written is found.
_UNWRITTEN = 0xA5


def checkpoint_source(model: Any, layers: list[torch.nn.Module], loader: Any, config: Any) -> LoaderSource:
    """Makes a source that reads layers from the checkpoint.

    `layers` are the decoder layers of `model`, which is one of SGLang's; `loader` and `config` are the model runner's
    `loader` and `model_config`. The loader names every weight of the checkpoint, and those of other layers are passed
    over; with memory-mapped files, SGLang's default, their bytes are not read. A layer's checksum proves the rest.
    """
    if not hasattr(loader, "_get_all_weights"):
        raise ConfigurationError(
            f"--load-format: {type(loader).__name__} does not give single weights, so a layer cannot be restored "
            "from the checkpoint; accepted: auto, safetensors, pt"
        )

    def load(layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        check_loadable(layers[layer], layer, tensors)
        for tensor in tensors.values():
            _as_bytes(tensor).fill_(_UNWRITTEN)
        wanted = re.compile(rf"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.{layer}\.")
        found = 0

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal found
            for name, weight in loader._get_all_weights(config, model):
                if wanted.match(name):
                    found += 1
                    yield name, weight

        with torch.no_grad(), _bound(layers[layer], layer, tensors):
            model.load_weights(weights())
        if not found:
            raise RestoreSourceError(f"the checkpoint {config.model_path} has no weights of layer {layer}")
        missing = [name for name, tensor in tensors.items() if bool((_as_bytes(tensor) == _UNWRITTEN).all())]
        if missing:
            raise RestoreSourceError(f"layer {layer}: the checkpoint {config.model_path} does not fill {missing}")

    return LoaderSource(load)


def check_loadable(layer_module: torch.nn.Module, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ConfigurationError where loading the layer once more would not give the bytes it has in memory."""
    for name, module in layer_module.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ not in _PLAIN_METHODS:
            raise ConfigurationError(
                f"layer {layer}: {name} is quantised ({type(method).__name__}) and was re-packed after loading, so it "
                "cannot be restored from the checkpoint; use --kunserve-keep-host-copy"
            )
    parameters = {name for name, _ in layer_module.named_parameters(remove_duplicate=False)}
    for name in tensors:
        if name.removesuffix("._base") not in parameters and name.split(".")[-1] not in {*_REMADE, "_base"}:
            raise ConfigurationError(
                f"layer {layer}: {name} is not a parameter, so it cannot be restored from the checkpoint; "
                "use --kunserve-keep-host-copy"
            )


@contextmanager
def _bound(layer_module: torch.nn.Module, layer: int, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Lets the layer's own tensor objects have the memory of `tensors`, for the loader to write to."""
    own = {name: _tensor_at(layer_module, name) for name in tensors}
    dropped = {name: tensor.data for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.data = tensors[name]
        yield
        for name, tensor in own.items():
            if _tensor_at(layer_module, name) is not tensor or tensor.data_ptr() != tensors[name].data_ptr():
                raise RestoreSourceError(f"layer {layer}: the loader replaced {name} instead of writing to it")
    finally:
        for name, tensor in own.items():
            tensor.data = dropped[name]


def _tensor_at(module: torch.nn.Module, name: str) -> torch.Tensor:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, torch.Tensor):
        raise RestoreSourceError(f"{name} is not a tensor any more")
    return found


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Views the bytes that a tensor uses, without what lies between them."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])
    return tensor.permute(order).view(torch.uint8) if tensor.dim() else tensor.unsqueeze(0).view(torch.uint8)
