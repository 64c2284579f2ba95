"""What keeps KV that lies elsewhere from being attended to by messages, seen before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kunserve_sgl.cuda_attention import MOST_HEAD_DIM
from kunserve_sgl.integration.cpu_platform import ATTENTION_BACKEND

_CUDA_BACKENDS = ("flashinfer", "triton")
_LONG_NAMES = {"bf16": "bfloat16"}


def wrong_for_messages(server_args: Any, is_on_cpu: bool) -> Iterator[str]:
    """Says what is wrong in the resolved arguments; `is_on_cpu` says whether this is the CPU platform."""
    flag, accepted = "--kunserve-remote-attention message", "accepted: auto, map"
    if server_args.is_on_network:
        flag, accepted = "--kunserve-control network, which takes messages", "accepted: ipc, tcp"
    if server_args.tp_size > 1 and server_args.moe_dense_tp_size == 1:
        yield (
            f"{flag}: not with --moe-dense-tp-size 1 and --tp-size {server_args.tp_size}, as behind a dense layer each "
            f"rank has other tokens, and could not see that another lacks an answer; {accepted}"
        )
    if is_on_cpu:
        if server_args.attention_backend not in (None, ATTENTION_BACKEND):
            yield f"{flag}: not with --attention-backend {server_args.attention_backend}; {accepted}"
    elif server_args.device != "cuda":
        yield f"{flag}: not on --device {server_args.device} yet; {accepted}"
    else:
        yield from (f"{flag}: {wrong}" for wrong in _wrong_on_cuda(server_args, accepted))


def _wrong_on_cuda(server_args: Any, accepted: str) -> Iterator[str]:
    backends = sorted({str(backend) for backend in server_args.get_attention_backends()} - {*_CUDA_BACKENDS})
    if backends:
        yield (
            f"attention backend {', '.join(backends)} gives no log-sum-exp for a part of the KV here; accepted: "
            f"--attention-backend {' or '.join(_CUDA_BACKENDS)}"
        )
    if server_args.use_mla_backend():
        yield f"not for latent attention (MLA) on CUDA yet; {accepted}"
    if server_args.enable_deterministic_inference:
        yield (
            "the last bits of an answer depend on where its KV is, which is not what --enable-deterministic-inference "
            f"promises; {accepted}"
        )
    config = server_args.get_model_config()
    dtype = str(config.dtype).removeprefix("torch.")
    kv_dtype = _LONG_NAMES.get(server_args.kv_cache_dtype, server_args.kv_cache_dtype)
    if kv_dtype not in ("auto", dtype):
        yield (
            f"not with --kv-cache-dtype {server_args.kv_cache_dtype}, as KV goes into messages without a scale; "
            f"accepted for this model: auto, {dtype}"
        )
    if config.head_dim > MOST_HEAD_DIM:
        yield f"the heads of this model have {config.head_dim} dimensions; accepted: {MOST_HEAD_DIM} at most"
