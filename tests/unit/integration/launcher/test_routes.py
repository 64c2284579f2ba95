"""The HTTP routes without a server: who may call them, what they parse, and what answers and silence lead to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.utils.auth import add_api_key_middleware
from sglang.utils import TypeBasedDispatcher

from kunserve_sgl.control.answers import Verdict, waiting_status
from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.launcher import calls as calls_module
from kunserve_sgl.integration.launcher import request_bodies, routes
from kunserve_sgl.integration.launcher.calls import Calls
from kunserve_sgl.integration.messages import (
    Command,
    CoordinatorCall,
    CoordinatorReply,
    Outcome,
    ReplicaReply,
    ResizeKvCall,
)

KEY, ADMIN_KEY = "key", "admin key"
DEADLINE_S = 120.0
COMMANDS = ("/kunserve/plan", "/kunserve/drop", "/kunserve/restore")


class ScriptedServer:
    """Stands where SGLang's tokenizer manager does: takes calls, and gives the answers it was told to give."""

    def __init__(self, replicas: int, answering: tuple[int, ...] = ()) -> None:
        arguments = {"dp_size": replicas, "kunserve_transition_timeout": 0.001, "kunserve_drain_timeout": 0.002}
        self.server_args = type("Arguments", (), arguments)()
        self.answering = answering
        self.deployment = waiting_status(replicas, ())
        self.verdict: Verdict | None = Verdict.DONE
        self.outcome = Outcome.DONE
        self.said: dict[int, dict[str, Any]] = {}  # beside what is always in a replica's status
        self._result_dispatcher = TypeBasedDispatcher([])
        self.calls: list[Any] = []

    def auto_create_handle_loop(self) -> None: ...

    def _dispatch_to_scheduler(self, call: Any) -> None:
        self.calls.append(call)
        if not isinstance(call, CoordinatorCall):
            for replica in self.answering:
                self.answer(call.call_id, replica)
        elif call.command is Command.STATUS:
            self._result_dispatcher(
                CoordinatorReply(call_id=call.call_id, verdict=Verdict.DONE, body={**self.deployment})
            )
        elif self.verdict is not None:
            body = {"success": self.verdict is Verdict.DONE, "message": "as told", "epoch": 7}
            self._result_dispatcher(CoordinatorReply(call_id=call.call_id, verdict=self.verdict, body=body))

    def answer(self, call_id: int, replica: int) -> None:
        reply = ReplicaReply(
            call_id=call_id,
            replica=replica,
            outcome=self.outcome,
            message="as told" if self.outcome is not Outcome.DONE else "",
            status={"id": replica, "capacity_tokens": 100, **self.said.get(replica, {})},
        )
        self._result_dispatcher(reply)


def test_answers_come_in_the_order_of_replicas() -> None:
    server = ScriptedServer(3, answering=(2, 0, 1))
    replies = asyncio.run(Calls(server).ask_to_resize(range(3), replica=1, frames=8))
    assert [reply.replica for reply in replies] == [0, 1, 2]


def test_missing_answer_ends_at_the_deadline_and_does_not_disturb_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls_module, "CALL_DEADLINE_S", 0.05)
    server = ScriptedServer(2, answering=(0,))
    calls = Calls(server)

    async def two_calls() -> list[ReplicaReply]:
        with pytest.raises(TransientError, match=r"replicas \[1\] did not answer within 0.05 s"):
            await calls.ask_to_resize(range(2), replica=1, frames=8)
        server.answer(server.calls[0].call_id, 1)  # too late
        server.answering = (1, 0)
        return await calls.ask_to_resize(range(2), replica=1, frames=8)

    replies = asyncio.run(two_calls())
    assert [reply.call_id for reply in replies] == [server.calls[1].call_id] * 2


def patient(server: ScriptedServer) -> Calls:
    """Who waits for a status in vain does so for longer than the test."""
    calls = Calls(server)
    calls.status_deadline_s = 2 * DEADLINE_S
    return calls


