"""KV goes to where it is read, in the background, and comes back: answers are those from before any drop, whatever
comes in between, and afterwards everything is as it was."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from _deployments import EXCHANGE, EXCHANGE_AUTO, EXCHANGE_LATENT, EXCHANGE_RANKS, using
from _drop import Clients, Served
from _http import Json
from _questions import ask_all, make_questions
from _sabotage import LIMITED_COPIES, order_fault
from _servers import RunningServer, check_books
from test_recovery import kill_under_load, load_for_kill, require_as_at_start

from waiting import wait_until

pytestmark = pytest.mark.server

QUESTIONS = make_questions(24, seed=21)
LONG_QUESTIONS = make_questions(24, seed=22, prefix_tokens=(500,))


def exchange(served: Served) -> Json:
    status: Json = served.status()["exchange"]
    return status


def drop(served: Served, *group: int) -> Json:
    answer: Json = served.endpoint.ask("/kunserve/drop", {"groups": [list(group or served.replicas)]})
    assert answer["success"], answer
    return answer


def wait_for_all(served: Served, remote: int = 0) -> None:
    """Until KV of no more than `remote` layers is read through mapped memory, and nothing is under way."""

    def is_there() -> bool:
        status = exchange(served)
        return not status["running"] and status["parts"] - status["parts_done"] <= remote

    wait_until(is_there, "all KV is where it is read")


def require_whole(served: Served) -> None:
    answer = served.endpoint.ask("/kunserve/check", {})
    assert answer == {"ok": True, "replicas": [{"replica": replica, "differences": []} for replica in served.replicas]}
    for replica in served.status()["replicas"]:
        check_books(replica)


def metric(served: Served, name: str) -> list[float]:
    found = re.findall(rf"^kunserve:{name}\S* (\S+)", served.endpoint.get("/metrics").text, re.MULTILINE)
    return [float(value) for value in found]


@contextmanager
def copying_up_to(server: RunningServer, size_bytes: int) -> Iterator[None]:
    """In the block each rank copies so much at most."""
    path = server.switches / LIMITED_COPIES
    path.write_text(str(size_bytes))
    try:
        yield
    finally:
        path.unlink()


def is_copying(served: Served) -> bool:
    """Whether a replica has copied something, and not all."""
    steps = [replica.get("transition_step") or "" for replica in served.status()["replicas"]]
    found = [re.search(r"copied the KV of (\d+) of (\d+) slots", step) for step in steps]
    return any(0 < int(each[1]) < int(each[2]) for each in found if each is not None)


@using(EXCHANGE)
def test_links_between_all_replicas_are_measured_after_the_start(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    served.wait_for_links()
    links = [replica["link_bytes_per_second"] for replica in served.status()["replicas"]]
    assert all(links[one][str(other)] == links[other][str(one)] for one in range(3) for other in range(one))


@using(EXCHANGE, EXCHANGE_LATENT, EXCHANGE_RANKS)
def test_answers_stay_equal_while_kv_goes_and_comes_back(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    spare = len(served.replicas) - 2  # of three, one may have no frames left for the last
    with Clients(served) as clients:
        for _ in range(2):
            clients.phase = "parted"
            clients.wait_for_answers(4)
            clients.during("dropping", lambda: drop(served))
            clients.during("exchanging", lambda: wait_for_all(served, remote=spare))
            clients.phase = "exchanged"
            clients.wait_for_answers(12)
            assert exchange(served)["parts_done"] > 0
            clients.during("restoring", served.restore)
    status = exchange(served)
    assert status["moved_bytes"] == status["returned_bytes"] > 0
    assert status["parts"] == 0
    require_whole(served)
    served.check_as_at_start()


@using(EXCHANGE, EXCHANGE_LATENT, EXCHANGE_RANKS)
def test_what_is_there_is_what_the_plan_says(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    drop(served)
    require_whole(served)  # whatever moves just then
    wait_for_all(served, remote=len(served.replicas) - 2)
    require_whole(served)
    status = served.status()
    if len(served.replicas) == 2:
        for each in status["homes"]:
            assert each["homes"] == status["hosts"][each["replica"]]
        assert [replica["frames"]["lent"] for replica in status["replicas"]] == [0, 0]
        wait_until(lambda: set(metric(served, "remote_tokens")) <= {0.0}, "nothing is remote")
    wait_until(lambda: sum(metric(served, "exchanged_bytes_total")) > 0, "what has moved is counted")
    served.restore()
    require_whole(served)
    served.check_as_at_start()


@using(EXCHANGE)
@pytest.mark.parametrize("command", ["restore", "drop"])
def test_a_command_in_the_middle_of_an_exchange(server: RunningServer, command: str) -> None:
    served = Served(server, QUESTIONS)
    moved = exchange(served)["moved_bytes"]
    with Clients(served) as clients:
        clients.phase = "exchanging"
        with copying_up_to(server, 200_000):
            if command == "restore":
                drop(served)
            else:
                drop(served, 0, 1)
            wait_until(lambda: is_copying(served), "KV is copied in part")
            assert served.status()["state"] == "merged"
            if command == "restore":
                served.restore()
                assert served.status()["state"] == "normal"
            else:
                drop(served)
                assert served.status()["replicas"][2]["group"] == [0, 1, 2]
        clients.phase = "afterwards"
        clients.wait_for_answers(8)
        if command == "drop":
            wait_until(lambda: exchange(served)["moved_bytes"] > moved, "it goes on")
            served.restore()
    assert "rolled back (a command goes before it)" in server.log()
    require_whole(served)
    served.check_as_at_start()


@using(EXCHANGE)
@pytest.mark.ends_server
@pytest.mark.parametrize(("killed", "others"), [(0, [1, 2]), (2, [0, 1])])
def test_a_death_in_the_middle_of_an_exchange(server: RunningServer, killed: int, others: list[int]) -> None:
    served = Served(server, QUESTIONS)
    load = load_for_kill(server, killed, others, seed=killed)
    with copying_up_to(server, 300_000):
        drop(served)
        wait_until(lambda: is_copying(served), "KV is copied in part")
        kill_under_load(server, load, killed, others)
    require_as_at_start(server, others)
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    drop(served, *others)
    wait_for_all(served)
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    served.restore()
    require_as_at_start(server, others)


@using(EXCHANGE)
@pytest.mark.ends_server
def test_a_death_while_it_changes_over_and_when_all_is_exchanged(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    load = load_for_kill(server, 1, [0, 2], seed=4)
    drop(served)
    wait_for_all(served, remote=1)
    kill_under_load(server, load, 1, [0, 2])
    require_as_at_start(server, [0, 2])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected
    with copying_up_to(server, 0):
        drop(served, 0, 2)
        order_fault(server.switches, "2 0", "release", "begin", signal.SIGKILL)
    wait_until(lambda: served.status()["replicas"][2]["lost"], "it has ended")
    wait_until(lambda: served.status()["replicas"][0]["state"] == "normal", "the other has recovered")
    require_as_at_start(server, [0])
    assert ask_all(server.endpoint, QUESTIONS) == served.expected


@using(EXCHANGE_AUTO)
def test_kv_moves_by_itself_where_asking_for_it_takes_long(server: RunningServer) -> None:
    """And then nobody is asked any more. Many requests have a long prefix in common, whose KV is elsewhere."""
    served = Served(server, LONG_QUESTIONS)
    since = len(server.log())
    with Clients(served) as clients:
        before = served.orders_sent()
        clients.during("dropping", lambda: drop(served))
        clients.phase = "asking"
        clients.wait_for_answers(1)
        assert sum(served.orders_sent()) > sum(before)
        clients.phase = "exchanging"
        wait_until(lambda: exchange(served)["parts_done"] == exchange(served)["parts"] > 0, "all KV has moved")
        clients.phase = "exchanged"
        in_the_end = served.orders_sent()
        clients.wait_for_answers(12)
        assert served.orders_sent() == in_the_end
        clients.during("restoring", served.restore)
    said = server.log()[since:]
    for host, home in ((0, 1), (1, 0)):
        measured = rf"replica {host} sends \d+ orders a second, .*: saves [\d.]+ s in 600 s, and takes [\d.]+ s"
        assert re.search(rf"KunServe exchange: {measured}: KV of replica {home} moves", said)
    require_whole(served)
    served.check_as_at_start()
