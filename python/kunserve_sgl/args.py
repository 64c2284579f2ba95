"""The flags of KunServe, apart from SGLang: their names, defaults, meaning, and what they refuse."""

from __future__ import annotations

import argparse
import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kunserve_sgl.errors import ConfigurationError


class Mode(str, enum.Enum):
    """How KunServe takes part in serving."""

    OFF = "off"
    MANUAL = "manual"
    AUTO = "auto"


MODES = tuple(mode.value for mode in Mode)


class ControlTransport(str, enum.Enum):
    """What the messages between coordinator and replicas go over."""

    IPC = "ipc"
    TCP = "tcp"


CONTROL_TRANSPORTS = tuple(transport.value for transport in ControlTransport)


class Activations(str, enum.Enum):
    """How activations get from replica to replica."""

    AUTO = "auto"
    MAPPED = "mapped"
    COLLECTIVE = "collective"


class Dispatch(str, enum.Enum):
    """Who decides which replica gets a request."""

    BY_NEED = "memory_and_compute"
    SGLANG = "load_balance_method"


@dataclass(kw_only=True)
class KunserveOptions:
    """Values of the KunServe flags; a field `kunserve_x` is the flag `--kunserve-x`."""

    kunserve: str | None = None
    kunserve_reserve_frames: int = 0
    kunserve_frame_bytes: int | None = None
    kunserve_max_replicas: int | None = None
    kunserve_max_slots: int | None = None
    kunserve_keep_host_copy: bool = False
    kunserve_control: str = ControlTransport.IPC.value
    kunserve_transition_timeout: float = 30.0
    kunserve_drain_timeout: float = 300.0
    kunserve_order_timeout: float = 120.0
    kunserve_drop_at: float = 0.9
    kunserve_restore_at: float = 0.5
    kunserve_horizon: float = 2.0
    kunserve_activations: str = Activations.AUTO.value
    kunserve_min_stay: float = 5.0
    kunserve_cool_down: float = 10.0
    kunserve_max_group: int = 4
    # no flag: --load-balance-method auto, SGLang's default, means BY_NEED with two or more replicas
    kunserve_dispatch: str = Dispatch.SGLANG.value
    # no flag: the launcher makes this directory for the sockets of one deployment, see control/addresses.py
    kunserve_directory: str = ""

    @property
    def kunserve_enabled(self) -> bool:
        return self.kunserve is not None and self.kunserve != Mode.OFF.value


