"""A replica ends before its last answers have left it, though the rest of the server has heard that it was done: its
sockets are not in step. Others give those answers."""

from __future__ import annotations

import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from _deployments import FAULTS_3, using
from _faults import bring_apart
from _questions import Question, ask, make_prompt
from _sabotage import UNSENT_ANSWERS
from _servers import RunningServer

from waiting import wait_until

pytestmark = [pytest.mark.server, using(FAULTS_3)]

LOST = 1


def test_answers_that_a_replica_has_not_sent_when_it_ends_are_given_by_others(server: RunningServer) -> None:
    chance = random.Random(97)
    questions = [Question(make_prompt(chance, 40), tokens) for tokens in (1, 7, 20)]
    expected = [ask(server.endpoint, question) for question in questions]
    server.endpoint.flush_cache()
    switch = server.switches / UNSENT_ANSWERS
    try:
        with ThreadPoolExecutor(len(questions)) as clients:
            switch.write_text(str(LOST))
            asked = [clients.submit(ask, server.endpoint, replace(each, replica=LOST)) for each in questions]

            def is_done() -> bool:
                """All are in its cache, and it runs none."""
                slots = server.status()["replicas"][LOST]["slots"]
                known = sum(len(each.prompt) for each in questions)
                return slots["used"] == 0 and slots["cached"] >= known

            wait_until(is_done, "the replica has computed all answers")
            wait_until(lambda: server.status()["dispatch"]["replicas"][str(LOST)]["work_tokens"] == 0, "it has said so")
            assert not any(each.done() for each in asked)
            switch.unlink()
            os.kill(server.scheduler_pid(LOST), signal.SIGKILL)
            assert [each.result() for each in asked] == expected
    finally:
        switch.unlink(missing_ok=True)
    bring_apart(server)
