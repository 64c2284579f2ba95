"""Builds SGLang's models without weights and prints what can be done with their layers: a line of JSON for each.

Its argument is the directory of any model that can be served.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.runtime_context import publish
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.launcher.server_args import prepare_server_args
from kunserve_sgl.integration.runner.layer_range import LayerRange
from kunserve_sgl.integration.runner.model_runner import decoder_layers

# What Transformers has under another name, or SGLang's class needs besides.
TYPES = {"Llama4ForCausalLM": "llama4_text"}
FIELDS: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {
        "rope_parameters": {"rope_type": "deepseek_yarn", "rope_theta": 10000.0, "factor": 1.0},
        **{"moe_layer_freq": 1, "first_k_dense_replace": 1, "topk_method": "greedy", "scoring_func": "softmax"},
        **{"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    },
    "Llama4ForCausalLM": {"pad_token_id": 0},
}


def config_of(architecture: str) -> Any:
    """A configuration with two layers; KeyError where Transformers has none."""
    types = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            types[name] = model_type
    model_type = TYPES.get(architecture) or types[architecture]
    return CONFIG_MAPPING[model_type](num_hidden_layers=2, architectures=[architecture], **FIELDS.get(architecture, {}))


def accepts(check: Callable[[Any], Any], model: Any) -> bool:
    try:
        check(model)
    except ConfigurationError:
        return False
    return True


def report_on(architecture: str, cls: type) -> dict[str, Any]:
    try:
        config = config_of(architecture)
        with torch.device("meta"):
            model = cls(config=config, quant_config=None)
    except Exception as error:  # noqa: BLE001 - many models need more than a small configuration
        return {"not_built": f"{type(error).__name__}: {error}"}
    return {"layers": accepts(decoder_layers, model), "stages": accepts(LayerRange, model)}


def main() -> None:
    server_args = prepare_server_args(["--model-path", sys.argv[1], "--kunserve", "manual"])
    logging.disable(logging.CRITICAL)
    publish(server_args, role="scheduler")
    with tempfile.TemporaryDirectory() as directory:
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{directory}/rendezvous", backend="gloo"
        )
        parallel_state.initialize_model_parallel(backend="gloo")
        initialize_dp_attention(server_args, server_args.get_model_config())
        for architecture, cls in sorted(ModelRegistry.models.items()):
            print(json.dumps({"architecture": architecture, **report_on(architecture, cls)}))
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


if __name__ == "__main__":
    main()
