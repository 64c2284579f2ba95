"""Bodies of the HTTP routes: too large, slow, or anything at all."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from starlette.requests import Request
from test_routes import ScriptedServer

from body_fuzz import ROUTES, STATUSES, random_body
from kunserve_sgl.integration.launcher import request_bodies, routes
from kunserve_sgl.integration.launcher.calls import Calls
from kunserve_sgl.integration.launcher.request_bodies import MAX_BODY_BYTES, BodyTooLargeError, read_body
from kunserve_sgl.integration.messages import Command, CoordinatorCall, ResizeKvCall

BODIES = 1000
LONGEST_ANSWER_CHARACTERS = 1000
REPLICAS = 2


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> ScriptedServer:
    made = ScriptedServer(REPLICAS, answering=(0, 1))
    calls = Calls(made)
    monkeypatch.setattr(routes, "_server_calls", lambda: calls)
    monkeypatch.setattr(http_server, "get_global_state", lambda: SimpleNamespace(scheduler_info={}))
    return made


@pytest.fixture
def http(server: ScriptedServer) -> Iterator[TestClient]:
    app = FastAPI()
    routes.add_routes(app)
    with TestClient(app) as made:
        yield made


def is_groups(groups: Any) -> bool:
    named = [replica for group in groups for replica in group]
    ids = all(type(replica) is int and 0 <= replica < REPLICAS for replica in named)
    return ids and len(set(named)) == len(named) > 0 and all(len(group) > 1 for group in groups)


def is_hosts(hosts: Any) -> bool:
    return isinstance(hosts, list) and all(type(host) is int and 0 <= host < REPLICAS for host in hosts)


def is_valid(call: Any) -> bool:
    """Whether a call is one that replicas and coordinator may get."""
    if isinstance(call, ResizeKvCall):
        return type(call.frames) is int and abs(call.frames) <= 2**53 and call.replica in range(REPLICAS)
    if not isinstance(call, CoordinatorCall) or call.command is Command.STATUS:
        return True
    if call.command in (Command.LEND, Command.PLAN_LEND):
        return {call.lender, call.borrower} == {0, 1} and type(call.tokens) is int and 0 < call.tokens <= 2**53
    if call.groups is None:
        return call.command in (Command.RESTORE, Command.PLAN_RESTORE)
    if call.command in (Command.RESTORE, Command.PLAN_RESTORE):
        layers = call.layers or {}
        back = [len(set(numbers)) == len(numbers) > 0 for numbers in layers.values()]
        is_one = call.tokens is None or (type(call.tokens) is int and call.tokens > 0 and call.layers is None)
        return is_groups(call.groups) and all(back) and set(layers) <= set(range(REPLICAS)) and is_one
    hosts = list(call.layers.values()) if isinstance(call.layers, dict) else [call.layers or []]
    keys = set(call.layers) if isinstance(call.layers, dict) else set()
    tokens = call.tokens is None or (type(call.tokens) is int and 0 < call.tokens <= 2**53 and call.layers is None)
    return is_groups(call.groups) and all(map(is_hosts, hosts)) and keys <= set(range(REPLICAS)) and tokens


@pytest.mark.parametrize("route", ROUTES)
def test_any_body_is_answered(route: str, http: TestClient, server: ScriptedServer) -> None:
    chance = random.Random(route)
    statuses: dict[int, int] = {}
    for _ in range(BODIES):
        body = random_body(chance, route)
        answer = http.post(f"/kunserve/{route}", content=body)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in STATUSES, (body[:200], answer.text[:500])
        assert len(answer.text) < LONGEST_ANSWER_CHARACTERS, (body[:200], answer.text[:500])
        if answer.status_code != 200:
            assert answer.json()["error"]["message"].isascii()
    assert [call for call in server.calls if not is_valid(call)] == []
    assert min(statuses[200], statuses[400]) > BODIES // 20  # else the bodies are not of all kinds
    assert statuses[413] > 0


@pytest.mark.parametrize("media_type", [None, "application/json", "application/x-www-form-urlencoded", "text/plain"])
def test_the_announced_type_does_not_matter(media_type: str | None, http: TestClient) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    assert http.post("/kunserve/plan", content=b'{"groups": [[0, 1]]}', headers=headers).status_code == 200


def test_the_largest_body_and_one_byte_more(http: TestClient) -> None:
    right = b'{"groups": [[0, 1]]}'
    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)):
        assert http.post("/kunserve/plan", content=right.ljust(size)).status_code == status

        def pieces(size: int = size) -> Iterator[bytes]:
            yield from (right.ljust(size)[start : start + 4096] for start in range(0, size, 4096))

        assert http.post("/kunserve/plan", content=pieces()).status_code == status  # without Content-Length


def test_values_are_cut_in_errors(http: TestClient) -> None:
    for value in ("x" * 900_000, [1] * 300_000, {"a" * 900_000: 1}):
        for body in ({"groups": value}, {"groups": [[0, 1]], "layers": value}, {"groups": [[0, 1]], "tokens": value}):
            answer = http.post("/kunserve/drop", content=json.dumps(body).encode())
            assert answer.status_code == 400
            assert len(answer.text) < LONGEST_ANSWER_CHARACTERS
    answer = http.post("/kunserve/drop", content=json.dumps({"b" * 900_000: 1, "a": 2}).encode())
    assert (answer.status_code, len(answer.text) < LONGEST_ANSWER_CHARACTERS) == (400, True)


class Client:
    """Sends pieces, counts how many were read, and then leaves or sends no more."""

    def __init__(self, pieces: list[bytes], headers: dict[str, str] | None = None, leaves: bool = False) -> None:
        self.read = 0
        self._events = self._make_events(pieces, leaves)
        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.request = Request({"type": "http", "method": "POST", "headers": raw}, self._receive)

    async def _receive(self) -> dict[str, Any]:
        return await anext(self._events)

    async def _make_events(self, pieces: list[bytes], leaves: bool) -> AsyncIterator[dict[str, Any]]:
        for piece in pieces:
            self.read += 1
            yield {"type": "http.request", "body": piece, "more_body": True}
        if leaves:
            yield {"type": "http.disconnect"}
        await asyncio.Event().wait()


def test_what_says_that_it_is_too_large_is_not_read() -> None:
    for announced in (str(MAX_BODY_BYTES + 1), "9" * 5000):
        client = Client([b"{}"], {"content-length": announced})
        with pytest.raises(BodyTooLargeError):
            asyncio.run(read_body(client.request))
        assert client.read == 0


def test_what_becomes_too_large_is_read_no_further() -> None:
    client = Client([b" " * 400_000] * 10)
    with pytest.raises(BodyTooLargeError):
        asyncio.run(read_body(client.request))
    assert client.read == 3


def test_who_leaves_or_stops_sending_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has left"):
        asyncio.run(read_body(Client([b"{"], leaves=True).request))
    monkeypatch.setattr(request_bodies, "BODY_DEADLINE_S", 0.01)
    with pytest.raises(ValueError, match=r"not there within 0\.01 s"):
        asyncio.run(read_body(Client([b"{"]).request))
