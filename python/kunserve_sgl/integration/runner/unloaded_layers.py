"""A model that SGLang loads without its layers, for a replica that is started again and takes these from others."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sglang.srt.model_loader.loader import DefaultModelLoader

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.runner.checkpoint_source import check_loadable
from kunserve_sgl.memory.layer_scan import KeptOutReason, SelectionRules, scan_layers

_LAYER = re.compile(r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
# What the model makes by itself, or writes to while it runs.
_NEVER_LOADED = (KeptOutReason.SHARED, KeptOutReason.SCRATCH)


class SkippedWeights:
    """Counts the weights of the checkpoint that were passed over."""

    count = 0


@contextlib.contextmanager
def without_layers(layer_count: int) -> Iterator[SkippedWeights]:
    """Lets SGLang's loader pass over the weights of the first `layer_count` decoder layers, whose memory is then as it
    was allocated. With memory-mapped files, SGLang's default, their bytes are not read. Only the loader that reads
    plain checkpoints does; with others nothing is skipped."""
    skipped = SkippedWeights()
    upstream = DefaultModelLoader._get_all_weights

    def all_but_layers(self: Any, config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in upstream(self, config, model):
            found = _LAYER.match(name) if type(self) is DefaultModelLoader else None
            if found is not None and int(found[1]) < layer_count:
                skipped.count += 1
            else:
                yield name, weight

    DefaultModelLoader._get_all_weights = all_but_layers
    try:
        yield skipped
    finally:
        DefaultModelLoader._get_all_weights = upstream


def why_to_load(config: Any, options: Any) -> str:
    """Says why the layers of a model are to be loaded from its checkpoint in any case, by SGLang's model config and
    server arguments; empty where nothing is known."""
    if config.quantization is not None or options.torchao_config:
        return "quantised weights are re-packed when they are loaded, and what is found out in that is not lent"
    return ""


def require_only_lent(model: torch.nn.Module, layers: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Raises ConfigurationError where the regions of `layers` would not hold all that loading gives them: what another
    replica lends would not be enough."""
    if any(hasattr(module, "post_load_weights") for module in model.modules()):
        raise ConfigurationError(f"{type(model).__name__} computes tensors from its weights when these are loaded")
    for contents in scan_layers(model, layers, device, SelectionRules()):
        layer_module = layers[contents.layer]
        names = [each.name for group in contents.groups for each in group.tensors]
        check_loadable(layer_module, contents.layer, names)
        state = layer_module.state_dict()
        for kept in contents.kept_out:
            if kept.name in state or kept.reason not in _NEVER_LOADED:
                raise ConfigurationError(f"layer {contents.layer}: {kept.name} is not lent: {kept.reason.value}")
