"""A layer comes back with the right bytes although the peer that keeps it has others by now."""

from __future__ import annotations

import pytest
from _deployments import SAFEGUARDS, THREE_TO_LOSE, Deployment, using
from _drop import Served
from _questions import ask_all, make_questions
from _sabotage import SPOILED_LAYER, spoil
from _servers import RunningServer

from waiting import wait_until

pytestmark = pytest.mark.server

MERGE = {"groups": [[0, 1]], "layers": [0, 0, 1, 1]}
QUESTIONS = make_questions(8, seed=12)
SECOND_SOURCE = {SAFEGUARDS: "the copy in host memory", THREE_TO_LOSE: "the checkpoint"}


@using(SAFEGUARDS, THREE_TO_LOSE)
def test_a_layer_that_its_keeper_has_spoiled_comes_from_elsewhere(
    server: RunningServer, deployment: Deployment
) -> None:
    served = Served(server, QUESTIONS)
    served.drop(MERGE)
    assert ask_all(served.endpoint, QUESTIONS) == served.expected
    before = len(server.log())
    spoil(server.switches, 1, 2)
    served.restore()
    log = server.log()[before:]
    assert "layer 2 does not come from parameters of layer 2 at replica 1: layer 2 as restored has checksum" in log
    assert f"layer 2 comes from {SECOND_SOURCE[deployment]}" in log
    assert "layer 3 comes from" not in log  # it came from its peer
    spoil(server.switches, 1, 2)
    server.status()
    wait_until(lambda: not (server.switches / SPOILED_LAYER).exists(), "the layer is whole again")
    served.check_as_at_start()


@using(SAFEGUARDS, THREE_TO_LOSE)
def test_the_log_says_at_start_where_layers_come_back_from(server: RunningServer, deployment: Deployment) -> None:
    lines = [line for line in server.log().splitlines() if "dropped layers come back from a peer that keeps" in line]
    assert len(lines) == len(server.at_start)
    expected = f"else from the checkpoint {server.model}"
    if deployment is SAFEGUARDS:
        expected = f"else from the copy in host memory, {expected}"
    assert all(line.endswith(expected) for line in lines)
