"""A transition that is under way at a rank: what is left to do in its phase, what has been done, and what it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

from kunserve_sgl.control.messages import MOST_REASON, Order, OrderReply, Phase, ReadSpeeds, Result
from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.policy.plan import Extent, ParameterLoan, Plan, ReplicaSteps
from kunserve_sgl.replica.kv_copy import KvCopy
from kunserve_sgl.replica.steps import LongStep, Step


@dataclass
class ActiveTransition:
    """Keeps the state of a transition at one rank. `order` is that of PREPARE, `steps` what this replica has to do on
    the way from `old` to its plan.

    `closing` are own slots that are to go and are not empty yet. `done` are steps that there is a way back from.
    `copies` are under way, the first of them, in the time that batches leave.
    """

    order: Order
    old: Plan
    steps: ReplicaSteps
    phase: Phase = Phase.PREPARE
    todo: deque[Step | LongStep] = field(default_factory=deque)
    done: list[Step] = field(default_factory=list)
    closing: list[Extent] = field(default_factory=list)
    copies: deque[KvCopy] = field(default_factory=deque)
    connection: Connecting | Connected = field(default_factory=Connected)
    is_connected: bool = False
    answered: bool = False
    deadline_s: float = 0.0
    loans: tuple[ParameterLoan, ...] = ()  # of this phase, where it is RELOAD
    lend_until_s: float = 0.0
    pause_s: float = 0.0
    longest_pause_s: float = 0.0
    freed_bytes: int = 0
    extension_slots: int = 0
    reads: list[ReadSpeeds] = field(default_factory=list)
    _timeout_s: float = 0.0
    _run: int = 0  # steps of this phase
    _running: str = ""
    _parts: Generator[None, None, object] | None = None  # of the long step that has begun, the first of `todo`

    @property
    def new(self) -> Plan:
        """Returns the plan that the transition leads to."""
        return self.order.plan

    @property
    def progress(self) -> str:
        """Says where the phase is, for people."""
        running = f": {self._running}" if self._running else ""
        if self.copies:
            running = f": {self.copies[0].progress}"
        return f"{self.phase.value}, step {self._run} of {self._run + len(self.todo)}{running}"

    @property
    def is_late(self) -> bool:
        """Tells whether half of the phase's time has passed."""
        return time.monotonic() > self.deadline_s - self._timeout_s / 2

    def begin_phase(self, order: Order) -> None:
        """Starts the clock and the counts of a phase. What was left of the one before is not done any more, except on
        the way back, where everything has to be."""
        self.phase, self.answered = order.phase, False
        self._timeout_s = order.timeout_s
        self.deadline_s = time.monotonic() + order.timeout_s
        self.loans, self.lend_until_s = order.loans, time.monotonic() + order.lend_timeout_s
        self.pause_s = self.longest_pause_s = 0.0
        self.freed_bytes = self.extension_slots = 0
        self._run, self._running = 0, ""
        self.copies.clear()
        self.reads.clear()
        if order.phase is not Phase.REOPEN:
            self.todo.clear()
            self._parts = None  # it is among `done`

    def run(self, step: Step) -> None:
        """Does a step. Raises what it raises; then there is nothing to take back of it."""
        self._run += 1
        self._running = step.what
        step.do()
        self.done.append(step)

    def run_next(self) -> None:
        """Does the first of the steps that are left, or a part of it."""
        step = self.todo.popleft()
        if isinstance(step, Step):
            self.run(step)
        elif not self._run_part(step):
            self.todo.appendleft(step)

    def _run_part(self, step: LongStep) -> bool:
        """Does a part of a step; returns whether that was the last one."""
        if self._parts is None:
            self._run += 1
            self._running = step.what
            self._parts = step.parts()
            self.done.append(Step(step.what, lambda: None, undo=self._parts.close))
        try:
            next(self._parts)
        except StopIteration:
            self._parts = None
            self.done[-1] = Step(step.what, lambda: None, step.undo, step.reopen)
            return True
        return False

    def leave(self) -> None:
        """Takes back a step that has begun and not ended. Raises what that raises."""
        if self._parts is not None:
            self._parts.close()

    def undoing(self) -> Iterable[Step]:
        """Returns the steps that take back what this rank did to its own memory, the last first."""
        return [Step(f"take back: {step.what}", step.undo) for step in reversed(self.done) if step.undo is not None]

    def reopening(self) -> Iterable[Step]:
        """Returns the steps that take back the rest, when all members have undone theirs."""
        return [
            Step(f"take back: {step.what}", step.reopen, frees_lent=step.frees_lent)
            for step in reversed(self.done)
            if step.reopen is not None
        ]

    def account(self, seconds: float) -> None:
        """Notes that no batch ran for `seconds`."""
        self.pause_s += seconds
        self.longest_pause_s = max(self.longest_pause_s, seconds)

    def reply(self, replica: int, rank: int, result: Result, reason: str, resident: tuple[int, ...] = ()) -> OrderReply:
        """Returns the answer to the order of this phase."""
        return OrderReply(
            self.order.transition,
            self.phase,
            replica,
            rank,
            result,
            reason[:MOST_REASON],
            self.pause_s,
            self.longest_pause_s,
            self.freed_bytes,
            self.extension_slots,
            resident,
            tuple(self.reads),
        )
