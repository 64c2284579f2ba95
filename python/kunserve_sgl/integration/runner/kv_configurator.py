"""Builds the KV pool and the allocator of a replica over elastic memory, where SGLang would build its own."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache import kv_cache_configurator as upstream
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from torch._C._distributed_c10d import FileStore
from typing_extensions import override

from kunserve_sgl.args import Activations
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.attach.attachment import current_attachment
from kunserve_sgl.integration.runner.elastic_allocator import make_elastic_allocator
from kunserve_sgl.integration.runner.elastic_pools import (
    ElasticMHATokenToKVPool,
    ElasticMLATokenToKVPool,
    kv_buffers,
)
from kunserve_sgl.integration.runner.memory_budget import (
    activation_buffer_bytes,
    bytes_of_slots,
    least_fraction,
    measured_together,
    most_prefill_tokens,
    part_of_gpu,
    slots_that_fit,
)
from kunserve_sgl.integration.runner.request_rows import KunserveReqToTokenPool
from kunserve_sgl.replica.replica_memory import ReplicaMemory, make_vmm

# Of the first replica on a GPU to have its model loaded for the others. The server ends sooner where one fails.
_LOAD_TIMEOUT_S = 1800.0


class KunserveKVCacheConfigurator(KVCacheConfigurator):  # type: ignore[misc]
    """Decides what memory is behind the tokens. How many fit, SGLang decides, of what is left beside KunServe's own."""

    memory: ReplicaMemory  # set by the model runner right after construction

    def __post_init__(self) -> None:
        super().__post_init__()
        current_attachment().mark_used(type(self))

    @override
    def _profile_available_bytes(self, pre_model_load_memory: float) -> int:
        """Returns the bytes for the KV cache and its sink: without the activation buffer, which is made later. For a
        replica that is started again they are what its first slots take: others count on those, and what is free now
        may be another one's."""
        if slots := self.server_args.kunserve_base_slots:
            return bytes_of_slots(slots, self._kv_buffers(), self.memory.vmm.frame_bytes, self.pool_page_size)
        if self.server_args.kunserve_replicas_per_gpu > 1:
            available = self._part_of_gpu()
        else:
            available = int(super()._profile_available_bytes(pre_model_load_memory))
        options = self.server_args
        if options.dp_size == 1 or options.kunserve_activations == Activations.COLLECTIVE.value:
            return available
        requests = self.resolve_max_num_reqs(super().config_from_budget(available).max_total_num_tokens)
        prefill = most_prefill_tokens(
            options.chunked_prefill_size, options.max_prefill_tokens, self.model_config.context_len
        )
        return available - activation_buffer_bytes(
            prefill, requests, self.model_config.hidden_size, self.model_dtype, self.memory.vmm.frame_bytes
        )

    def _part_of_gpu(self) -> int:
        """Measures with the other replicas on this GPU, when all have loaded, so that each gets the same. Raises
        ConfigurationError where nothing is left."""
        options = self.server_args
        sharing = options.kunserve_replicas_per_gpu
        group, member = divmod(self.ps.dp_rank, sharing)
        device = torch.get_device_module(self.device)
        device.empty_cache()  # of what loading has left, before another one measures
        store = FileStore(str(Path(options.kunserve_directory) / f"memory-{group}-{self.ps.tp_rank}"))
        free = measured_together(store, sharing, member, self._free_bytes, _LOAD_TIMEOUT_S)
        total = device.mem_get_info(self.gpu_id)[1]
        budget = part_of_gpu(free, total, sharing, options.mem_fraction_static)
        if budget <= 0:
            raise ConfigurationError(
                f"--mem-fraction-static {options.mem_fraction_static}: with {sharing} replicas per GPU it leaves no "
                f"memory for the KV cache; accepted: more than {least_fraction(free, total):.3f}"
            )
        return budget

    def _free_bytes(self) -> int:
        """Measures what is free on the GPU of this rank, or on that of the rank of this replica with the least."""
        world = upstream.get_world_group()
        free_gib = upstream.get_available_gpu_memory(
            self.device, self.gpu_id, distributed=world.world_size > 1, cpu_group=world.cpu_group
        )
        return int(free_gib * 2**30)

    @override
    def config_from_budget(self, budget_bytes: int, *, cap_tokens: int | None = None) -> Any:
        """Takes no more tokens than fit in whole granules, beside the sink. Raises ConfigurationError where none do."""
        frame_bytes = self.memory.vmm.frame_bytes
        most = slots_that_fit(budget_bytes, self._kv_buffers(), frame_bytes, self.pool_page_size)
        if not most:
            raise ConfigurationError(
                f"{budget_bytes} bytes are left for the KV cache, less than the sink and the smallest number of slots "
                f"take with frames of {frame_bytes} bytes; accepted: a larger --mem-fraction-static, or a smaller "
                "--kunserve-frame-bytes"
            )
        return super().config_from_budget(
            budget_bytes, cap_tokens=most if cap_tokens is None else min(most, cap_tokens)
        )

    def _kv_buffers(self) -> list[Any]:
        config, item_bytes = self.model_config, self.kv_cache_dtype.itemsize
        if self.use_mla_backend:
            row_bytes = {"latent": (config.kv_lora_rank + config.qk_rope_head_dim) * item_bytes}
        else:
            heads = config.get_num_kv_heads(upstream.get_parallel().attn_tp_size)
            row_bytes = {"k": heads * config.head_dim * item_bytes, "v": heads * config.v_head_dim * item_bytes}
        return kv_buffers(self.layer_info.num_effective_layers, row_bytes)

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
