"""Fixtures of the tests with real servers, and the order that they run in: each shared server starts once."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from _deployments import GROUPS, IN_ORDER, Deployment, Pair, deployment_of
from _distribution import SharedServerScheduling, unit_of
from _servers import LLAMA, RunningServer, ServerPool

from kunserve_sgl.tiny_model import write_tiny_model
from preloaded import Preloaded

# Of those that start their own servers. They begin first, so that no process of a run waits for them in the end.
_LONGEST = ("test_demo", "test_restarts")
_POOL: pytest.StashKey[ServerPool] = pytest.StashKey()


@pytest.fixture(scope="session")
def server_pool(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, preloaded: Preloaded
) -> Iterator[ServerPool]:
    pool = ServerPool(tmp_path_factory.mktemp("servers"), preloaded.popen)
    request.config.stash[_POOL] = pool
    yield pool
    pool.stop_all()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for tests that only need one."""
    directory = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(LLAMA, directory)
    return directory


@pytest.fixture(scope="session")
def deployment(request: pytest.FixtureRequest) -> Deployment:
    """The deployment that a test is marked with, by `_deployments.using`."""
    value: Deployment = request.param
    return value


@pytest.fixture
def server(deployment: Deployment, server_pool: ServerPool, request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """The running server of the deployment. A test that harms it fails, and the next one gets a new server."""
    running, *_ = server_pool.running(*deployment.servers)
    yield running
    if _is_last(request.node):
        server_pool.stop_all()
    else:
        server_pool.require_unharmed()


@pytest.fixture
def pair(server: RunningServer, deployment: Deployment, server_pool: ServerPool) -> Pair:
    """The running server, and the stock server that it is compared with."""
    ours, stock = server_pool.running(*deployment.servers)
    return Pair(stock, ours)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one deployment follow each other, those last that are the end of its server. Tests with servers of their
    own come after them, and then those without any."""
    for item in items:
        deployment = deployment_of(item)
        assert deployment is None or unit_of(item.nodeid) == GROUPS[deployment], item.nodeid
    items.sort(key=lambda item: (_place(item), _is_last(item)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharedServerScheduling:
    """Where several processes run tests, each shared server is in one of them."""
    return SharedServerScheduling(config, log)


def _place(item: pytest.Item) -> int:
    deployment = deployment_of(item)
    if deployment is not None:
        return IN_ORDER.index(deployment)
    if item.get_closest_marker("server") is None:
        return len(IN_ORDER) + 2
    return len(IN_ORDER) + (item.path.stem not in _LONGEST)


def _is_last(item: pytest.Item) -> bool:
    return item.get_closest_marker("ends_server") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests that start servers of their own do not share the machine with those of the pool."""
    pool = item.config.stash.get(_POOL, None)
    if pool is not None and item.get_closest_marker("server") and deployment_of(item) is None:
        pool.stop_all()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows what the servers printed last."""
    report = yield
    pool = item.config.stash.get(_POOL, None)
    if report.failed and pool is not None and deployment_of(item) is not None:
        report.sections += [(f"log of {name}", text) for name, text in pool.logs().items()]
    return report
