"""Where the processes of one deployment reach each other: a private directory made by the launcher, and names in it.

With `--kunserve-control ipc` all sockets lie in the directory. With tcp, messages go over ports of 127.0.0.1 that the
system picks when they are bound; the directory then tells the coordinator's, and has the keys without which nobody can
connect. With network it is the same at the address of the node of Ray that a process is on. Frames are file
descriptors, which only a Unix socket can pass, so those sockets lie in the directory in any case.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.wire import curve

_KEYS = "curve.keys"
_UNIX_PATH_BYTES = 107  # what a Unix socket's address has room for
_LONGEST_NAME_BYTES = len("memory-999-99-999999")  # of a socket; files may have longer names


def make_control_directory() -> str:
    """Makes a directory of a random name that only this user can enter. `integration.reaper` removes it in the end,
    because a launcher that is killed cannot."""
    directory = tempfile.mkdtemp(prefix="kunserve-")
    if len(os.fsencode(directory)) + 1 + _LONGEST_NAME_BYTES > _UNIX_PATH_BYTES:
        os.rmdir(directory)
        raise ConfigurationError(
            f"{directory}: too long a path for a Unix socket, of {_UNIX_PATH_BYTES} bytes at most; "
            "set TMPDIR to a shorter one"
        )
    return directory


def coordinator_bind_address(options: KunserveOptions) -> str:
    """Returns what the coordinator binds; `publish_coordinator` tells the others where that led."""
    return _bind_address(options, "coordinator")


def group_store_bind_address(options: KunserveOptions) -> str:
    """Returns what the coordinator binds for the store over which groups are made."""
    return _bind_address(options, "groups")


def publish_coordinator(options: KunserveOptions, endpoint: str) -> None:
    """Lets `coordinator_address` answer `endpoint` in every process; before the schedulers start."""
    _publish(_address_file(options), endpoint)


def coordinator_address(options: KunserveOptions) -> str:
    """Returns where ranks send what is for the coordinator. Raises TransientError where there is none."""
    return _published(_address_file(options), "coordinator")


def inbox_bind_address(options: KunserveOptions, replica: int, rank: int, incarnation: int) -> str:
    """Returns what a rank binds its inbox to; with tcp, the socket's LAST_ENDPOINT is what others connect to. No two
    incarnations of a replica have the same: what was sent to one never reaches the next."""
    return _bind_address(options, f"inbox-{replica}-{rank}-{incarnation}")


def is_inbox_address(
    options: KunserveOptions,
    replica: int,
    rank: int,
    incarnation: int,
    address: str,
    hosts: Collection[str] | None = None,
) -> bool:
    """Says whether this rank's inbox can be there. Of a network `hosts` are the nodes of the deployment; None where
    somebody has looked who knows them."""
    if not options.controls_by_tcp:
        return address == inbox_bind_address(options, replica, rank, incarnation)
    found = re.fullmatch(r"tcp://([0-9.]{7,15}):[1-9]\d{0,4}", address, re.ASCII)
    if found is None:
        return False
    if not options.is_on_network:
        return found[1] == options.kunserve_host
    return is_host(found[1]) if hosts is None else found[1] in hosts


def is_memory_address(
    options: KunserveOptions,
    replica: int,
    rank: int,
    incarnation: int,
    address: str,
    hosts: Collection[str] | None = None,
) -> bool:
    """Says whether this rank's memory can be used by messages there; see `is_inbox_address`. It is told only where
    others need it."""
    if not (options.controls_by_tcp and options.uses_messages):
        return not address
    return is_inbox_address(options, replica, rank, incarnation, address, hosts)


def is_host(host: str) -> bool:
    """Says whether `host` is an address that sockets can be bound to and others can connect to: one of IPv4."""
    try:
        return not ipaddress.IPv4Address(host).is_unspecified
    except ValueError:
        return False


def requests_bind_address(options: KunserveOptions, replica: int, incarnation: int) -> str:
    """Returns what the controller binds for the requests of a replica that is started again; without a network SGLang
    names those of the first start."""
    if options.is_on_network:
        return _bind_address(options, "requests")
    return f"ipc://{_directory(options) / f'requests-{replica}-{incarnation}'}"


def head_bind_address(options: KunserveOptions) -> str:
    """Returns what the tokenizer manager and the detokenizer bind on a network, for what schedulers send them: a port
    of the address that the coordinator has. `publish_on_head` tells where that led."""
    return coordinator_address(options).rpartition(":")[0] + ":*"


def publish_on_head(options: KunserveOptions, name: str, endpoint: str) -> None:
    """Lets `address_on_head` answer `endpoint` in every process of the head, which is those that use its directory."""
    _publish(_head_file(options, name), endpoint)


def address_on_head(options: KunserveOptions, name: str) -> str:
    """Returns where a process of the head listens. Raises TransientError where it does not yet."""
    return _published(_head_file(options, name), "process")


def nobodys_address(options: KunserveOptions, name: str) -> str:
    """Returns an address in the directory of this node at which nobody listens, nor anybody else could."""
    return f"ipc://{_directory(options) / f'nobody-{name}'}"


def frame_socket_path(options: KunserveOptions, replica: int, rank: int, incarnation: int) -> str:
    """Returns the path of the Unix socket over which a rank gives out frames, as file descriptors."""
    return str(_directory(options) / f"frames-{replica}-{rank}-{incarnation}")


def is_frame_address(options: KunserveOptions, replica: int, rank: int, incarnation: int, address: str) -> bool:
    """Says whether this rank's socket for frames can be there; on a network it is in a directory of another machine."""
    path = frame_socket_path(options, replica, rank, incarnation)
    return os.path.basename(address) == os.path.basename(path) if options.is_on_network else address == path


