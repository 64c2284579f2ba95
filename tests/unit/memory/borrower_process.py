"""The other process of the lending tests: what it runs, and the handle the tests hold on it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

from kunserve_sgl.errors import KunserveError
from kunserve_sgl.memory.frame_export import receive_export, send_export
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.virtual_range import LayerSpan, Span
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

FRAME_BYTES = 8192
POSITIONS = 12
TIMEOUT_S = 120.0


def run_borrower(sock: socket.socket) -> None:
    """The other process: does what it is told until the socket closes."""
    pool = FramePool(MemfdVmm(FRAME_BYTES), "borrower")
    area = pool.vmm.reserve(POSITIONS, "k 0")
    stream = sock.makefile("rb", buffering=0)
    while line := stream.readline():
        command = json.loads(line)
        reply: dict[str, Any] = {}
        try:
            if command["do"] == "borrow":
                with receive_export(sock, TIMEOUT_S) as export:
                    spans = [LayerSpan(0, Span(area, first, count)) for first, count in command["spans"]]
                    pool.loans.borrow("owner", command["loan"], export, spans)
            elif command["do"] == "write":
                size = pool.vmm.frame_bytes
                pool.vmm.tensor(area, command["at"] * size, size).fill_(command["value"])
            elif command["do"] == "return":
                pool.loans.return_loan("owner", command["loan"])
            pool.check()
        except KunserveError as error:
            reply["error"] = type(error).__name__
        size = pool.vmm.frame_bytes
        reply["bytes"] = {at: int(pool.vmm.tensor(area, at * size, size)[-1]) for at in sorted(area.frames)}
        reply["borrowed"] = dict(pool.snapshot().borrowed_by_owner)
        sock.sendall(json.dumps(reply).encode() + b"\n")


class Borrower:
    """A running borrower process and the socket to it."""

    def __init__(self, context: ForkServerContext) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(TIMEOUT_S)
        self.process: BaseProcess = context.Process(target=run_borrower, args=(theirs,))
        self.process.start()
        theirs.close()
        self.stream = self.sock.makefile("rb", buffering=0)

    def tell(self, **command: object) -> None:
        self.sock.sendall(json.dumps(command).encode() + b"\n")

    def reply(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.stream.readline())
        answer["bytes"] = {int(at): value for at, value in answer["bytes"].items()}
        return answer

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.close()
        assert self.process.exitcode == -signal.SIGKILL

    def close(self) -> None:
        self.stream.close()
        self.sock.close()
        self.process.join(TIMEOUT_S)


def make_context() -> ForkServerContext:
    """Starts processes that share nothing with this one."""
    context = multiprocessing.get_context("forkserver")
    # The server finds installed packages only; with these loaded once, a process starts in milliseconds.
    context.set_forkserver_preload(["pytest", "kunserve_sgl.memory.frame_pool", "kunserve_sgl.memory.vmm_memfd"])
    return context


def lend_and_wait(sock: socket.socket) -> None:
    """Lends two stamped frames and then waits to be killed."""
    pool = FramePool(MemfdVmm(FRAME_BYTES), "owner")
    pool.add_frames(2)
    area = pool.vmm.reserve(2, "k 0")
    pool.map_kv([LayerSpan(0, Span(area, 0, 2))])
    pool.vmm.tensor(area, 0, 2 * FRAME_BYTES).fill_(77)
    loan = pool.loans.lend("borrower", pool.vmm.frames_at(Span(area, 0, 2)))
    with pool.vmm.export_frames(loan.frames) as export:
        send_export(sock, export, TIMEOUT_S)
    signal.pause()
