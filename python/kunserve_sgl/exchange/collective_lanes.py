"""The two ends of a directed group: messages, uint8[n] each, arrive in the order in which they were sent.

gloo: a transfer cannot be polled, only be waited for, and waiting too short closes the connection. A thread for each
lane waits for its transfers: for those sent, so that the memory is kept that long, and for those received, so that
others can ask whether they have come. NCCL: all is put on streams and nothing
waits; a transfer that is overdue is seen by the next call.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from datetime import timedelta
from typing import Protocol

import torch
from torch._C._distributed_c10d import Work as Transfer
from typing_extensions import override

from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange.collective_groups import RECEIVER, SENDER, Group

_TAG, _ABORT_TAG = 0, 1
_JOIN_S = 1.0


class SendLane(Protocol):
    """Sends messages, uint8[n] each, to one peer; it is the end of a group in which this replica is SENDER."""

    def send(self, message: torch.Tensor) -> None:
        """Keeps `message` until it is sent; waits for nobody. Raises TransientError where the lane is broken."""

    def abort(self) -> None:
        """Ends what is under way. Any thread may call it, any number of times."""


class Arrival(Protocol):
    """Is a message that is being received."""

    def has_come(self) -> bool:
        """Tells whether it is here; waits for nobody. Raises TransientError where it does not come in time, or the lane
        is broken."""
        ...

    def take(self) -> torch.Tensor:
        """Returns the message, uint8[n], usable in the current stream. It may be called once. Raises TransientError
        where it does not come, or the lane is broken."""
        ...


class ReceiveLane(Protocol):
    """Receives what one peer's `SendLane` sent, in that order."""

    def post(self, size_bytes: int) -> Arrival:
        """Begins to receive the next message, of `size_bytes`, which is what was sent; waits for nobody. Raises
        TransientError where the lane is broken."""
        ...

    def abort(self) -> None:
        """Ends what is under way: a `take` that waits raises. Any thread may call it, any number of times."""


class GlooSendLane(SendLane):
    """Sends over gloo; a thread waits for what was sent and keeps its memory until then."""

    def __init__(self, group: Group, what: str, timeout_s: float) -> None:
        self._group = group
        self._what = what
        self._timeout = timedelta(seconds=timeout_s)
        self._broken = ""
        self._sent: queue.SimpleQueue[tuple[Transfer, torch.Tensor] | None] = queue.SimpleQueue()
        self._keeper = threading.Thread(target=self._keep_until_sent, name="kunserve-sent", daemon=True)
        self._keeper.start()

    @override
    def send(self, message: torch.Tensor) -> None:
        if self._broken:
            raise TransientError(f"{self._what}: {self._broken}")
        try:
            self._sent.put((self._group.send([message], RECEIVER, _TAG), message))
        except RuntimeError as error:
            self._broken = str(error)
            raise TransientError(f"{self._what}: {error}") from error

    @override
    def abort(self) -> None:
        self._broken = self._broken or "closed"
        _close_gloo(self._group, RECEIVER)
        self._sent.put(None)
        self._keeper.join(_JOIN_S)

    def _keep_until_sent(self) -> None:
        while (sent := self._sent.get()) is not None:
            try:
                sent[0].wait(self._timeout)
            except RuntimeError as error:
                self._broken = self._broken or str(error)
            del sent


class _GlooArrival(Arrival):
    """Has what the thread of its lane has waited for."""

    def __init__(self, lane: GlooReceiveLane) -> None:
        self._lane = lane
        self.message: Future[torch.Tensor] = Future()

    @override
    def has_come(self) -> bool:
        return self.message.done() and self.take() is not None

    @override
    def take(self) -> torch.Tensor:
        try:
            return self.message.result(self._lane.timeout.total_seconds() + _JOIN_S)
        except (RuntimeError, TimeoutError) as error:
            raise self._lane.error(error) from error


class GlooReceiveLane(ReceiveLane):
    """Receives over gloo. Messages that are posted are filled in that order, by a thread of gloo's; one of this lane
    waits for them."""

    def __init__(self, group: Group, what: str, timeout_s: float) -> None:
        self._group = group
        self._what = what
        self.timeout = timedelta(seconds=timeout_s)
        self._closed = False
        self._posted: queue.SimpleQueue[tuple[Transfer, torch.Tensor, _GlooArrival] | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._wait_for_posted, name="kunserve-received", daemon=True)
        self._waiter.start()

    @override
    def post(self, size_bytes: int) -> Arrival:
        if self._closed:
            raise TransientError(f"{self._what}: closed")
        message = torch.empty(size_bytes, dtype=torch.uint8)
        arrival = _GlooArrival(self)
        try:
            self._posted.put((self._group.recv([message], SENDER, _TAG), message, arrival))
        except RuntimeError as error:
            raise self.error(error) from error
        return arrival

    def _wait_for_posted(self) -> None:
        while (posted := self._posted.get()) is not None:
            transfer, message, arrival = posted
            try:
                transfer.wait(self.timeout)
            except RuntimeError as error:
                arrival.message.set_exception(error)
            else:
                arrival.message.set_result(message)
            del posted, transfer, message, arrival

    def error(self, error: Exception) -> TransientError:
        """Says what torch's error means here."""
        return TransientError(f"{self._what}: {'closed' if self._closed else error}")

    @override
    def abort(self) -> None:
        self._closed = True
        _close_gloo(self._group, SENDER)
        self._posted.put(None)
        self._waiter.join(_JOIN_S)


