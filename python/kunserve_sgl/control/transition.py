"""One transition between two plans, as the coordinator drives it: phase by phase, or back.

No clock, no threads, no sockets of its own: it reacts to replies, to losses and to the passing of time.
"""

from __future__ import annotations

import enum
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kunserve_sgl.control.messages import Order, OrderReply, Phase, ReadSpeeds, Result
from kunserve_sgl.control.phased import Phased
from kunserve_sgl.policy.plan import Plan, steps_of

logger = logging.getLogger(__name__)

_WAY_BACK = (Phase.REVERT, Phase.UNDO, Phase.REOPEN)
# From the first of these on parameters are gone: there is no way back.
_AFTER_COMMIT = (Phase.RELEASE, Phase.RESUME)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds the time of one phase; `drain_s` is for a phase that waits until requests have left the slots that go, and
    for one that copies KV in the time that batches leave."""

    phase_s: float
    drain_s: float


class End(enum.Enum):
    """Says how a transition ended: the new plan holds, the old plan holds, or nobody can say. ABANDONED is one in which
    a member has died that others depend on: they recover."""

    SUCCEEDED = "succeeded"
    ROLLED_BACK = "rolled back"
    DEGRADED = "degraded"
    ABANDONED = "abandoned"


class Transition(Phased):
    """Leads the members from one plan to the next: all their ranks finish a phase before the next one begins, and every
    phase has a deadline.

    `end` is None while it runs. `reason` says why it did not succeed, `timed_out` whether a deadline was the reason.
    """

    def __init__(
        self,
        number: int,
        old: Plan,
        new: Plan,
        members: Sequence[int],
        ranks: int,
        timeouts: Timeouts,
        send: Callable[[int, int, Order], None],
        clock: Callable[[], float],
        forces: bool = False,
    ) -> None:
        """`forces` is as in `Order`."""
        super().__init__(ranks, clock, Phase.PREPARE)
        self.number = number
        self.old = old
        self.new = new
        self.members = tuple(members)
        self.end: End | None = None
        self.reason = ""
        self.timed_out = False
        self.longest_pause_s = 0.0
        self.freed_bytes = 0
        self.extension_slots = 0
        self._pauses_s: defaultdict[tuple[int, int], float] = defaultdict(float)  # by rank
        self.reads: dict[tuple[int, int], ReadSpeeds] = {}  # by layer host and owner, those of the slowest rank
        self._timeouts = timeouts
        self._send = send
        self._forces = forces
        # Members that did not take part in the way back in time, and their ranks that have not reopened. Orders go to
        # them all the same.
        self.silent: dict[int, set[int]] = {}
        self._lost: set[int] = set()
        self._switched = False
        steps = [steps_of(old, new, member) for member in self.members]
        self._drains = any(each.close for each in steps)
        self._copies = any(each.moves for each in steps)
        self._ahead = [
            Phase.PREPARE,
            *([Phase.LOAD] if any(each.unmap_kv or each.load or each.moves for each in steps) else []),
            Phase.SWITCH,
            Phase.RELEASE,
            *([Phase.RESUME] if any(each.open or each.end_kv for each in steps) else []),
        ]

    @property
    def has_switched(self) -> bool:
        """Tells whether a member may have taken the new route, now or before it went back."""
        return self._switched

    @property
    def committed(self) -> bool:
        """Tells whether parameters may be gone already, so that only the new plan can hold."""
        return self.phase in _AFTER_COMMIT

    @property
    def pause_s(self) -> float:
        """Gives for how long it has kept a rank from running batches at most, but for copying in LOAD."""
        return max(self._pauses_s.values(), default=0.0)

    @property
    def summary(self) -> str:
        """Says in one line of the log what became of it."""
        end = "runs" if self.end is None else self.end.value
        return (
            f"transition {self.number} of replicas {list(self.members)} from epoch {self.old.epoch} to "
            f"{self.new.epoch} {end}{f' ({self.reason})' if self.reason else ''}: {self._phase_times}; longest pause "
            f"{1000 * self.longest_pause_s:.1f} ms, {self.freed_bytes / 2**20:.1f} MiB of parameters freed, "
            f"{self.extension_slots} slots gained"
        )

    def start(self) -> None:
        """Orders the first phase; to be called once."""
        self._begin(self._ahead.pop(0))

    def on_reply(self, reply: OrderReply) -> None:
        """Takes in a rank's reply, and goes on to the next phase when all have finished this one, or back where one
        refused. A reply that was not waited for is ignored."""
        sender = (reply.replica, reply.rank)
        if reply.transition == self.number and reply.phase is Phase.REOPEN and reply.replica in self.silent:
            self._on_late_reply(reply)
            return
        expected = (
            self.end is None
            and (reply.transition, reply.phase) == (self.number, self.phase)
            and sender in self._waiting
            # Who knows nothing of the transition has nothing to take back.
            and (reply.result is not Result.STALE or self.phase in _WAY_BACK)
        )
        if not expected:
            logger.info("KunServe: ignored %s while transition %d is in %s", reply, self.number, self.phase.value)
            return
        self.longest_pause_s = max(self.longest_pause_s, reply.longest_pause_s or reply.pause_s)
        if self.phase is not Phase.LOAD:
            self._pauses_s[sender] += reply.pause_s
        if reply.result is Result.REFUSED:
            self._fail(f"replica {reply.replica} rank {reply.rank} refused to {self.phase.value}: {reply.reason}")
            return
        for speeds in reply.reads:
            known = self.reads.get((reply.replica, speeds.owner), speeds)
            self.reads[reply.replica, speeds.owner] = min(known, speeds, key=lambda each: each.borrowed / each.own)
        if self.phase not in _WAY_BACK:
            self.freed_bytes += reply.freed_bytes
            if reply.rank == 0:  # the allocators of all ranks of a replica have the same slots
                self.extension_slots += reply.extension_slots
        self._waiting.remove(sender)
        self._go_on()

    def _on_late_reply(self, reply: OrderReply) -> None:
        if reply.result is not Result.REFUSED:
            self.silent[reply.replica].discard(reply.rank)
            if not self.silent[reply.replica]:
                del self.silent[reply.replica]

    def on_time(self) -> None:
        """Goes on, or back, where the phase has taken too long. To be called when `deadline_s` has passed."""
        if self.end is None and self._is_late:
            missing = ", ".join(f"replica {replica} rank {rank}" for replica, rank in self.waiting_for)
            if self.phase in _WAY_BACK and not self._switched:
                # Nobody has left the old route, so the others can give back what they hold without being routed to.
                logger.error("KunServe: no answer to %s from %s; the others go on", self.phase.value, missing)
                self.silent |= {replica: set(range(self._ranks)) for replica, _ in self._waiting}
                self._waiting.clear()
                self._go_on()
                return
            self.timed_out = True
            self._fail(f"no answer to {self.phase.value} within {self._limit_s:g} s from {missing}")

    def on_lost(self, replica: int, reason: str) -> None:
        """Takes note that a process of `replica` has ended."""
        if self.end is not None or replica not in self.members or replica in self._lost:
            return
        self._lost.add(replica)
        if self.phase in _WAY_BACK:  # the others can go back without it
            self._waiting = {sender for sender in self._waiting if sender[0] != replica}
            self._go_on()
        else:
            self._fail(reason)

    def on_changed(self, replica: int) -> None:
        """Takes note that the memory or the parameters of `replica` are not those that the new plan was made from."""
        if self.end is None and replica in self.members and self.phase is Phase.PREPARE:
            self._fail(f"the memory or the parameters of replica {replica} have changed meanwhile")

    def take_back(self, reason: str) -> None:
        """Goes back, where that is still possible and not being done."""
        if self.end is None and not self.committed and self.phase not in _WAY_BACK:
            self._fail(reason)

    def abandon(self, reason: str) -> None:
        """Ends it as it is: its members go another way."""
        self.reason = f"{self.reason}; {reason}" if self.reason else reason
        self.end = End.ABANDONED

    def _go_on(self) -> None:
        if self._waiting:
            return
        self._note_end()
        if self._ahead:
            self._begin(self._ahead.pop(0))
        else:
            self.end = End.ROLLED_BACK if self.phase in _WAY_BACK else End.SUCCEEDED

    def _fail(self, reason: str) -> None:
        if self.phase in _WAY_BACK:
            self.reason = f"{self.reason}; and the way back failed: {reason}"
            self.end = End.DEGRADED
        elif self.committed:
            self.reason = reason
            self.end = End.DEGRADED
        else:
            logger.warning("KunServe: transition %d goes back: %s", self.number, reason)
            self.reason = reason
            self.freed_bytes = self.extension_slots = 0
            self._ahead = list(_WAY_BACK)
            self._begin(self._ahead.pop(0))

    def _begin(self, phase: Phase) -> None:
        alive = [member for member in self.members if member not in self._lost]
        timeout_s = longest_s = self._timeouts.phase_s
        if phase is Phase.PREPARE and self._drains:
            timeout_s = self._timeouts.drain_s  # for the slots to become empty; a rank has more to do than wait
            longest_s = max(timeout_s, longest_s)
        if phase is Phase.LOAD and self._copies:
            timeout_s = longest_s = max(timeout_s, self._timeouts.drain_s)  # batches go first
        self._switched = self._switched or phase is Phase.SWITCH
        self._await(phase, [member for member in alive if member not in self.silent], longest_s)
        for member in alive:
            self._send(member, 0, Order(self.number, phase, self.old.epoch, self.new, timeout_s, forces=self._forces))
        self._go_on()  # where nobody is left


def members_of(old: Plan, new: Plan) -> tuple[int, ...]:
    """Returns the replicas that a transition concerns: those for whom something changes, and all who depend on them."""
    changed = {
        replica
        for replica in range(new.replica_count)
        if (old.hosts[replica], old.resident[replica], old.extents_of(replica))
        != (new.hosts[replica], new.resident[replica], new.extents_of(replica))
    }
    groups: Iterable[tuple[int, ...]] = (*old.groups, *new.groups)
    return tuple(sorted({member for group in groups if changed & set(group) for member in group}))
