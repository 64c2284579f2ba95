"""The flags of KunServe, apart from SGLang: their names, defaults, meaning, and what they refuse."""

from __future__ import annotations

import argparse
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kunserve_sgl.errors import ConfigurationError


class Mode(str, enum.Enum):
    """Says how KunServe takes part in serving."""

    OFF = "off"
    MANUAL = "manual"
    AUTO = "auto"


MODES = tuple(mode.value for mode in Mode)


class ControlTransport(str, enum.Enum):
    """Says what the messages between coordinator and replicas go over."""

    IPC = "ipc"
    TCP = "tcp"
    NETWORK = "network"


CONTROL_TRANSPORTS = tuple(transport.value for transport in ControlTransport)


class Activations(str, enum.Enum):
    """Says how activations get from replica to replica."""

    AUTO = "auto"
    MAPPED = "mapped"
    COLLECTIVE = "collective"


class RemoteAttentionBy(str, enum.Enum):
    """Says how a layer host attends to KV that lies elsewhere."""

    AUTO = "auto"
    MAP = "map"
    MESSAGE = "message"


class Exchange(str, enum.Enum):
    """Says when KV goes to the memory of the replica that reads it."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Dispatch(str, enum.Enum):
    """Says who decides which replica gets a request."""

    BY_NEED = "memory_and_compute"
    SGLANG = "load_balance_method"


SECONDS, SHARE = "seconds", "share"


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Says how a field of KunserveOptions is given on the command line. Parser, checks and README's table are made of
    it.

    `unit` is what a number counts; SECONDS and SHARE are no whole numbers. A flag without a unit takes one of
    `choices`, or is a switch where there are none. `least` is the smallest number that is accepted. `default` is what
    holds where the flag is not given, in words; empty where the field's own default says it.
    """

    meaning: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    least: int | None = None
    default: str = ""

    @property
    def is_switch(self) -> bool:
        """Tells whether the flag takes no value."""
        return not self.unit and not self.choices

    def described(self, default: Any) -> str:
        """Returns the meaning and the default, in sentences. `default` is that of the field."""
        in_words = self.default or ("" if self.is_switch else f"{default:g}" if self.unit else str(default))
        return f"{self.meaning} Default: {in_words}." if in_words else self.meaning


def _flag(value: Any, meaning: str, **details: Any) -> Any:
    """Makes a field of KunserveOptions that is a flag, and `value` by default; `details` are those of Flag."""
    return field(default=value, metadata={"flag": Flag(meaning=meaning, **details)})


