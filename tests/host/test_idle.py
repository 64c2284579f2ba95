"""An idle server waits for events instead of asking for them, also while its engine is paused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from idle import cpu_percent, worker_percent
from servers.server import ServerProcess, find_free_port

pytestmark = pytest.mark.server

# A busy loop takes a whole core per process; the housekeeping of a waiting one about 1 %. CPU time is compared, not
# wall time, so other load on the machine does not count. bench/idle.py reports the exact figures.
BUSY_PERCENT = 25.0
WATCHED_S = 6.0
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    port = find_free_port()
    command = [
        *(sys.executable, "-m", "kunserve_sgl.launch_server", "--model-path", str(tiny_model), "--port", str(port)),
        *("--dp-size", "2", "--max-total-tokens", "1024", "--dtype", "float32"),
    ]
    with ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1"}) as server:
        server.wait_healthy(400)
        yield server


def generate(server: ServerProcess) -> None:
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    answer = requests.post(f"{server.base_url}/generate", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200
    assert answer.json()["meta_info"]["completion_tokens"] == 4


def test_idle_replicas_and_controller_wait(server: ServerProcess) -> None:
    generate(server)
    assert worker_percent(cpu_percent(server.pids(), WATCHED_S)) < BUSY_PERCENT
    generate(server)


def test_paused_engine_waits_and_goes_on(server: ServerProcess) -> None:
    """What patch 0001 is for. Unpatched, both schedulers spin until /continue_generation."""
    paused = requests.post(f"{server.base_url}/pause_generation", json={}, timeout=TIMEOUT_S)
    assert paused.status_code == 200
    try:
        assert worker_percent(cpu_percent(server.pids(), WATCHED_S)) < BUSY_PERCENT
    finally:
        continued = requests.post(f"{server.base_url}/continue_generation", json={}, timeout=TIMEOUT_S)
    assert continued.status_code == 200
    generate(server)
