"""Builds the KV pool and the allocator of a replica over elastic memory, where SGLang would build its own."""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.attach.attachment import current_attachment
from kunserve_sgl.integration.runner.elastic_allocator import make_elastic_allocator
from kunserve_sgl.integration.runner.elastic_pools import ElasticMHATokenToKVPool, ElasticMLATokenToKVPool
from kunserve_sgl.integration.runner.request_rows import KunserveReqToTokenPool
from kunserve_sgl.replica.replica_memory import ReplicaMemory, make_vmm


class KunserveKVCacheConfigurator(KVCacheConfigurator):  # type: ignore[misc]
    """Decides what memory is behind the tokens; how many fit, SGLang decides."""

    memory: ReplicaMemory  # set by the model runner right after construction

    def __post_init__(self) -> None:
        super().__post_init__()
        current_attachment().mark_used(type(self))

    def _build_default_req_pool(self, *, max_num_reqs: int, extra_max_context_len: int) -> Any:
        options = self.memory.options
        # Frames of its own: a table that SGLang has beside the KV cache must not take from what it counts as KV.
        return KunserveReqToTokenPool(
            max_num_reqs,
            self.model_config.context_len + extra_max_context_len,
            self.device,
            make_vmm(options.frame_bytes, self.device, self.gpu_id),
            self.memory.replica,
            options.max_replicas,
        )

    def _build_token_to_kv_pool(
        self, *, sizes: Any, is_dsa_model: bool, is_dsv4_model: bool, req_to_token_pool: Any
    ) -> Any:
        if is_dsa_model or is_dsv4_model or self.mambaish_config or self.is_hybrid_swa:
            raise ConfigurationError(
                "KunServe extends plain MHA, GQA and MLA KV caches only; run this model with --kunserve off"
            )
        if self.use_mla_backend:
            return self._build_elastic_mla_pool(sizes.max_total_num_tokens)
        pool_class = functools.partial(ElasticMHATokenToKVPool, memory=self.memory)
        return self._build_mha_kv_pool(max_total_num_tokens=sizes.max_total_num_tokens, mha_pool_class=pool_class)

    def _build_elastic_mla_pool(self, max_total_num_tokens: int) -> ElasticMLATokenToKVPool:
        return ElasticMLATokenToKVPool(
            max_total_num_tokens,
            page_size=self.pool_page_size,
            dtype=self.kv_cache_dtype,
            kv_lora_rank=self.model_config.kv_lora_rank,
            qk_rope_head_dim=self.model_config.qk_rope_head_dim,
            layer_num=self.layer_info.num_effective_layers,
            device=self.device,
            enable_memory_saver=False,
            start_layer=self.layer_info.start_layer,
            end_layer=self.layer_info.end_layer,
            memory=self.memory,
        )

    def _build_token_to_kv_pool_allocator(
        self, *, sizes: Any, token_to_kv_pool: Any, token_to_kv_pool_allocator: Any, **_: Any
    ) -> Any:
        if token_to_kv_pool_allocator is not None:
            raise ConfigurationError("KunServe does not share a KV cache with a draft model")
        return make_elastic_allocator(
            sizes.max_total_num_tokens,
            self.page_size,
            first_slot=token_to_kv_pool.elastic.slots.first,
            dtype=self.kv_cache_dtype,
            device=self.device,
            kvcache=token_to_kv_pool,
            need_sort=False,
        )
