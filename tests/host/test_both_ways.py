"""A deployment on two machines: replicas of one map each other's memory and use that of the other by messages, within
one batch too. Answers are those from before any drop."""

from __future__ import annotations

import itertools
import re
import signal

import pytest
from _deployments import BASE_TOKENS, BOTH_WAYS, using
from _drop import Served
from _http import Json
from _questions import ask_all, make_questions
from _servers import RunningServer
from test_exchange import copying_up_to, drop, exchange, wait_for_all
from test_lending import granules, smaller
from test_nothing_mapped import Watcher
from test_recovery import kill_under_load, load_for_kill, require_as_at_start, wait_whole

pytestmark = [pytest.mark.server, using(BOTH_WAYS)]

QUESTIONS = make_questions(12, seed=41)
MAPPED = (0, 1)  # the others use each other's memory by messages
WAYS = [{"1": "map", "2": "message"}, {"0": "map", "2": "message"}, {"0": "message", "1": "message"}]


def attention(served: Served) -> list[Json]:
    return [replica["remote_attention"] for replica in served.status()["replicas"]]


def orders_sent(served: Served) -> dict[tuple[int, int], int]:
    """Of each replica to each other."""
    return {
        (replica, int(peer)): count
        for replica, each in enumerate(attention(served))
        for peer, count in each["orders_sent"].items()
    }


def test_each_peer_is_used_in_its_way_while_replicas_drop_exchange_and_restore(server: RunningServer) -> None:
    served = Served(server, QUESTIONS)
    assert [each["by"] for each in attention(served)] == ["auto"] * 3
    assert [each["peers"] for each in attention(served)] == WAYS
    before, watcher = orders_sent(served), Watcher(server)
    with watcher.watching():
        with copying_up_to(server, 0):  # KV stays where it is
            drop(served)
            watcher.look()
            assert ask_all(server.endpoint, QUESTIONS) == served.expected
            after = orders_sent(served)
        has_asked = {pair for pair, count in after.items() if count > before.get(pair, 0)}
        assert has_asked == {(0, 2), (1, 2), (2, 0), (2, 1)}
        assert server.endpoint.post("/kunserve/check").json()["ok"]
        wait_for_all(served, remote=1)
        assert exchange(served)["parts_done"] > 0
        assert ask_all(server.endpoint, QUESTIONS) == served.expected
        assert server.endpoint.post("/kunserve/check").json()["ok"]
        served.restore()
    assert watcher.pairs == {MAPPED}
    served.check_as_at_start()


@pytest.mark.parametrize(("lender", "borrower"), [(0, 1), (2, 1), (0, 2)])
def test_memory_is_lent_in_both_ways(server: RunningServer, lender: int, borrower: int) -> None:
    served = Served(server, QUESTIONS)
    watcher = Watcher(server)
    with smaller(served, lender, granules(served, BASE_TOKENS // 2)):
        body = {"from": lender, "to": borrower, "tokens": BASE_TOKENS // 4}
        assert server.endpoint.ask("/kunserve/lend", body)["extension_slots"] > 0
        watcher.look()
        assert ask_all(server.endpoint, QUESTIONS) == served.expected
        served.restore()
    assert watcher.pairs == ({MAPPED} if (lender, borrower) == MAPPED else set())
    served.check_as_at_start()


@pytest.mark.parametrize("killed", [1, 2])
def test_one_that_is_killed_is_recovered_from_and_gets_its_layers_back(server: RunningServer, killed: int) -> None:
    served = Served(server, QUESTIONS)
    others = [replica for replica in served.replicas if replica != killed]
    load = load_for_kill(server, killed, others, seed=killed)
    watcher = Watcher(server)
    with watcher.watching():
        drop(served)
        watcher.look()
        kill_under_load(server, load, killed, others, sent=signal.SIGKILL)
        wait_whole(server)
    assert watcher.pairs == {MAPPED}
    require_as_at_start(server, served.replicas)
    assert [each["peers"] for each in attention(served)] == WAYS
    sources = re.findall(r"KunServe: the layers have come from (.*) in ", server.log())
    assert "the checkpoint" not in sources[-1]


def test_the_way_to_each_peer_is_in_the_metrics(server: RunningServer) -> None:
    text = server.endpoint.get("/metrics").text
    for replica, peer in itertools.permutations(range(3), 2):
        way = WAYS[replica][str(peer)]
        for each in ("map", "message"):
            found = re.search(rf'kunserve:peer_memory{{.*peer="{peer}",replica="{replica}",way="{each}"}} (\S+)', text)
            assert found is not None
            assert float(found[1]) == (each == way)
