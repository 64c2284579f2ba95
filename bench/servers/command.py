"""The command that starts a server of this environment, stock or with KunServe."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servers.server import HOST

DTYPES = ("float32", "bfloat16")
STOCK_SERVER = "sglang.launch_server"
KUNSERVE_SERVER = "kunserve_sgl.launch_server"
_SHARING = "--kunserve-replicas-per-gpu"


def launch_command(module: str, model: Path | None, port: int, *flags: str) -> list[str]:
    """The arguments of a process that serves `model` on `port` of the loopback interface; where it is None, `flags`
    name the model.

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
        *(sys.executable, *what, "--host", HOST, "--port", str(port)),
        *([] if model is None else ["--model-path", str(model)]),
        *flags,
    ]


def add_server_arguments(parser: argparse.ArgumentParser, *, any_model: bool = True) -> None:
    """Options of a benchmark that go to the servers it starts: see `server_flags` and, where it runs with any model,
    `model_to_serve`."""
    if any_model:
        parser.add_argument("--model-path", type=Path, help="another model than the one that is written for it")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="of the servers, and of a model that is written"
    )
    parser.add_argument(
        "--server-flags",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="more flags for all servers, in one argument: memory, graphs, placement on GPUs, ...",
    )


def model_to_serve(arguments: argparse.Namespace, sizes: Mapping[str, Any], directory: Path) -> Path:
    """The model of `--model-path`, or a llama of these sizes and the dtype, which is written to `directory`."""
    if arguments.model_path is not None:
        return Path(arguments.model_path)
    from kunserve_sgl.tiny_model import write_tiny_model
    from kunserve_sgl.tiny_model_spec import TinyModelSpec

    write_tiny_model(TinyModelSpec(dtype=arguments.dtype, **sizes), directory)
    return directory


def server_flags(arguments: argparse.Namespace) -> list[str]:
    """What `add_server_arguments` takes, as flags of a server but for the model. Flags that are given count more than a
    benchmark's own, if they come last."""
    return ["--dtype", arguments.dtype, *arguments.server_flags]
