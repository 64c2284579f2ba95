"""The command that starts a server of this environment, stock or with KunServe."""

from __future__ import annotations

import sys
from pathlib import Path

from servers.server import HOST

STOCK_SERVER = "sglang.launch_server"
KUNSERVE_SERVER = "kunserve_sgl.launch_server"


def launch_command(module: str, model: Path, port: int, *flags: str) -> list[str]:
    """The arguments of a process that serves `model` on `port` of the loopback interface.

    `module` is `STOCK_SERVER` or `KUNSERVE_SERVER`. The dtype belongs to `flags`: with `auto` SGLang computes a float32
    model in float16.
    """
    return [
        *(sys.executable, "-m", module, "--model-path", str(model), "--host", HOST, "--port", str(port)),
        *flags,
    ]