def memory_bind_address(options: KunserveOptions, replica: int, rank: int, incarnation: int) -> str:
    """Returns what a rank binds for memory that is used by messages; with tcp, others are told where that led."""
    return _bind_address(options, f"memory-{replica}-{rank}-{incarnation}")


def begun_requests_path(options: KunserveOptions, replica: int, incarnation: int) -> str:
    """Returns the file in which a replica notes with which requests it has begun."""
    return str(_directory(options) / f"begun-{replica}-{incarnation}")


def collective_store_path(options: KunserveOptions) -> str:
    """Returns the file over which replicas that send activations by NCCL or gloo find each other; the first that opens
    it makes it. On a network it is a store of the coordinator's, at `kunserve_group_store`."""
    return str(_directory(options) / "collectives")


def rank_store_url(options: KunserveOptions, replica: int) -> str:
    """Returns where torch lets the ranks of a replica find each other: a file, as `collective_store_path`. Each
    incarnation has its own, because torch takes what is there for ranks that have come already."""
    return f"file://{_directory(options) / f'torch-{replica}-{options.kunserve_incarnation}'}"


def remove_files(options: KunserveOptions, replica: int, incarnation: int) -> None:
    """Removes what an incarnation of a replica, all of whose processes have ended, has left in the directory."""
    directory = _directory(options)
    for what in ("inbox", "frames", "memory"):
        for path in directory.glob(f"{what}-{replica}-*-{incarnation}"):
            path.unlink(missing_ok=True)
    for what in ("torch", "requests", "begun"):
        name = f"{what}-{replica}-{incarnation}"
        (directory / name).unlink(missing_ok=True)


def make_host_copies(options: KunserveOptions, ranks: int) -> None:
    """Makes the files for the copies of parameters in host memory, one for each rank of a replica; before the
    schedulers start. They are anonymous memory that this process, the launcher, keeps open for those that come and
    go."""
    for rank in range(ranks):
        fd = os.memfd_create(f"kunserve-host-copy-{rank}")
        os.symlink(f"/proc/{os.getpid()}/fd/{fd}", host_copy_path(options, rank))


def host_copy_path(options: KunserveOptions, rank: int) -> str:
    """Returns the path of the file with the host copy of a rank's layers, the same for all replicas."""
    return str(_directory(options) / f"host-copy-{rank}")


def make_keys(options: KunserveOptions, replicas: int, ranks: int) -> None:
    """Lets `curve_of` find keys in every process, where they are needed; before anything listens."""
    if options.controls_by_tcp:
        curve.make_keys(_directory(options) / _KEYS, replicas, ranks)


def curve_of(options: KunserveOptions, me: curve.Name) -> curve.Curve | None:
    """Returns what sockets of this process need so that they talk to the deployment only. None with ipc: those sockets
    lie in the directory."""
    if options.controls_by_tcp:
        return curve.Curve(_directory(options) / _KEYS, me)
    return None


def files_for_nodes(options: KunserveOptions) -> dict[str, bytes]:
    """Returns by name the files that a directory on another machine begins with: how to reach the coordinator, and the
    keys. Whoever gets them can speak for any process of the deployment."""
    directory = _directory(options)
    return {name: (directory / name).read_bytes() for name in (_KEYS, _address_file(options).name)}


def _bind_address(options: KunserveOptions, name: str) -> str:
    if options.controls_by_tcp:
        return f"tcp://{options.kunserve_host}:*"
    return f"ipc://{_directory(options) / name}"


def _address_file(options: KunserveOptions) -> Path:
    return _directory(options) / "coordinator.address"


def _head_file(options: KunserveOptions, name: str) -> Path:
    return _directory(options) / f"{name}.address"


def _publish(file: Path, endpoint: str) -> None:
    new = file.with_name(file.name + ".new")
    new.write_text(endpoint, encoding="utf-8")
    new.replace(file)


def _published(file: Path, by: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TransientError(f"no {by} has written {file}") from None


def _directory(options: KunserveOptions) -> Path:
    if not options.kunserve_directory:
        raise ConfigurationError("this server was not started by kunserve_sgl.launch_server: it has no directory")
    return Path(options.kunserve_directory)
