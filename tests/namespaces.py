"""Network namespaces with addresses of their own and a cable between them, for what has to work between machines."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cable import END, Cable
from waiting import wait_until

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_HERE = Path("/proc/thread-self/ns/net")
_NAMED = Path("/run/netns")
_PRIVATE = int(ipaddress.IPv4Address("10.0.0.0"))
_NETWORKS = 1 << 22  # of four addresses each there
_DEADLINE_S = 30.0


@dataclass(frozen=True)
class Namespace:
    """One machine, as far as networks go."""

    name: str
    address: str

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What runs `arguments` there."""
        return ["ip", "netns", "exec", self.name, *arguments]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Takes this thread there as long as the block lasts. The threads and processes that it starts stay there: also
        those of a context of ZMQ that gets its first socket, which must not be one that others use."""
        before, inside = os.open(_HERE, os.O_RDONLY), os.open(_NAMED / self.name, os.O_RDONLY)
        try:
            _enter(inside)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(before)
            os.close(inside)

    def pids(self) -> list[int]:
        """The processes that are there."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]


@dataclass(frozen=True)
class Network:
    """Two machines, and all that joins them."""

    first: Namespace
    second: Namespace
    cable: Cable


@contextlib.contextmanager
def two_namespaces() -> Iterator[Network]:
    """Two namespaces with one cable between them. Whatever runs there at the end is killed. Skips the test where they
    cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces are made by root only")
    name = f"kunserve-{secrets.token_hex(4)}"
    # Nobody else's: Ray does not start where any process of the machine has a head of the same address.
    network = _PRIVATE + 4 * secrets.randbelow(_NETWORKS)
    first, second = (Namespace(f"{name}-{end}", str(ipaddress.IPv4Address(network + end))) for end in (1, 2))
    with contextlib.ExitStack() as stack:
        try:
            for each in (first, second):
                _ip("netns", "add", each.name)
                stack.callback(_ip, "netns", "delete", each.name)
            cable = stack.enter_context(Cable(first.inside, second.inside))
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
        for each in (first, second):
            stack.callback(_end_all_inside, each)
            _ip("-netns", each.name, "address", "add", f"{each.address}/30", "dev", END)
            _ip("-netns", each.name, "link", "set", "lo", "up")
        yield Network(first, second, cable)


def _end_all_inside(namespace: Namespace) -> None:
    def is_empty() -> bool:
        pids = namespace.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(is_empty, f"nothing is left in {namespace.name}", _DEADLINE_S)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> str:
    return subprocess.run(("ip", *arguments), check=True, timeout=_DEADLINE_S, capture_output=True, text=True).stdout