def test_a_replica_that_has_ended_is_not_waited_for() -> None:
    server = ScriptedServer(3, answering=(0,))
    calls = patient(server)

    async def ask(call: Any, *alive: list[int]) -> Any:
        asking = asyncio.ensure_future(call)
        for each in alive:
            await asyncio.sleep(0)
            assert not asking.done()
            calls.on_alive(each)
        return await asyncio.wait_for(asking, DEADLINE_S)

    async def run() -> None:
        status = await ask(calls.ask_for_status(range(3)), [0, 1, 2], [0, 2], [0])
        assert [reply.replica for reply in status] == [0]
        with pytest.raises(TransientError, match=r"replicas \[1, 2\] ended meanwhile"):
            await ask(calls.ask_to_resize(range(3), replica=1, frames=8), [0])
        assert await ask(calls.ask_for_status(())) == []
        assert list(await ask(calls.ask_for_check(range(2)), [0])) == [0]
        before = len(server.calls)
        assert await ask(calls.ask_for_check(())) == {}
        assert len(server.calls) == before

    asyncio.run(run())


def test_the_end_of_a_replica_may_be_known_before_others_have_answered_or_anybody_is_asked() -> None:
    """Also where it is back before they answer: it was asked before."""
    server = ScriptedServer(3, answering=(0,))
    calls = patient(server)

    async def run() -> None:
        asking = asyncio.ensure_future(calls.ask_for_status(range(3)))
        await asyncio.sleep(0)
        calls.on_alive([0, 2])
        calls.on_alive([0, 1, 2])
        assert not asking.done()
        server.answer(server.calls[0].call_id, 2)
        assert [reply.replica for reply in await asyncio.wait_for(asking, DEADLINE_S)] == [0, 2]
        calls.on_alive([0])
        assert [reply.replica for reply in await asyncio.wait_for(calls.ask_for_status(range(3)), DEADLINE_S)] == [0]
        server.answering = ()
        assert await asyncio.wait_for(calls.ask_for_status([1, 2]), DEADLINE_S) == []

    asyncio.run(run())


def client(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, api_key: str | None = None, admin: str | None = None
) -> TestClient:
    app = FastAPI()
    routes.add_routes(app)
    add_api_key_middleware(app, api_key=api_key, admin_api_key=admin)
    calls = Calls(server)
    monkeypatch.setattr(routes, "_server_calls", lambda: calls)
    return TestClient(app)


