"""A replica that ends comes back by itself: others serve meanwhile, and in the end all is as it was at the start."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests
from _deployments import LATENT, LLAMA, MOE, RANKS, using
from _drop import Clients, Served
from _questions import Question, ask, ask_all, make_questions
from _servers import START_DEADLINE_S, TITLE_OF_CONTROLLER, RunningServer, ServerPool, ServerSpec

from kunserve_sgl.tiny_model import write_tiny_model
from kunserve_sgl.tiny_model_spec import TinyModelSpec
from preloaded import Preloaded
from waiting import wait_until

pytestmark = pytest.mark.server

QUESTIONS = make_questions(12, seed=12)


@pytest.fixture
def served(server: RunningServer) -> Served:
    return Served(server, QUESTIONS)


def has_been_lost(server: RunningServer, replica: int, before: Sequence[int]) -> bool:
    """Also where it is back already; `before` are the restarts before it was killed."""
    return server.states()[replica] == "restarting" or server.restarts()[replica] > before[replica]


def kill_and_wait(server: RunningServer, *pids: int, replicas: Sequence[int]) -> None:
    """Kills processes of `replicas`, and waits until all of these are back."""
    before = server.restarts()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)

    def are_back() -> bool:
        now = server.restarts()
        return all(now[each] > before[each] for each in replicas) and set(server.states()) == {"normal"}

    wait_until(are_back, f"replicas {replicas} are back", START_DEADLINE_S)


def took_layers_from(server: RunningServer, replica: int) -> str:
    """Where the layers have come from at the last start of a replica, as it says."""
    line = re.compile(rf"DP{replica}\b.*KunServe: the layers have come from (.*) in [\d.]+ s$")
    found = [match[1] for each in server.log().splitlines() if (match := line.search(each))]
    return found[-1] if found else ""


def all_answer(served: Served) -> None:
    """Every replica gives the answers that were given before."""
    for replica in served.replicas:
        asked = [Question(each.prompt, each.answer_tokens, replica) for each in served.questions[:6]]
        assert ask_all(served.endpoint, asked) == served.expected[:6]


@using(LLAMA)
def test_others_serve_on_and_the_replica_is_taken_up_again(served: Served) -> None:
    """Twice, each time with a merge of the two after it: nothing of the one before stands in the way."""
    server, endpoint = served.server, served.endpoint
    for _ in range(2):
        with Clients(Served(server, [Question(q.prompt, q.answer_tokens, 0) for q in QUESTIONS]), 4) as clients:
            clients.wait_for_answers(4)
            before = server.restarts()
            os.kill(server.scheduler_pid(1), signal.SIGKILL)
            wait_until(partial(has_been_lost, server, 1, before), "the loss is seen")
            answer = endpoint.post("/kunserve/drop", {"groups": [[0, 1]]})
            if answer.status_code == requests.codes.ok:  # it was back already
                served.restore()
            else:
                assert answer.status_code == requests.codes.conflict
                assert "replica 1 is restarting: replica 1 rank 0 ended with exit code -9; " in answer.text
            wait_until(lambda: server.states() == ["normal", "normal"], "it is back", START_DEADLINE_S)
            clients.wait_for_answers(4)
        assert took_layers_from(server, 1) == "replica 0 (4)"
        all_answer(served)
        served.drop({"groups": [[0, 1]]})
        assert ask_all(endpoint, served.questions) == served.expected
        served.restore()
        assert ask_all(endpoint, served.questions) == served.expected


@using(LLAMA)
def test_a_member_of_a_group_comes_back_and_merges_again(served: Served) -> None:
    served.drop({"groups": [[0, 1]]})
    kill_and_wait(served.server, served.server.scheduler_pid(1), replicas=[1])
    all_answer(served)
    served.drop({"groups": [[0, 1]]})
    assert ask_all(served.endpoint, served.questions) == served.expected
    served.restore()


@using(LLAMA)
def test_requests_wait_while_nobody_is_there(served: Served) -> None:
    """Both replicas are killed while they are merged, and come back apart."""
    server, endpoint = served.server, served.endpoint
    served.drop({"groups": [[0, 1]]})
    before = server.restarts()
    for pid in [server.scheduler_pid(replica) for replica in served.replicas]:
        os.kill(pid, signal.SIGKILL)

    def nobody_is_there() -> bool:
        is_over = all(now > was for now, was in zip(server.restarts(), before, strict=True))
        return endpoint.get("/health").status_code == requests.codes.service_unavailable or is_over

    wait_until(nobody_is_there, "both have ended")
    assert ask_all(endpoint, served.questions) == served.expected
    wait_until(lambda: server.states() == ["normal", "normal"], "both are back", START_DEADLINE_S)
    assert endpoint.get("/health").status_code == requests.codes.ok
    all_answer(served)


@using(RANKS)
def test_one_rank_takes_its_replica_with_it_and_all_ranks_come_back(served: Served) -> None:
    kill_and_wait(served.server, served.server.scheduler_pid(0, 1), replicas=[0])
    assert took_layers_from(served.server, 0) == "replica 1 (4)"
    all_answer(served)
    served.drop({"groups": [[0, 1]]})
    assert ask_all(served.endpoint, served.questions) == served.expected
    served.restore()
    assert ask_all(served.endpoint, served.questions) == served.expected


@using(MOE)
def test_activations_are_sent_to_the_replica_that_came_back(served: Served) -> None:
    """Two of three have sent to each other before, and are merged while the third is killed."""
    server, endpoint = served.server, served.endpoint
    served.drop({"groups": [[0, 1]]})
    served.restore()
    served.drop({"groups": [[1, 2]]})
    kill_and_wait_merged(served, killed=0, merged=(1, 2))
    assert ask_all(endpoint, served.questions) == served.expected
    served.restore()
    served.drop({"groups": [[0, 1, 2]]})
    assert ask_all(endpoint, served.questions) == served.expected
    served.restore()
    assert set(server.states()) == {"normal"}


@using(LATENT)
def test_a_model_that_computes_tensors_from_its_weights_is_loaded_as_a_whole(served: Served) -> None:
    """Those are nowhere else: they may be too small to be moved into frames."""
    kill_and_wait(served.server, served.server.scheduler_pid(1), replicas=[1])
    assert took_layers_from(served.server, 1) == ""
    why = "DeepseekV2ForCausalLM computes tensors from its weights when these are loaded"
    assert f"KunServe: all layers are loaded from the checkpoint: ConfigurationError: {why}" in served.server.log()
    all_answer(served)


def kill_and_wait_merged(served: Served, killed: int, merged: tuple[int, ...]) -> None:
    before = served.server.restarts()
    os.kill(served.server.scheduler_pid(killed), signal.SIGKILL)
    wait_until(lambda: served.server.restarts()[killed] > before[killed], "it is started again")
    expected = ["merged" if replica in merged else "normal" for replica in served.replicas]
    wait_until(lambda: served.server.states() == expected, "it is back", START_DEADLINE_S)


def grown(before: dict[str, int], now: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {what: (before[what], count) for what, count in now.items() if count > before[what]}


def mapped_memfds(pid: int) -> int:
    return sum("memfd:" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


@pytest.fixture
def start(tmp_path: Path, preloaded: Preloaded) -> Iterator[Callable[[ServerSpec], RunningServer]]:
    """Starts a server that is no other test's."""
    pool = ServerPool(tmp_path, preloaded.popen)

    def started(spec: ServerSpec) -> RunningServer:
        (server,) = pool.running(spec)
        return server

    yield started
    pool.stop_all()


