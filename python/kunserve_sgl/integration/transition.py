"""A rank's part in transitions: carries out the coordinator's orders between two batches, and answers each.

Every phase is a list of small steps. Where batches are running, a batch boundary does as many as fit into a few
milliseconds; an idle replica does all at once. What changes which slots may be allocated is done by all ranks of a
replica at the same boundary, because they must allocate alike.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kunserve_sgl.control.messages import MOST_REASON, Order, OrderReply, Phase, Result
from kunserve_sgl.errors import KunserveError
from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.plan import Extent, Plan, ReplicaFacts, ReplicaSteps, steps_of
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.loans import Loans

logger = logging.getLogger(__name__)

# What may come after each phase; see `control.transition.Transition`.
_NEXT: dict[Phase, tuple[Phase, ...]] = {
    Phase.PREPARE: (Phase.LOAD, Phase.SWITCH, Phase.REVERT),
    Phase.LOAD: (Phase.SWITCH, Phase.REVERT),
    Phase.SWITCH: (Phase.RELEASE, Phase.REVERT),
    Phase.RELEASE: (Phase.RESUME,),
    Phase.REVERT: (Phase.UNDO,),
    Phase.UNDO: (Phase.REOPEN,),
}
BOUNDARY_BUDGET_S = 0.005  # per batch boundary; one step may take longer, the next then waits for the next boundary


@dataclass
class _Active:
    """A transition under way at this rank."""

    order: Order
    old: Plan
    steps: ReplicaSteps
    phase: Phase
    todo: deque[Callable[[], None]] = field(default_factory=deque)
    undo: list[Callable[[], None]] = field(default_factory=list)
    reopen: list[Callable[[], None]] = field(default_factory=list)
    closing: list[Extent] = field(default_factory=list)
    connection: Connecting | Connected = field(default_factory=Connected)
    is_connected: bool = False
    deadline_s: float = 0.0
    pause_s: float = 0.0
    longest_pause_s: float = 0.0
    freed_bytes: int = 0
    extension_slots: int = 0
    answered: bool = True


class TransitionAgent:
    """One per rank. While no transition runs, the rank's plan is the one from which the next will begin."""

    def __init__(
        self, scheduler: Any, loans: Loans, hosting: Any, plan: HeldPlan, reply: Callable[[OrderReply], None]
    ) -> None:
        self._plan = plan
        self._scheduler = scheduler
        self._loans = loans
        self._hosting = hosting
        self._reply = reply
        self._replica: int = loans.replica
        self._rank: int = scheduler.ps.tp_rank
        self._active: _Active | None = None
        self._finished = 0

    @property
    def is_busy(self) -> bool:
        """Whether a transition is under way here, between its phases too."""
        return self._active is not None

    def on_order(self, order: Order) -> None:
        """Begins a phase. Called by all ranks at the same batch boundary."""
        started_s = time.perf_counter()
        refusal = self._begin_refusal(order)
        if refusal is not None:
            self._reply(OrderReply(order.transition, order.phase, self._replica, self._rank, *refusal))
            return
        if order.phase is Phase.PREPARE:
            old = self._plan.agreed
            assert old is not None
            self._active = _Active(order, old, steps_of(old, order.plan, self._replica), order.phase)
        active = self._active
        assert active is not None
        active.phase, active.answered = order.phase, False
        active.deadline_s = time.monotonic() + order.timeout_s
        active.pause_s = active.longest_pause_s = 0.0
        active.freed_bytes = active.extension_slots = 0
        if order.phase is not Phase.REOPEN:
            active.todo.clear()
        self._guarded(active, lambda: _BEGIN[order.phase](self, active))
        self._account(active, time.perf_counter() - started_s)

    def why_unexpected(self, order: Order) -> str | None:
        """Why an order of the transition under way cannot come now, the same at all ranks. The coordinator never sends
        one: it is to be ignored."""
        active = self._active
        if active is None or order.phase is Phase.PREPARE or order.transition != active.order.transition:
            return None  # what is to be said to that is an answer
        if (order.old_epoch, order.plan) != (active.order.old_epoch, active.order.plan):
            return f"transition {order.transition} is to another plan"
        if order.phase not in _NEXT.get(active.phase, ()):
            return f"{order.phase.value} does not come after {active.phase.value}"
        return None

    def _begin_refusal(self, order: Order) -> tuple[Result, str] | None:
        plan = self._plan.agreed
        if plan is None:
            return Result.REFUSED, "there is no plan here yet"
        if order.phase is Phase.PREPARE:
            if self._active is not None:
                return Result.REFUSED, f"transition {self._active.order.transition} is under way"
            if order.old_epoch != plan.epoch:
                return Result.REFUSED, f"the plan here has epoch {plan.epoch}, not {order.old_epoch}"
            planned, granules = plan.extents_of(self._replica)[0].granules, self._loans.own_granules
            if planned != granules:
                return Result.REFUSED, f"the KV cache here has been resized from {planned} to {granules} granules"
            return None
        if self._active is None and order.transition == self._finished:
            return Result.APPLIED, ""  # there was nothing left to do in this phase
        if self._active is None or self._active.order.transition != order.transition:
            return Result.STALE, f"transition {order.transition} is not under way"
        return None

    def advance(self, is_serving: bool) -> None:
        """Called at every batch boundary: goes on with the phase, and answers when it is done."""
        active = self._active
        if active is None:
            return
        if active.answered:
            if active.phase is Phase.PREPARE and active.closing:
                # What failed here may have worked at the other ranks, and all must take the same slots away.
                self._guarded(active, lambda: self._close(active))
            return
        started_s = time.perf_counter()
        went_well = self._guarded(active, lambda: self._advance(active, started_s + BOUNDARY_BUDGET_S, is_serving))
        self._account(active, time.perf_counter() - started_s)
        if not went_well:
            return
        if self._is_done(active):
            self._finish_phase(active)
        elif active.closing and time.monotonic() >= active.deadline_s:
            used = sum(len(self._allocator.used_in(self._loans.slots(extent))) for extent in active.closing)
            self._answer(
                active,
                Result.REFUSED,
                f"what lives in the slots that are to go, {used} pages, had no room elsewhere within "
                f"{active.order.timeout_s:g} s",
            )

    def _advance(self, active: _Active, until_s: float, is_serving: bool) -> None:
        """An idle replica goes on until others wait for it."""
        if active.phase is Phase.PREPARE:
            self._close(active)
            active.is_connected = active.connection.is_done()
        while self._step(active):
            if time.perf_counter() >= until_s and (is_serving or self._hosting.looks_waited_for()):
                return

    def _step(self, active: _Active) -> bool:
        """Returns False where nothing can be done now."""
        if active.todo:
            active.todo.popleft()()
            return True
        return active.phase is Phase.PREPARE and self._loans.receive(active.order.transition, active.undo)

    def _is_done(self, active: _Active) -> bool:
        waits = active.phase is Phase.PREPARE and (
            active.closing or self._loans.awaits_offers or not active.is_connected
        )
        return not active.todo and not waits

    def _guarded(self, active: _Active, action: Callable[[], None]) -> bool:
        """Runs a part of a phase; its failure is reported to the coordinator, which decides what comes next, and False
        returned."""
        try:
            action()
        except KunserveError as error:
            logger.warning("KunServe: %s of transition %d: %s", active.phase.value, active.order.transition, error)
            self._answer(active, Result.REFUSED, str(error))
            return False
        return True

    def _account(self, active: _Active, seconds: float) -> None:
        active.pause_s += seconds
        active.longest_pause_s = max(active.longest_pause_s, seconds)

    def _finish_phase(self, active: _Active) -> None:
        phase = active.phase
        is_over = phase in (Phase.RESUME, Phase.REOPEN) or (
            phase is Phase.RELEASE and not active.steps.open and not active.steps.end_kv
        )
        if is_over:
            self._plan.end(active.old if phase is Phase.REOPEN else active.order.plan)
            self._active, self._finished = None, active.order.transition
            self._loans.finish()
        self._answer(active, Result.APPLIED, "")

    def _answer(self, active: _Active, result: Result, reason: str) -> None:
        active.answered = True
        active.todo.clear()
        self._reply(
            OrderReply(
                active.order.transition,
                active.phase,
                self._replica,
                self._rank,
                result,
                reason[:MOST_REASON],
                active.pause_s,
                active.longest_pause_s,
                active.freed_bytes,
                active.extension_slots,
            )
        )

    # The phases

    def _prepare(self, active: _Active) -> None:
        steps, new, me = active.steps, active.order.plan, self._replica
        self._plan.begin(new)
        active.closing = list(steps.close)
        if steps.close:
            base = active.old.extents_of(me)[0]
            self._allocator.prefer(self._loans.slots(base))
            going = sum(self._allocator.count_in(self._loans.slots(extent)) for extent in steps.close)
            self._scheduler.limits.expect_capacity(self._allocator.size - going)
            active.reopen.append(lambda: self._allocator.prefer(None))
        for owner in new.owners_served_by(me):
            self._scheduler.req_to_token_pool.map_rows_of(owner)
        active.undo.append(lambda: self._unmap_rows_of_others(active.old))
        peers = [peer for peer in new.group_of(me) if peer != me]
        active.connection = self._hosting.connect(peers, active.order.timeout_s)
        active.undo.append(active.connection.cancel)
        # While there is a way back: in RELEASE, what keeps a layer from being dropped would degrade the group.
        active.todo.extend(partial(self._loans.require_droppable, layer) for layer in steps.drop)
        active.todo.extend(self._loans.prepare(active.order.transition, steps, peers, active.undo, active.reopen))

    def _close(self, active: _Active) -> None:
        """Empties own slots that go away as soon as what lives there has room elsewhere. Until then requests run on,
        and new ones get other slots first. Every rank sees the same state, so all do it at the same boundary."""
        for extent in list(active.closing):
            slots = self._loans.slots(extent)
            if not self._scheduler.capacity.can_shrink_by(slots):
                return
            self._scheduler.capacity.take(slots)
            active.closing.remove(extent)
            active.reopen.append(lambda slots=slots: self._open_slots(slots))  # type: ignore[misc]
            self._scheduler.capacity.publish()

    def _load(self, active: _Active) -> None:
        for part in active.steps.unmap_kv:
            active.todo.append(self._undoable(active, self._loans.unmap_kv, self._loans.map_kv, part))
        for layer in active.steps.load:
            active.todo.append(self._undoable(active, self._loans.load, self._loans.drop, layer))

    def _undoable(
        self, active: _Active, do: Callable[[Any], Any], undo: Callable[[Any], Any], what: Any
    ) -> Callable[[], None]:
        def step() -> None:
            do(what)
            active.undo.append(lambda: undo(what))

        return step

    def _switch(self, active: _Active) -> None:
        self._take_route(active.order.plan)

    def _take_route(self, plan: Plan) -> None:
        """Own batches take the route of `plan` from the next one on, to hosts that know nothing of them yet."""
        self._scheduler.device_module.synchronize()
        self._plan.route_by(plan)
        self._scheduler.req_to_token_pool.forget_hosts()

    def _release(self, active: _Active) -> None:
        def drop(layer: int) -> None:
            active.freed_bytes += self._loans.drop(layer)

        steps = active.steps
        active.undo.clear()  # there is no way back any more
        active.reopen.clear()
        self._hosting.forget_all_but(active.order.plan.owners_served_by(self._replica))
        self._plan.settle(active.order.plan)
        if steps.close:
            self._allocator.prefer(None)
        active.todo.extend([lambda layer=layer: drop(layer) for layer in steps.drop])  # type: ignore[misc]
        active.todo.append(lambda: self._unmap_rows_of_others(active.order.plan))
        active.todo.extend(self._loans.give_back(steps.return_kv))
        active.todo.extend([lambda part=part: self._loans.map_kv(part) for part in steps.map_kv])  # type: ignore[misc]

    def _resume(self, active: _Active) -> None:
        if active.steps.open:
            self._scheduler.limits.expect_capacity(None)
        for extent in active.steps.open:
            slots = self._loans.slots(extent)
            self._open_slots(slots)
            active.extension_slots += slots.count
        self._loans.end_loans(active.steps.end_kv)
        active.todo.append(self._loans.check)

    def _unmap_rows_of_others(self, plan: Plan) -> None:
        """Of those whose layers do not run here by `plan`. They have switched to it, and so know nothing of what was
        here."""
        for owner in set(range(plan.replica_count)) - {self._replica, *plan.owners_served_by(self._replica)}:
            self._scheduler.req_to_token_pool.unmap_rows_of(owner)

    def _revert(self, active: _Active) -> None:
        self._take_route(active.old)

    def _undo(self, active: _Active) -> None:
        # Everybody who lives has reverted: what is left of others is from one who has died.
        self._hosting.forget_all_but(active.old.owners_served_by(self._replica))
        active.closing.clear()
        active.todo.extend(reversed(active.undo))

    def _reopen(self, active: _Active) -> None:
        while active.todo:  # where nobody waited for this rank to undo everything
            active.todo.popleft()()
        self._plan.settle(active.old)
        for step in reversed(active.reopen):
            step()
        active.todo.append(self._loans.check)

    def _open_slots(self, slots: SlotRange) -> None:
        self._allocator.add_slots(slots)
        self._allocator.prefer(None)
        self._scheduler.capacity.publish()

    @property
    def _allocator(self) -> Any:
        return self._scheduler.token_to_kv_pool_allocator