def _close_gloo(group: Group, peer: int) -> None:
    """Closes the connection, at which all that waits for it, here and there, fails. gloo does so when a transfer is
    late, and in no other way that can be called."""
    with contextlib.suppress(RuntimeError):
        group.recv([torch.empty(1, dtype=torch.uint8)], peer, _ABORT_TAG).wait(timedelta(milliseconds=1))


class _Transfers:
    """Keeps what was put on streams and is not known to have ended, so that the memory stays."""

    def __init__(self, group: Group, what: str, timeout_s: float) -> None:
        self.group = group
        self._what = what
        self._timeout_s = timeout_s
        self._open: deque[tuple[Transfer, torch.Tensor, float]] = deque()
        self._closed = False

    def require_working(self) -> None:
        """Forgets what has ended. Raises TransientError where something failed or is overdue."""
        if self._closed:
            raise TransientError(f"{self._what}: closed")
        try:
            while self._open and self._open[0][0].is_completed():
                self._open.popleft()
        except RuntimeError as error:
            raise TransientError(f"{self._what}: {error}") from error
        if self._open and time.monotonic() > self._open[0][2]:
            raise TransientError(f"{self._what}: not done after {self._timeout_s:.0f} s")

    def add(self, transfer: Transfer, message: torch.Tensor) -> None:
        self._open.append((transfer, message, time.monotonic() + self._timeout_s))

    def abort(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RuntimeError):  # it failed before
            self.group.abort()
        self._open.clear()


class NcclSendLane(SendLane):
    """Sends over NCCL, on a stream of the group's own, which waits for what the current stream has got to do so far."""

    def __init__(self, group: Group, what: str, timeout_s: float) -> None:
        self._transfers = _Transfers(group, what, timeout_s)
        self._what = what

    @override
    def send(self, message: torch.Tensor) -> None:
        self._transfers.require_working()
        try:
            with torch.cuda.device(message.device):
                transfer = self._transfers.group.send([message], RECEIVER, _TAG)
        except RuntimeError as error:
            raise TransientError(f"{self._what}: {error}") from error
        self._transfers.add(transfer, message)

    @override
    def abort(self) -> None:
        self._transfers.abort()


class _NcclArrival(Arrival):
    """Lets the stream that uses a message wait for its transfer."""

    def __init__(self, transfers: _Transfers, what: str, transfer: Transfer, message: torch.Tensor) -> None:
        self._transfers = transfers
        self._what = what
        self._transfer = transfer
        self._message = message

    @override
    def has_come(self) -> bool:
        self._transfers.require_working()
        try:
            return self._transfer.is_completed()
        except RuntimeError as error:
            raise TransientError(f"{self._what}: {error}") from error

    @override
    def take(self) -> torch.Tensor:
        try:
            self._transfer.wait()  # the current stream waits, not the caller
        except RuntimeError as error:
            raise TransientError(f"{self._what}: {error}") from error
        self._message.record_stream(torch.cuda.current_stream(self._message.device))
        return self._message


class NcclReceiveLane(ReceiveLane):
    """Receives over NCCL. Memory and transfer belong to a stream of this lane, so that receiving does not wait for what
    the current stream computes; the stream that takes the message waits for the transfer."""

    def __init__(self, group: Group, what: str, timeout_s: float, device: torch.device) -> None:
        self._transfers = _Transfers(group, what, timeout_s)
        self._what = what
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @override
    def post(self, size_bytes: int) -> Arrival:
        self._transfers.require_working()
        try:
            with torch.cuda.stream(self._stream):
                message = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
                transfer = self._transfers.group.recv([message], SENDER, _TAG)
        except RuntimeError as error:
            raise TransientError(f"{self._what}: {error}") from error
        self._transfers.add(transfer, message)
        return _NcclArrival(self._transfers, self._what, transfer, message)

    @override
    def abort(self) -> None:
        self._transfers.abort()