@pytest.mark.parametrize(
    ("api_key", "admin_api_key", "given", "allowed"),
    [
        (None, None, None, True),
        (KEY, None, None, False),
        (KEY, None, KEY, True),
        (None, ADMIN_KEY, None, False),
        (None, ADMIN_KEY, ADMIN_KEY, True),
        (KEY, ADMIN_KEY, KEY, False),
        (KEY, ADMIN_KEY, ADMIN_KEY, True),
    ],
)
def test_keys_are_honoured_as_on_sglangs_admin_routes(
    api_key: str | None, admin_api_key: str | None, given: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {} if given is None else {"Authorization": f"Bearer {given}"}
    http = client(ScriptedServer(1, answering=(0,)), monkeypatch, api_key, admin_api_key)
    assert http.get("/kunserve/status", headers=headers).status_code == (200 if allowed else 401)
    # A body that is refused for what it says shows that the route was reached.
    for path in ("/kunserve/kv", "/kunserve/check", *COMMANDS):
        assert http.post(path, content=b"[]", headers=headers).status_code == (400 if allowed else 401)


@pytest.mark.parametrize(
    ("path", "body", "call"),
    [
        ("plan", {"groups": [[0, 1]]}, (Command.PLAN, [[0, 1]], None, None)),
        ("drop", {"groups": [[0, 1]], "tokens": 5}, (Command.DROP, [[0, 1]], None, 5)),
        ("drop", {"groups": [[0, 1]], "layers": [0, 1]}, (Command.DROP, [[0, 1]], [0, 1], None)),
        ("drop", {"groups": [[0, 1]], "layers": {"1": [0, 1]}}, (Command.DROP, [[0, 1]], {1: [0, 1]}, None)),
        ("restore", {"groups": [[0, 1]]}, (Command.RESTORE, [[0, 1]], None, None)),
        ("restore", {}, (Command.RESTORE, None, None, None)),
        ("restore", None, (Command.RESTORE, None, None, None)),
    ],
)
def test_commands_reach_the_coordinator(path: str, body: Any, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ScriptedServer(2)
    answer = client(server, monkeypatch).post(f"/kunserve/{path}", **({} if body is None else {"json": body}))
    assert (answer.status_code, answer.json()) == (200, {"success": True, "message": "as told", "epoch": 7})
    (sent,) = server.calls
    assert (sent.command, sent.groups, sent.layers, sent.tokens) == call


@pytest.mark.parametrize(
    ("verdict", "status"), [(Verdict.BAD_REQUEST, 400), (Verdict.CONFLICT, 409), (Verdict.FAILED, 503)]
)
def test_refusals_have_their_status_and_the_reason(
    verdict: Verdict, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ScriptedServer(2)
    server.verdict = verdict
    answer = client(server, monkeypatch).post("/kunserve/restore")
    assert answer.status_code == status
    assert answer.json() == {"success": False, "message": "as told", "epoch": 7, "error": {"message": "as told"}}


def test_silent_coordinator_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "CALL_DEADLINE_S", 0.05)
    server = ScriptedServer(2)
    server.verdict = None
    answer = client(server, monkeypatch).post("/kunserve/drop", json={"groups": [[0, 1]]})
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "the coordinator did not answer within 0.086 s"


def test_one_replica_has_nobody_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ScriptedServer(1, answering=(0,))
    http = client(server, monkeypatch)
    for path, body in zip(COMMANDS, ({"groups": [[0, 1]]}, {"groups": [[0, 1]]}, {}), strict=True):
        answer = http.post(path, json=body)
        assert answer.status_code == 409
        assert "--dp-size 2 or more" in answer.json()["error"]["message"]
    status = http.get("/kunserve/status").json()
    assert (status["state"], status["epoch"]) == ("normal", 0)
    assert status["replicas"][0]["state"] == "normal"


def test_status_joins_plan_and_replicas_and_leaves_out_who_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ScriptedServer(3, answering=(2, 0))
    members = server.deployment["members"]
    members[0].update(state="merged", group=(0, 2))
    members[1].update(state="degraded", lost=True, reason="replica 1 rank 0 ended with exit code -9")
    server.deployment.update(epoch=4, state="degraded")
    status = client(server, monkeypatch).get("/kunserve/status").json()
    assert (status["epoch"], status["state"]) == (4, "degraded")
    assert status["replicas"][0] == {
        "id": 0, "capacity_tokens": 100, "state": "merged", "group": [0, 2], "lost": False, "stalled": False,
        "reason": "", "link_bytes_per_second": {},
    }  # fmt: skip
    assert status["replicas"][1] == {
        "id": 1, "state": "degraded", "group": [1], "lost": True, "stalled": False,
        "reason": "replica 1 rank 0 ended with exit code -9", "link_bytes_per_second": {},
    }  # fmt: skip
    assert "members" not in status


def test_status_says_who_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calls, "status_deadline_s", 0.05)
    answer = client(ScriptedServer(2, answering=(1,)), monkeypatch).get("/kunserve/status")
    assert answer.status_code == 200
    hangs, answers = answer.json()["replicas"]
    assert (hangs["id"], hangs["state"], hangs["reason"]) == (0, "normal", "no answer within 0.05 s")
    assert "capacity_tokens" not in hangs
    assert (answers["capacity_tokens"], answers["reason"]) == (100, "")


def test_a_check_says_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "CHECK_DEADLINE_S", 0.05)
    server = ScriptedServer(3, answering=(2, 0))
    server.deployment["epoch"] = 4
    server.said = {replica: {"differences": [], "epoch": 4} for replica in (0, 2)}
    server.deployment["members"][1]["lost"] = True
    http = client(server, monkeypatch)
    whole = {"ok": True, "replicas": [{"replica": 0, "differences": []}, {"replica": 2, "differences": []}]}
    for body in (b"", b"{}"):
        server.calls.clear()
        answer = http.post("/kunserve/check", content=body)
        assert (answer.status_code, answer.json()) == (200, whole)
        held, *_, freed = server.calls
        assert (held.command, freed.command) == (Command.HOLD_EXCHANGE, Command.FREE_EXCHANGE)
        assert held.hold == freed.hold
        assert held.hold_s > 0.05
    server.said[2] = {"differences": ["page 3 is nobody's"], "epoch": 3}
    server.deployment["members"][1]["lost"] = False
    answer = http.post("/kunserve/check")
    assert answer.status_code == 200
    assert answer.json() == {
        "ok": False,
        "replicas": [
            {"replica": 0, "differences": []},
            {"replica": 1, "differences": ["no answer within 300 s"]},
            {
                "replica": 2,
                "differences": [
                    "page 3 is nobody's",
                    "its plan has epoch 3; that of the coordinator has epoch 4",
                ],
            },
        ],
    }


