"""Carries out the coordinator's orders at one rank, between two batches, and answers each.

What the phases of a transition do, and how they are taken back, is in `phases.py`. Here is when: a replica that runs
batches, or that others wait for, does as many steps per batch boundary as fit into a few milliseconds, and one at
least; an idle one does all at once. All ranks of a replica begin a phase at the same boundary.

The parameters that come back are most of what a restore does. Beside batches they take LOAD_SHARE of a replica's time,
unless half of the phase's time has passed already.

A long prefill would keep a transition waiting for its end several times over. So on a CPU with one rank, what touches
neither the route of own batches nor which slots may be allocated goes on between the layers of an own batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kunserve_sgl.control.messages import Order, OrderReply, Phase, Result
from kunserve_sgl.errors import KunserveError
from kunserve_sgl.policy.plan import steps_of
from kunserve_sgl.replica.active_transition import ActiveTransition
from kunserve_sgl.replica.capacity import CapacityManager
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.pace import Pace
from kunserve_sgl.replica.phases import Hosting, Phases
from kunserve_sgl.replica.recovery_phases import STANDING_PHASES
from kunserve_sgl.replica.replica_memory import ReplicaMemory

logger = logging.getLogger(__name__)

# What may come after each phase; see `control.transition.Transition`.
_NEXT: dict[Phase, tuple[Phase, ...]] = {
    Phase.PREPARE: (Phase.LOAD, Phase.SWITCH, Phase.REVERT),
    Phase.LOAD: (Phase.SWITCH, Phase.REVERT),
    Phase.SWITCH: (Phase.RELEASE, Phase.REVERT),
    Phase.RELEASE: (Phase.RESUME,),
    Phase.REVERT: (Phase.UNDO,),
    Phase.UNDO: (Phase.REOPEN,),
    Phase.ABANDON: (Phase.RELOAD,),
    Phase.RELOAD: (Phase.REVIVE,),
}
# With these a transition or a recovery begins here.
_FIRST = (Phase.PREPARE, Phase.ABANDON)
# What these do is of no concern to an own batch that is under way: it began by the route that holds after SWITCH.
_BETWEEN_LAYERS = (Phase.PREPARE, Phase.LOAD, Phase.RELEASE)
# These neither lend nor free what is lent, and open no slots. A loan of parameters of the transition before, or of what
# was lent beside it, may not have ended yet; those of KV have, since who ends them waits for that.
_FREES_NOTHING_LENT = (Phase.SWITCH, Phase.REVERT, Phase.UNDO, Phase.ABANDON)
LOAD_SHARE = 0.04  # of each of two replicas, which a token of both waits for
IDLE_BUDGET_S = 0.1  # then an idle replica looks for requests and orders, as for a recovery; one step may take longer
BOUNDARY_BUDGET_S = 0.005  # per batch boundary; one step may take longer, the next then waits for the next boundary


class TransitionAgent:
    """Takes orders and answers them, one for each rank. While no transition runs, the rank's plan is the one from which
    the next will begin."""

    def __init__(
        self,
        rank: int,
        plan: HeldPlan,
        engine: Engine,
        capacity: CapacityManager,
        memory: ReplicaMemory,
        loans: Loans,
        hosting: Hosting,
        writes: KvWrites,
        reply: Callable[[OrderReply], None],
        measures_reads: bool = False,
    ) -> None:
        """`measures_reads` says whether memory that is borrowed is compared with own memory."""
        self._measures_reads = measures_reads
        self._replica = memory.replica
        self._rank = rank
        self._plan = plan
        self._allocator = engine.allocator
        self._memory = memory
        self._loans = loans
        self._hosting = hosting
        self._reply = reply
        self._phases = Phases(plan, engine, capacity, memory, loans, hosting, writes)
        self._active: ActiveTransition | None = None
        self._finished = 0
        self._pace = Pace(LOAD_SHARE, BOUNDARY_BUDGET_S, 0.0)  # of the phase

    @property
    def is_busy(self) -> bool:
        """Says whether a transition is under way here, between its phases too."""
        return self._active is not None

    @property
    def progress(self) -> str:
        """Says where the transition that is under way stands, for people; empty where none is."""
        return "" if self._active is None else self._active.progress

    @property
    def stands(self) -> bool:
        """Says whether a recovery keeps all batches from running. It is the same at all ranks of a replica."""
        return self._active is not None and self._active.phase in STANDING_PHASES

    # Orders

    def on_order(self, order: Order) -> None:
        """Begins a phase. Called by all ranks at the same batch boundary."""
        started_s = time.perf_counter()
        refusal = self._begin_refusal(order)
        if refusal is not None:
            self._reply(OrderReply(order.transition, order.phase, self._replica, self._rank, *refusal))
            return
        if order.phase in _FIRST:
            old = self._plan.agreed
            assert old is not None
            # A recovery looks at the books in place of plans.
            before = order.plan if order.phase is Phase.ABANDON else old
            left, self._active = (
                self._active,
                ActiveTransition(order, old, steps_of(before, order.plan, self._replica)),
            )
            if left is not None:
                self._active.connection = left.connection
                self._guarded(self._active, left.leave)
        active = self._active
        assert active is not None
        active.begin_phase(order)
        self._pace = Pace(LOAD_SHARE, BOUNDARY_BUDGET_S, started_s)
        self._guarded(active, lambda: self._phases.begin(active))
        active.account(time.perf_counter() - started_s)

    def why_unexpected(self, order: Order) -> str | None:
        """Says why an order of the transition under way cannot come now, the same at all ranks. The coordinator never
        sends one: it is to be ignored."""
        active = self._active
        if active is None or order.phase in _FIRST or order.transition != active.order.transition:
            return None  # what is to be said to that is an answer
        if (order.old_epoch, order.plan) != (active.order.old_epoch, active.new):
            return f"transition {order.transition} is to another plan"
        if order.phase not in _NEXT.get(active.phase, ()):
            return f"{order.phase.value} does not come after {active.phase.value}"
        return None

    def _begin_refusal(self, order: Order) -> tuple[Result, str] | None:
        """Returns the answer to an order that cannot be carried out, or that has nothing left to do; None for
        others."""
        plan = self._plan.agreed
        if plan is None:
            return Result.REFUSED, "there is no plan here yet"
        if order.phase is Phase.ABANDON:
            return None  # whatever is under way
        if order.phase is Phase.PREPARE:
            if self._active is not None:
                return Result.REFUSED, f"transition {self._active.order.transition} is under way"
            if order.old_epoch != plan.epoch:
                return Result.REFUSED, f"the plan here has epoch {plan.epoch}, not {order.old_epoch}"
            planned, granules = plan.extents_of(self._replica)[0].granules, self._memory.kv.granules
            if planned != granules:
                return Result.REFUSED, f"the KV cache here has been resized from {planned} to {granules} granules"
            return None
        if self._active is None and order.transition == self._finished:
            return Result.APPLIED, ""  # there was nothing left to do in this phase
        if self._active is None or self._active.order.transition != order.transition:
            return Result.STALE, f"transition {order.transition} is not under way"
        return None

    # Between two batches

    def advance(self, is_serving: bool) -> None:
        """Goes on with the phase, and answers when it is done. Called at every batch boundary."""
        active = self._active
        if active is None:
            return
        if active.answered:
            if active.phase is Phase.PREPARE and active.closing:
                # What failed here may have worked at the other ranks, and all must take the same slots away.
                self._guarded(active, lambda: self._phases.close_slots(active))
            return
        started_s = time.perf_counter()
        went_well = self._guarded(active, lambda: self._advance(active, started_s, is_serving))
        active.account(time.perf_counter() - started_s)
        if not went_well:
            return
        if self._is_done(active):
            self._finish_phase(active)
        elif active.closing and time.monotonic() >= active.deadline_s:
            used = sum(len(self._allocator.used_in(self._memory.slots(extent))) for extent in active.closing)
            self._answer(
                active,
                Result.REFUSED,
                f"what lives in the slots that are to go, {used} pages, had no room elsewhere within "
                f"{active.order.timeout_s:g} s",
            )

    def forget(self, peer: int) -> None:
        """Takes note that a peer has other processes now."""
        self._phases.forget(peer)

    def may_begin_between_layers(self, order: Order) -> bool:
        """Says whether `on_order` may be called while an own batch is under way, between layers. Only for a replica of
        one rank."""
        if order.phase is not Phase.PREPARE:
            return order.phase in _BETWEEN_LAYERS
        old = self._plan.agreed
        return old is None or old.epoch != order.old_epoch or not steps_of(old, order.plan, self._replica).close

    def advance_between_layers(self) -> None:
        """Goes on with the phase while an own batch is under way, between layers, and answers when the phase is done.
        Neither do slots go here, nor does the transition end. Only for a replica of one rank."""
        active = self._active
        if active is None or active.answered or active.phase not in _BETWEEN_LAYERS:
            return
        started_s = time.perf_counter()
        went_well = self._guarded(active, lambda: self._do_steps(active, started_s, True))
        active.account(time.perf_counter() - started_s)
        if went_well and self._is_done(active) and not self._ends_with(active):
            self._finish_phase(active)

    def _advance(self, active: ActiveTransition, now_s: float, is_serving: bool) -> None:
        if active.phase is Phase.PREPARE:
            self._phases.close_slots(active)
        self._do_steps(active, now_s, is_serving)

    def _do_steps(self, active: ActiveTransition, now_s: float, is_serving: bool) -> None:
        """Does steps. An idle replica goes on for longer, unless others wait for it; but what is copied in the time
        that batches leave ends with the time of a boundary, since requests may have come."""
        if active.phase is Phase.PREPARE:
            active.is_connected = active.connection.is_done()
        budget_s = BOUNDARY_BUDGET_S
        if active.phase is Phase.LOAD and not active.is_late:
            budget_s = self._pace.credit_s(now_s)
            if budget_s < 0 and (is_serving or self._hosting.looks_waited_for()):
                return
        while self._step(active):
            taken_s = time.perf_counter() - now_s
            if taken_s >= IDLE_BUDGET_S:
                break
            if taken_s >= budget_s and (is_serving or self._hosting.looks_waited_for()):
                break
        self._pace.pay(time.perf_counter() - now_s)
        is_first = not is_serving or active.is_late
        while active.copies and active.copies[0].advance(is_serving=not is_first):
            if active.copies[0].is_done:
                active.copies.popleft()
            is_over = time.perf_counter() >= now_s + BOUNDARY_BUDGET_S
            if is_serving or is_over or self._hosting.looks_waited_for():
                return

    def _step(self, active: ActiveTransition) -> bool:
        """Does one step. Returns False where nothing can be done now."""
        self._loans.ending.advance()
        if self._waits_for_loans(active):
            return False
        if active.todo:
            active.run_next()
            return True
        arrived = self._phases.look_for_lent(active)
        if arrived is None:
            return False
        active.todo.appendleft(arrived)
        active.run_next()
        if self._measures_reads:
            active.todo.extend(self._phases.measuring(active))
        return True

    def _is_done(self, active: ActiveTransition) -> bool:
        """Says whether the phase has nothing left to do or to wait for."""
        is_prepare = active.phase is Phase.PREPARE
        waits_for_offers = (is_prepare or active.phase is Phase.RELOAD) and self._loans.awaits_offers
        waits = waits_for_offers or (is_prepare and (active.closing or not active.is_connected))
        waits = waits or self._waits_for_loans(active)
        return not (active.todo or active.copies or waits)

    def _waits_for_loans(self, active: ActiveTransition) -> bool:
        """Says whether a loan is to end first, whose memory is lent again or freed, or written by batches."""
        return active.phase not in _FREES_NOTHING_LENT and bool(self._loans.ending)

    def _guarded(self, active: ActiveTransition, action: Callable[[], None]) -> bool:
        """Runs a part of a phase; its failure is reported to the coordinator, which decides what comes next, and False
        returned."""
        try:
            action()
        except KunserveError as error:
            logger.warning("KunServe: transition %d, %s: %s", active.order.transition, active.progress, error)
            self._answer(active, Result.REFUSED, str(error))
            return False
        return True

    @staticmethod
    def _ends_with(active: ActiveTransition) -> bool:
        """Says whether the transition ends here with this phase."""
        return active.phase in (Phase.RESUME, Phase.REOPEN, Phase.REVIVE) or (
            active.phase is Phase.RELEASE and not active.steps.open and not active.steps.end_kv
        )

    def _finish_phase(self, active: ActiveTransition) -> None:
        if self._ends_with(active):
            self._phases.end(active)
            self._active, self._finished = None, active.order.transition
        self._answer(active, Result.APPLIED, "")

    def _answer(self, active: ActiveTransition, result: Result, reason: str) -> None:
        active.answered = True
        active.todo.clear()
        active.copies.clear()
        resident = self._memory.resident_layers if active.phase is Phase.ABANDON else ()
        self._reply(active.reply(self._replica, self._rank, result, reason, resident))
