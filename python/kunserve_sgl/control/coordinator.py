"""The coordinator of a deployment: knows the plan, and leads the replicas from one plan to the next, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kunserve_sgl.control.answers import CommandAnswer, State, Verdict, plan_status, waiting_status
from kunserve_sgl.control.commands import Done, Leg, Merge, RunningCommand
from kunserve_sgl.control.leading import Leading
from kunserve_sgl.control.messages import Hello, HostFailed, LinkSpeed, OrderReply, ResizeRefused, Wanting
from kunserve_sgl.control.restoring import plan_after, restorable_groups
from kunserve_sgl.control.transition import members_of
from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.decision import DeploymentView
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.drop_plan import DropWish, plan_cost
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.partial_restore import RestoreWish
from kunserve_sgl.policy.plan import Plan
from kunserve_sgl.policy.plan_check import check_facts

logger = logging.getLogger(__name__)


class Coordinator(Leading):
    """Reacts to messages, commands, losses and the passing of time; sends through `send(replica, rank, message)`,
    which must not block. `clock` is monotonic, in seconds."""

    # What happens

    def on_message(self, message: Hello | OrderReply | Wanting | HostFailed | ResizeRefused | LinkSpeed) -> None:
        """Takes in what a rank says. It has been checked: see `message_check`."""
        if isinstance(message, HostFailed):
            self._on_host_failed(message)
        elif isinstance(message, ResizeRefused):
            self._resizing.on_refused(message)
        elif isinstance(message, LinkSpeed):
            self._deployment.add_link(message)
        elif isinstance(message, Wanting):
            if self.is_lost(message.replica):
                self._deployment.newcomers.add(message)
                self._lend_to_newcomers()
        elif isinstance(message, OrderReply):
            if group := self._latecomers.on_reply(message):
                logger.warning("KunServe: replicas %s are as before transition %d", list(group), message.transition)
                self._deployment.health.mend(group)
            elif self._under_way is None:
                logger.info("KunServe: ignored %s, no transition runs", message)
            else:
                self._under_way.on_reply(message)
                self._after_event()
        else:
            self._on_hello(message)
            self._resizing.follow()

    def on_tick(self) -> None:
        """Goes on where time has passed. To be called at `next_deadline_s`, and at any other time."""
        if self._under_way is not None:
            self._under_way.on_time()
            self._after_event()
        else:
            self._exchange_on()
        self._resizing.follow()

    def next_deadline_s(self) -> float | None:
        """Says when `on_tick` has something to do, on the clock's scale; None while it has not."""
        next_s: float | None
        if self._recovery is not None and self._recovery.failed:
            next_s = None  # their end is waited for
        elif self._under_way is not None:
            next_s = self._under_way.deadline_s
        else:
            next_s = None if self._next_exchange() is None else max(self._clock(), self._exchange.due_s())
        return min((each for each in (next_s, self._resizing.deadline_s) if each is not None), default=None)

    def on_member_lost(self, replica: int, rank: int, how: str) -> None:
        """Takes note that all processes of a replica have ended, the first of them as `how` says. Those who depend on
        it recover: its memory is theirs alone from now on."""
        if replica not in self._deployment.health.lost:
            self._lose({replica: f"replica {replica} rank {rank} {how}"})

    # Replicas that come back

    def slots_at_start(self, replica: int) -> int:
        """Returns the KV slots that `replica` had when all had reported for the first time."""
        return self._deployment.slots_at_start(replica)

    def has_new_parameters(self, replica: int) -> bool:
        """Tells whether a replica last had other parameters than when all had reported for the first time."""
        return self._deployment.has_new_parameters(replica)

    def checksums_for(self, replica: int) -> tuple[tuple[str, ...], ...]:
        """Returns the checksums that the layers of a replica which is started again have to have, by rank."""
        return self._deployment.checksums_for(replica)

    def set_restarting(self, replica: int, how: str) -> None:
        """Takes note that `replica`, which has ended or is about to be seen to have, is to be started again."""
        self._deployment.set_restarting(replica, how)

    def give_up(self, replica: int, reason: str) -> None:
        """Takes note that a replica which has ended is not started again."""
        self._deployment.give_up(replica, reason)

    def take_back(self, replica: int) -> bool:
        """Takes a replica up again whose processes were started anew, and tells everybody. Returns False where that is
        not possible yet: not all of its ranks have reported, or a transition or recovery runs. Raises TransientError
        where it is not the replica that it was."""
        if self.plan is None or self._under_way is not None or not self._deployment.has_returned(replica):
            return False
        self._deployment.take_back(replica)
        self._exchange.forget(replica)
        return True

    def set_stalled(self, stalled: Mapping[int, str], notes: Mapping[int, str]) -> None:
        """Takes note of the replicas that make no progress, with the reason, and of what else is to be said of some in
        the status. No new transition takes those that stand still."""
        self._deployment.health.set_stalled(stalled, notes)

    def on_load(self, replica: int, load: ReplicaLoad) -> None:
        """Takes in a replica's report of its load."""
        self._exchange.on_load(replica, load)

    # Commands

    def drop(self, wish: DropWish, done: Done) -> None:
        """Merges groups; `done` gets the answer, now or later."""
        if not self._leaves_exchange(lambda: self.drop(wish, done)):
            self._merge(State.DROPPING, wish, done)

    def lend(self, wish: LendWish, done: Done) -> None:
        """Lets a replica have slots in the memory of another; `done` gets the answer, now or later."""
        if not self._leaves_exchange(lambda: self.lend(wish, done)):
            self._merge(State.LENDING, wish, done)

    def _merge(self, state: State, wish: DropWish | LendWish, done: Done) -> None:
        try:
            plan = self._ready_plan()
            new = self._merged(wish)
            members = members_of(plan, new)
            if state is State.DROPPING:
                self._deployment.require_same_parameters(members)
        except (ConfigurationError, TransientError) as error:
            done(self._refusal(error))
            return
        groups = tuple(group for group in new.groups if len(group) > 1 and set(group) <= set(members))
        command = self._command = RunningCommand(state, groups, done, self._clock())
        self._begin(command, Leg(new, tuple(Merge(frozenset(group), plan) for group in groups)))

    def restore(self, wish: RestoreWish, done: Done, *, only_last: bool = False, drain_s: float | None = None) -> None:
        """Takes merged groups apart, or brings back a part of what they have dropped. `done` gets the answer, now or
        later. `only_last` undoes just the merge of each group that came last; `drain_s` is the longest time to wait for
        slots to become empty."""
        if self._leaves_exchange(partial(self.restore, wish, done, only_last=only_last, drain_s=drain_s)):
            return
        try:
            self._ready_plan()
            groups = restorable_groups(self._deployment, wish)
            plan_after(self._deployment, groups, wish)
        except (ConfigurationError, TransientError) as error:
            done(self._refusal(error))
            return
        self._command = RunningCommand(
            State.RESTORING, groups, done, self._clock(), wish, only_last or wish.is_partial, drain_s
        )
        self._restore_next(self._command)

    def hold_exchange(self, number: int, seconds: float, done: Done) -> None:
        """Lets no exchange begin for so long, or until `free_exchange` is called with the same number. One that is
        under way is left, and `done` gets the answer when it has ended."""
        self._exchange.hold(number, self._clock() + seconds)
        if not self._leaves_exchange(lambda: done(self._answer("no exchange runs"))):
            done(self._answer("no exchange runs"))

    def free_exchange(self, number: int, done: Done) -> None:
        """Ends what `hold_exchange` has begun; `done` gets the answer."""
        self._exchange.free(number)
        done(self._answer("an exchange may begin"))

    def resize(self, replica: int, tokens: int, done: Done) -> None:
        """Lets a replica that shares memory with nobody have so many slots of its own more, in free frames, or fewer
        where negative. `done` gets the answer, now or later."""
        try:
            self._ready_plan()
            self._resizing.order(replica, tokens, self._next_number(), done)
        except (ConfigurationError, TransientError) as error:
            done(self._refusal(error))

    def _merged(self, wish: DropWish | LendWish) -> Plan:
        if isinstance(wish, LendWish):
            return self._deployment.lent(wish)
        return self._deployment.dropped(self._with_spare(wish))

    def dry_run(self, wish: DropWish | LendWish | RestoreWish) -> CommandAnswer:
        """Says what a command would do, and does nothing."""
        try:
            plan = self._ready_plan()
            if isinstance(wish, RestoreWish):
                new = plan_after(self._deployment, restorable_groups(self._deployment, wish), wish)
            else:
                new = self._merged(wish)
        except (ConfigurationError, TransientError) as error:
            return self._refusal(error)
        cost = plan_cost(plan, new, self._deployment.facts)
        gained = cost.gained_tokens
        return CommandAnswer(
            Verdict.DONE,
            f"would gain {gained} tokens" if gained > 0 else f"would give up {-gained} tokens",
            new.epoch,
            freed_bytes=cost.dropped_bytes * self._deployment.ranks,
            extension_slots=cost.gained_tokens,
            plan=new,
            cost=cost,
        )

    def status(self) -> dict[str, Any]:
        """Returns what GET /kunserve/status says of the plan."""
        plan = self._deployment.plan
        if plan is None:
            return waiting_status(self._deployment.replicas, self._deployment.missing)
        states = {replica: self._state_of(group) for group in plan.groups for replica in group}
        for replica in self._deployment.health.stalled:
            if states[replica] is not State.DEGRADED:
                states[replica] = State.STALLED
        for replica in self._deployment.health.restarting:
            states[replica] = State.RESTARTING
        facts = self._deployment.facts
        return {
            **plan_status(plan, facts, states, self._deployment.health, self._under_way),
            "exchange": self._exchange.status(plan, facts, self._is_exchanging),
        }

    def view(self) -> DeploymentView | None:
        """Returns what an automatic decision has to know; None while no transition may begin."""
        may_begin = self._under_way is None or (self._is_exchanging and not self._waiting)
        return self._deployment.view() if may_begin else None

    @property
    def plan(self) -> Plan | None:
        """Gives the plan that holds, None until all have reported."""
        return self._deployment.plan

    @property
    def maps(self) -> Sequence[Sequence[bool]]:
        """Gives at [r][other] whether replica r maps memory of another, or uses it by messages; empty until all have
        reported, and another object when it changes."""
        return self._deployment.ways.chosen

    @property
    def capacities(self) -> tuple[int, ...]:
        """Gives the KV slots of each replica under the plan that holds, and already without those that a resize is
        about to take; none until all have reported."""
        return self._resizing.lowered(self._deployment.capacities())

    def most_capacity(self) -> int:
        """Returns a capacity that no replica could have, whoever lent and dropped what; a bound, not a promise."""
        return self._deployment.most_capacity()

    @property
    def moving(self) -> Sequence[int]:
        """Lists the replicas that take part in the running transition or recovery."""
        return () if self._under_way is None else self._under_way.members

    # Reports

    def _on_hello(self, hello: Hello) -> None:
        if not self._deployment.add_report(hello):
            return
        if self._transition is None:
            if self._recovery is None:
                self._deployment.take_up_facts()
            return
        # A rank says so before it answers its first order: the plan was made from what held before.
        self._transition.on_changed(hello.replica)
        self._after_event()

    # What a command needs

    def _ready_plan(self) -> Plan:
        """Returns the plan, where a new transition may leave it. Raises TransientError or ConfigurationError."""
        if self._command is not None and self._transition is not None and not self._command.is_background:
            members = [list(group) for group in self._command.groups]
            raise TransientError(f"groups {members} are {self._command.state.value}: {self._transition.phase.value}")
        if self._recovery is not None:
            raise TransientError(
                f"replicas {list(self._recovery.members)} are recovering: {self._recovery.phase.value}"
            )
        plan = self._deployment.known_plan()
        check_facts(self._deployment.facts)
        return plan

    def _refusal(self, error: ConfigurationError | TransientError) -> CommandAnswer:
        verdict = Verdict.BAD_REQUEST if isinstance(error, ConfigurationError) else Verdict.CONFLICT
        return self._answer(str(error), verdict)

    def _answer(self, message: str, verdict: Verdict = Verdict.DONE) -> CommandAnswer:
        return CommandAnswer(verdict, message, 0 if self._deployment.plan is None else self._deployment.plan.epoch)

    def _with_spare(self, wish: DropWish) -> DropWish:
        there = range(self._deployment.replicas)  # a wish that names others is refused
        members = {member for group in wish.groups for member in group if member in there}
        return replace(
            wish, leaves_spare=self._exchange.leaves_spare(members, self._deployment.ways.are_apart(members))
        )

    def _state_of(self, group: Sequence[int]) -> State:
        if any(member in self._deployment.health.degraded for member in group):
            return State.DEGRADED
        if self._recovery is not None and set(self._recovery.members) & set(group):
            return State.RECOVERING
        if self._command is not None and self._command.members & set(group):
            return self._command.state
        if len(group) == 1:
            return State.NORMAL
        return State.MERGED if any(map(self._deployment.known_plan().runs_apart, group)) else State.LENDING
