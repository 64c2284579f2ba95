"""Replicas end one after the other, and nobody starts them again: those who are left go on, until all have ended."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from _deployments import THREE_TO_LOSE, using
from _http import CALL_DEADLINE_S, Endpoint, at_once
from _sabotage import BROKEN_FORWARD
from _servers import RunningServer

from servers.server import ServerProcess
from waiting import wait_until

pytestmark = [pytest.mark.server, using(THREE_TO_LOSE)]

PROMPTS = [[7 * i + j + 300 for j in range(20 + 10 * i)] for i in range(6)]


def answers(endpoint: Endpoint) -> list[list[int]]:
    bodies = [{"input_ids": each, "sampling_params": {"temperature": 0, "max_new_tokens": 16}} for each in PROMPTS]
    calls = [lambda body=body: endpoint.ask("/generate", body)["output_ids"] for body in bodies]
    return at_once(calls)


def members(endpoint: Endpoint) -> list[tuple[str, bool]]:
    status = endpoint.get("/kunserve/status").json()
    return [(replica["state"], replica["lost"]) for replica in status["replicas"]]


def answers_while_one_is_stopped(server: RunningServer, stopped: int, merged_with: int) -> list[list[int]]:
    """The stopped one goes on once the status names it; the other one, which waits for it, tells nothing either."""
    pid = server.scheduler_pid(stopped)

    def is_named() -> bool:
        reason: str = server.status()["replicas"][stopped]["reason"]
        return reason.startswith(f"replica {merged_with} has waited for it for ")

    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as thread:
            late = thread.submit(answers, server.endpoint)
            # The other one gives up after `--kunserve-order-timeout`, twice as long as this.
            wait_until(is_named, "the stopped one is named", 60.0)
            os.kill(pid, signal.SIGCONT)
            return late.result()
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.ends_server
def test_replicas_end_one_after_the_other(server: RunningServer) -> None:
    """One server, because each part needs that the replicas of those before have ended."""
    expected = answers(server.endpoint)
    those_who_are_left_still_merge_and_come_apart(server, expected)
    a_replica_that_fails_ends_alone_and_nobody_waits_for_its_answers(server, expected)
    the_last_requests_are_answered_and_the_server_ends_with_the_first_reason(server)


def those_who_are_left_still_merge_and_come_apart(server: RunningServer, expected: list[list[int]]) -> None:
    """Replica 2 is killed. Replica 1 is stopped for a while when it is merged."""
    endpoint = server.endpoint
    os.kill(server.scheduler_pid(2), signal.SIGKILL)
    left = [("normal", False), ("normal", False), ("degraded", True)]
    wait_until(lambda: members(endpoint) == left, "the death is noticed")
    assert endpoint.get("/health").status_code == 200
    assert answers(endpoint) == expected
    assert endpoint.ask("/kunserve/drop", {"groups": [[0, 1]]})["extension_slots"] > 0
    assert members(endpoint)[:2] == [("merged", False)] * 2
    assert answers(endpoint) == expected
    assert answers_while_one_is_stopped(server, stopped=1, merged_with=0) == expected
    assert endpoint.ask("/kunserve/restore", {})["success"]
    assert answers(endpoint) == expected
    assert server.process.running


def a_replica_that_fails_ends_alone_and_nobody_waits_for_its_answers(
    server: RunningServer, expected: list[list[int]]
) -> None:
    """Replica 2 has been killed by then. The request that replica 1 fails with goes on at replica 0."""
    endpoint = server.endpoint
    (server.switches / BROKEN_FORWARD).write_text("1")
    body = {"input_ids": PROMPTS[0], "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
    assert endpoint.ask("/generate", {**body, "routed_dp_rank": 1})["output_ids"] == expected[0]
    assert [is_lost for _, is_lost in members(endpoint)] == [False, True, True]
    assert answers(endpoint) == expected
    # What is asked of all replicas.
    assert len(endpoint.ask_for("/server_info")["internal_states"]) == 1
    endpoint.flush_cache()
    assert endpoint.ask("/update_weights_from_disk", {"model_path": str(server.model)})["success"]
    assert answers(endpoint) == expected


def the_last_requests_are_answered_and_the_server_ends_with_the_first_reason(server: RunningServer) -> None:
    """Only replica 0 is left by then; replica 2 was the first to end. Stopped, it can answer nothing before its end."""
    url = f"{server.endpoint.base_url}/generate"
    pid = server.scheduler_pid(0)
    os.kill(pid, signal.SIGSTOP)
    body = {"input_ids": PROMPTS[0], "sampling_params": {"max_new_tokens": 4}, "stream": True}
    calls = [requests.post(url, json=body, stream=True, timeout=CALL_DEADLINE_S) for _ in range(8)]  # the heads came
    os.kill(pid, signal.SIGKILL)
    for call in calls:
        assert last_of_stream(call)["meta_info"]["finish_reason"]["status_code"] == 503
    assert exit_status(server.process) == 1
    assert server.process.log_tail(1).endswith(
        "KunServe: all replicas have ended; the first one: replica 2 rank 0 ended with exit code -9"
    )


def last_of_stream(answer: requests.Response) -> Any:
    *_, last, done = [line.removeprefix("data: ") for line in answer.iter_lines(decode_unicode=True) if line]
    assert done == "[DONE]"
    return json.loads(last)


def exit_status(server: ServerProcess) -> int:
    assert server._process is not None
    return server._process.wait(CALL_DEADLINE_S)