def test_nothing_is_left_of_those_that_have_ended(start: Callable[[ServerSpec], RunningServer]) -> None:
    """Neither files of the server nor shared memory, nor descriptors or mapped memory of those that live."""
    server = start(LLAMA.ours)
    served = Served(server, QUESTIONS)
    (private,) = (path.parent for path in server.process.temporary_directory.glob("kunserve-*/coordinator.address"))

    def merge_and_part() -> None:
        served.drop({"groups": [[0, 1]]})
        ask(served.endpoint, served.questions[0])
        served.restore()
        served.endpoint.flush_cache()

    def leftovers() -> dict[str, int]:
        living = {"the replica": server.scheduler_pid(0), "the controller": server.pid_titled(TITLE_OF_CONTROLLER)}
        files = {f"files of {name}": psutil.Process(pid).num_fds() for name, pid in living.items()}
        maps = {f"memfds mapped by {name}": mapped_memfds(pid) for name, pid in living.items()}
        members = {path.name for path in (private / "members").iterdir()}
        shared = [path for path in Path("/dev/shm").iterdir() if (members | ended) & set(re.split(r"[-_.]", path.name))]
        # What a process has counted stays a part of the sums on /metrics, in files of its own.
        private_files = [path for path in private.rglob("*") if path.suffix != ".db"]
        return {**files, **maps, "server": len(private_files), "shared memory": len(shared)}

    ended: set[str] = set()

    def start_again() -> None:
        pid = server.scheduler_pid(1)
        ended.add(str(pid))
        kill_and_wait(server, pid, replicas=[1])
        merge_and_part()

    start_again()
    before = leftovers()
    for _ in range(3):
        start_again()
    wait_until(lambda: grown(before, leftovers()) == {}, f"nothing grows: {grown(before, leftovers())}", 60.0)


