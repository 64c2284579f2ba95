"""Which GPUs can map each other's memory, asked of the driver before anything starts: without a CUDA call, as processes
are forked afterwards."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import pynvml
import torch

from kunserve_sgl.args import Activations, RemoteAttentionBy
from kunserve_sgl.integration.launcher.message_checks import wrong_for_messages
from kunserve_sgl.integration.placement import gpu_offset

logger = logging.getLogger(__name__)


def choose_remote_attention(server_args: Any) -> None:
    """Decides in resolved arguments whether `--kunserve-remote-attention auto` takes messages for GPUs of one machine:
    where two replicas could not map each other's memory. These use it by messages then, and others map it."""
    is_asked_for = server_args.kunserve_remote_attention != RemoteAttentionBy.AUTO.value
    is_asked_for |= server_args.kunserve_activations == Activations.MAPPED.value
    is_shared = server_args.kunserve_replicas_per_gpu > 1  # messages take NCCL, which does not send within a GPU
    if is_asked_for or is_shared or server_args.device != "cuda" or server_args.use_ray or server_args.dp_size == 1:
        return
    if not (apart := pairs_apart(server_args)):
        return
    who = ", ".join(f"{one} and {other}" for one, other in apart)
    lacking = f"by the driver and its numbers of GPUs, replicas have no access to each other's memory: {who}"
    if wrong := list(wrong_for_messages(server_args, is_on_cpu=False)):
        logger.warning("KunServe: %s; they are not merged, as memory is not used by messages: %s", lacking, wrong[0])
        return
    logger.warning(
        "KunServe: %s. These use it by messages, and activations of all are sent; with --kunserve-remote-attention map "
        "only those are merged who have access",
        lacking,
    )
    server_args.override("kunserve", kunserve_lacks_access=True, kunserve_activations=Activations.COLLECTIVE.value)


def pairs_apart(server_args: Any) -> Sequence[tuple[int, int]]:
    """Returns the pairs of replicas, in resolved arguments for CUDA, that could not map each other's memory; none where
    all could, or the driver does not say."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("KunServe: the driver does not say which GPUs have access to each other: %s", error)
        return []
    try:
        ranks = [_gpus_of(server_args, replica) for replica in range(server_args.dp_size)]
        pairs = itertools.combinations(range(len(ranks)), 2)
        return [(one, other) for one, other in pairs if not all(map(_have_access, ranks[one], ranks[other]))]
    # torch raises RuntimeError where the server sees parts of GPUs (MIG): the driver numbers whole ones.
    except (pynvml.NVMLError, RuntimeError) as error:
        logger.debug("KunServe: the driver does not say which GPUs have access to each other: %s", error)
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpus_of(server_args: Any, replica: int) -> Sequence[int]:
    """Returns the driver's numbers of the GPUs of a replica, by rank. Ranks map memory of the same rank of others."""
    first = server_args.base_gpu_id + gpu_offset(server_args, replica)
    seen = (first + rank * server_args.gpu_id_step for rank in range(server_args.tp_size))
    return [int(torch.cuda._get_nvml_device_index(gpu)) for gpu in seen]  # counts those in CUDA_VISIBLE_DEVICES


def _have_access(one: int, other: int) -> bool:
    """Tells whether each of two GPUs can read and write the other's memory. A replica on the same one can."""
    handles = [pynvml.nvmlDeviceGetHandleByIndex(gpu) for gpu in (one, other)]
    ways = (pynvml.NVML_P2P_CAPS_INDEX_READ, pynvml.NVML_P2P_CAPS_INDEX_WRITE)
    return one == other or all(
        pynvml.nvmlDeviceGetP2PStatus(*pair, way) == pynvml.NVML_P2P_STATUS_OK
        for pair in (handles, handles[::-1])
        for way in ways
    )
