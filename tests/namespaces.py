"""Network namespaces with addresses of their own, for what has to work between machines."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

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
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces with one cable between them. Skips the test where they cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces are made by root only")
    name = f"kunserve-{secrets.token_hex(3)}"
    pair = Namespace(f"{name}-a", "10.77.0.1"), Namespace(f"{name}-b", "10.77.0.2")
    try:
        try:
            for each in pair:
                _ip("netns", "add", each.name)
            # Its two ends are in the namespaces from the start: names of interfaces of this one are nobody's business.
            ends = (*("eth0", "netns", pair[0].name), *("type", "veth"), *("peer", "eth0", "netns", pair[1].name))
            _ip("link", "add", *ends)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
        for each in pair:
            _ip("-netns", each.name, "address", "add", f"{each.address}/24", "dev", "eth0")
            _ip("-netns", each.name, "link", "set", "lo", "up")
            _ip("-netns", each.name, "link", "set", "eth0", "up")
        yield pair
    finally:
        for each in pair:
            subprocess.run(
                ("ip", "netns", "delete", each.name), check=False, timeout=_DEADLINE_S, stderr=subprocess.DEVNULL
            )


def _ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True, timeout=_DEADLINE_S, capture_output=True, text=True)
