"""The status command: what it prints, and what it says when there is no status."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kunserve_sgl.status import main, render

FRAMES = {"total": 100, "parameters": 20, "kv": 70, "lent": 30, "free": 10, "bytes": 4096, "per_granule": 8}
SLOTS = {"base": 64, "extension": 32, "used": 5, "cached": 6, "per_granule": 16}
ALIVE: dict[str, Any] = {"frames": FRAMES, "slots": SLOTS, "capacity_tokens": 96, "lost": False, "reason": ""}
STATUS: dict[str, Any] = {
    "state": "merged",
    "epoch": 3,
    "hosts": [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2]],
    "homes": [
        {"replica": 0, "first_granule": 0, "granules": 4, "slots": 64, "homes": [0, 0, 0, 0]},
        {"replica": 0, "first_granule": 4, "granules": 2, "slots": 32, "homes": [0, 0, 0, 1]},
    ],
    "transition": None,
    "replicas": [
        {"id": 0, "state": "merged", "group": [0, 1], **ALIVE},
        {"id": 1, "state": "merged", "group": [0, 1], **ALIVE},
        {
            "id": 2,
            "state": "degraded",
            "group": [2],
            "lost": True,
            "reason": "replica 2 rank 0 ended with exit code -9",
        },
    ],
}


def test_merged() -> None:
    assert render(STATUS).split("\n") == [
        "state merged, epoch 3",
        "",
        "replica  state     group  capacity  used  cached  base  extension  frames  parameters  kv  lent  free",
        "0        merged    0,1    96        5     6       64    32         100     20          70  30    10",
        "1        merged    0,1    96        5     6       64    32         100     20          70  30    10",
        "2        degraded  2      -         -     -       -     -          -       -           -   -     -",
        "replica 2: replica 2 rank 0 ended with exit code -9",
        "",
        "batches of  layers @ host",
        "0           0-1 @ 0, 2-3 @ 1",
        "1           0-1 @ 0, 2-3 @ 1",
        "2           0-3 @ 2",
        "",
        "slots of  count  layers @ home",
        "0         64     0-3 @ 0",
        "0         32     0-2 @ 0, 3 @ 1",
    ]


def test_transition_and_normal_plan() -> None:
    text = render(
        {
            **STATUS,
            "hosts": [[0], [1], [2]],
            "transition": {"number": 4, "phase": "load", "members": [0, 1], "waiting_for": [[1, 0], [1, 1]]},
            "replicas": [
                {**STATUS["replicas"][0], "transition_step": ""},
                {**STATUS["replicas"][1], "transition_step": "load, step 2 of 9: load the parameters of layer 3"},
                STATUS["replicas"][2],
            ],
        }
    )
    assert "\nreplica 1 is in load, step 2 of 9: load the parameters of layer 3\n" in text
    assert "replica 0 is in" not in text
    assert "transition 4 of replicas 0,1: load, waiting for 1.0, 1.1" in text
    assert "layers @" not in text


def test_automatic_mode_says_what_it_does_and_why() -> None:
    auto = {"acts": True, "decision": "wait", "reason": "it would be over in 0.1 s", "demand": {}}
    assert render({**STATUS, "auto": auto}).split("\n")[1] == "auto: wait: it would be over in 0.1 s"
    assert render({**STATUS, "auto": {**auto, "acts": False}}) == render(STATUS)


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(STATUS).encode()
        code = 200 if self.headers["Authorization"] == "Bearer key" else 401
        if self.path != "/kunserve/status":
            code = 404
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_command(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([address, "--api-key", "key"]) == 0
    assert capsys.readouterr().out == render(STATUS) + "\n"
    assert main([f"http://{address}/"]) == 1
    assert capsys.readouterr().err.endswith("401 a key is needed: --api-key\n")
    assert main([f"http://{address}/elsewhere", "--api-key", "key"]) == 1
    assert capsys.readouterr().err.endswith("404 the server runs without KunServe\n")


def test_watch_goes_on_until_it_is_interrupted(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def interrupted_later(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted_later)
    assert main([address, "--api-key", "key", "--watch", "--interval", "0.25"]) == 0
    assert capsys.readouterr().out == 3 * (render(STATUS) + "\n")
    assert waits == [0.25] * 3


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    server.server_close()
    assert main([f"127.0.0.1:{server.server_address[1]}"]) == 1
    assert "refused" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["127.0.0.1", "--interval", "0"])


def test_an_exchange_is_a_line() -> None:
    each = {"remote_layers": 1, "remote_bytes": 1 << 20, "away_layers": 2, "away_bytes": 2 << 20}
    exchange = {
        "mode": "on",
        "running": True,
        "parts": 6,
        "parts_done": 4,
        "moved_bytes": 4 << 20,
        "returned_bytes": 0,
        "seconds": 2.0,
        "bytes_per_second": 2 << 20,
        "last_failure": "",
        "replicas": {"0": each, "1": each},
    }
    line = (
        "exchange on, goes on: 4 of 6 parts of KV are where they are read, and 2.0 MiB are read through mapped memory; "
        "4.0 MiB moved at 2.0 MiB/s"
    )
    assert line in render({**STATUS, "exchange": exchange}).splitlines()
    failed = {**exchange, "running": False, "last_failure": "no frames"}
    assert "exchange on, failed: no frames: 4 of 6" in render({**STATUS, "exchange": failed})
    assert "exchange" not in render({**STATUS, "exchange": {**exchange, "parts": 0}})
