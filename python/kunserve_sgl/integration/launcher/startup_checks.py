"""What makes a start fail for sure and can be seen before anything starts: numbers, files, the port, this platform.

Each would end a scheduler after the load, or the launcher when all others are ready. What KunServe cannot work with is
in `unsupported.py`.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import socket
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.platforms import current_platform

from kunserve_sgl.args import flag_of, too_small
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.host_memory import free_host_bytes
from kunserve_sgl.integration.cpu_platform import ATTENTION_BACKEND
from kunserve_sgl.integration.cpu_platform.platform import CpuPlatform
from kunserve_sgl.integration.launcher.message_checks import wrong_for_messages
from kunserve_sgl.integration.placement import gpu_count

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # what SGLang looks for with --load-format auto
_CONFIGURATIONS = ("config.json", "params.json")  # the second is Mistral's
_DIVISORS = dict.fromkeys(("dp_size", "tp_size"), 1)  # least values
_AT_LEAST = dict.fromkeys(
    (
        *("page_size", "max_running_requests", "max_total_tokens", "max_prefill_tokens", "context_length"),
        *("stream_interval", "decode_log_interval"),
    ),
    1,
)
_SEEDS = 2**32  # NumPy's generators take no others
_CPU_ATTENTION_BACKENDS = (ATTENTION_BACKEND, "torch_native")
_CPU_DTYPES = ("float32", "bfloat16")
_CPU_KV_DTYPES = ("auto", "bf16", "bfloat16")


def check_sizes(raw: Any) -> None:
    """Checks sizes before SGLang divides by them while it resolves its arguments. Raises ConfigurationError."""
    for message in too_small(vars(raw), _DIVISORS):
        raise ConfigurationError(message)


def check_model_path(path: str) -> None:
    """Checks a path before SGLang takes a directory that is missing for the name of a repository, and complains of its
    form. Raises ConfigurationError."""
    if _is_missing(path):
        raise ConfigurationError(f"--model-path {path}: there is no such file or directory")
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in _CONFIGURATIONS):
        raise ConfigurationError(f"--model-path {path}: accepted: a directory with {' or '.join(_CONFIGURATIONS)}")


def check_ray_is_there() -> None:
    """Raises ConfigurationError unless Ray is installed."""
    if find_spec("ray") is None:
        raise ConfigurationError("--use-ray: Ray is not installed; the extra `ray` has it: pip install -e '.[ray]'")


def check_ray(raw: Mapping[str, Any]) -> None:
    """Checks flags for replicas that Ray starts, each on one of --nnodes nodes. Raises ConfigurationError."""
    replicas, nodes, sharing = raw["dp_size"], raw["nnodes"], raw["kunserve_replicas_per_gpu"]
    if replicas < 2:
        raise ConfigurationError(
            f"--use-ray with --dp-size {replicas}: accepted: 2 replicas or more; one that shares with nobody is served "
            "by Ray with --kunserve off"
        )
    if not 1 <= nodes <= replicas:
        raise ConfigurationError(
            f"--nnodes {nodes}: a replica is on one node; accepted with --use-ray: 1 to --dp-size {replicas}"
        )
    if sharing > 1:
        raise ConfigurationError(
            f"--kunserve-replicas-per-gpu {sharing}: Ray gives every scheduler a GPU of its own; accepted with "
            "--use-ray: 1"
        )
    if raw["kunserve_host_copy"] and nodes > 1:
        raise ConfigurationError(
            f"--kunserve-host-copy: all replicas map one copy, so they are on one node; not with --nnodes {nodes}"
        )
    if raw["node_rank"] or raw["dist_init_addr"] is not None:
        raise ConfigurationError(
            "--node-rank, --dist-init-addr: with --use-ray one command starts all nodes; leave them out"
        )


def check_start(server_args: Any) -> None:
    """Raises ConfigurationError that names all that is found in the resolved arguments."""
    found = [*_wrong_numbers(server_args), *_wrong_caches(), *_wrong_files(server_args)]
    if server_args.uses_messages:
        found += wrong_for_messages(server_args, isinstance(current_platform, CpuPlatform))
    if isinstance(current_platform, CpuPlatform):
        found += _missing_on_host(server_args)
    else:
        if not server_args.use_ray:  # Ray knows the GPUs of all nodes
            found += missing_gpus(server_args, torch.cuda.device_count() if server_args.device == "cuda" else 0)
        config = server_args.get_model_config()
        found += wrong_ranks(server_args.tp_size, config.num_attention_heads, config.get_total_num_kv_heads())
    if found:
        raise ConfigurationError("\n  ".join(found))


def check_port(host: str, port: int) -> None:
    """Raises ConfigurationError for an address that cannot be listened on. SGLang would find out when all is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise ConfigurationError(
            f"--host {host} --port {port}: {error}; accepted: an address of this machine, and a port that is free"
        ) from error


def wrong_ranks(ranks: int, heads: int, kv_heads: int) -> Iterator[str]:
    """Says what is wrong with so many ranks for a model with that many heads. On a CPU SGLang fills them up with heads
    that are 0."""
    if heads % ranks:
        yield f"--tp-size {ranks}: accepted: a divisor of the model's {heads} attention heads"
    elif kv_heads % ranks and ranks % kv_heads:
        yield f"--tp-size {ranks}: accepted: a divisor or a multiple of the model's {kv_heads} KV heads"