@dataclass(kw_only=True)
class KunserveOptions:
    """Values of the KunServe flags; a field `kunserve_x` is the flag `--kunserve-x`."""

    kunserve: str | None = _flag(
        None,
        "off: SGLang as it is; nothing is attached. manual: transitions are ordered over HTTP. auto: transitions "
        "follow the load.",
        choices=MODES,
        default="auto with two or more replicas (--dp-size), else off",
    )
    kunserve_reserve_frames: int = _flag(
        0,
        "Frames of memory that each rank holds back at start; POST /kunserve/kv gives them to the KV cache.",
        unit="frames",
        least=0,
    )
    kunserve_frame_bytes: int | None = _flag(
        None,
        "Size of a frame, the unit in which memory moves between parameters and KV cache. A multiple of what the "
        "machine maps.",
        unit="bytes",
        least=1,
        default="2 MiB on CUDA, 64 KiB on a CPU",
    )
    kunserve_max_replicas: int | None = _flag(
        None,
        "Replicas that the address space of the KV cache has room for.",
        unit="replicas",
        default="--dp-size, which is the least",
    )
    kunserve_max_slots: int | None = _flag(
        None,
        "KV slots per replica that the address space has room for; costs no memory.",
        unit="slots",
        least=1,
        default="the slots at start, and those that all of a replica's parameters would make room for",
    )
    kunserve_host_copy: bool = _flag(
        False,
        "Keep a copy of the layers' parameters in host memory, from which dropped layers come back where no other "
        "replica has them. All replicas share it, so it takes as much host memory as the layers of one replica.",
    )
    kunserve_replicas_per_gpu: int = _flag(
        1,
        "Replicas that share a GPU, or the GPUs of one replica with --tp-size: so many in turn, from --base-gpu-id on. "
        "Each gets an equal part of the memory, and --mem-fraction-static is a share of that. A divisor of --dp-size.",
        unit="replicas",
        least=1,
    )
    kunserve_control: str = _flag(
        ControlTransport.IPC.value,
        "What the messages between the coordinator and the replicas go over, and memory that is used by messages. ipc: "
        "Unix sockets in a private directory. tcp: ports of 127.0.0.1 that the system picks, with keys of "
        "this server (CURVE). network: as tcp, at the address of each node of Ray, which replicas "
        "on several machines take; with --use-ray.",
        choices=CONTROL_TRANSPORTS,
    )
    kunserve_activations: str = _flag(
        Activations.AUTO.value,
        "How activations get from replica to replica. mapped: through a buffer that both map, which on CUDA takes GPUs "
        "with access to each other's memory, or one GPU. collective: sent by NCCL, on a CPU by gloo. auto: mapped "
        "where that works, else collective, as where memory of a replica is used by messages.",
        choices=tuple(each.value for each in Activations),
    )
    kunserve_remote_attention: str = _flag(
        RemoteAttentionBy.AUTO.value,
        "How a replica attends to KV of its batches that is in the memory of another. map: that memory is mapped, and "
        "read as its own. message: queries go to the other replica, which attends to what it has, and the results are "
        "merged; all other memory of another replica is used by messages too, and nothing of it is mapped; on CUDA "
        "with --attention-backend flashinfer or triton, untried. auto: for each two replicas what works between them: "
        "map on one machine, on CUDA with GPUs that have access to each other's memory, else message.",
        choices=tuple(each.value for each in RemoteAttentionBy),
    )
    kunserve_exchange: str = _flag(
        Exchange.AUTO.value,
        "Whether KV of base slots is copied, after a drop and in the background, to the replica that executes the "
        "layer, and back before a restore. auto: where that saves twice what copying there and back takes: by slower "
        "reading of the other's memory or, where that is used by messages, by what asking the other takes, "
        "as measured, for --kunserve-min-stay or as long as the replicas have been merged. on: always. off: never. For "
        "it each replica keeps as much free at a drop as a layer's base KV takes, unless that is half of what is "
        "gained; with auto where it is likely to be of use.",
        choices=tuple(each.value for each in Exchange),
    )
    kunserve_transition_timeout: float = _flag(
        30.0, "Longest time for one phase of a transition; past it the transition is rolled back.", unit=SECONDS
    )
    kunserve_drain_timeout: float = _flag(
        300.0,
        "Longest time that a restore waits for requests to leave the KV slots that go away, and that the KV of a layer "
        "takes to be copied by --kunserve-exchange.",
        unit=SECONDS,
    )
    kunserve_order_timeout: float = _flag(
        120.0,
        "Longest time that a batch may spend with the replicas that host its layers; past it the one that stands still "
        "is ended. A replica that has requests and runs none for so long is left out.",
        unit=SECONDS,
    )
    kunserve_restart: str = _flag(
        "on",
        "Whether a replica that has ended, or was ended, is started again while the others serve. off: they go on "
        "without it, and the server ends with the last one.",
        choices=("on", "off"),
    )
    kunserve_restart_tries: int = _flag(
        5,
        "How often a replica is started again until it has served for ten minutes; past it the replica is given up.",
        unit="tries",
        least=1,
    )
    kunserve_restart_pause: float = _flag(
        60.0,
        "Longest pause before a replica is started again. It is 1 s at first, and doubles with every further end until "
        "the replica has served for ten minutes.",
        unit=SECONDS,
    )
    kunserve_hold_timeout: float = _flag(
        120.0,
        "Longest time that requests wait for a replica to come back, while no other is there; and that, with auto, one "
        "waits which is longer than any replica has room for.",
        unit=SECONDS,
    )
    kunserve_drop_at: float = _flag(
        0.9,
        "auto: drop when the requests of a replica need more than this share of its KV capacity, now or within the "
        "horizon.",
        unit=SHARE,
    )
    kunserve_restore_at: float = _flag(
        0.5,
        "auto: restore when the requests of all members need less than this share of the KV capacity without the drop.",
        unit=SHARE,
    )
    kunserve_horizon: float = _flag(
        2.0,
        "auto: how far ahead the need is forecast, and the time constant of the rates it is forecast from.",
        unit=SECONDS,
    )
    kunserve_min_stay: float = _flag(
        5.0,
        "auto: how long the need must have been below --kunserve-restore-at before a restore.",
        unit=SECONDS,
    )
    kunserve_cool_down: float = _flag(
        10.0,
        "auto: for so long after a restore a forecast alone is no reason to drop, and a drop doubles the stay that "
        "follows, 16 times at most.",
        unit=SECONDS,
    )
    kunserve_max_group: int = _flag(4, "auto: most replicas in one group.", unit="replicas", least=2)
    # no flag: --load-balance-method auto, SGLang's default, means BY_NEED with two or more replicas
    kunserve_dispatch: str = Dispatch.SGLANG.value
    # no flag: --nnodes with --use-ray, for which SGLang's processes then have 1, as a replica is on one node
    kunserve_nodes: int = 1
    # no flag: how often this replica was started before, counted by the controller
    kunserve_incarnation: int = 0
    # no flag: the KV slots that this replica had at its first start, for it to have as many again; 0 at that start
    kunserve_base_slots: int = 0
    # no flag: the checksums that the layers have at the living replicas, by rank, for a replica that is started again
    # to take its layers from somewhere else than the checkpoint; empty where it is to load them from there
    kunserve_checksums: tuple[tuple[str, ...], ...] = ()
    # no flag: whether another replica may lend them
    kunserve_lenders: bool = False
    # no flag: where others reach this process with --kunserve-control network; that of the node of Ray it is on
    kunserve_host: str = "127.0.0.1"
    # no flag: the driver says that GPUs of some replicas have no access to each other's memory
    kunserve_lacks_access: bool = False
    # no flag: where the store is over which groups for activations are made, with --kunserve-control network
    kunserve_group_store: str = ""
    # no flag: the launcher makes this directory for the sockets of one deployment, see control/addresses.py
    kunserve_directory: str = ""

    @property
    def controls_by_tcp(self) -> bool:
        """Tells whether messages go over TCP, with keys."""
        return self.kunserve_control != ControlTransport.IPC.value

    @property
    def is_on_network(self) -> bool:
        """Tells whether replicas may be on machines that share nothing but a network."""
        return self.kunserve_control == ControlTransport.NETWORK.value

    @property
    def way_to_peers(self) -> RemoteAttentionBy:
        """Says how memory of peers is used: MAP or MESSAGE, that of all of them, or AUTO, as each allows it."""
        return way_to_peers(self.kunserve_remote_attention, self.kunserve_control, self.kunserve_lacks_access)

    @property
    def uses_messages(self) -> bool:
        """Tells whether memory of a peer may be used by messages."""
        return self.way_to_peers is not RemoteAttentionBy.MAP

    @property
    def kunserve_enabled(self) -> bool:
        """Tells whether KunServe is attached; False until the mode is resolved, see `resolve_mode`."""
        return self.kunserve is not None and self.kunserve != Mode.OFF.value


