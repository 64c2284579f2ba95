"""Which GPUs the replicas of a server are on."""

from __future__ import annotations

from typing import Any


def gpu_offset(server_args: Any, replica: int) -> int:
    """Returns how far the first GPU of `replica` is behind --base-gpu-id. SGLang moves on by the GPUs of one replica
    with each; here so many replicas in turn stay as --kunserve-replicas-per-gpu says."""
    per_replica = server_args.tp_size * server_args.pp_size * server_args.gpu_id_step
    return int(replica // server_args.kunserve_replicas_per_gpu * per_replica)


def gpu_count(server_args: Any) -> int:
    """Returns how many GPUs there must be, of those that the server sees: the last one that it uses, and all before."""
    last = gpu_offset(server_args, server_args.dp_size - 1)
    ranks = server_args.tp_size * server_args.pp_size
    return int(server_args.base_gpu_id + last + (ranks - 1) * server_args.gpu_id_step + 1)
