"""Fixtures of the tests with real servers: tiny models, and the pairs of servers that are compared."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from _deployments import Deployment, Pair, ServerPool

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec

_POOL: pytest.StashKey[ServerPool] = pytest.StashKey()


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a dtype, written when it is first asked for. Both dtypes have the same seed."""
    written: dict[str, Path] = {}

    def model(dtype: str) -> Path:
        if dtype not in written:
            written[dtype] = tmp_path_factory.mktemp("models") / dtype
            write_tiny_model(TinyModelSpec(dtype=dtype), written[dtype])
        return written[dtype]

    return model


@pytest.fixture(scope="session")
def tiny_model(model_of: Callable[[str], Path]) -> Path:
    """A model for tests that only need one."""
    return model_of("float32")


@pytest.fixture(scope="session")
def server_pool(
    model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ServerPool]:
    pool = ServerPool(model_of, tmp_path_factory.mktemp("logs"))
    request.config.stash[_POOL] = pool
    yield pool
    pool.stop_all()


@pytest.fixture(scope="session")
def deployment(request: pytest.FixtureRequest) -> Deployment:
    """The deployment that a test is marked with, by `_deployments.using`."""
    value: Deployment = request.param
    return value


@pytest.fixture
def pair(deployment: Deployment, server_pool: ServerPool) -> Iterator[Pair]:
    """The running servers of the deployment. A server that dies fails the test in which it died."""
    servers = server_pool.pair(deployment)
    yield servers
    server_pool.check_alive()
    for endpoint in servers.both:  # What a failed test has left running would disturb the next one.
        endpoint.post("/abort_request", {"abort_all": True})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that start servers of their own do not share the machine with those of the pool."""
    pool = item.config.stash.get(_POOL, None)
    if pool is not None and item.get_closest_marker("server") and not _uses_pair(item):
        pool.stop_all()


def _uses_pair(item: pytest.Item) -> bool:
    return "pair" in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what the servers printed last."""
    report = yield
    pool = item.config.stash.get(_POOL, None)
    if report.failed and pool is not None and _uses_pair(item):
        report.sections += [(f"log of {name}", text) for name, text in pool.logs().items()]
    return report
