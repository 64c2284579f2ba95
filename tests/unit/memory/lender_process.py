"""A process that keeps the layers that another one dropped: what it runs, and the handle the tests hold on it."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

from borrower_process import TIMEOUT_S, make_context
from layer_setup import AdoptedModel

from kunserve_sgl.errors import KunserveError
from kunserve_sgl.memory.frame_export import FrameExport, receive_export, send_export
from kunserve_sgl.memory.virtual_range import Frame


def run_lender(sock: socket.socket) -> None:
    """The other process: does what it is told until the socket closes."""
    adopted = AdoptedModel(None)
    lent: dict[str, Sequence[Frame]] = {}
    stream = sock.makefile("rb", buffering=0)
    while line := stream.readline():
        command = json.loads(line)
        layer = command.get("layer")
        reply: dict[str, Any] = {}
        try:
            if command["do"] == "lend":
                loan = adopted.pool.loans.lend(command["borrower"], adopted.parameters.frames_of(layer))
                lent[command["borrower"]] = loan.frames
                reply["loan"] = loan.loan_id
            elif command["do"] == "export":
                with adopted.pool.vmm.export_frames(lent[command["borrower"]]) as export:
                    send_export(sock, export, TIMEOUT_S)
                continue
            elif command["do"] == "die in the middle of an export":
                # The length of a header, and the first byte of it.
                sock.sendall((64).to_bytes(4, "little") + b"{")
                os.kill(os.getpid(), signal.SIGKILL)
            elif command["do"] == "flip":
                adopted.parameters.region(layer)[command["at"]] ^= 4
            elif command["do"] == "drop":
                adopted.parameters.drop(layer)
            elif command["do"] == "end":
                adopted.pool.loans.end_loan(command["loan"])
            elif command["do"] == "answer":
                adopted.assert_same_answers()
            adopted.pool.check()
        except KunserveError as error:
            reply["error"] = type(error).__name__
        reply["lent"] = adopted.pool.snapshot().lent
        sock.sendall(json.dumps(reply).encode() + b"\n")


class Lender:
    """A running lender and the socket to it."""

    def __init__(self) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(TIMEOUT_S)
        self.process = make_context().Process(target=run_lender, args=(theirs,))
        self.process.start()
        theirs.close()
        self.stream = self.sock.makefile("rb", buffering=0)

    def ask(self, do: str, **command: object) -> dict[str, Any]:
        self.sock.sendall(json.dumps({"do": do, **command}).encode() + b"\n")
        reply: dict[str, Any] = json.loads(self.stream.readline())
        return reply

    def export_for(self, borrower: str, do: str = "export") -> FrameExport:
        self.sock.sendall(json.dumps({"do": do, "borrower": borrower}).encode() + b"\n")
        return receive_export(self.sock, TIMEOUT_S)

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode == -signal.SIGKILL

    def close(self) -> None:
        self.stream.close()
        self.sock.close()
        self.process.join(TIMEOUT_S)
