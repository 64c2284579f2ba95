"""The command that starts a server of this environment, stock or with KunServe."""

from __future__ import annotations

import sys
from pathlib import Path

from servers.server import HOST

STOCK_SERVER = "sglang.launch_server"
KUNSERVE_SERVER = "kunserve_sgl.launch_server"
_SHARING = "--kunserve-replicas-per-gpu"


def launch_command(module: str, model: Path, port: int, *flags: str) -> list[str]:
    """The arguments of a process that serves `model` on `port` of the loopback interface.

    `module` is `STOCK_SERVER` or `KUNSERVE_SERVER`. The dtype belongs to `flags`: with `auto` SGLang computes a float32
    model in float16. `--kunserve-replicas-per-gpu N` among them puts the replicas of a stock server on one GPU, too,
    where N is all of them. Raises ValueError where it is not.
    """
    what = ["-m", module]
    if module == STOCK_SERVER and _SHARING in flags:
        at = flags.index(_SHARING)
        sharing, flags = flags[at + 1], flags[:at] + flags[at + 2 :]
        replicas = flags[flags.index("--dp-size") + 1] if "--dp-size" in flags else "1"
        if sharing != replicas:
            raise ValueError(f"{_SHARING} {sharing}: accepted with a stock server: all of its {replicas} replicas")
        what = [str(Path(__file__).with_name("one_gpu_stock.py"))]
    return [
        *(sys.executable, *what, "--model-path", str(model), "--host", HOST, "--port", str(port)),
        *flags,
    ]
