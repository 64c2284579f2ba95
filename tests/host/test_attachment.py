"""A server that is not attached as it must be does not start, and says why: three ways to break it. A process whose
patch does not apply is shown by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from servers.command import KUNSERVE_SERVER, launch_command
from servers.server import ServerError, ServerProcess, find_free_port

pytestmark = pytest.mark.server

DEADLINE_S = 900
ATTACH = "from kunserve_sgl.integration.attach.attachment import Role, attach; attach(Role.SCHEDULER)"


def start_and_fail(model: Path, overlay: Path) -> str:
    """Starts a server whose Python path begins with `overlay`; its whole output once it has died."""
    port = find_free_port()
    command = launch_command(
        *(KUNSERVE_SERVER, model, port, "--dtype", "float32", "--kunserve", "manual"),
        *("--dp-size", "2", "--max-total-tokens", "1024"),
    )
    with ServerProcess(command, port=port, env={"PYTHONPATH": str(overlay), "OMP_NUM_THREADS": "1"}) as server:
        with pytest.raises(ServerError, match="the server ended with status"):
            server.wait_healthy(DEADLINE_S)
        return server.log_path.read_text(encoding="utf-8", errors="replace")


def fake_distribution(overlay: Path, name: str, version: str, entry_points: str = "") -> None:
    info = overlay / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def test_wrong_sglang_version(tiny_model: Path, tmp_path: Path) -> None:
    fake_distribution(tmp_path, "sglang", "0.5.18")
    log = start_and_fail(tiny_model, tmp_path)
    assert "KunServe needs sglang==0.5.17, but 0.5.18 is installed" in log


def test_patch_that_does_not_apply(tmp_path: Path) -> None:
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(
        Path(spec.origin).parent,
        tmp_path / "sglang",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    scheduler = tmp_path / "sglang" / "srt" / "managers" / "scheduler.py"
    source = scheduler.read_text(encoding="utf-8")
    scheduler.unlink()
    scheduler.write_text(source + "\n# changed by somebody\n", encoding="utf-8")
    attaching = subprocess.run(
        [sys.executable, "-c", ATTACH],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert attaching.returncode != 0
    log = attaching.stderr
    assert "0001-paused-engine-waits.patch was made for another version of sglang.srt.managers.scheduler" in log


def test_replaced_class_that_a_process_does_not_use(tiny_model: Path, tmp_path: Path) -> None:
    """Another plugin replaces the scheduler too, in every scheduler process, after we did."""
    fake_distribution(tmp_path, "usurper", "1", "[sglang.srt.plugins]\nusurper = usurper:register\n")
    (tmp_path / "usurper.py").write_text(
        "def register():\n"
        "    from sglang.srt.managers.scheduler import Scheduler\n"
        "    from sglang.srt.plugins.hook_registry import HookRegistry, HookType\n"
        "    base = Scheduler.__mro__[1] if Scheduler.__name__ == 'KunserveScheduler' else Scheduler\n"
        "    usurper = type('UsurperScheduler', (base,), {})\n"
        "    HookRegistry.register('sglang.srt.managers.scheduler.Scheduler', usurper, HookType.REPLACE)\n"
    )
    log = start_and_fail(tiny_model, tmp_path)
    assert "sglang.srt.managers.scheduler.Scheduler was replaced by" in log
    assert "UsurperScheduler there; another plugin may have hooked it" in log
