"""Which GPUs can map each other's memory, asked of the driver before anything starts: without a CUDA call, as processes
are forked afterwards."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pynvml
import torch

from kunserve_sgl.args import Activations, RemoteAttentionBy
from kunserve_sgl.integration.launcher.message_checks import wrong_for_messages
from kunserve_sgl.integration.placement import gpu_offset

logger = logging.getLogger(__name__)


def choose_remote_attention(server_args: Any) -> None:
    """Decides `--kunserve-remote-attention auto` in resolved arguments for GPUs of one machine: message, where a
    replica could map the memory of no other, and so would be merged with nobody. Then it is message for all: a rank
    uses memory of its peers in one way, and offers its own in the same."""
    is_asked_for = server_args.kunserve_remote_attention != RemoteAttentionBy.AUTO.value
    is_asked_for |= server_args.kunserve_activations == Activations.MAPPED.value
    if is_asked_for or server_args.device != "cuda" or server_args.use_ray or server_args.dp_size == 1:
        return
    if not (lonely := lonely_replicas(server_args)):
        return
    who = ", ".join(f"replica {replica} on GPU {' and '.join(map(str, gpus))}" for replica, gpus in lonely.items())
    alone = f"by the driver and its numbers of GPUs, these have access to the memory of no other replica's GPUs: {who}"
    if wrong := list(wrong_for_messages(server_args, is_on_cpu=False)):
        logger.warning(
            "KunServe: %s; they are merged with none, as memory is not used by messages: %s", alone, wrong[0]
        )
        return
    logger.warning(
        "KunServe: %s. So all replicas use memory of others by messages, those too that could map each other's; with "
        "--kunserve-remote-attention map they map it, and who has no access is merged with none",
        alone,
    )
    way, activations = RemoteAttentionBy.MESSAGE.value, Activations.COLLECTIVE.value
    server_args.override("kunserve", kunserve_remote_attention=way, kunserve_activations=activations)


def lonely_replicas(server_args: Any) -> Mapping[int, Sequence[int]]:
    """Returns the replicas, in resolved arguments for CUDA, that could map the memory of no other, each with the
    driver's numbers of its GPUs, by rank; none where each could, or the driver does not say."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("KunServe: the driver does not say which GPUs have access to each other: %s", error)
        return {}
    try:
        ranks = [_gpus_of(server_args, replica) for replica in range(server_args.dp_size)]
        met: set[int] = set()
        for one, other in itertools.combinations(range(len(ranks)), 2):
            if not {one, other} <= met and all(map(_have_access, ranks[one], ranks[other])):
                met |= {one, other}
    # torch raises RuntimeError where the server sees parts of GPUs (MIG): the driver numbers whole ones.
    except (pynvml.NVMLError, RuntimeError) as error:
        logger.debug("KunServe: the driver does not say which GPUs have access to each other: %s", error)
        return {}
    finally:
        pynvml.nvmlShutdown()
    return {replica: gpus for replica, gpus in enumerate(ranks) if replica not in met}


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
