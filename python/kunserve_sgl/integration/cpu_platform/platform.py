"""The CPU platform object that SGLang asks for defaults, classes and memory sizes on a CPU.

SGLang imports this module while it imports its own utilities, so the rest of SGLang is imported inside the methods.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform
from typing_extensions import override

from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.integration.cpu_platform import ATTENTION_BACKEND

logger = logging.getLogger(__name__)

# Share of the memory that is free at start which all replicas together may use for parameters and KV cache.
_MEMORY_SHARE = 0.6


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]
    """Lets SGLang run on a CPU: sockets and gloo between ranks, native operators, our attention backend."""

    _enum = PlatformEnum.OOT

    @override
    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fills what the user left open. SGLang calls it while it resolves its arguments."""
        if server_args.device != "cpu":
            raise ConfigurationError(f"--device {server_args.device}: there is no such accelerator here; accepted: cpu")
        ranks = server_args.dp_size * server_args.tp_size * server_args.pp_size
        if server_args.mem_fraction_static is None and server_args.max_total_tokens is None:
            # Every rank measures the whole machine's free memory, so each may take its part of it only.
            server_args.mem_fraction_static = round(_MEMORY_SHARE / ranks, 4)
        if "OMP_NUM_THREADS" not in os.environ:
            # Children inherit it. Without it every rank starts a thread per core, and ranks slow each other down.
            threads = max(1, len(os.sched_getaffinity(0)) // ranks)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            logger.info("OMP_NUM_THREADS=%d: cores shared by %d ranks", threads, ranks)
        from kunserve_sgl.integration.cpu_platform import attention

        attention.register()
        if server_args.use_ray and importlib.util.find_spec("ray") is not None:  # else SGLang says that it is missing
            from kunserve_sgl.integration.cpu_platform import ray_mode

            ray_mode.install()
        if server_args.attention_backend == "intel_amx":
            # What SGLang has filled in for every CPU by now; its kernels exist in its own CPU build only, and its
            # next choice would be torch_native.
            server_args.attention_backend = self.get_default_attention_backend()

    @override
    def init_backend(self) -> None:
        """Replaces what a CPU does not have. SGLang calls it once in every worker, before the model runner is
        defined."""
        from kunserve_sgl.integration.cpu_platform import (
            attention,
            grammar,
            kernels,
            layer_kernels,
            rank_group,
            runtime,
        )

        attention.register()
        grammar.install()
        kernels.install()
        layer_kernels.install()
        runtime.install()
        rank_group.install()

    @override
    def get_device(self, local_rank: int | None = 0) -> str:  # the mixin's torch.device breaks ServerArgs.device
        return "cpu"

    @override
    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    @override
    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool  # type: ignore[no-any-return]

    @override
    def get_mla_kv_pool_cls(self) -> type:
        from kunserve_sgl.integration.cpu_platform.pools import CpuMLATokenToKVPool

        return CpuMLATokenToKVPool

    @override
    def get_paged_allocator_cls(self) -> type:
        from kunserve_sgl.integration.cpu_platform.pools import make_allocator

        return make_allocator  # type: ignore[return-value]

    @override
    def get_compile_backend(self, mode: str | None = None) -> str:
        # Inductor would need a C++ compiler, and stop a replica for 15 s and more at the first batch that uses one of
        # SGLang's compiled functions (tensor parallelism, experts, a repetition penalty). `runtime.py` keeps torch from
        # tracing them.
        return "eager"

    @override
    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    @override
    def get_torch_profiler_activity(self) -> Any:
        import torch

        return torch.profiler.ProfilerActivity.CPU

    @override
    def empty_cache(self) -> None:
        """Does nothing. The mixin collects garbage instead, which stops a replica for half a second per flush."""