def test_exchanges_are_free_again_where_the_coordinator_did_not_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold them all the same, for as long as ten minutes."""
    monkeypatch.setattr(calls_module, "CALL_DEADLINE_S", 0.05)
    server = ScriptedServer(2, answering=(0, 1))
    server.verdict = None
    assert client(server, monkeypatch).post("/kunserve/check").status_code == 503
    held, freed = server.calls
    assert (held.command, freed.command) == (Command.HOLD_EXCHANGE, Command.FREE_EXCHANGE)
    assert held.hold == freed.hold


def test_a_check_that_cannot_be_made_now_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ScriptedServer(2, answering=(0, 1))
    server.outcome = Outcome.CONFLICT
    http = client(server, monkeypatch)
    answer = http.post("/kunserve/check", json={})
    assert (answer.status_code, answer.json()) == (409, {"error": {"message": "replica 0: as told"}})
    answer = http.post("/kunserve/check", json={"layers": 3})
    assert answer.status_code == 400
    assert "layers" in answer.json()["error"]["message"]
    assert "accepted: {}, or nothing" in answer.json()["error"]["message"]


def test_kv_is_resized_while_the_replica_is_normal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ScriptedServer(2, answering=(0, 1))
    http = client(server, monkeypatch)
    assert http.post("/kunserve/kv", json={"replica": 1, "frames": 8}).status_code == 200
    server.deployment["members"][1]["state"] = "merged"
    server.calls.clear()
    answer = http.post("/kunserve/kv", json={"replica": 1, "frames": 8})
    assert answer.status_code == 409
    assert "replica 1 is merged" in answer.json()["error"]["message"]
    assert not any(isinstance(call, ResizeKvCall) for call in server.calls)


def require_refusal(parse: Callable[[bytes, int], object], body: bytes, part: str) -> None:
    """For a server of two replicas."""
    with pytest.raises(ValueError, match="accepted") as raised:
        parse(body, 2)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "not an object"),
        (b'{"frames": 8}', "replica is missing"),
        (b'{"replica": 0}', "frames is missing"),
        (b'{"replica": "0", "frames": 8}', "replica: '0' is not an integer"),
        (b'{"replica": 0, "frames": 8.0}', "frames: 8.0 is not an integer"),
        (b'{"replica": 0, "frames": true}', "frames: True is not an integer"),
        (b'{"replica": -1, "frames": 8}', "accepted: 0 to 1"),
        (b'{"replica": 2, "frames": 8}', "accepted: 0 to 1"),
        (b'{"replica": 0, "frames": 8, "force": 1}', "unknown fields force"),
        (b'{"replica": 0, "frames": 8, "frames": 16}', "'frames' is given twice"),
        (b'{"replica": 0, "frames": NaN}', "frames: nan is not an integer"),
        (b'{"replica": 0, "frames": -Infinity}', "frames: -inf is not an integer"),
        (b'{"replica": 0, "frames": 9007199254740993}', "frames: 9007199254740993 is not an integer"),
        (b'{"replica": 0, "frames": -%s}' % (b"9" * 4300), "frames: -99999999"),
        (b'{"replica": 1e400, "frames": 8}', "replica: inf is not an integer"),
        (b'{"\\ud800": 1}', r"unknown fields '\ud800'"),
        ('{"größe": 1}'.encode(), r"unknown fields 'gr\xf6\xdfe'"),
        (b'{"replica": "\\ud800", "frames": 8}', r"replica: '\ud800' is not an integer"),
        (b'"\xed\xa0\x80"', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_wrong_resize_names_the_field(body: bytes, part: str) -> None:
    require_refusal(request_bodies.parse_resize, body, part)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "not JSON"),
        (b"{}", "groups is missing"),
        (b'{"groups": []}', "groups: [] is not a list of lists"),
        (b'{"groups": [0, 1]}', "groups: [0, 1] is not a list of lists"),
        (b'{"groups": [[0, "1"]]}', "groups: [[0, '1']] is not"),
        (b'{"groups": [[0, true]]}', "groups: [[0, True]] is not"),
        (b'{"groups": [[0, 1]], "tokens": 0}', "tokens: 0; accepted: an integer, 1 or more"),
        (b'{"groups": [[0, 1]], "tokens": 1.5}', "tokens: 1.5; accepted"),
        (b'{"groups": [[0, 1]], "layers": []}', "layers: [] is not a list"),
        (b'{"groups": [[0, 1]], "layers": "all"}', "layers: 'all' is not a list"),
        (b'{"groups": [[0, 1]], "layers": {"a": [0]}}', "layers: 'a': [0] is not a replica"),
        (b'{"groups": [[0, 1]], "layers": {"1": 0}}', "layers: '1': 0 is not a replica"),
        (b'{"groups": [[0, 1]], "layers": [0], "tokens": 4}', "layers and tokens are both given"),
        (b'{"group": [[0, 1]]}', "unknown fields group"),
        (b'{"groups": [[0, 2]]}', "groups: there is no replica 2"),
        (b'{"groups": [[0, -1]]}', "groups: there is no replica -1"),
        (b'{"groups": [[0]]}', "groups: [0]; accepted: two or more"),
        (b'{"groups": [[0, 1], [1, 0]]}', "groups: replica 1 is named twice; accepted"),
        (b'{"groups": [[0, 1]], "layers": [0, 2]}', "layers: there is no replica 2"),
        (b'{"groups": [[0, 1]], "layers": {"2": [0]}}', "layers: there is no replica 2"),
        (b'{"groups": [[0, 1]], "layers": {"0": [7]}}', "layers: there is no replica 7"),
        (b'{"groups": [[0, 1]], "layers": {"01": [0]}}', "layers: '01': [0] is not a replica"),
        (b'{"groups": [[0, 1]], "layers": {"0": [0], "0": [1]}}', "'0' is given twice"),
        (b'{"groups": [[0, 1]], "layers": {"%s": [0]}}' % (b"1" * 5000), "layers: '1111"),
        (b'{"groups": [[0, 1]], "tokens": %s}' % (b"9" * 5000), "tokens: 9999"),
    ],
)
def test_wrong_drop_names_the_field(body: bytes, part: str) -> None:
    require_refusal(request_bodies.parse_drop, body, part)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"[]", "not an object"),
        (b'{"groups": [0]}', "groups: [0] is not"),
        (b'{"frames": 1}', "unknown fields frames"),
        (b'{"tokens": 0}', "tokens: 0; accepted: an integer, 1 or more"),
        (b'{"tokens": 5, "layers": {"0": [1]}}', "layers and tokens are both given"),
        (b'{"layers": [0, 0, 1, 1]}', "layers: [0, 0, 1, 1] is not an object"),
        (b'{"layers": {}}', "layers: {} is not an object"),
        (b'{"layers": {"0": []}}', "layers: '0': [] is not a replica and a list of its layers"),
        (b'{"layers": {"0": 2}}', "layers: '0': 2 is not a replica and a list of its layers"),
        (b'{"layers": {"2": [1]}}', "layers: there is no replica 2; accepted: 0 to 1"),
        (b'{"layers": {"0": [1, 1]}}', "layers: [1, 1] of replica 0; accepted: each layer once"),
        (b'{"force": 1}', "force: 1; accepted: true or false"),
    ],
)
def test_wrong_restore_names_the_field(body: bytes, part: str) -> None:
    require_refusal(request_bodies.parse_restore, body, part)


def test_right_bodies() -> None:
    assert request_bodies.parse_resize(b'{"replica": 1, "frames": -16}', replicas=2) == (1, -16)
    assert request_bodies.parse_drop(b'{"groups": [[0, 1]], "layers": {"0": [1, 0]}}', 2) == {
        "groups": [[0, 1]], "layers": {0: [1, 0]}, "tokens": None,
    }  # fmt: skip
    assert request_bodies.parse_restore(b'{"groups": null}', 2) == WHOLE
    part = b'{"groups": [[0, 1]], "layers": {"0": [2, 3]}, "force": true}'
    parts = {"groups": [[0, 1]], "layers": {0: [2, 3]}, "tokens": None, "force": True}
    assert request_bodies.parse_restore(part, 2) == parts


WHOLE = {"groups": None, "layers": None, "tokens": None, "force": False}


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"{}", "from is missing"),
        (b'{"from": 1, "to": 0}', "tokens is missing"),
        (b'{"from": 1, "to": true, "tokens": 1}', "to: True is not an integer"),
        (b'{"from": 2, "to": 0, "tokens": 1}', "from: there is no replica 2; accepted: 0 to 1"),
        (b'{"from": 1, "to": 1, "tokens": 1}', "from and to are both 1; accepted: two replicas"),
        (b'{"from": 1, "to": 0, "tokens": 0}', "tokens: 0; accepted: an integer, 1 or more"),
        (b'{"from": 1, "to": 0, "tokens": 1, "force": true}', "unknown fields force"),
    ],
)
def test_wrong_loan_names_the_field(body: bytes, part: str) -> None:
    require_refusal(request_bodies.parse_lend, body, part)


def test_a_plan_is_one_of_a_drop_unless_it_says_otherwise() -> None:
    drop = {"groups": [[0, 1]], "layers": None, "tokens": 9}
    for action in (b"", b', "action": "drop"'):
        assert request_bodies.parse_plan(b'{"groups": [[0, 1]], "tokens": 9%s}' % action, 2) == ("drop", drop)
    assert request_bodies.parse_plan(b'{"action": "restore"}', 2) == ("restore", WHOLE)
    assert request_bodies.parse_plan(b'{"action": "restore", "tokens": 9}', 2) == ("restore", {**WHOLE, "tokens": 9})
    loan = b'{"from": 1, "to": 0, "tokens": 9'
    lend = {"lender": 1, "borrower": 0, "tokens": 9}
    assert request_bodies.parse_plan(loan + b', "action": "lend"}', 2) == ("lend", lend)
    assert request_bodies.parse_lend(loan + b"}", 2) == lend
    for body, part in (
        (b'{"action": "merge", "groups": [[0, 1]]}', "action: 'merge'; accepted: drop or restore or lend"),
        (b'{"action": []}', "action: []; accepted"),
        (b'{"action": "lend", "from": 1, "to": 0}', "tokens is missing"),
        (b'{"action": "lend", "groups": [[0, 1]]}', "unknown fields groups"),
        (b'{"groups": [[0, 1]], "force": true}', "unknown fields force"),
        (b'{"action": "restore", "layers": [0, 1]}', "layers: [0, 1] is not an object"),
    ):
        require_refusal(request_bodies.parse_plan, body, part)
