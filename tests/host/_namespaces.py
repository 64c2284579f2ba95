"""Two machines in small: network namespaces that a cable joins, with a node of Ray in each. What the second one has in
its directory for temporary files is its own, and so are the numbers of its processes."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil
from _drop import Served
from _ray import on_ray, served_on
from _servers import ServerSpec
from typing_extensions import Self

from servers.ray_nodes import OBJECT_STORE_BYTES
from waiting import wait_until

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_HERE = Path("/proc/self/ns/net")
_NAMED = Path("/run/netns")
_CABLE = "cable"  # its name at both ends
_PRIVATE = int(ipaddress.IPv4Address("10.0.0.0"))
_NETWORKS = 1 << 22  # of four addresses each there
_START_DEADLINE_S = 120.0
_STOP_DEADLINE_S = 20.0
# So that Ray finds out in seconds that a node is away, and a node that it is alone.
_IMPATIENCE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Where only a directory and its mount are new. The model is in the directory, and has to be on both machines.
_AS_A_MACHINE = (
    'mount --bind "$1" /mnt && mount -t tmpfs tmpfs "$2" && mkdir -p "$1" && mount --move /mnt "$1" && shift 2 && '
    'exec "$@"'
)


def why_not_possible() -> str | None:
    """Says why this process cannot make namespaces; None where it can."""
    name = f"kunserve-{secrets.token_hex(4)}"
    try:
        made = _ip("netns", "add", name)
        if made.returncode:
            return made.stderr.strip() or "ip netns add has failed"
        tried = subprocess.run(
            ["ip", "netns", "exec", name, *_unshared("mount", "-t", "tmpfs", "tmpfs", "/mnt")],
            **_QUIETLY,  # type: ignore[call-overload]
        )
        return tried.stderr.strip() or "unshare has failed" if tried.returncode else None
    except FileNotFoundError as error:
        return str(error)
    finally:
        with contextlib.suppress(FileNotFoundError):
            _ip("netns", "delete", name)


class TwoMachines:
    """Is there while the context lasts, and `first`, where its thread is then, as are the processes that it starts."""

    def __init__(self, logs: Path, model: Path) -> None:
        """`logs` gets the output of Ray; `model` is a directory that both have."""
        name = f"kunserve-{secrets.token_hex(4)}"
        self.first, self.second = f"{name}-1", f"{name}-2"
        # Nobody else's: Ray does not start where any process of the machine has a head of the same address.
        network = _PRIVATE + 4 * secrets.randbelow(_NETWORKS)
        self.addresses = str(ipaddress.IPv4Address(network + 1)), str(ipaddress.IPv4Address(network + 2))
        self._port = 2048 + secrets.randbelow(4096)
        self.ray_address = f"{self.addresses[0]}:{self._port}"
        self._logs = logs
        self._model = model
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            files = tempfile.mkdtemp(prefix="ray-")  # in a short path, for sockets
            stack.callback(shutil.rmtree, files)
            for name in (self.first, self.second):
                _must("netns", "add", name)
                stack.callback(_remove, name)
            _must(
                "link", "add", _CABLE, "netns", self.first, "type", "veth", "peer", "name", _CABLE, "netns", self.second
            )
            for name, address in zip((self.first, self.second), self.addresses, strict=True):
                _must("-n", name, "address", "add", f"{address}/30", "dev", _CABLE)
                for link in ("lo", _CABLE):
                    _must("-n", name, "link", "set", link, "up")
            stack.enter_context(_inside(self.first))
            head = ["--head", "--port", str(self._port), "--include-dashboard", "false", "--temp-dir", files]
            self._start("head", head, 0)
            self.start_second()
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()

    def start_second(self) -> None:
        """Starts Ray on the second machine, and waits until it runs."""
        self._start("second", ["--address", self.ray_address], 1)

    def processes_of_second(self, title: str) -> list[int]:
        """The processes of the second machine that have this in their titles."""
        found = []
        for pid in map(int, _ip("netns", "pids", self.second).stdout.split()):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, and may not have been waited for yet
                found += [pid] if title in " ".join(psutil.Process(pid).cmdline()) else []
        return found

    def directories_of_second(self) -> list[Path]:
        """What servers have in the directory for temporary files of the second machine, as this one finds it."""
        raylet = max(self.processes_of_second("raylet/raylet"))
        return list(Path(f"/proc/{raylet}/root{tempfile.gettempdir()}").glob("kunserve-*"))

    def set_cable(self, is_in: bool) -> None:
        """Pulls the cable out, or puts it in."""
        _must("-n", self.first, "link", "set", _CABLE, "up" if is_in else "down")

    def why_no_losses(self, *how: str) -> str | None:
        """Lets the cable delay and lose what `how` says, as netem does; says why that is not possible here."""
        for name in (self.first, self.second):
            done = subprocess.run(
                ["tc", "-n", name, "qdisc", "replace", "dev", _CABLE, "root", "netem", *how],
                **_QUIETLY,  # type: ignore[call-overload]
            )
            if done.returncode:
                return done.stderr.strip() or "tc has failed"
        return None

    def _start(self, what: str, how: Sequence[str], machine: int) -> None:
        ray = [str(Path(sys.executable).with_name("ray")), "start", *how, "--block"]
        ray += ["--node-ip-address", self.addresses[machine], "--num-cpus", "1", "--num-gpus", "0"]
        ray += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
        if machine:
            apart = _unshared("sh", "-c", _AS_A_MACHINE, "sh", str(self._model), tempfile.gettempdir(), *ray)
            ray = ["ip", "netns", "exec", self.second, *apart]
        log = self._logs / f"ray-{what}-{len(self._nodes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ray,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_IMPATIENCE},
            )
        self._nodes.append(process)

        def runs() -> bool:
            assert process.poll() is None, log.read_text(errors="replace")
            return b"Ray runtime started" in log.read_bytes()

        wait_until(runs, f"{what} runs: {log}", _START_DEADLINE_S)


_QUIETLY: Mapping[str, object] = {"capture_output": True, "text": True, "timeout": 30}


def _unshared(*command: str) -> list[str]:
    return ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", *command]


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], **_QUIETLY)  # type: ignore[call-overload,no-any-return]


def _must(*arguments: str) -> None:
    done = _ip(*arguments)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _remove(name: str) -> None:
    """Ends whatever is in a namespace, and removes it."""

    def is_empty() -> bool:
        inside = [int(pid) for pid in _ip("netns", "pids", name).stdout.split()]
        for pid in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not inside

    try:
        wait_until(is_empty, f"nothing is left in {name}", _STOP_DEADLINE_S)
    finally:
        _must("netns", "delete", name)


@contextlib.contextmanager
def _inside(name: str) -> Iterator[None]:
    """Takes this thread, and what it starts, into a namespace."""
    before, inside = os.open(_HERE, os.O_RDONLY), os.open(_NAMED / name, os.O_RDONLY)
    try:
        _enter(inside)
        try:
            yield
        finally:
            _enter(before)
    finally:
        os.close(before)
        os.close(inside)


def _enter(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


def on_two_machines(*flags: str) -> ServerSpec:
    """A server with a replica on each machine."""
    return on_ray("--kunserve-control", "network", *flags)


@contextlib.contextmanager
def served_on_both(machines: TwoMachines, model: Path, spec: ServerSpec) -> Iterator[Served]:
    """Starts the server from the first machine. When it has ended nothing of it is left on the second."""
    with served_on(machines.ray_address, spec, model) as served:
        yield served
        assert machines.directories_of_second()
    wait_until(lambda: not machines.directories_of_second(), "the directory of the second machine is gone")
