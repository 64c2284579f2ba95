"""An idle server waits for events instead of asking for them, also while its engine is paused."""

from __future__ import annotations

import pytest
import requests
from _deployments import AUTO, using
from _questions import Question, ask
from _servers import RunningServer

from idle import cpu_percent, worker_percent

pytestmark = [pytest.mark.server, using(AUTO)]

# A busy loop takes a whole core per process; the housekeeping of a waiting one about 1 %. CPU time is compared, not
# wall time, so other load on the machine does not count. bench/idle.py reports the exact figures.
BUSY_PERCENT = 25.0
WATCHED_S = 3.0
QUESTION = Question((5, 6, 7), 4)


def test_idle_replicas_and_controller_wait(server: RunningServer) -> None:
    ask(server.endpoint, QUESTION)
    assert worker_percent(cpu_percent(server.process.pids(), WATCHED_S)) < BUSY_PERCENT
    ask(server.endpoint, QUESTION)


def test_paused_engine_waits_and_goes_on(server: RunningServer) -> None:
    """What patch 0001 is for. Unpatched, both schedulers spin until /continue_generation."""
    assert server.endpoint.post("/pause_generation", {}).status_code == requests.codes.ok
    try:
        assert worker_percent(cpu_percent(server.process.pids(), WATCHED_S)) < BUSY_PERCENT
    finally:
        continued = server.endpoint.post("/continue_generation", {})
    assert continued.status_code == requests.codes.ok
    ask(server.endpoint, QUESTION)
