"""A message to a replica whose process has ended is dropped, and nobody waits for it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import zmq
from sglang.srt.utils.network import get_zmq_socket

from kunserve_sgl.integration.controller import worker_socket
from kunserve_sgl.integration.controller.worker_socket import WorkerSocket
from waiting import wait_until


def test_nobody_waits_for_a_replica_that_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_socket, "SEND_DEADLINE_MS", 50)
    address = f"ipc://{tmp_path}/worker"
    with zmq.Context() as context:
        bound = get_zmq_socket(context, zmq.PUSH, address, True)  # as SGLang makes it
        worker = WorkerSocket(bound, 1)
        scheduler = get_zmq_socket(context, zmq.PULL, address, False)
        worker.send(b"first")
        worker.send_pyobj("second")
        assert scheduler.recv() == b"first"
        assert scheduler.recv_pyobj() == "second"
        assert not caplog.records
        scheduler.close(linger=0)
        with caplog.at_level(logging.WARNING):
            for send in (worker.send, worker.send_pyobj):
                caplog.clear()
                # What is sent before the socket knows that nobody is there is lost on the way.
                wait_until(lambda send=send: send(b"late") or bool(caplog.records), "a message was dropped")
                assert caplog.records[0].getMessage() == "KunServe: replica 1 is not there to take a message"
        worker.close(linger=0)
        assert bound.closed
