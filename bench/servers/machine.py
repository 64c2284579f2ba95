"""The machine and the command of a measurement, for the lines above a table."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

_GIT_TIMEOUT_S = 10.0


def describe_machine() -> dict[str, str]:
    """Processor, memory, load, software, commit and command, as text by name."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    total_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "machine": f"{model or platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{total_kib / 2**20:.0f} GiB, {platform.system()} {platform.release()}",
        "load": "load average before the start " + " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "software": f"Python {platform.python_version()}, sglang {version('sglang')}, torch {version('torch')}, "
        f"kunserve-sgl {version('kunserve-sgl')} {_commit()}".rstrip(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines() if Path(path).exists() else []


def _commit() -> str:
    """The commit of this checkout, with a mark where files differ from it; empty outside of one."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"commit {answer.stdout.strip()}" if answer.returncode == 0 else ""
