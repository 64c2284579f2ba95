"""Own orders that are with other replicas, and how their answers are waited for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence

from kunserve_sgl.errors import BatchCalledOffError, InvariantError, KunserveError, TransientError
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.remote_attention import KvUnreachableError
from kunserve_sgl.exchange.work import Answer, TurnKind
from kunserve_sgl.exits import CONTROLLER_PATIENCE_S
from kunserve_sgl.replica.row_copies import HomeFailedError
from kunserve_sgl.replica.serving import ServingQueue
from kunserve_sgl.replica.time_spent import TimeSpent
from kunserve_sgl.replica.turns import Turns

_POLL_SLICE_MS = 1000
# Of a process that has ended the others are told when it is gone; one that is stopped is not why a batch fails.
_CALL_OFF_S = CONTROLLER_PATIENCE_S
_TELL_INTERVAL_S = 1.0  # how often the coordinator is told of a batch that does not come back


class HostFailedError(InvariantError):
    """Says that a layer host could not execute an own order. Who knows what it has written."""

    def __init__(self, host: int, batch: int, reason: str) -> None:
        super().__init__(f"replica {host} could not execute batch {batch}: {reason}")
        self.host = host
        self.reason = reason


class OrdersAway:
    """Knows the own orders of one rank that are with other replicas. They have the same numbers at all ranks of the
    replica, which send the same ones."""

    def __init__(self, link: PeerLink, turns: Turns, serving: ServingQueue, spent: TimeSpent) -> None:
        self._link = link
        self._turns = turns
        self._serving = serving
        self._spent = spent
        self._hosts: dict[int, tuple[int, ...]] = {}
        self._last_number = 0
        # Says at rank 0 whether own orders are called off: the coordinator lets this replica recover.
        self.is_called_off: Callable[[], bool] = lambda: False
        # Called with the layer hosts of an own order that has been away for a second or more, or because of whom an own
        # batch has failed, and for how long.
        self.tell_of_waiting: Callable[[Sequence[int], float], None] = lambda hosts, waited_s: None
        # Called with the replica that could not execute an own order or attend to KV of it, or with which activations
        # could not be exchanged, and why: all own orders are called off then.
        self.tell_of_failure: Callable[[int, str], None] = lambda host, reason: None

    def add(self, hosts: tuple[int, ...]) -> int:
        """Returns the number of a new order, which the layer hosts `hosts` execute, each once or more."""
        self._last_number += 1
        self._hosts[self._last_number] = hosts
        return self._last_number

    def hosts_of(self, number: int) -> Collection[int]:
        """Returns the layer hosts that may have the order of that number; none once it has been answered."""
        return self._hosts.get(number, ())

    def take_answer(self, number: int) -> Answer | None:
        """Returns the answer, if it is here, else None. It does not look into the inbox."""
        return self._link.take_answer(number)

    def serve_until(self, number: int, meanwhile: Callable[[], None] = lambda: None) -> Answer:
        """At rank 0: waits for an answer, and executes others' orders until it has come. The other ranks are to follow.
        `meanwhile` is called again and again. Raises TransientError when the answer does not come in time,
        BatchCalledOffError when it is not to be waited for."""
        deadline_s = self._turns.deadline_s()
        told_s = time.monotonic()
        while (answer := self._link.take_answer(number)) is None:
            self.leave_if_called_off()
            meanwhile()
            if self._serving.serve_one():
                if self._serving.is_waited_for:  # else what comes next is waited for, or is there already
                    self._link.poll(0)
                continue
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransientError(
                    f"replica {self._link.replica}: batch {number} did not come back within {self._turns.timeout_s:g} s"
                )
            if time.monotonic() - told_s >= _TELL_INTERVAL_S:
                told_s = time.monotonic()
                self.tell_of_waiting(self._hosts.get(number, ()), self._turns.timeout_s - left_s)
            with self._spent.on("wait"):
                self._link.poll(min(_POLL_SLICE_MS, max(1, int(1000 * left_s))))
        return answer

    def leave_if_called_off(self) -> None:
        """At rank 0: raises BatchCalledOffError if own orders are called off, and lets the other ranks do so too."""
        if self.is_called_off():
            self._turns.announce(TurnKind.LEAVE)
            raise BatchCalledOffError(f"the own batch of replica {self._link.replica} is called off")

    def leave_failed(self, error: KunserveError, is_pipelined: bool) -> None:
        """Where a part of an own batch has failed, and another replica may be why: tells the coordinator at once which
        one, where it is known, and raises BatchCalledOffError if the batch is called off, for which it waits a while. A
        replica that has died may be noticed by others later than here. `is_pipelined` says whether the batch visits
        others."""
        peers: Sequence[int] = ()
        if isinstance(error, HostFailedError):
            peers = (error.host,)
        elif isinstance(error, KvUnreachableError):
            peers = error.homes
        elif isinstance(error, HomeFailedError):
            peers = (error.home,)
        elif isinstance(error, InvariantError) or not is_pipelined:
            return
        reason = error.reason if isinstance(error, HostFailedError) else str(error)
        for peer in peers:
            self.tell_of_failure(peer, reason)
        self._leave_if_called_off_soon(peers or sorted({host for hosts in self._hosts.values() for host in hosts}))

    def _leave_if_called_off_soon(self, waits_for: Sequence[int]) -> None:
        began_s = time.monotonic()
        ends_at_s = began_s + _CALL_OFF_S
        if not self._turns.leads:
            self._link.wait_leave(ends_at_s)
            return
        told_s = -math.inf
        while (left_s := ends_at_s - time.monotonic()) > 0:
            self.leave_if_called_off()
            # Who has requests and says nothing would be taken to be the one that stands still.
            if waits_for and (now_s := time.monotonic()) - told_s >= _TELL_INTERVAL_S:
                told_s = now_s
                self.tell_of_waiting(waits_for, now_s - began_s)
            self._link.poll(max(1, int(1000 * min(left_s, _TELL_INTERVAL_S))))

    def forget_all(self) -> None:
        """Takes no own order to be away: answers that come are none, and those that have come are dropped."""
        self._hosts.clear()
        self._link.forget_answers()

    def close(self, answer: Answer) -> None:
        """Takes the order off the list. Raises HostFailedError where a layer host could not execute it."""
        self._hosts.pop(answer.batch, None)
        if answer.error:
            raise HostFailedError(answer.host, answer.batch, answer.error)
