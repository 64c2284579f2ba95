"""Servers of two replicas on Ray: what they are started with, and how."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from _drop import Served
from _questions import make_questions
from _servers import RunningServer, ServerSpec

from servers.server import ServerProcess, find_free_port


def on_ray(*flags: str) -> ServerSpec:
    """A server with a replica on each of two nodes."""
    return ServerSpec(
        (
            *("--dp-size", "2", "--use-ray", "--nnodes", "2", "--kunserve", "manual", "--chunked-prefill-size", "64"),
            *("--max-total-tokens", "2048", "--context-length", "1024", "--max-running-requests", "32"),
            *("--enable-metrics", *flags),
        )
    )


def process_on(ray_address: str, spec: ServerSpec, model: Path) -> ServerProcess:
    """A server on the cluster at this address, to be started. Its log is beside the model."""
    port = find_free_port()
    return ServerProcess(
        spec.command(model, port),
        port=port,
        env={"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray_address},
        log_path=model.parent / "log",
        grace_s=0.0,
    )


@contextlib.contextmanager
def served_on(ray_address: str, spec: ServerSpec, model: Path) -> Iterator[Served]:
    """Starts a server as `process_on`, and waits until it serves."""
    process = process_on(ray_address, spec, model)
    server = RunningServer(spec, process, model, model.parent)
    with process:
        server.wait_ready()
        yield Served(server, make_questions(6, seed=21))
