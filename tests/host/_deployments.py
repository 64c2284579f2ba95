"""The servers that conformance is tested with: which there are, and a pool that runs those that are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _http import Endpoint

from servers.server import HOST, ServerError, ServerProcess, find_free_port

START_DEADLINE_S = 400.0
KV_TOKENS = 8192
CONTEXT_TOKENS = 4096
STOCK = "sglang.launch_server"
OURS = "kunserve_sgl.launch_server"
# A random model would fill the places where JSON may have white space with it for ever.
# Without --sleep-on-idle stock servers fill a core each while the other server is tested. It changes no answer.
_COMMON_FLAGS = (
    *("--max-total-tokens", str(KV_TOKENS), "--context-length", str(CONTEXT_TOKENS)),
    *("--max-running-requests", "32", "--enable-metrics", "--sleep-on-idle"),
    *("--constrained-json-disable-any-whitespace", "--enable-custom-logit-processor"),
)


@dataclass(frozen=True)
class ServerSpec:
    """One server: the module that is run, the dtype of the tiny model, and its flags."""

    module: str
    dtype: str
    flags: tuple[str, ...]

    def command(self, model: Path, port: int) -> list[str]:
        # The dtype is said again: with --dtype auto SGLang computes a float32 model in float16.
        return [
            *(sys.executable, "-m", self.module, "--model-path", str(model), "--host", HOST, "--port", str(port)),
            *("--dtype", self.dtype, *_COMMON_FLAGS, *self.flags),
        ]


@dataclass(frozen=True)
class Deployment:
    """A stock server and the server that is compared with it, both with the same model."""

    name: str
    stock: ServerSpec
    ours: ServerSpec


@dataclass(frozen=True)
class Pair:
    """The running servers of a deployment."""

    stock: Endpoint
    ours: Endpoint
    dtype: str
    model: Path

    @property
    def both(self) -> tuple[Endpoint, Endpoint]:
        return self.stock, self.ours

    def flush_caches(self) -> None:
        """Bring the caches of both servers into the same state: empty."""
        for endpoint in self.both:
            endpoint.flush_cache()


_STOCK_FLOAT32 = ServerSpec(STOCK, "float32", ("--dp-size", "1"))
_STOCK_BFLOAT16 = ServerSpec(STOCK, "bfloat16", ("--dp-size", "1"))
FLOAT32 = Deployment("float32", _STOCK_FLOAT32, ServerSpec(OURS, "float32", ("--dp-size", "2", "--kunserve", "manual")))
BFLOAT16 = Deployment(
    "bfloat16", _STOCK_BFLOAT16, ServerSpec(OURS, "bfloat16", ("--dp-size", "2", "--kunserve", "manual"))
)
OFF = Deployment("off", _STOCK_FLOAT32, ServerSpec(OURS, "float32", ("--kunserve", "off", "--tp-size", "2")))
TENSOR_PARALLEL = Deployment(
    "tp2-dp2", _STOCK_FLOAT32, ServerSpec(OURS, "float32", ("--tp-size", "2", "--dp-size", "2", "--kunserve", "manual"))
)


def using(*deployments: Deployment) -> pytest.MarkDecorator:
    """Run a test, or all tests of a module, with the `pair` of each deployment.

    The parameter has session scope, so that pytest groups the tests by deployment and servers start once. Groups
    come in the order of their first test; a stock server goes on where two that follow each other have it in common.
    """
    return pytest.mark.parametrize(
        "deployment", deployments, indirect=True, ids=lambda deployment: deployment.name, scope="session"
    )


@dataclass
class ServerPool:
    """Runs the servers of one deployment at a time; a server that the next one needs too goes on running."""

    model_of: Callable[[str], Path]
    log_dir: Path
    _running: dict[ServerSpec, ServerProcess] = field(default_factory=dict)

    def pair(self, deployment: Deployment) -> Pair:
        """The servers of `deployment`, which are started unless they run, after all others have been stopped."""
        needed = (deployment.stock, deployment.ours)
        self._stop([spec for spec in self._running if spec not in needed or not self._running[spec].running])
        started = {spec: self._start(spec) for spec in needed if spec not in self._running}
        for server in started.values():
            server.wait_healthy(START_DEADLINE_S)
        stock, ours = (Endpoint(self._running[spec].base_url) for spec in needed)
        return Pair(stock, ours, deployment.ours.dtype, self.model_of(deployment.ours.dtype))

    def _start(self, spec: ServerSpec) -> ServerProcess:
        port = find_free_port()
        server = ServerProcess(
            spec.command(self.model_of(spec.dtype), port),
            port=port,
            env={"OMP_NUM_THREADS": "1"},
            log_path=self.log_dir / f"{port}.log",
        )
        self._running[spec] = server
        server.start()
        return server

    def check_alive(self) -> None:
        """Raises ServerError when a server has died."""
        for spec, server in self._running.items():
            if not server.running:
                raise ServerError(f"{spec.module} {' '.join(spec.flags)} has died:\n{server.log_tail(60)}")

    def logs(self) -> Mapping[str, str]:
        """The end of the output of every server, by its command."""
        return {f"{spec.module} {' '.join(spec.flags)}": server.log_tail() for spec, server in self._running.items()}

    def _stop(self, specs: list[ServerSpec]) -> None:
        if not specs:
            return
        # At once: a server takes seconds to stop. Every one gets its stop even if another one fails.
        with ThreadPoolExecutor(max_workers=len(specs)) as threads:
            stops = [threads.submit(self._running.pop(spec).stop) for spec in specs]
        for stop in stops:
            stop.result()

    def stop_all(self) -> None:
        self._stop(list(self._running))
