"""Every architecture of the tiny models that is said to run on a CPU does, with the tokens of its reference. Cut
into ranges of layers, and with all layers dropped and restored, it computes the same, and so do architectures that
there are no tiny models of. See `_model_program.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import ARCHITECTURES, MlaSpec, TinyModelSpec
from preloaded import Preloaded

pytestmark = pytest.mark.server

PROGRAM = Path(__file__).with_name("_model_program.py")
DEADLINE_S = 1500
TINY = {
    **{name: TinyModelSpec(arch=name, dtype="float32") for name, entry in ARCHITECTURES.items() if entry.runs_on_cpu},
    "deepseek_v2-q-lora": TinyModelSpec(arch="deepseek_v2", layers=3, mla=MlaSpec(q_lora_rank=48), dtype="float32"),
}

Config = dict[str, Any]
_SIZES: Config = {
    **{"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 1024},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
}
_EXPERTS: Config = {
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    **{"first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
    **{"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
_LATENT: Config = {
    **{"kv_lora_rank": 64, "q_lora_rank": 48, "num_key_value_heads": 4},
    **{"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32},
}
_YARN: Config = {
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.0, "original_max_position_embeddings": 1024}
    }
}
# SGLang's class, the kind of configuration, and what is in it beside the sizes.
CONFIGURED: dict[str, tuple[str, Config]] = {
    "ApertusForCausalLM": ("apertus", {}),
    "ArceeForCausalLM": ("arcee", {"hidden_act": "relu2"}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", _EXPERTS | _LATENT | _YARN),
    "Glm4ForCausalLM": ("glm4", {"head_dim": 32}),
    "Glm4MoeLiteForCausalLM": ("glm4_moe_lite", _EXPERTS | _LATENT),
    "Ministral3ForCausalLM": ("ministral3", {"head_dim": 32, "sliding_window": None}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "SDARForCausalLM": ("qwen3", {"head_dim": 32}),
    "SDARMoeForCausalLM": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    "TeleFLMForCausalLM": (
        "llama",
        {"use_mup": True, "input_mult": 2.0, "output_mult": 0.5, "mup_scale_factor": 1.0},
    ),
}


def require_right(name: str, output: str) -> None:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    wrong = {Path(line["model"]).name: line["wrong"] for line in lines}
    assert name in wrong, output
    assert wrong[name] is None, output


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, preloaded: Preloaded) -> str:
    """What the program says of all models. Importing SGLang takes longer than a model."""
    directory = tmp_path_factory.mktemp("models")
    for name, spec in TINY.items():
        write_tiny_model(spec, directory / name)
    for name, (kind, values) in CONFIGURED.items():
        config = AutoConfig.for_model(kind, **(_SIZES | values)).to_dict()
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(config | values | {"architectures": [name]}))
    models = [str(directory / name) for name in (*TINY, *CONFIGURED)]
    return preloaded.output_of(str(PROGRAM), *models, deadline_s=DEADLINE_S)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_computes_the_same_dropped_and_restored(name: str, answers: str) -> None:
    require_right(name, answers)


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_model_of_random_weights_computes_the_same_dropped_and_restored(name: str, answers: str) -> None:
    require_right(name, answers)
