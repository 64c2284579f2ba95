"""Asks schedulers and the coordinator from the HTTP server, each call under its own number and deadline."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sglang.utils import TypeBasedDispatcher

from kunserve_sgl.errors import TransientError
from kunserve_sgl.exits import EXIT_DEADLINE_S
from kunserve_sgl.integration.messages import (
    CheckCall,
    Command,
    CoordinatorCall,
    CoordinatorReply,
    ReplicaReply,
    ResizeKvCall,
    StatusCall,
    WritableCall,
)

# A replica answers between two batches, and a long prefill chunk may take seconds. The controller, which passes calls
# on, may be waiting for a process to end.
CALL_DEADLINE_S = EXIT_DEADLINE_S + 15.0
CHECK_DEADLINE_S = 300.0  # a replica looks at one layer between two batches
# More than a transition can have, there and back. Each of its phases has a deadline, so an answer comes in any case.
_PHASES_OF_TRANSITION = 8


@dataclass(slots=True)
class _OpenCall:
    done: asyncio.Future[None]
    replies: list[Any]
    missing: set[int] | None  # replicas whose answer may still come; None for a call of the coordinator

    def end_if_answered(self) -> None:
        """Ends the wait when nothing more can come."""
        is_answered = bool(self.replies) if self.missing is None else not self.missing
        if is_answered and not self.done.done():
            self.done.set_result(None)


class Calls:
    """Asks replicas and coordinator through SGLang's tokenizer manager, whose socket to the controller and whose result
    loop it shares."""

    status_deadline_s = 10.0

    def __init__(self, tokenizer_manager: Any) -> None:
        self._tokenizer_manager = tokenizer_manager
        self._server_args = tokenizer_manager.server_args
        self.replicas: int = self._server_args.dp_size
        self.alive: Collection[int] = range(self.replicas)
        self._numbers = itertools.count(1)
        self._open: dict[int, _OpenCall] = {}
        handlers: list[Any] = [(ReplicaReply, self._on_replica), (CoordinatorReply, self._on_coordinator)]
        tokenizer_manager._result_dispatcher += TypeBasedDispatcher(handlers)

    async def ask_to_resize(self, replicas: Collection[int], replica: int, frames: int) -> list[ReplicaReply]:
        """Asks `replica` to give `frames` to its KV cache. Returns the answers of `replicas`, all that are there, in
        their order. Raises TransientError when the deadline passes."""
        return await self._ask_all(ResizeKvCall, {"replica": replica, "frames": frames}, replicas)

    async def ask_whether_writable(self, replicas: Collection[int], flushes: bool) -> list[ReplicaReply]:
        """Asks whether parameters can be replaced now, with `flushes` together with the cache. Returns the answers of
        `replicas`, all that are there, in their order. Raises TransientError when the deadline passes."""
        return await self._ask_all(WritableCall, {"flushes": flushes}, replicas)

    async def ask_for_check(self, replicas: Collection[int]) -> dict[int, ReplicaReply | None]:
        """Asks `replicas` to check themselves. Returns the answers that have come within `CHECK_DEADLINE_S`, None for
        one that has not; those that have ended meanwhile are left out."""
        replies: list[ReplicaReply] = []
        is_done = await self._ask(CheckCall, {}, replies, replicas, CHECK_DEADLINE_S)
        late = {} if is_done else {replica: None for replica in replicas if replica in self.alive}
        return dict(sorted({**late, **{reply.replica: reply for reply in replies}}.items()))

    @asynccontextmanager
    async def without_exchange(self) -> AsyncIterator[None]:
        """In the block no exchange is under way, unless it takes far longer than a check. Raises TransientError where
        the coordinator does not answer."""
        if self.replicas == 1:
            yield
            return
        number = next(self._numbers)
        try:
            await self.ask_coordinator(Command.HOLD_EXCHANGE, hold=number, hold_s=2 * CHECK_DEADLINE_S)
            yield
        finally:
            await self.ask_coordinator(Command.FREE_EXCHANGE, hold=number)

    async def _ask_all(self, call_type: Any, fields: dict[str, Any], replicas: Collection[int]) -> list[ReplicaReply]:
        replies: list[ReplicaReply] = []
        is_done = await self._ask(call_type, fields, replies, replicas, CALL_DEADLINE_S)
        if missing := sorted(set(replicas) - {reply.replica for reply in replies}):
            how = "ended meanwhile" if is_done else f"did not answer within {CALL_DEADLINE_S:g} s"
            raise TransientError(f"replicas {missing} {how}")
        return sorted(replies, key=lambda reply: reply.replica)

    async def ask_for_status(self, replicas: Collection[int]) -> list[ReplicaReply]:
        """Returns the answers of `replicas` that have come within `status_deadline_s`."""
        replies: list[ReplicaReply] = []
        await self._ask(StatusCall, {}, replies, replicas, self.status_deadline_s)
        return replies

    async def ask_coordinator(self, command: Command, **fields: Any) -> CoordinatorReply:
        """Returns the coordinator's answer when the command has ended. Raises TransientError when the deadline
        passes."""
        deadline_s = CALL_DEADLINE_S
        if command is Command.HOLD_EXCHANGE:
            deadline_s += _PHASES_OF_TRANSITION * self._server_args.kunserve_transition_timeout
        if command in (Command.DROP, Command.RESTORE, Command.LEND):
            # A restore undoes one merge at a time, of which there are fewer than replicas, with one transition or two.
            phases_s = 2 * _PHASES_OF_TRANSITION * self._server_args.kunserve_transition_timeout
            deadline_s += self.replicas * (self._server_args.kunserve_drain_timeout + phases_s)
        replies: list[CoordinatorReply] = []
        if not await self._ask(CoordinatorCall, {"command": command, **fields}, replies, None, deadline_s):
            raise TransientError(f"the coordinator did not answer within {deadline_s:g} s")
        return replies[0]

    async def _ask(
        self,
        call_type: Any,
        fields: dict[str, Any],
        replies: list[Any],
        expected: Collection[int] | None,
        deadline_s: float,
    ) -> bool:
        """Sends a call and gathers `replies` of the replicas `expected`, or the one of the coordinator for None. Tells
        whether all came before the deadline, but for those of replicas that have ended meanwhile; where nobody is
        expected, nothing is sent."""
        if expected is not None and not expected:
            return True
        number = next(self._numbers)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        missing = None if expected is None else set(expected).intersection(self.alive)
        call = self._open[number] = _OpenCall(done, replies, missing)
        self._tokenizer_manager.auto_create_handle_loop()
        try:
            self._tokenizer_manager._dispatch_to_scheduler(call_type(call_id=number, **fields))
            call.end_if_answered()  # where all that were to answer have ended
            await asyncio.wait_for(done, deadline_s)
        except asyncio.TimeoutError:
            return False
        finally:
            del self._open[number]
        return True

    def _on_replica(self, reply: ReplicaReply) -> None:
        self._take(reply.call_id, reply)

    def _on_coordinator(self, reply: CoordinatorReply) -> None:
        self._take(reply.call_id, reply)

    def _take(self, number: int, reply: Any) -> None:
        call = self._open.get(number)
        if call is None:  # it came after the deadline
            return
        call.replies.append(reply)
        if call.missing is not None:
            call.missing.discard(reply.replica)
        call.end_if_answered()

    def on_alive(self, alive: Collection[int]) -> None:
        """Waits no more for the answers of replicas that are not among `alive`. One that comes back has not got what
        was asked before."""
        self.alive = alive
        for call in self._open.values():
            if call.missing is not None:
                call.missing.intersection_update(alive)
                call.end_if_answered()
