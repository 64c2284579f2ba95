"""Members that are killed or hang in the middle of a transition: it is rolled back, serving goes on. Then all end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from _http import CALL_DEADLINE_S, Endpoint, at_once
from _sabotage import BROKEN_FORWARD, sabotage

from servers.server import HOST, ServerProcess, find_free_port

pytestmark = pytest.mark.server

START_DEADLINE_S = 400.0
TIMEOUT_S = 10.0  # of a phase; far longer than a phase takes, so that an early end is told from a deadline
PROMPTS = [[7 * i + j + 300 for j in range(20 + 10 * i)] for i in range(6)]


@pytest.fixture(scope="module")
def switches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("switches")


@pytest.fixture(scope="module")
def server(tiny_model: Path, switches: Path) -> Iterator[ServerProcess]:
    port = find_free_port()
    command = [
        *(sys.executable, "-m", "kunserve_sgl.launch_server", "--model-path", str(tiny_model), "--dtype", "float32"),
        *("--host", HOST, "--port", str(port), "--dp-size", "3", "--max-total-tokens", "4096"),
        *("--max-running-requests", "8", "--kunserve-transition-timeout", str(TIMEOUT_S)),
    ]
    with ServerProcess(command, port=port, env={"OMP_NUM_THREADS": "1", **sabotage(switches)}) as process:
        process.wait_healthy(START_DEADLINE_S)
        yield process


def scheduler_pid(server: ServerProcess, replica: int) -> int:
    (pid,) = [pid for pid in server.pids() if psutil.Process(pid).cmdline()[:1] == [f"sglang::scheduler_DP{replica}"]]
    return pid


def answers(endpoint: Endpoint) -> list[list[int]]:
    bodies = [{"input_ids": each, "sampling_params": {"temperature": 0, "max_new_tokens": 16}} for each in PROMPTS]
    calls = [lambda body=body: endpoint.ask("/generate", body)["output_ids"] for body in bodies]
    return at_once(calls)


def wait_until_dropping(endpoint: Endpoint) -> None:
    ends_at_s = time.monotonic() + CALL_DEADLINE_S
    while "are dropping: prepare" not in endpoint.post("/kunserve/plan", {"groups": [[0, 1]]}).text:
        assert time.monotonic() < ends_at_s, "no transition has begun"
        time.sleep(0.02)


def members(endpoint: Endpoint) -> list[tuple[str, bool]]:
    status = endpoint.get("/kunserve/status").json()
    return [(replica["state"], replica["lost"]) for replica in status["replicas"]]


def drop_with_a_stopped_member(
    endpoint: Endpoint, server: ServerProcess, groups: list[list[int]], stopped: int, kill: bool
) -> requests.Response:
    """The answer to a drop that `stopped` takes no part in, and in the middle of which it may be killed."""
    pid = scheduler_pid(server, stopped)
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(endpoint.post, "/kunserve/drop", {"groups": groups})
            wait_until_dropping(endpoint)
            if kill:
                os.kill(pid, signal.SIGKILL)
            return answer.result()
    finally:
        if not kill:
            os.kill(pid, signal.SIGCONT)


def answers_while_one_is_stopped(
    endpoint: Endpoint, server: ServerProcess, stopped: int, merged_with: int
) -> list[list[int]]:
    """The stopped one goes on once the status names it; the other one, which waits for it, tells nothing either."""
    pid = scheduler_pid(server, stopped)
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as thread:
            late = thread.submit(answers, endpoint)
            ends_at_s = (
                time.monotonic() + CALL_DEADLINE_S / 2
            )  # the other one gives up after `--kunserve-order-timeout`
            named = f"replica {merged_with} has waited for it for "
            while not (reason := endpoint.get("/kunserve/status").json()["replicas"][stopped]["reason"]).startswith(
                named
            ):
                assert time.monotonic() < ends_at_s, reason
            os.kill(pid, signal.SIGCONT)
            return late.result()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_death_and_silence_in_the_middle_of_a_drop(server: ServerProcess) -> None:
    endpoint = Endpoint(server.base_url)
    expected = answers(endpoint)

    answer = drop_with_a_stopped_member(endpoint, server, [[1, 2]], stopped=2, kill=True)
    assert answer.status_code == 503, answer.text
    assert answer.json()["message"] == "rolled back: replica 2 rank 0 ended with exit code -9"
    assert answer.json()["seconds"] < TIMEOUT_S / 2
    assert endpoint.get("/health").status_code == 200
    assert members(endpoint) == [("normal", False), ("normal", False), ("degraded", True)]
    assert answers(endpoint) == expected

    # Those who are left still merge and come apart.
    assert endpoint.ask("/kunserve/drop", {"groups": [[0, 1]]})["extension_slots"] > 0
    assert members(endpoint)[:2] == [("merged", False)] * 2
    assert answers(endpoint) == expected
    assert answers_while_one_is_stopped(endpoint, server, stopped=1, merged_with=0) == expected
    assert endpoint.ask("/kunserve/restore", {})["success"]
    assert answers(endpoint) == expected

    answer = drop_with_a_stopped_member(endpoint, server, [[0, 1]], stopped=1, kill=False)
    assert answer.status_code == 503, answer.text
    assert answer.json()["message"].startswith(f"rolled back: no answer to prepare within {TIMEOUT_S:g} s")
    assert members(endpoint) == [("normal", False), ("degraded", False), ("degraded", True)]
    assert endpoint.post("/kunserve/drop", {"groups": [[0, 1]]}).status_code == 409
    assert answers(endpoint) == expected
    assert server.running


def test_a_replica_that_fails_ends_alone_and_nobody_waits_for_its_answers(
    server: ServerProcess, switches: Path, tiny_model: Path
) -> None:
    """Replica 2 has been killed by then."""
    endpoint = Endpoint(server.base_url)
    expected = answers(endpoint)
    (switches / BROKEN_FORWARD).write_text("1")
    body = {"input_ids": PROMPTS[0], "sampling_params": {"max_new_tokens": 4}}
    lost = endpoint.post("/generate", {**body, "routed_dp_rank": 1})
    assert lost.status_code == 503
    assert "replica 1 has ended" in lost.text
    assert [is_lost for _, is_lost in members(endpoint)] == [False, True, True]
    assert answers(endpoint) == expected
    # What is asked of all replicas.
    assert len(endpoint.get("/server_info").json()["internal_states"]) == 1
    endpoint.flush_cache()
    assert endpoint.ask("/update_weights_from_disk", {"model_path": str(tiny_model)})["success"]
    assert answers(endpoint) == expected


def test_requests_of_the_last_replica_are_answered_and_the_server_ends_with_the_first_reason(
    server: ServerProcess,
) -> None:
    """Only replica 0 is left by then; replica 2 was the first to end. Stopped, it can answer nothing before its end."""
    url = f"{server.base_url}/generate"
    pid = scheduler_pid(server, 0)
    os.kill(pid, signal.SIGSTOP)
    body = {"input_ids": PROMPTS[0], "sampling_params": {"max_new_tokens": 4}, "stream": True}
    calls = [requests.post(url, json=body, stream=True, timeout=CALL_DEADLINE_S) for _ in range(8)]  # the heads came
    os.kill(pid, signal.SIGKILL)
    for call in calls:
        assert last_of_stream(call)["meta_info"]["finish_reason"]["status_code"] == 503
    assert exit_status(server) == 1
    assert server.log_tail(1).endswith(
        "KunServe: all replicas have ended; the first one: replica 2 rank 0 ended with exit code -9"
    )


def last_of_stream(answer: requests.Response) -> Any:
    *_, last, done = [line.removeprefix("data: ") for line in answer.iter_lines(decode_unicode=True) if line]
    assert done == "[DONE]"
    return json.loads(last)


def exit_status(server: ServerProcess) -> int:
    assert server._process is not None
    return server._process.wait(CALL_DEADLINE_S)
