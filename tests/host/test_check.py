"""POST /kunserve/check finds a whole deployment whole, in any state, under load too, and says what is not."""

from __future__ import annotations

import pytest
import requests
from _deployments import LATENT, RANKS, SAFEGUARDS, using
from _drop import Clients, Served
from _http import Json
from _questions import make_questions
from _sabotage import SPOILED_LAYER, spoil
from _servers import RunningServer

from waiting import wait_until

pytestmark = pytest.mark.server

QUESTIONS = make_questions(16, seed=13)
MERGE = {"groups": [[0, 1]], "layers": [0, 0, 1, 1]}


def check(served: Served) -> Json:
    answer: Json = served.endpoint.ask("/kunserve/check", {})
    return answer


def whole(served: Served) -> Json:
    return {"ok": True, "replicas": [{"replica": replica, "differences": []} for replica in served.replicas]}


def check_while(served: Served, phase: str) -> int:
    """Checks until requests have been answered in between. Returns how many checks there were."""
    made = 0

    def is_enough() -> bool:
        nonlocal made
        assert check(served) == whole(served)
        made += 1
        return made >= 3 and (sum(clients.answers.values()) >= before + 8 or not clients.are_asking)

    with Clients(served) as clients:
        clients.phase = phase
        clients.wait_for_answers(4)
        before = sum(clients.answers.values())
        wait_until(is_enough, "requests have been answered between checks")
    return made


@using(LATENT, RANKS, SAFEGUARDS)
def test_a_deployment_is_whole_in_any_state(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    assert check(served) == whole(served)
    assert check_while(served, "parted") >= 3
    served.drop(MERGE)
    assert check(served) == whole(served)
    assert check_while(served, "merged") >= 3
    served.restore()
    assert check(served) == whole(served)
    served.check_as_at_start()


@using(SAFEGUARDS)
def test_checks_and_transitions_do_not_meet(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    with Clients(served) as clients:
        for _ in range(2):
            for route, body in (("drop", MERGE), ("restore", {})):
                clients.during(route, lambda route=route, body=body: served.endpoint.ask(f"/kunserve/{route}", body))
                answer = served.endpoint.post("/kunserve/check", {})
                assert answer.status_code == requests.codes.ok, answer.text
                assert answer.json() == whole(served)
    served.check_as_at_start()


@using(SAFEGUARDS)
def test_a_bit_that_has_turned_is_found(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    spoil(server.switches, 1, 2)
    answer = check(served)
    assert not answer["ok"]
    first, second = answer["replicas"]
    assert first == {"replica": 0, "differences": []}
    (difference,) = second["differences"]
    assert difference.startswith("layer 2 in memory has checksum xxh3-128:")
    spoil(server.switches, 1, 2)
    server.status()
    wait_until(lambda: not (server.switches / SPOILED_LAYER).exists(), "the layer is whole again")
    assert check(served) == whole(served)


@using(SAFEGUARDS)
def test_it_takes_the_key_of_an_administrator(server: RunningServer) -> None:
    assert requests.post(f"{server.process.base_url}/kunserve/check", timeout=60).status_code == 401
    answer = server.endpoint.post("/kunserve/check", {"deep": True})
    assert answer.status_code == 400
    assert "accepted: {}, or nothing" in answer.text