def test_a_replica_comes_back_with_the_parameters_that_the_others_have(
    start: Callable[[ServerSpec], RunningServer], tmp_path: Path
) -> None:
    """Those that were loaded from a disk since the start are loaded again."""
    server = start(ServerSpec(("--dp-size", "2", "--kunserve", "manual", "--max-total-tokens", "1024")))
    question = Question((300, 301, 302, 303), 16, 0)
    before = ask(server.endpoint, question)
    write_tiny_model(TinyModelSpec(dtype="float32", seed=77), tmp_path / "other")
    assert server.endpoint.ask("/update_weights_from_disk", {"model_path": str(tmp_path / "other")})["success"]
    expected = ask(server.endpoint, question)
    assert expected != before
    kill_and_wait(server, server.scheduler_pid(1), replicas=[1])
    assert ask(server.endpoint, Question(question.prompt, 16, 1)) == expected
    assert server.endpoint.ask("/kunserve/drop", {"groups": [[0, 1]]})["success"]
    assert ask(server.endpoint, Question(question.prompt, 16, 1)) == expected


def test_layers_come_from_the_host_copy_where_nobody_is_left(start: Callable[[ServerSpec], RunningServer]) -> None:
    server = start(ServerSpec(("--dp-size", "2", "--max-total-tokens", "1024", "--kunserve-host-copy")))
    question = Question((300, 301, 302), 8, 0)
    expected = ask(server.endpoint, question)
    kill_and_wait(server, *(server.scheduler_pid(replica) for replica in range(2)), replicas=[0, 1])
    assert [ask(server.endpoint, replace(question, replica=replica)) for replica in range(2)] == [expected] * 2
    taken = {took_layers_from(server, replica) for replica in range(2)}
    # One of them may have been back before the other began.
    assert any(each.startswith("the copy in host memory (") for each in taken), taken
    assert all(re.fullmatch(r"(the copy in host memory|replica \d) \(\d+\)", each) for each in taken), taken


def test_a_replica_that_cannot_start_is_given_up_and_the_others_serve(
    start: Callable[[ServerSpec], RunningServer],
) -> None:
    server = start(ServerSpec(("--dp-size", "2", "--max-total-tokens", "1024", "--kunserve-restart-tries", "2")))
    question = Question((300, 301, 302), 8, 0)
    expected = ask(server.endpoint, question)
    elsewhere = server.model.with_name("elsewhere")
    server.model.rename(elsewhere)
    os.kill(server.scheduler_pid(1), signal.SIGKILL)
    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(lambda: [ask(server.endpoint, question) for _ in range(20)])
        wait_until(lambda: server.states() == ["normal", "degraded"], "it is given up", START_DEADLINE_S)
        assert asking.result() == [expected] * 20
    reason = server.status()["replicas"][1]["reason"]
    assert reason.startswith("given up: ended 3 times in "), reason
    assert "the last one: replica 1 rank 0 ended with exit code 1: " in reason
    assert server.restarts() == [0, 2]
    assert f"replica 1 is not started again: {reason}" in server.log()
    answer = server.endpoint.post("/kunserve/drop", {"groups": [[0, 1]]})
    assert (answer.status_code, answer.json()["message"]) == (409, f"replica 1 is degraded: {reason}")
    # The last one that is left may come back, and is given up like the other: then the server ends.
    os.kill(server.scheduler_pid(0), signal.SIGKILL)
    asked = requests.post(f"{server.endpoint.base_url}/generate", json=question.body(), timeout=START_DEADLINE_S)
    assert asked.status_code == requests.codes.service_unavailable
    wait_until(lambda: not server.process.running, "the server ends")
    assert "KunServe: all replicas have ended; the first one: replica 1 rank 0 ended with exit code -9" in server.log()
