"""Which of SGLang's classes runs a model, and whether a replica can run a part of its layers; before it is loaded.

`layer_range.py` and `model_runner.decoder_layers` say the same of a loaded model. Where the source does not tell, the
answer here is yes, and the scheduler finds out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglang.srt.environ import envs

from kunserve_sgl.integration.launcher.class_source import ClassSource, find_class, modules_of, names_in

_MODELS = "sglang.srt.models"
_FALLBACKS = "Transformers"  # how the names of those classes begin
_REGISTRY = f"{_MODELS}.registry"
# With any other, SGLang has a second class for Mixtral.
_MIXTRAL_QUANTIZATIONS = (None, "fp8", "compressed-tensors", "gptq_marlin", "awq_marlin", "quark_int4fp8_moe")


@dataclass(frozen=True)
class ModelClass:
    """Says what is known of the class that SGLang runs an architecture with."""

    is_fallback: bool  # SGLang has none of its own: Transformers' runs inside it
    has_layers: bool = True
    has_stages: bool = True


def model_class_of(
    architectures: Sequence[str], uses_transformers: bool, quantization: str | None = None
) -> ModelClass:
    """Finds the class for a model's configuration; `uses_transformers` where --model-impl asks for it."""
    if "MixtralForCausalLM" in architectures and quantization not in _MIXTRAL_QUANTIZATIONS:
        architectures = ["QuantMixtralForCausalLM"]
    if uses_transformers or any(each.startswith(_FALLBACKS) for each in architectures):
        return ModelClass(is_fallback=True)
    source = next(filter(None, map(source_of, architectures)), None)
    if source is None:
        return ModelClass(is_fallback=not any(each in _registered() for each in architectures))
    return ModelClass(is_fallback=False, has_layers=has_layers(source), has_stages=has_stages(source))


def source_of(architecture: str) -> ClassSource | None:
    """Finds the source of SGLang's own class for an architecture; None where there is none."""
    module = _module_of(architecture)
    return None if module is None else find_class(module, architecture)


def has_layers(model: ClassSource) -> bool:
    """Tells whether the decoder layers may be at `model.layers`; False where it is sure that they are not."""
    inner = _inner_of(model)
    if inner is None:
        return model.has("model")
    return inner.has("layers")


def has_stages(model: ClassSource) -> bool:
    """Tells whether the model may have pipeline stages; False where it is sure that it has none."""
    if not model.takes("forward", "pp_proxy_tensors"):
        return False
    inner = _inner_of(model)
    if inner is None:
        return model.has("model")
    return inner.has("pp_group") and inner.has("start_layer")


def _inner_of(model: ClassSource) -> ClassSource | None:
    """Finds the class of what is at `model.model`."""
    for cls in model.lineage:
        for value in cls.values_of("model"):
            if (inner := model.class_of(value, cls)) is not None:
                return inner
    return None


def _registered() -> Mapping[str, type]:
    """Returns what is in SGLang's registry, where a plugin has loaded it and may have changed it."""
    registry = sys.modules.get(_REGISTRY)
    models: Mapping[str, type] = {} if registry is None else registry.ModelRegistry.models
    return models


def _module_of(architecture: str) -> str | None:
    """Finds the module that SGLang's registry has the class from: one that has it as `EntryClass`, of the external
    package first."""
    if (cls := _registered().get(architecture)) is not None:
        return cls.__module__
    external = envs.SGLANG_EXTERNAL_MODEL_PACKAGE.get()
    for package in (*([external] if external else []), _MODELS):
        for module, text in _texts_of(package).items():
            if architecture.encode() in text and architecture in names_in(module, "EntryClass"):
                return module
    return None


@functools.cache
def _texts_of(package: str) -> dict[str, bytes]:
    """Reads the modules that the registry takes models from."""
    disabled = envs.SGLANG_DISABLED_MODEL_ARCHS.get()
    texts = {name: path.read_bytes() for name, path in modules_of(package).items() if path.stem not in disabled}
    return {name: text for name, text in texts.items() if b"EntryClass" in text}
