"""Servers of two replicas on Ray: what they are started with, and how."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _drop import Served
from _leftovers import members, shared_memory_of
from _questions import make_questions
from _servers import RunningServer, ServerSpec

from servers.server import ServerProcess, find_free_port

END_DEADLINE_S = 300.0


def on_ray(*flags: str) -> ServerSpec:
    """A server with a replica on each of two nodes."""
    return ServerSpec(
        (
            *("--dp-size", "2", "--use-ray", "--nnodes", "2", "--kunserve", "manual", "--chunked-prefill-size", "64"),
            *("--max-total-tokens", "2048", "--context-length", "1024", "--max-running-requests", "32"),
            *("--enable-metrics", *flags),
        )
    )


def process_on(
    ray_address: str, spec: ServerSpec, model: Path, popen: Callable[..., Any] = subprocess.Popen
) -> ServerProcess:
    """A server on the cluster at this address, to be started by `popen`. Its log is beside the model."""
    port = find_free_port()
    return ServerProcess(
        spec.command(model, port),
        port=port,
        env={"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray_address},
        log_path=model.parent / "log",
        grace_s=END_DEADLINE_S,  # only its own reaper knows what its actors leave, as they are not its children
        popen=popen,
    )


@contextlib.contextmanager
def served_on(
    ray_address: str, spec: ServerSpec, model: Path, popen: Callable[..., Any] = subprocess.Popen
) -> Iterator[Served]:
    """Starts a server as `process_on`, and waits until it serves. Its end must leave no shared memory."""
    process = process_on(ray_address, spec, model, popen)
    server = RunningServer(spec, process, model, model.parent)
    with process:
        server.wait_ready()
        names = members(process.temporary_directory)
        assert shared_memory_of(names)
        yield Served(server, make_questions(6, seed=21))
    assert not shared_memory_of(names)