_BEGIN: dict[Phase, Callable[[TransitionAgent, _Active], None]] = {
    Phase.PREPARE: TransitionAgent._prepare,
    Phase.LOAD: TransitionAgent._load,
    Phase.SWITCH: TransitionAgent._switch,
    Phase.RELEASE: TransitionAgent._release,
    Phase.RESUME: TransitionAgent._resume,
    Phase.REVERT: TransitionAgent._revert,
    Phase.UNDO: TransitionAgent._undo,
    Phase.REOPEN: TransitionAgent._reopen,
}


def facts_of(memory: Any, row_count: int) -> ReplicaFacts:
    """What planning has to know of this rank's memory."""
    kv, parameters = memory.kv, memory.parameters
    layers = range(memory.layer_count)
    one_granule = kv.space.slots_of(memory.replica, 0, 1)
    return ReplicaFacts(
        replica=memory.replica,
        frame_bytes=memory.vmm.frame_bytes,
        granule_slots=kv.space.granule_slots,
        base_granules=kv.granules,
        max_granules=kv.space.replica_granules,
        free_frames=memory.frames.free_frames,
        layer_frames=tuple(parameters.report(layer).frames for layer in layers),
        granule_frames=tuple(kv.frames_for(one_granule, [layer]) for layer in layers),
        row_count=row_count,
    )
