"""What KunServe's flags may say, each by itself and together; what they are is in `args.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kunserve_sgl.args import (
    SECONDS,
    Activations,
    ControlTransport,
    RemoteAttentionBy,
    flag_of,
    flags,
    too_small,
    way_to_peers,
)
from kunserve_sgl.errors import ConfigurationError

_NETWORK = f"--kunserve-control {ControlTransport.NETWORK.value}"


def check_options(options: Mapping[str, Any], replicas: int) -> None:
    """Raises ConfigurationError for a KunServe flag whose value makes no sense by itself."""
    at_least = {name: flag.least for name, flag, _ in flags() if flag.least is not None}
    for message in too_small(options, {**at_least, "kunserve_max_replicas": replicas}):
        raise ConfigurationError(message)
    sharing = options["kunserve_replicas_per_gpu"]
    if replicas % sharing:
        raise ConfigurationError(f"--kunserve-replicas-per-gpu {sharing}: accepted: a divisor of --dp-size {replicas}")
    if sharing > 1 and options["kunserve_activations"] == Activations.COLLECTIVE.value:
        raise ConfigurationError(
            f"--kunserve-activations collective: not with --kunserve-replicas-per-gpu {sharing}, because NCCL does not "
            "send between replicas on one GPU; accepted: auto, mapped"
        )
    if options["kunserve_host_copy"] and replicas == 1:
        raise ConfigurationError("--kunserve-host-copy: one replica drops nothing; accepted: with --dp-size 2 or more")
    if options["kunserve_remote_attention"] == RemoteAttentionBy.MESSAGE.value and replicas == 1:
        raise ConfigurationError(
            "--kunserve-remote-attention message: one replica has all KV itself; accepted: with --dp-size 2 or more"
        )
    if options["kunserve_control"] == ControlTransport.NETWORK.value:
        _check_network(options)
    way = way_to_peers(options["kunserve_remote_attention"], options["kunserve_control"])
    uses_messages = way is not RemoteAttentionBy.MAP
    if uses_messages and options["kunserve_activations"] == Activations.MAPPED.value:
        is_far = options["kunserve_control"] == ControlTransport.NETWORK.value
        why = _NETWORK if is_far else f"--kunserve-remote-attention {RemoteAttentionBy.MESSAGE.value}"
        raise ConfigurationError(
            f"--kunserve-activations {Activations.MAPPED.value}: with {why} activations are sent between all replicas; "
            f"accepted: {Activations.AUTO.value}, {Activations.COLLECTIVE.value}"
        )
    if uses_messages and sharing > 1:
        raise ConfigurationError(
            f"--kunserve-replicas-per-gpu {sharing}: with --kunserve-remote-attention message activations are sent, "
            "which NCCL does not do between replicas on one GPU; accepted: 1"
        )
    for name in (name for name, flag, _ in flags() if flag.unit == SECONDS):
        if not 0 < options[name] < math.inf:
            raise ConfigurationError(f"{flag_of(name)} {options[name]}: accepted: seconds, more than 0")
    drop_at, restore_at = options["kunserve_drop_at"], options["kunserve_restore_at"]
    if not 0 < drop_at <= 1:
        raise ConfigurationError(f"--kunserve-drop-at {drop_at}: accepted: a share of the capacity, up to 1")
    if not 0 < restore_at < drop_at:
        raise ConfigurationError(
            f"--kunserve-restore-at {restore_at}: accepted: more than 0, less than --kunserve-drop-at {drop_at}; "
            "else a restore would be the reason for the next drop"
        )


def _check_network(options: Mapping[str, Any]) -> None:
    """Raises ConfigurationError for what replicas that share no machine cannot do."""
    if not options["use_ray"]:
        raise ConfigurationError(f"{_NETWORK}: only Ray starts replicas on other machines; accepted: with --use-ray")
    if options["kunserve_remote_attention"] == RemoteAttentionBy.MAP.value:
        raise ConfigurationError(
            f"--kunserve-remote-attention {RemoteAttentionBy.MAP.value}: memory of another machine cannot be mapped; "
            f"accepted with {_NETWORK}: {RemoteAttentionBy.AUTO.value}, {RemoteAttentionBy.MESSAGE.value}"
        )
    if options["kunserve_host_copy"]:
        raise ConfigurationError(
            f"--kunserve-host-copy: all replicas map one copy, so they are on one machine; not with {_NETWORK}"
        )


def check_off(replicas_per_gpu: int) -> None:
    """Raises ConfigurationError for what would do nothing without KunServe, and be missed."""
    if replicas_per_gpu != 1:
        raise ConfigurationError(
            f"--kunserve-replicas-per-gpu {replicas_per_gpu}: SGLang by itself gives each replica GPUs of its own; "
            "accepted with --kunserve off, which is the default with one replica: 1"
        )
