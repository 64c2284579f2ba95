"""SGLang's attention backend interface over `cpu_attention.paged_attention`, and its registration under our name."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from typing_extensions import override

from kunserve_sgl.cpu_attention import merging
from kunserve_sgl.cpu_attention.paged_attention import (
    SUPPORTED_DTYPES,
    AttentionPlan,
    DecodePlanner,
    PagedAttention,
    plan_attention,
)
from kunserve_sgl.errors import ConfigurationError, InvariantError
from kunserve_sgl.exchange.attention_service import PartAttention
from kunserve_sgl.exchange.remote_attention import RemoteAttention
from kunserve_sgl.integration.attention import layer_kinds
from kunserve_sgl.integration.attention.divided_attention import DividedAttention
from kunserve_sgl.integration.attention.part_attention import PoolAttention
from kunserve_sgl.integration.attention.pool_parts import attention_layers, holds_keys_of
from kunserve_sgl.integration.cpu_platform import ATTENTION_BACKEND
from kunserve_sgl.integration.cpu_platform.paged_parts import PagedKernels

# On the forward batch itself, not on the backend: several batches may be in flight, each between two of its layers.
_PLAN_ATTRIBUTE = "kunserve_attention_plan"


def register() -> None:
    """Makes `--attention-backend kunserve_host` known to SGLang in this process. Idempotent.

    The command line accepts the name only if this ran before its parser was built.
    """
    from sglang.srt import server_args

    if ATTENTION_BACKEND not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([ATTENTION_BACKEND])
    attention_registry.register_attention_backend(ATTENTION_BACKEND)(_create)


def _create(runner: Any) -> CpuAttentionBackend:
    """Makes the backend. SGLang's model runner calls it once its pools exist, so every module below is loaded
    already."""
    _use_torch_helpers()
    if runner.use_mla_backend:
        _attend_latent_keys()
    return CpuAttentionBackend(runner)


def _use_torch_helpers() -> None:
    """Makes four helpers of SGLang use torch. By the backend's name it would decide for Triton, which has no CPU.
    Idempotent."""
    from sglang.srt.layers.rotary_embedding import mrope
    from sglang.srt.mem_cache import allocation
    from sglang.srt.model_executor import forward_batch_info

    for module in (allocation, forward_batch_info, mrope):
        module.support_triton = _support_triton
    allocation.get_last_loc_triton = allocation.get_last_loc_torch


def _support_triton(backend: str) -> bool:
    from sglang.srt.utils import support_triton

    return backend != ATTENTION_BACKEND and bool(support_triton(backend))


def _attend_latent_keys() -> None:
    """Makes DeepSeek's attention always take its absorbed form, over the latent keys in the cache, also in prefill.

    A backend of unknown name would expand keys and values in a prefill without cached prefix, which is rounded
    differently: in bfloat16 an answer would depend on whether its prompt was in the radix cache.
    """
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    def always_absorbed(attention: Any, forward_batch: Any) -> Any:
        return handlers._dispatch_mla_subtype(attention, forward_batch)

    handlers.AttentionBackendRegistry.register(ATTENTION_BACKEND, always_absorbed)


class CpuAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """Computes attention on the CPU for a batch as a whole: prefill, cached prefix, decode and both mixed.

    The answer of a request does not depend on the other requests of its batch, on chunking, or on cached prefixes.
    """

    def __init__(self, runner: Any) -> None:
        _refuse_configuration(runner)
        super().__init__()
        # SGLang finds the pools of the running forward pass through its backend.
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.forward_metadata = None
        self._bidirectional: dict[Any, bool] = {}
        self._divided: DividedAttention | None = None
        self.attention = PagedAttention()
        table_dtype = self.req_to_token_pool.req_to_token.dtype
        self._decode_planner = DecodePlanner(self.req_to_token_pool.req_to_token)
        self.attention.warm_up(runner.dtype, runner.kv_cache_dtype, table_dtype=table_dtype)

    @override
    def support_triton(self) -> bool:
        return False

    def part_attention(self, model: torch.nn.Module, dtype: torch.dtype) -> PartAttention:
        """Makes what attends to parts of batches in a thread of its own. `dtype` is that of the model's queries."""
        return self._pool_attention(PagedAttention(), model, dtype)

    def divide(self, remote: RemoteAttention, model: torch.nn.Module, dtype: torch.dtype) -> None:
        """Lets what of a batch's KV is elsewhere be attended to there."""
        own = self._pool_attention(self.attention, model, dtype)
        merging.warm_up()
        self._divided = DividedAttention(remote, own, self.req_to_token_pool.req_to_token, merging.MergePlan)

    def _pool_attention(self, attention: PagedAttention, model: torch.nn.Module, dtype: torch.dtype) -> PoolAttention:
        attention.warm_up(dtype, self.token_to_kv_pool.dtype, output_dtype=torch.float32)
        kernels = PagedKernels(attention)
        return PoolAttention(kernels, self.token_to_kv_pool, attention_layers(model), dtype, torch.device("cpu"))

    @override
    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plans the batch from forward_mode, req_pool_indices, seq_lens and, unless it decodes, extend_seq_lens."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        rows = forward_batch.req_pool_indices
        if mode.is_decode():
            plan = self._decode_planner.plan(rows, forward_batch.seq_lens)
        elif mode.is_extend_or_draft_extend_or_mixed():
            table = self.req_to_token_pool.req_to_token
            plan = plan_attention(table, rows, forward_batch.extend_seq_lens, forward_batch.seq_lens)
        else:
            raise ConfigurationError(f"attention backend {ATTENTION_BACKEND} does not run {mode.name} batches")
        setattr(forward_batch, _PLAN_ATTRIBUTE, plan)

    @override
    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Output (tokens, q_heads * v_head_dim) of one layer, for batches of every mode.

        `k` and `v` go into the cache at out_cache_loc first, unless `save_kv_cache` is false or they are None; then
        all keys and values, also those of the new tokens, are read from the cache.
        """
        _refuse_arguments(layer, kwargs)
        if layer not in self._bidirectional:
            self._bidirectional[layer] = _attends_both_ways(layer)
        plan: AttentionPlan | None = getattr(forward_batch, _PLAN_ATTRIBUTE, None)
        if plan is None:
            raise InvariantError(f"layer {layer.layer_id}: init_forward_metadata was not called for this batch")
        if self._divided is not None:
            stored = (k, v) if save_kv_cache else (None, None)
            if (output := self._divided.forward(q, *stored, layer, forward_batch)) is not None:
                return output
        if save_kv_cache and k is not None:
            self._store(layer, forward_batch.out_cache_loc, k, v)
        if self._bidirectional[layer]:
            plan = plan.bidirectional()
        return self._attend(plan, layer, q).view(-1, layer.tp_q_head_num * layer.v_head_dim)

    forward_extend = forward_decode

    def _attend(self, plan: AttentionPlan, layer: Any, query: torch.Tensor) -> torch.Tensor:
        """Computes attention over the slots of `plan`: (tokens, q_heads, v_head_dim). Writes nothing."""
        pool = self.token_to_kv_pool
        key, value = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        if not holds_keys_of(pool, layer):
            raise InvariantError(
                f"layer {layer.layer_id} wants keys {(layer.tp_k_head_num, layer.qk_head_dim)} per token, "
                f"the cache holds {tuple(key.shape[1:])}"
            )
        output, _ = self.attention.attend(
            plan,
            query.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            key,
            value,
            scale=layer.scaling,
            logit_cap=layer.logit_cap or 0.0,
            sliding_window=layer.sliding_window_size,
        )
        return output

    def _store(self, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None) -> None:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(slots), k, v)


def _refuse_configuration(runner: Any) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    arguments = runner.server_args
    accepted = "accepted: " + ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
    who = f"attention backend {ATTENTION_BACKEND}"
    if str(runner.device) != "cpu":
        raise ConfigurationError(f"{who}: runs on the CPU only, not on --device {runner.device}")
    if runner.dtype not in SUPPORTED_DTYPES:
        raise ConfigurationError(f"{who}: --dtype {arguments.dtype} is {runner.dtype}; {accepted}")
    if runner.kv_cache_dtype not in SUPPORTED_DTYPES:
        raise ConfigurationError(
            f"{who}: --kv-cache-dtype {arguments.kv_cache_dtype} is {runner.kv_cache_dtype}; {accepted}"
        )
    if arguments.speculative_algorithm is not None:
        raise ConfigurationError(f"{who}: no --speculative-algorithm, got {arguments.speculative_algorithm}")
    if not isinstance(runner.token_to_kv_pool, MHATokenToKVPool | MLATokenToKVPool):
        raise ConfigurationError(
            f"{who}: the model needs a {type(runner.token_to_kv_pool).__name__}; "
            f"models whose layers all use an ordinary (MHA, GQA, MQA) or latent (MLA) cache are accepted"
        )


def _attends_both_ways(layer: Any) -> bool:
    """Tells whether the causal rule is off for this layer. Refuses the kinds of attention that are missing here."""
    for feature in layer_kinds.missing(layer):
        raise ConfigurationError(
            f"attention backend {ATTENTION_BACKEND}: layer {layer.layer_id} needs {feature}, which it does not have"
        )
    return layer_kinds.attends_both_ways(layer)


def _refuse_arguments(layer: Any, arguments: dict[str, Any]) -> None:
    for name, argument in arguments.items():
        if argument is not None:
            raise ConfigurationError(
                f"attention backend {ATTENTION_BACKEND}: layer {layer.layer_id} passes {name}, which it does not have"
            )
