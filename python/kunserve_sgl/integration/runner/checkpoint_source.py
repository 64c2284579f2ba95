"""The checkpoint on disk as a source of a dropped layer's bytes, read by SGLang's own loader."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import override

from kunserve_sgl.errors import ConfigurationError, KunserveError
from kunserve_sgl.integration.runner.stepped_load import SteppedLoad
from kunserve_sgl.memory.errors import RestoreSourceError
from kunserve_sgl.memory.layer_sources import LayerSource, RestoreTarget

# Weights are stored as they are in the checkpoint, apart from splitting and joining.
_PLAIN_METHODS = ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod", "UnquantizedEmbeddingMethod")
# Plain attributes that SGLang's own load_weights makes again: the halves of MLA's projection.
_REMADE = frozenset({"w_kc", "w_vc"})
# What no tensor consists of, so that one the loader has not written is found.
_UNWRITTEN = 0xA5
_WEIGHT_FILES = (".safetensors", ".bin", ".pt")

# Size and time of change by name.
_Files = dict[str, tuple[int, int]]


class CheckpointSource(LayerSource):
    """Reads layers from the checkpoint that the parameters were loaded from, as long as that has not changed, and the
    parameters have not.

    The loader names every weight of the checkpoint, and those of other layers are passed over; with memory-mapped
    files, SGLang's default, their bytes are not read. A layer's checksum proves the rest.
    """

    def __init__(self, model: Any, layers: list[torch.nn.Module], loader: Any, config: Any) -> None:
        """`layers` are the decoder layers of `model`, which is one of SGLang's; `loader` and `config` are the model
        runner's `loader` and `model_config`."""
        self._model = model
        self._layers = layers
        self._config = config
        self._why_not = ""
        self.take(loader)

    def take(self, loader: Any) -> None:
        """Takes note that the parameters are now what `loader` has read from the config's path."""
        self._loader = loader
        self._files = _weight_files(self._config.model_path)
        self._why_not = ""

    def forget(self, reason: str) -> None:
        """Takes note that the parameters are not the checkpoint's any more; `reason` says why."""
        self._why_not = reason

    def lacks(self, tensors: Mapping[int, Iterable[str]]) -> str:
        """Says which layers can not come from here, of those whose tensors are named, and why the first of them cannot;
        empty where all can."""
        lacking, why = [], ""
        for layer, names in tensors.items():
            try:
                self.check(layer, names)
            except KunserveError as error:
                lacking.append(layer)
                why = why or str(error)
        return f"layers {lacking} ({why})" if lacking else ""

    def check(self, layer: int, tensors: Iterable[str]) -> None:
        """Raises ConfigurationError where a layer with these tensors can never come from here, RestoreSourceError where
        it cannot any more."""
        if not hasattr(self._loader, "_get_all_weights"):
            raise ConfigurationError(
                f"--load-format: {type(self._loader).__name__} does not give single weights, so a layer cannot be "
                "restored from the checkpoint; accepted: auto, safetensors, pt"
            )
        check_loadable(self._layers[layer], layer, tensors)
        if self._why_not:
            raise RestoreSourceError(self._why_not)
        now = _weight_files(self._config.model_path)
        if changed := sorted(name for name in self._files if now.get(name) != self._files[name]):
            raise RestoreSourceError(f"{changed[0]} has changed since it was loaded, or is gone")

    @override
    def fill(self, target: RestoreTarget) -> None:
        with self._filling(target) as weights:
            self._load(filter(None, weights))

    @override
    def fill_in_parts(self, target: RestoreTarget, part_bytes: int) -> Generator[int, None, None]:
        """A part is one weight of the checkpoint at least. Nothing is known to be written before the end, because the
        loader has an order of its own."""
        if part_bytes >= target.region.numel():
            self.fill(target)
        else:
            with (
                self._filling(target) as weights,
                SteppedLoad(self._load, weights, target.region.device) as load,
            ):
                while not load.go_on(part_bytes):
                    yield 0
        yield target.region.numel()

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            self._model.load_weights(weights)

    @contextmanager
    def _filling(self, target: RestoreTarget) -> Iterator[Iterator[tuple[str, torch.Tensor] | None]]:
        """Gives what to load into `target`: the weights of the layer, and None for each other one. Raises
        RestoreSourceError afterwards where that was not all."""
        layer, tensors = target.layer, target.tensors
        self.check(layer, tensors)
        for tensor in tensors.values():
            _as_bytes(tensor).fill_(_UNWRITTEN)
        wanted = re.compile(rf"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.{layer}\.")
        found = 0

        def weights() -> Iterator[tuple[str, torch.Tensor] | None]:
            nonlocal found
            for name, weight in self._loader._get_all_weights(self._config, self._model):
                is_wanted = wanted.match(name) is not None
                found += is_wanted
                yield (name, weight) if is_wanted else None

        try:
            with _bound(self._layers[layer], layer, tensors):
                yield weights()
        except KunserveError:
            raise
        except Exception as error:  # whatever SGLang's loader says of files that it cannot read
            raise RestoreSourceError(f"{type(error).__name__}: {error}") from error
        if not found:
            raise RestoreSourceError(f"it has no weights of layer {layer}")
        missing = [name for name, tensor in tensors.items() if bool((_as_bytes(tensor) == _UNWRITTEN).all())]
        if missing:
            raise RestoreSourceError(f"it does not fill {missing} of layer {layer}")


def check_loadable(layer_module: torch.nn.Module, layer: int, tensors: Iterable[str]) -> None:
    """Raises ConfigurationError where loading the layer once more would not give the bytes it has in memory."""
    for name, module in layer_module.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ not in _PLAIN_METHODS:
            raise ConfigurationError(
                f"layer {layer}: {name} is quantised ({type(method).__name__}) and was re-packed after loading, so it "
                "cannot be restored from the checkpoint; use --kunserve-host-copy"
            )
    parameters = {name for name, _ in layer_module.named_parameters(remove_duplicate=False)}
    for name in tensors:
        if name.removesuffix("._base") not in parameters and name.split(".")[-1] not in {*_REMADE, "_base"}:
            raise ConfigurationError(
                f"layer {layer}: {name} is not a parameter, so it cannot be restored from the checkpoint; "
                "use --kunserve-host-copy"
            )


def _weight_files(model_path: str) -> _Files:
    """Finds the files with weights in a directory. The name of a repository has none: what is in its cache does not
    change."""
    if not os.path.isdir(model_path):
        return {}
    found = (entry for entry in os.scandir(model_path) if entry.name.endswith(_WEIGHT_FILES))
    return {entry.path: (entry.stat().st_size, entry.stat().st_mtime_ns) for entry in found if entry.is_file()}


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
