"""An idle server waits for events instead of asking for them, also while its engine is paused."""

from __future__ import annotations

import pytest
import requests
from _deployments import AUTO, using
from _questions import Question, ask
from _servers import RunningServer

from idle import cpu_percent, worker_percent
from waiting import wait_until

pytestmark = [pytest.mark.server, using(AUTO)]

# A busy loop takes a whole core per process; the housekeeping of a waiting one about 1 %. CPU time is compared, not
# wall time, so other load on the machine does not count. bench/idle.py reports the exact figures.
BUSY_PERCENT = 25.0
WATCHED_S = 3.0
QUESTION = Question((5, 6, 7), 4)


def wait_for_rest(server: RunningServer) -> None:
    """Until the replicas and the controller have waited for so long. What came before may still have to be finished;
    who is in a busy loop never waits."""

    def rests() -> bool:
        return worker_percent(cpu_percent(server.process.pids(), WATCHED_S)) < BUSY_PERCENT

    wait_until(rests, "no process of the server is busy", 120.0)


def test_idle_replicas_and_controller_wait(server: RunningServer) -> None:
    ask(server.endpoint, QUESTION)
    wait_for_rest(server)
    ask(server.endpoint, QUESTION)


def test_paused_engine_waits_and_goes_on(server: RunningServer) -> None:
    """What patch 0001 is for. Unpatched, both schedulers spin until /continue_generation."""
    assert server.endpoint.post("/pause_generation", {}).status_code == requests.codes.ok
    try:
        wait_for_rest(server)
    finally:
        continued = server.endpoint.post("/continue_generation", {})
    assert continued.status_code == requests.codes.ok
    ask(server.endpoint, QUESTION)
