"""How much memory of the machine is left for processes here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Of a control group, version 2 and 1: the most memory that it may take, and what it has taken.
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def free_host_bytes(root: str = "/") -> int:
    """Returns how much memory processes here may still take: what the machine has left, and what their control group
    allows them. `root` is where /proc and /sys are."""
    lines = Path(root, "proc/meminfo").read_text().splitlines()
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return min([int(available) * 1024, *_left_in_group(Path(root, "sys/fs/cgroup"))])


def _left_in_group(group: Path) -> Iterator[int]:
    """Yields what the limit of the control group leaves, if it has one. Cached files that nobody uses count as free."""
    for limit, used in _LIMITS:
        try:
            most, now = (Path(group, name).read_text().strip() for name in (limit, used))
            lines = Path(group, limit).with_name("memory.stat").read_text().splitlines()
        except FileNotFoundError:
            continue
        if most.isdigit():
            counts = dict(line.split() for line in lines)
            yield int(most) - int(now) + int(counts.get("total_inactive_file", counts.get("inactive_file", "0")))
