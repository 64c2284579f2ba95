"""Lets SGLang's attention backends on CUDA attend to batches whose KV is divided over homes. Untried on CUDA.

Batches of which all KV is here go the backend's own way, with its graphs. Others are planned and attended to part by
part (`divided_attention.py`), in the stream in which the layers run; what peers ask for is attended to in the stream of
the thread that serves memory, by kernels and buffers of its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kunserve_sgl.cuda_attention.merging import DeviceMergePlan
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.exchange.device_copies import finish
from kunserve_sgl.exchange.remote_attention import RemoteAttention
from kunserve_sgl.integration.attention import layer_kinds
from kunserve_sgl.integration.attention.divided_attention import DividedAttention
from kunserve_sgl.integration.attention.flashinfer_parts import FlashInferKernels
from kunserve_sgl.integration.attention.part_attention import PartKernels, PoolAttention
from kunserve_sgl.integration.attention.pool_parts import attention_layers
from kunserve_sgl.integration.attention.triton_parts import TritonKernels


def part_attention(runner: Any, device: torch.device) -> PoolAttention:
    """Makes what attends to parts of batches in a runner's pool, for one thread, and runs it once. Raises
    ConfigurationError for a model with layers whose attention is missing here, or KV of another type than queries."""
    kept = runner.token_to_kv_pool.dtype
    if kept != runner.dtype:  # with --kv-cache-dtype auto a quantized checkpoint decides
        raise ConfigurationError(
            f"--kunserve-remote-attention message: this model keeps KV as {kept}, and KV goes into messages without a "
            f"scale, as {runner.dtype}; accepted: auto, map, or with --kv-cache-dtype KV of that type"
        )
    layers = attention_layers(runner.model)
    for layer in layers:
        missing = [*layer_kinds.missing(layer)]
        if layer_kinds.attends_both_ways(layer):
            missing.append("attention in both directions")
        if missing:
            raise ConfigurationError(
                f"--kunserve-remote-attention message: layer {layer.layer_id} needs {', '.join(missing)}, which parts "
                "of attention do not have on CUDA; accepted: auto, map"
            )
    found = PoolAttention(_kernels(runner.server_args, device), runner.token_to_kv_pool, layers, runner.dtype, device)
    found.warm_up()
    finish(device)
    return found


def divide(runner: Any, remote: RemoteAttention, device: torch.device) -> None:
    """Lets what of a batch's KV is elsewhere be attended to there. Its backend's `forward`, which all layers call, is
    replaced on the object: SGLang may have put it together of two, and asks for its class."""
    own = part_attention(runner, device)
    merge_plan = partial(DeviceMergePlan, device=device)
    divided = DividedAttention(remote, own, runner.req_to_token_pool.req_to_token, merge_plan)
    backend = runner.attn_backend
    undivided = backend.forward

    def forward(
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> Any:
        for name, argument in kwargs.items():
            if argument is not None:
                raise ConfigurationError(
                    f"--kunserve-remote-attention message: layer {layer.layer_id} passes {name}, which parts of "
                    "attention do not have on CUDA; accepted: auto, map"
                )
        if not forward_batch.forward_mode.is_idle():
            stored = (k, v) if save_kv_cache else (None, None)
            if (output := divided.forward(q, *stored, layer, forward_batch)) is not None:
                return output
        return undivided(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    backend.forward = forward
    # See patches/0006-fused-kv-stores.patch.
    runner.token_to_kv_pool.kv_may_be_elsewhere = True


def _kernels(server_args: Any, device: torch.device) -> PartKernels:
    """Returns the kernels of the backend that decodes; a thread has its own, for the plans that they keep."""
    by_triton = TritonKernels(device, server_args.triton_attention_num_kv_splits)
    _, decodes = server_args.get_attention_backends()
    return FlashInferKernels(device, by_triton) if decodes == "flashinfer" else by_triton
