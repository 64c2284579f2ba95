"""What a server has on the machine beside its processes, by the names that it has signed up."""

from __future__ import annotations

import re
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")


def members(temporary: Path) -> set[str]:
    """The names that a server has signed up whose temporary files are in this directory."""
    return {path.name for path in temporary.glob("kunserve-*/members/*")}


def shared_memory_of(names: set[str]) -> set[str]:
    """The files in shared memory that have one of these names."""
    return {path.name for path in _SHARED_MEMORY.iterdir() if names & set(re.split(r"[-_.]", path.name))}
