"""Shared servers start once in a run, and a test that leaves one in another state is found out; needs no server."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _deployments import LLAMA, deployment_of
from _servers import RunningServer

FRAMES = {"parameters": 4, "kv": 2, "lent": 0, "free": 1, "total": 7}
REPLICA = {
    **{"id": 0, "state": "normal", "lost": False, "capacity_tokens": 100},
    **{"frames": FRAMES, "slots": {"base": 100, "extension": 0}},
}
STATUS = {"state": "normal", "hosts": [[0]], "replicas": [REPLICA]}


class Answers:
    """What a server answers to the routes that the check after a test asks."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = copy.deepcopy(STATUS)
        self.aborted = False

    def of(self, path: str) -> Any:
        if path == "/v1/loads":
            return {"loads": [{"num_running_reqs": 0 if self.aborted else 1, "num_waiting_reqs": 0}]}
        self.aborted |= path == "/abort_request"
        return self.status


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def server(answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """A server in the state of its start, in which a request runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers.of(self.path)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setattr("_servers.SETTLE_DEADLINE_S", 0.1)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        process: Any = SimpleNamespace(running=True, base_url=f"http://127.0.0.1:{http.server_address[1]}")
        running = RunningServer(LLAMA.ours, process, tmp_path, tmp_path)
        assert running.at_start
        yield running
        http.shutdown()
        thread.join()


def test_a_server_as_at_its_start_is_unharmed_and_has_no_requests_left(server: RunningServer, answers: Answers) -> None:
    server.require_unharmed()
    assert answers.aborted


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"state": "merged"}, "state: merged"),
        ({"replicas": [{**REPLICA, "lost": True}]}, "replica 0: lost: True"),
        ({"replicas": [{"id": 0, "state": "degraded", "lost": True}]}, "replica 0: state: degraded"),
        ({"replicas": [{**REPLICA, "capacity_tokens": 90, "slots": {"base": 90, "extension": 0}}]}, "capacity_tokens"),
        ({"replicas": [{**REPLICA, "frames": {**FRAMES, "free": 2, "total": 8}}]}, "replica 0: frames"),
        ({"replicas": [{**REPLICA, "slots": {"base": 90, "extension": 0}}]}, "base"),
    ],
    ids=["merged", "lost", "gone", "capacity", "frames", "books"],
)
def test_what_a_test_has_changed_fails_it(
    server: RunningServer, answers: Answers, changed: dict[str, Any], named: str
) -> None:
    answers.status |= changed
    with pytest.raises(AssertionError, match=named):
        server.require_unharmed()


def test_each_shared_server_starts_once(request: pytest.FixtureRequest) -> None:
    """Of the tests of this run; what ends a server comes last on it."""
    shared = [item for item in request.session.items if deployment_of(item) is not None]
    groups = [(deployment, list(items)) for deployment, items in groupby(shared, deployment_of)]
    assert len({deployment for deployment, _ in groups}) == len(groups)
    for _, items in groups:
        ends = [item.get_closest_marker("ends_server") is not None for item in items]
        assert ends == sorted(ends)
