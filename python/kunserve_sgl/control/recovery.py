"""The way of replicas that a member of their group has left by its death, as the coordinator drives it: each becomes a
replica of its own again.

A recovery begins in whatever state its members are, so it asks nothing about it: in any phase of a transition, in the
middle of a batch that does not come back, in a recovery that another death has cut short. It leads to one plan only,
the normal one, and there is no way back from it: who does not come along is ended. What a member does in each phase is
told at the head of `replica/recovery_phases.py`.

After ABANDON every member says which layers it has, so it is known who can lend which layer to whom in RELOAD. What no
member has, replicas that take no part in the recovery may have: they are told to lend it, and serve on.

No clock, no threads, no sockets of its own: it reacts to replies and to the passing of time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from kunserve_sgl.control.messages import Order, OrderReply, Phase, Result
from kunserve_sgl.control.phased import Phased
from kunserve_sgl.control.transition import Timeouts, Transition
from kunserve_sgl.policy.lenders import Layers
from kunserve_sgl.policy.plan import Extent, ParameterLoan, Plan

logger = logging.getLogger(__name__)

RECOVERY_PHASES = (Phase.ABANDON, Phase.RELOAD, Phase.REVIVE)


class Recovery(Phased):
    """Leads `members` to `plan`: all their ranks finish a phase before the next one begins, and every phase has a
    deadline.

    `failed` says why a member cannot come along. It is to be ended; then another recovery begins, without it.
    """

    def __init__(
        self,
        number: int,
        plan: Plan,
        members: Collection[int],
        ranks: int,
        timeouts: Timeouts,
        send: Callable[[int, int, Order], None],
        clock: Callable[[], float],
        reason: str,
        choose_loans: Callable[[Layers], Sequence[ParameterLoan]] = lambda resident: (),
        lend: Callable[[int, int, Sequence[ParameterLoan]], None] = lambda lender, number, loans: None,
    ) -> None:
        """`number` is that of no other recovery or transition; `reason` says why it begins. `choose_loans` says who
        lends what to members that have `resident` layers; `lend(lender, number, loans)` tells one that is no member."""
        super().__init__(ranks, clock, Phase.ABANDON)
        self.number = number
        self.plan = plan
        self.members = tuple(sorted(members))
        self.reason = reason
        self.has_ended = False
        self.failed: dict[int, str] = {}
        self._timeouts = timeouts
        self._send = send
        self._ahead = list(RECOVERY_PHASES)
        self._choose_loans = choose_loans
        self._lend = lend
        everything = frozenset(range(plan.layer_count))
        self._resident = dict.fromkeys(self.members, everything)  # at all ranks of each
        self.lenders: set[int] = set()  # who lends, and is no member

    @property
    def summary(self) -> str:
        """Says in one line of the log what became of it."""
        end = "has ended" if self.has_ended else f"is in {self.phase.value}"
        return f"recovery {self.number} of replicas {list(self.members)} ({self.reason}) {end}: {self._phase_times}"

    def start(self) -> None:
        """Orders the first phase; to be called once. Where there are no members it has ended."""
        if self.members:
            self._begin(self._ahead.pop(0))
        else:
            self.has_ended = True

    def on_reply(self, reply: OrderReply) -> None:
        """Takes in a rank's reply, and goes on to the next phase when all have finished this one. A reply that was not
        waited for is ignored."""
        sender = (reply.replica, reply.rank)
        if (reply.transition, reply.phase) != (self.number, self.phase) or sender not in self._waiting:
            logger.info("KunServe: ignored %s while recovery %d is in %s", reply, self.number, self.phase.value)
            return
        if reply.result is not Result.APPLIED:
            why = f"replica {reply.replica} rank {reply.rank} could not {self.phase.value}: {reply.reason}"
            self.failed.setdefault(reply.replica, why)
            return
        self._waiting.remove(sender)
        if self.phase is Phase.ABANDON:
            self._resident[reply.replica] &= frozenset(reply.resident)
        if self._waiting:
            return
        self._note_end()
        if self._ahead:
            self._begin(self._ahead.pop(0))
        else:
            self.has_ended = True

    def on_time(self) -> None:
        """Notes who has failed where the phase has taken too long. To be called when `deadline_s` has passed."""
        if not self.has_ended and self._is_late:
            for replica, rank in self.waiting_for:
                why = f"replica {replica} rank {rank} did not {self.phase.value} within {self._limit_s:g} s"
                self.failed.setdefault(replica, why)

    def close(self) -> None:
        """Lets those who lend, and are no members, stop it; to be called when it has ended or is given up."""
        for lender in sorted(self.lenders):
            self._lend(lender, self.number, ())
        self.lenders.clear()

    def _begin(self, phase: Phase) -> None:
        timeouts = self._timeouts
        loans: tuple[ParameterLoan, ...] = ()
        if phase is Phase.RELOAD:
            loans = tuple(self._choose_loans(self._resident))
            self.lenders = {loan.owner for loan in loans} - set(self.members)
            for lender in sorted(self.lenders):
                self._lend(lender, self.number, [loan for loan in loans if loan.owner == lender])
        # Parameters may have to be read from a disk.
        timeout_s = max(timeouts.phase_s, timeouts.drain_s) if phase is Phase.RELOAD else timeouts.phase_s
        self._await(phase, self.members, timeout_s)
        for member in self.members:
            self._send(
                member,
                0,
                Order(
                    self.number,
                    phase,
                    self.plan.epoch - 1,
                    self.plan,
                    timeout_s,
                    loans,
                    timeouts.phase_s / 2 if loans else 0.0,
                    members=tuple(self.members),
                ),
            )


def recovered_plan(plan: Plan, members: Collection[int], epoch: int) -> Plan:
    """Returns `plan` with each of `members` by itself: it executes all layers for itself, keeps all parameters, and has
    its base slots, with their KV at home."""
    layers = tuple(range(plan.layer_count))

    def alone(extent: Extent) -> Extent:
        return replace(extent, homes=(extent.replica,) * plan.layer_count)

    return Plan(
        epoch=epoch,
        hosts=tuple((r,) * plan.layer_count if r in members else hosts for r, hosts in enumerate(plan.hosts)),
        resident=tuple(layers if r in members else resident for r, resident in enumerate(plan.resident)),
        extents=tuple(
            alone(extent) if extent.replica in members else extent
            for extent in plan.extents
            if extent.replica not in members or extent.first_granule == 0
        ),
    )


def left_behind_by(replica: int, plan: Plan, transition: Transition | None, recovery: Recovery | None) -> set[int]:
    """Returns who has to recover from the loss of `replica`, itself included; nobody where nobody has to.

    Those are the replicas that may depend on it, by the plan that holds or by the one to which a transition leads, as
    soon as somebody may follow that. What is under way cannot go on without them, so its members recover too.
    """
    members = set(plan.group_of(replica))
    # Who waits for what it lends asks others then.
    is_lending = recovery is not None and replica in recovery.lenders
    is_followed = transition is not None and transition.has_switched and replica in transition.members
    is_recovering = recovery is not None and replica in recovery.members
    if len(members) == 1 and not (is_followed or is_recovering or is_lending):
        return set()
    for under_way in (transition, recovery):
        members.update(() if under_way is None else under_way.members)
    return members
