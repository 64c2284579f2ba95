"""What KunServe cannot work with yet: values of SGLang's flags, and models. Each is refused before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kunserve_sgl.args import flag_of
from kunserve_sgl.errors import ConfigurationError


@dataclass(frozen=True)
class Refusal:
    """Refuses a value of an SGLang flag that KunServe cannot work with yet."""

    field: str
    accepted: tuple[Any, ...]
    reason: str

    @property
    def flag(self) -> str:
        """Gives the flag as it is written on the command line."""
        return flag_of(self.field)


# Each of these is refused at start, because a drop or restore would compute wrong answers or crash later, under load.
_OFF = (None, False, 0, "", "none", "null")
_KV_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e5m2", "fp8_e4m3")
_POLICIES = ("lpm", "random", "fcfs", "dfs-weight", "lof", "routing-key")
REFUSALS = (
    Refusal(
        "speculative_algorithm",
        _OFF,
        "the draft model shares the KV pool and its slots",
    ),
    Refusal(
        "disaggregation_mode",
        _OFF,
        "KV buffers are registered for RDMA at fixed places",
    ),
    Refusal("enable_dp_attention", _OFF, "its collectives span replicas in every layer"),
    Refusal(
        "enable_lora",
        _OFF,
        "adapter weights live in pools per layer outside the layer's region",
    ),
    Refusal(
        "lora_paths",
        (*_OFF, [], {}),
        "adapter weights live in pools outside the layer's region",
    ),
    Refusal("pp_size", (1,), "KunServe forms pipelines itself, across replicas"),
    Refusal("enable_memory_saver", _OFF, "it frees the memory that KunServe moves"),
    Refusal("cpu_offload_gb", _OFF, "it moves parameters behind KunServe's back"),
    Refusal(
        "enable_hierarchical_cache",
        _OFF,
        "its host pool copies every layer's KV",
    ),
    Refusal("enable_eplb", _OFF, "it moves experts between ranks"),
    Refusal("elastic_ep_backend", _OFF, "ranks may come and go in the middle of a layer"),
    Refusal("moe_a2a_backend", _OFF, "its collectives span replicas in every MoE layer"),
    Refusal(
        "enable_two_batch_overlap",
        _OFF,
        "it runs all layers of a batch in one go",
    ),
    Refusal("enable_pdmux", _OFF, "prefill and decode use separate communicators"),
    Refusal("nnodes", (1,), "replicas on several nodes are started by Ray: --use-ray"),
    Refusal("encoder_only", _OFF, "there is no KV cache to extend"),
    Refusal("smg_grpc_mode", _OFF, "KunServe is attached to the HTTP server"),
    Refusal("attn_cp_size", (1,), "a request's KV is spread over context-parallel ranks"),
    Refusal("dcp_size", (1,), "a request's KV is spread over context-parallel ranks"),
    Refusal("ep_size", (1,), "experts of one layer live on several ranks"),
    Refusal("dwdp_size", (None, 0, 1), "expert weights are fetched from peers at fixed addresses"),
    Refusal("offload_group_size", (-1, 0), "it moves parameters behind KunServe's back"),
    Refusal("kt_num_gpu_experts", _OFF, "it moves experts behind KunServe's back"),
    Refusal("weight_cache_mode", ("off",), "parameters stay with another process"),
    Refusal(
        "enable_unified_memory",
        _OFF,
        "it replaces the KV pools that KunServe extends",
    ),
    Refusal("enable_hisparse", _OFF, "it replaces the KV pools that KunServe extends"),
    Refusal("enable_lmcache", _OFF, "it copies every layer's KV from fixed addresses"),
    Refusal("enable_flexkv", _OFF, "it copies every layer's KV from fixed addresses"),
    Refusal(
        "enable_return_routed_experts",
        _OFF,
        "the experts of a layer are noted where the layer runs",
    ),
    Refusal(
        "expert_distribution_recorder_mode",
        _OFF,
        "the experts of a layer are noted where the layer runs",
    ),
    Refusal(
        "enable_return_indexer_topk",
        _OFF,
        "what a layer selects is noted where the layer runs",
    ),
    Refusal("tokenizer_worker_num", (1,), "KunServe's routes are in one HTTP server process"),
    Refusal(
        "enable_streaming_session",
        _OFF,
        "its sessions keep KV slots that KunServe could not move",
    ),
    Refusal(
        "enable_session_radix_cache",
        _OFF,
        "it needs a radix cache that KunServe does not know",
    ),
    Refusal("radix_cache_backend", _OFF, "KunServe knows SGLang's plain radix cache only"),
    Refusal(
        "schedule_policy",
        _POLICIES,
        f"SGLang's schedulers do not know that policy; accepted: {', '.join(_POLICIES)}",
    ),
    Refusal(
        "kv_cache_dtype",
        _KV_DTYPES,
        f"its scales are in buffers of their own, which do not grow; accepted: {', '.join(_KV_DTYPES)}",
    ),
    Refusal("dllm_algorithm", _OFF, "diffusion models do not decode token by token"),
)


def check_supported(server_args: Mapping[str, Any]) -> None:
    """Raises ConfigurationError that names every flag in `server_args` that KunServe cannot work with."""
    found = [
        refusal
        for refusal in REFUSALS
        if refusal.field in server_args and server_args[refusal.field] not in refusal.accepted
    ]
    if not found:
        return
    lines = [f"{refusal.flag} {server_args[refusal.field]!r}: {refusal.reason}" for refusal in found]
    raise ConfigurationError(
        "KunServe does not support these flags yet:\n  "
        + "\n  ".join(lines)
        + "\nLeave them out, or run without KunServe: --kunserve off"
    )


@dataclass(frozen=True, kw_only=True)
class ModelTraits:
    """Says what KunServe must know of a model before it loads; read from the model's configuration and its class'
    source."""

    architecture: str
    is_hybrid: bool = False
    is_generation: bool = True
    is_multimodal: bool = False
    is_fallback: bool = False
    has_layers: bool = True
    has_stages: bool = True


def check_model(traits: ModelTraits, replicas: int) -> None:
    """Raises ConfigurationError for a model whose KV pools KunServe cannot extend, whose layers need more of a batch
    than their layer hosts are told, or of which, with several replicas, none can run some of the layers."""
    reason = None
    if traits.is_hybrid:
        reason = "it mixes attention kinds (sliding window, Mamba, linear or sparse), each with a KV pool of its own"
    elif not traits.is_generation:
        reason = "it does not generate tokens, so there is no KV cache to extend"
    elif traits.is_multimodal:
        reason = "images and other media give its layers inputs and positions that the hosts of a batch are not told"
    elif not traits.has_layers:
        reason = "SGLang's class for it does not have its decoder layers at model.layers"
    elif replicas > 1 and traits.is_fallback:
        reason = "SGLang has no class of its own for it, and of Transformers' code replicas cannot run a part"
    elif replicas > 1 and not traits.has_stages:
        reason = "SGLang's class for it has no pipeline stages, so replicas cannot host its layers for each other"
    if reason is not None:
        raise ConfigurationError(
            f"KunServe does not support model architecture {traits.architecture} yet: {reason}. Accepted are language "
            "models that SGLang runs in pipeline stages, such as LlamaForCausalLM or Qwen3ForCausalLM; run this one "
            "without KunServe: --kunserve off"
        )