def flags() -> Iterator[tuple[str, Flag, Any]]:
    """Yields each field that is a flag: its name, the flag, and the field's default."""
    for each in fields(KunserveOptions):
        if "flag" in each.metadata:
            yield each.name, each.metadata["flag"], each.default


def add_kunserve_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the KunServe group to `parser`."""
    group = parser.add_argument_group(
        "KunServe", "Parameter-centric memory: replicas share layers when their KV cache memory runs out."
    )
    for name, flag, default in flags():
        how: dict[str, Any]
        if flag.is_switch:
            how = {"action": "store_true"}
        elif flag.choices:
            how = {"choices": flag.choices, "default": default}
        else:
            number = float if flag.unit in (SECONDS, SHARE) else int
            how = {"type": number, "default": default, "metavar": flag.unit.upper()}
        group.add_argument(flag_of(name), help=flag.described(default), **how)


def flag_table() -> str:
    """Returns the flags as a table in Markdown, which README.md holds."""
    lines = ["| flag | value | meaning |", "| --- | --- | --- |"]
    for name, flag, default in flags():
        value = ", ".join(f"`{choice}`" for choice in flag.choices) or flag.unit
        lines.append(f"| `{flag_of(name)}` | {value} | {flag.described(default)} |")
    return "\n".join(lines)


def flag_of(name: str) -> str:
    """Returns the flag of a field of the server's arguments."""
    return f"--{name.replace('_', '-')}"


def too_small(values: Mapping[str, Any], at_least: Mapping[str, int]) -> Iterator[str]:
    """Says what is wrong with those fields that have a value below the least one that is accepted."""
    for name, least in at_least.items():
        value = values[name]
        if value is not None and value < least:
            yield f"{flag_of(name)} {value}: accepted: {least} or more"


def way_to_peers(by: str, control: str, lacks_access: bool = False) -> RemoteAttentionBy:
    """Returns `KunserveOptions.way_to_peers` for two flags. `lacks_access` says that some replicas of one machine
    cannot map each other's memory."""
    way = RemoteAttentionBy(by)
    is_one_for_all = control != ControlTransport.NETWORK.value and not lacks_access
    return RemoteAttentionBy.MAP if way is RemoteAttentionBy.AUTO and is_one_for_all else way


def resolve_activations(options: Mapping[str, Any]) -> str:
    """Returns how activations go where `auto` could find that out only by mapping memory of another replica, and the
    value as it is otherwise."""
    way = way_to_peers(options["kunserve_remote_attention"], options["kunserve_control"])
    if way is not RemoteAttentionBy.MAP:
        return Activations.COLLECTIVE.value
    return str(options["kunserve_activations"])


def resolve_mode(requested: str | None, replicas: int) -> Mode:
    """Returns the mode to run in: as asked for, or `auto` where there is a second replica to share layers with."""
    if requested is None:
        return Mode.AUTO if replicas >= 2 else Mode.OFF
    if requested not in MODES:
        raise ConfigurationError(f"--kunserve {requested!r} is not known; accepted: {', '.join(MODES)}")
    return Mode(requested)


if __name__ == "__main__":
    print(flag_table())