def add_kunserve_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the KunServe group to `parser`."""
    group = parser.add_argument_group(
        "KunServe", "Parameter-centric memory: replicas share layers when their KV cache memory runs out."
    )
    group.add_argument(
        "--kunserve",
        choices=MODES,
        default=None,
        help="off: SGLang as it is. manual: transitions are ordered over HTTP. auto: transitions follow the load. "
        "Default: auto with two or more replicas (--dp-size), else off.",
    )
    group.add_argument(
        "--kunserve-reserve-frames",
        type=int,
        default=0,
        metavar="N",
        help="Frames of memory that each rank holds back at start; POST /kunserve/kv gives them to the KV cache.",
    )
    group.add_argument(
        "--kunserve-frame-bytes",
        type=int,
        default=None,
        metavar="BYTES",
        help="Size of a frame, the unit in which memory moves between parameters and KV cache. A multiple of what the "
        "machine maps. Default: 2 MiB on CUDA, 64 KiB on the host.",
    )
    group.add_argument(
        "--kunserve-max-replicas",
        type=int,
        default=None,
        metavar="N",
        help="Replicas that the address space of the KV cache has room for. Default: --dp-size.",
    )
    group.add_argument(
        "--kunserve-max-slots",
        type=int,
        default=None,
        metavar="N",
        help="KV slots per replica that the address space has room for; costs no memory. Default: the slots at start, "
        "and those that all of a replica's parameters would make room for.",
    )
    group.add_argument(
        "--kunserve-keep-host-copy",
        action="store_true",
        help="Keep a copy of the layers' parameters in host memory. It takes as much host memory per rank as they do, "
        "and nothing is restored from it yet.",
    )
    group.add_argument(
        "--kunserve-control",
        choices=CONTROL_TRANSPORTS,
        default=ControlTransport.IPC.value,
        help="What the messages between the coordinator and the replicas go over: Unix sockets in a private "
        "directory, or ports of 127.0.0.1 that the system picks. Default: ipc.",
    )
    group.add_argument(
        "--kunserve-activations",
        choices=[each.value for each in Activations],
        default=Activations.AUTO.value,
        help="How activations get from replica to replica. mapped: through a buffer that both map, which on CUDA takes "
        "GPUs with access to each other's memory, or one GPU. collective: sent by NCCL, on the host by gloo. Default: "
        "auto, which is collective on CUDA and mapped on the host.",
    )
    group.add_argument(
        "--kunserve-transition-timeout",
        type=float,
        default=KunserveOptions.kunserve_transition_timeout,
        metavar="SECONDS",
        help="Longest time for one phase of a transition; past it the transition is rolled back. Default: 30.",
    )
    group.add_argument(
        "--kunserve-drain-timeout",
        type=float,
        default=KunserveOptions.kunserve_drain_timeout,
        metavar="SECONDS",
        help="Longest time that a restore waits for requests to leave the KV slots that go away. Default: 300.",
    )
    group.add_argument(
        "--kunserve-order-timeout",
        type=float,
        default=KunserveOptions.kunserve_order_timeout,
        metavar="SECONDS",
        help="Longest time that a batch may spend with the replicas that host its layers; past it this replica ends "
        "with an error. Default: 120.",
    )
    _add_thresholds(group)


def _add_thresholds(group: argparse._ArgumentGroup) -> None:
    """What --kunserve auto goes by."""
    group.add_argument(
        "--kunserve-drop-at",
        type=float,
        default=KunserveOptions.kunserve_drop_at,
        metavar="SHARE",
        help="auto: drop when the requests of a replica need more than this share of its KV capacity, now or within "
        "the horizon. Default: 0.9.",
    )
    group.add_argument(
        "--kunserve-restore-at",
        type=float,
        default=KunserveOptions.kunserve_restore_at,
        metavar="SHARE",
        help="auto: restore when the requests of all members need less than this share of the KV capacity without the "
        "drop. Default: 0.5.",
    )
    group.add_argument(
        "--kunserve-horizon",
        type=float,
        default=KunserveOptions.kunserve_horizon,
        metavar="SECONDS",
        help="auto: how far ahead the need is forecast, and the time constant of the rates it is forecast from. "
        "Default: 2.",
    )
    group.add_argument(
        "--kunserve-min-stay",
        type=float,
        default=KunserveOptions.kunserve_min_stay,
        metavar="SECONDS",
        help="auto: how long the need must have been below --kunserve-restore-at before a restore. Default: 5.",
    )
    group.add_argument(
        "--kunserve-cool-down",
        type=float,
        default=KunserveOptions.kunserve_cool_down,
        metavar="SECONDS",
        help="auto: for so long after a restore a forecast alone is no reason to drop, and a drop doubles the stay "
        "that follows, 16 times at most. Default: 10.",
    )
    group.add_argument(
        "--kunserve-max-group",
        type=int,
        default=KunserveOptions.kunserve_max_group,
        metavar="N",
        help="auto: most replicas in one group. Default: 4.",
    )


def flag_of(field: str) -> str:
    """The flag of a field of the server's arguments."""
    return f"--{field.replace('_', '-')}"


def too_small(values: Mapping[str, Any], at_least: Mapping[str, int]) -> Iterator[str]:
    """What is wrong with those fields that have a value below the least one that is accepted."""
    for field, least in at_least.items():
        value = values[field]
        if value is not None and value < least:
            yield f"{flag_of(field)} {value}: accepted: {least} or more"


def check_options(options: Mapping[str, Any], replicas: int) -> None:
    """Raises ConfigurationError for a KunServe flag whose value makes no sense by itself."""
    at_least = {
        "kunserve_reserve_frames": 0,
        "kunserve_frame_bytes": 1,
        "kunserve_max_replicas": replicas,
        "kunserve_max_slots": 1,
        "kunserve_max_group": 2,
    }
    for message in too_small(options, at_least):
        raise ConfigurationError(message)
    for field in (
        *("kunserve_transition_timeout", "kunserve_drain_timeout", "kunserve_order_timeout"),
        *("kunserve_horizon", "kunserve_min_stay", "kunserve_cool_down"),
    ):
        value = options[field]
        if not 0 < value < math.inf:
            raise ConfigurationError(f"{flag_of(field)} {value}: accepted: seconds, more than 0")
    drop_at, restore_at = options["kunserve_drop_at"], options["kunserve_restore_at"]
    if not 0 < drop_at <= 1:
        raise ConfigurationError(f"--kunserve-drop-at {drop_at}: accepted: a share of the capacity, up to 1")
    if not 0 < restore_at < drop_at:
        raise ConfigurationError(
            f"--kunserve-restore-at {restore_at}: accepted: more than 0, less than --kunserve-drop-at {drop_at}; "
            "else a restore would be the reason for the next drop"
        )


def sends_activations(requested: str, device: str) -> bool:
    """Whether activations go by collectives, on a device of that type, and not through mapped memory."""
    return requested == Activations.COLLECTIVE.value or (requested == Activations.AUTO.value and device == "cuda")


def resolve_mode(requested: str | None, replicas: int) -> Mode:
    """The mode to run in: as asked for, or `auto` where there is a second replica to share layers with."""
    if requested is None:
        return Mode.AUTO if replicas >= 2 else Mode.OFF
    if requested not in MODES:
        raise ConfigurationError(f"--kunserve {requested!r} is not known; accepted: {', '.join(MODES)}")
    return Mode(requested)