def missing_gpus(server_args: Any, there: int) -> Iterator[str]:
    """Says which GPUs are missing where `there` are visible. SGLang's schedulers would each end with an assertion that
    has no text."""
    needed = gpu_count(server_args)
    if server_args.device == "cuda" and needed > there:
        yield (
            f"--dp-size {server_args.dp_size} with --tp-size {server_args.tp_size}, --base-gpu-id "
            f"{server_args.base_gpu_id}, --gpu-id-step {server_args.gpu_id_step} and --kunserve-replicas-per-gpu "
            f"{server_args.kunserve_replicas_per_gpu} takes {needed} GPUs, and there are {there}; accepted: fewer "
            "replicas or ranks, or more replicas per GPU"
        )


def _wrong_numbers(server_args: Any) -> Iterator[str]:
    yield from too_small(vars(server_args), _AT_LEAST)
    fraction = server_args.mem_fraction_static
    if fraction is not None and not 0 < fraction < 1:
        yield f"--mem-fraction-static {fraction}: accepted: a share of the memory, more than 0 and less than 1"
    if not isinstance(getattr(logging, server_args.log_level.upper(), None), int):
        yield f"--log-level {server_args.log_level}: accepted: debug, info, warning, error, critical"
    seed = server_args.random_seed
    if seed is not None and not 0 <= seed < _SEEDS:
        yield f"--random-seed {seed}: accepted: 0 to {_SEEDS - 1}"
    slots, tokens = server_args.kunserve_max_slots, server_args.max_total_tokens
    if slots is not None and tokens is not None and slots < tokens:
        yield f"--kunserve-max-slots {slots}: accepted: --max-total-tokens {tokens} or more"


def _wrong_caches() -> Iterator[str]:
    for variable in (envs.SGLANG_ENABLE_UNIFIED_RADIX_TREE, envs.SGLANG_EXPERIMENTAL_CPP_RADIX_TREE):
        if variable.get():
            yield f"{variable.name} is set: KunServe knows SGLang's plain radix cache only; unset it"
    if envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get():
        yield (
            f"{envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.name} is set: it sizes the KV cache once more when graphs "
            "have been captured, and that memory is KunServe's; unset it"
        )


def _wrong_files(server_args: Any) -> Iterator[str]:
    model = Path(server_args.model_path)
    if server_args.load_format == "auto" and model.is_dir() and not any(any(model.glob(each)) for each in _WEIGHTS):
        yield f"--model-path {model}: there are no weights in it; accepted: a directory with {', '.join(_WEIGHTS)}"
    if server_args.kunserve_host_copy and (weights := _weight_bytes(model)) > (free := free_host_bytes()):
        yield (
            f"--kunserve-host-copy: the weights in {model} have {weights} bytes, and {free} bytes of host memory are "
            "free; accepted where there is room for a copy of them"
        )
    extra = server_args.model_loader_extra_config
    if isinstance(extra, str) and not _is_json(extra):
        yield f"--model-loader-extra-config {extra}: accepted: an object of JSON"
    if _is_missing(server_args.tokenizer_path or ""):
        yield f"--tokenizer-path {server_args.tokenizer_path}: there is no such file or directory"
    for field, is_known in (("chat_template", _has_chat_template), ("completion_template", _has_completion_template)):
        template = getattr(server_args, field)
        if template is not None and not os.path.exists(template) and not is_known(template):
            yield f"{flag_of(field)} {template}: accepted: a file, or the name of one of SGLang's templates"


def _weight_bytes(model: Path) -> int:
    """Adds up the files of the first kind that is there, as SGLang loads only those."""
    found = [sum(file.stat().st_size for file in model.glob(each)) for each in _WEIGHTS] if model.is_dir() else []
    return next((size_bytes for size_bytes in found if size_bytes), 0)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _has_chat_template(name: str) -> bool:
    from sglang.srt.parser.conversation import chat_template_exists

    return bool(chat_template_exists(name))


def _has_completion_template(name: str) -> bool:
    from sglang.srt.parser.code_completion_parser import completion_template_exists

    return bool(completion_template_exists(name))


def _missing_on_host(server_args: Any) -> Iterator[str]:
    if (sharing := server_args.kunserve_replicas_per_gpu) > 1:
        yield f"--kunserve-replicas-per-gpu {sharing}: there is no GPU, and all replicas share the CPU; accepted: 1"
    for field in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        backend = getattr(server_args, field)
        if backend is not None and backend not in _CPU_ATTENTION_BACKENDS:
            yield f"{flag_of(field)} {backend}: {_on_cpu(*_CPU_ATTENTION_BACKENDS)}"
    if server_args.attention_backend == ATTENTION_BACKEND:
        dtype = str(server_args.get_model_config().dtype).removeprefix("torch.")
        if dtype not in _CPU_DTYPES:
            yield f"--dtype {server_args.dtype} is {dtype} for this model: {_on_cpu(*_CPU_DTYPES)}"
        if server_args.kv_cache_dtype not in _CPU_KV_DTYPES:
            yield f"--kv-cache-dtype {server_args.kv_cache_dtype}: {_on_cpu(*_CPU_KV_DTYPES)}"
    quantization = server_args.get_model_config().quantization
    if quantization is not None:
        yield f"--quantization {quantization}, of the flag or the model: not on a CPU; accepted: a model without"
    frame_bytes = server_args.kunserve_frame_bytes
    if frame_bytes is not None and frame_bytes % mmap.PAGESIZE:
        yield f"--kunserve-frame-bytes {frame_bytes}: accepted: a multiple of {mmap.PAGESIZE}, a page of this machine"


def _on_cpu(*accepted: str) -> str:
    return f"not on a CPU; accepted: {', '.join(accepted)}"


def _is_missing(path: str) -> bool:
    """Tells whether it is a path, and not the name of a repository, and nothing is there."""
    return path.startswith(("/", ".", "~")) and not os.path.exists(os.path.expanduser(path))
