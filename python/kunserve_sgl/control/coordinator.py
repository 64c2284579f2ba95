"""The coordinator of a deployment: knows the plan, and leads the replicas from one plan to the next, one at a time."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from kunserve_sgl.args import Activations, Exchange
from kunserve_sgl.control.answers import CommandAnswer, State, Verdict, plan_status, waiting_status
from kunserve_sgl.control.commands import Done, Leg, Merge, RunningCommand
from kunserve_sgl.control.deployment import Deployment
from kunserve_sgl.control.exchanging import BackgroundExchange
from kunserve_sgl.control.latecomers import Latecomers
from kunserve_sgl.control.messages import FromCoordinator, Hello, HostFailed, OrderReply, ResizeRefused, Wanting
from kunserve_sgl.control.recovery import Recovery, left_behind_by, recovered_plan
from kunserve_sgl.control.resizing import Resizing
from kunserve_sgl.control.restoring import next_leg, plan_after, restorable_groups
from kunserve_sgl.control.transition import End, Timeouts, Transition, members_of
from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.decision import DeploymentView
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.drop_plan import DropWish, PlanCost, plan_cost
from kunserve_sgl.policy.lending import LendWish
from kunserve_sgl.policy.partial_restore import RestoreWish
from kunserve_sgl.policy.plan import Plan
from kunserve_sgl.policy.plan_check import check_facts

logger = logging.getLogger(__name__)


class Coordinator:
    """Reacts to messages, commands, losses and the passing of time; sends through `send(replica, rank, message)`,
    which must not block. `clock` is monotonic, in seconds."""

    def __init__(
        self,
        replicas: int,
        ranks: int,
        timeouts: Timeouts,
        send: Callable[[int, int, FromCoordinator], None],
        clock: Callable[[], float],
        on_transition: Callable[[State, Transition, PlanCost], None] = lambda kind, transition, cost: None,
        activations: Activations = Activations.AUTO,
        model: str = "the model",
        end_replica: Callable[[int, str], None] = lambda replica, reason: None,
        exchange: Exchange = Exchange.OFF,
        stay_s: float = 0.0,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """`activations` and `exchange` are as the flags say, `model` is what people call the model.
        `end_replica(replica, reason)` ends all processes of a replica that does not do what it has to, and returns when
        they are gone; `on_broken` is told that a merge ends because a layer host could not execute a batch."""
        self._on_broken = on_broken
        self._on_transition = on_transition  # told of every transition that has ended
        self._end_replica = end_replica
        self._deployment = Deployment(replicas, ranks, send, activations, model)
        self._timeouts = timeouts
        self._send = send
        self._clock = clock
        self._exchange = BackgroundExchange(exchange, ranks, clock, stay_s)
        self._waiting: deque[Callable[[], None]] = deque()  # commands that go before an exchange which is being left
        self._command: RunningCommand | None = None
        self._transition: Transition | None = None
        self._recovery: Recovery | None = None  # never while a transition runs
        self._latecomers = Latecomers()
        self._resizing = Resizing(self._deployment, timeouts.phase_s, send, clock)
        self._transitions = 0

    # What happens

    def on_message(self, message: Hello | OrderReply | Wanting | HostFailed | ResizeRefused) -> None:
        """Takes in what a rank says. It has been checked: see `message_check`."""
        if isinstance(message, HostFailed):
            self._on_host_failed(message)
        elif isinstance(message, ResizeRefused):
            self._resizing.on_refused(message)
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
        if self._under_way is not None:
            next_s: float | None = self._under_way.deadline_s
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

    def _lend_to_newcomers(self) -> None:
        if self._under_way is None:
            self._deployment.lend_to_newcomers(self._next_number)

    def _next_number(self) -> int:
        self._transitions += 1
        return self._transitions

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
        return True

    def set_stalled(self, stalled: Mapping[int, str], notes: Mapping[int, str]) -> None:
        """Takes note of the replicas that make no progress, with the reason, and of what else is to be said of some in
        the status. No new transition takes those that stand still."""
        self._deployment.health.set_stalled(stalled, notes)

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
    def capacities(self) -> tuple[int, ...]:
        """Gives the KV slots of each replica under the plan that holds; none until all have reported."""
        return self._deployment.capacities()

    def most_capacity(self) -> int:
        """Returns a capacity that no replica could have, whoever lent and dropped what; a bound, not a promise."""
        return self._deployment.most_capacity()

    @property
    def moving(self) -> Sequence[int]:
        """Lists the replicas that take part in the running transition or recovery."""
        return () if self._under_way is None else self._under_way.members

    def is_lost(self, replica: int) -> bool:
        """Tells whether a process of `replica` has ended."""
        return replica in self._deployment.health.lost

    def dependent_on(self, replica: int) -> tuple[int, ...]:
        """Returns `replica` and those that may wait for it: those that it is merged with, and all members of a
        transition that has switched."""
        dependent = self._deployment.dependent_on(replica)
        if self._transition is None or not self._transition.has_switched or replica not in self._transition.members:
            return dependent
        return tuple(sorted({*dependent, *self._transition.members}))

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
        return CommandAnswer(verdict, str(error), 0 if self._deployment.plan is None else self._deployment.plan.epoch)

    # Transitions

    def _begin(self, command: RunningCommand, leg: Leg) -> None:
        plan, new = self._deployment.known_plan(), leg.plan
        timeouts = self._timeouts if command.drain_s is None else replace(self._timeouts, drain_s=command.drain_s)
        command.merges, command.is_homeward = leg.merges, leg.is_homeward
        self._transition = Transition(
            self._next_number(),
            plan,
            new,
            members_of(plan, new),
            self._deployment.ranks,
            timeouts,
            self._send,
            self._clock,
            command.wish.is_forced,
        )
        self._deployment.welcome(self._transition.members)
        self._transition.start()

    def _restore_next(self, command: RunningCommand) -> None:
        """Undoes the latest merge of every group, or as much of it as is wished, or ends the command where there is
        none left."""
        try:
            leg = next_leg(self._deployment, command)
        except (ConfigurationError, TransientError) as error:
            self._finish(command, Verdict.CONFLICT, str(error))
            return
        if leg is None:
            self._finish(command, Verdict.DONE, "restored")
        else:
            self._begin(command, leg)

    # An exchange in the background

    def on_load(self, replica: int, load: ReplicaLoad) -> None:
        """Takes in a replica's report of its load."""
        self._exchange.on_load(replica, load)

    def _with_spare(self, wish: DropWish) -> DropWish:
        members = {member for group in wish.groups for member in group}
        return replace(wish, leaves_spare=self._exchange.leaves_spare(members, self._deployment.are_apart(members)))

    @property
    def _is_exchanging(self) -> bool:
        return self._command is not None and self._command.is_background

    def _next_exchange(self) -> Plan | None:
        if self._command is not None or self._under_way is not None or self._deployment.plan is None:
            return None
        health, plan = self._deployment.health, self._deployment.plan
        if any(self._deployment.has_returned(replica) for replica in health.lost):
            return None  # who comes back is taken back first, and not while a transition runs
        return self._exchange.next_plan(plan, self._deployment.facts, health.unavailable)

    def _exchange_on(self) -> None:
        """Begins the next transition in which KV moves, where there is one and it is time."""
        new = self._next_exchange()
        if new is None or self._clock() < self._exchange.due_s():
            return
        members = members_of(self._deployment.known_plan(), new)
        groups = tuple(group for group in new.groups if set(group) <= set(members))
        command = RunningCommand(State.MERGED, groups, lambda answer: None, self._clock(), is_background=True)
        self._command = command
        self._begin(command, Leg(new, ()))

    def _leaves_exchange(self, command: Callable[[], None]) -> bool:
        """Leaves an exchange that is under way, and says whether there is one: then the command comes when it has
        ended. Where it cannot go back any more, it is about to end."""
        if self._command is None or self._transition is None or not self._command.is_background:
            return False
        self._waiting.append(command)
        self._command.is_interrupted = True
        self._transition.take_back("a command goes before it")
        return True

    def _after_event(self) -> None:
        """Goes on where an event has ended what is under way, or has shown that a member cannot come along."""
        if self._recovery is not None:
            self._follow_recovery(self._recovery)
        elif self._transition is not None and self._transition.end is not None and self._command is not None:
            self._after_end(self._transition, self._command)

    def _after_end(self, transition: Transition, command: RunningCommand) -> None:
        if transition.end in (End.SUCCEEDED, End.ROLLED_BACK):
            self._exchange.on_end(transition, self._deployment.facts, command.is_interrupted)
        if transition.end is End.DEGRADED:
            self._recover(transition.members, transition.reason)
            return
        self._take_off(transition, command)
        if transition.end is End.ROLLED_BACK:
            for silent, ranks in transition.silent.items():
                group = self._deployment.known_plan().group_of(silent)
                self._deployment.health.degrade(group, f"replica {silent} did not answer: {transition.reason}")
                self._latecomers.expect(silent, ranks, transition.number, group)
            has_failed = transition.timed_out or self._deployment.health.lost.keys() & command.members
            verdict = Verdict.FAILED if has_failed else Verdict.CONFLICT
            self._finish(command, verdict, f"rolled back: {transition.reason}")
            return
        self._deployment.adopt(transition, self._merges_after(command))
        if command.is_background:
            self._finish(command, Verdict.DONE, "exchanged")
        elif command.is_homeward:
            self._restore_next(command)
        elif command.state is State.RESTORING and command.only_last and command.then is None:
            self._finish(command, Verdict.DONE, "the last merge is undone" if command.merges else "partly restored")
        elif command.state is State.RESTORING:
            self._restore_next(command)
        else:
            how = "dropped" if command.state is State.DROPPING else "memory is lent"
            self._finish(command, Verdict.DONE, f"{how} in groups {[list(group) for group in command.groups]}")

    def _take_off(self, transition: Transition, command: RunningCommand) -> None:
        """Takes the transition, which has ended, off the list, and notes what it took."""
        self._transition = None
        is_wanted = transition.end is End.SUCCEEDED or command.is_interrupted
        level = logging.INFO if is_wanted else logging.ERROR
        logger.log(level, "KunServe: %s", transition.summary)
        self._on_transition(
            command.state, transition, plan_cost(transition.old, transition.new, self._deployment.facts)
        )
        command.pause_s = max(command.pause_s, transition.longest_pause_s)
        command.freed_bytes += transition.freed_bytes
        command.extension_slots += transition.extension_slots

    def _merges_after(self, command: RunningCommand) -> list[Merge]:
        """Lists the merges that hold when the transition of `command` has succeeded."""
        merges = self._deployment.merges
        if command.state in (State.DROPPING, State.LENDING):
            return [*merges, *command.merges]
        return [merge for merge in merges if merge not in command.merges]

    # Losses

    def _on_host_failed(self, message: HostFailed) -> None:
        """Lets all members of a group become replicas by themselves, where one could not execute a batch of another
        and lives on. Whoever recovers already does so, and whoever has recovered need not again."""
        plan, replica = self._deployment.plan, message.replica
        is_recovering = self._recovery is not None and replica in self._recovery.members
        if plan is None or self.is_lost(replica) or is_recovering:
            return
        members = left_behind_by(replica, plan, self._transition, self._recovery)
        if message.host in members:
            why = f"replica {message.host} could not execute a batch of replica {replica}: {message.reason}"
            logger.error("KunServe: %s", why)
            self._on_broken()
            self._recover(members, why)

    def _lose(self, losses: Mapping[int, str]) -> None:
        """Goes on without these replicas, whose processes are gone; the values say why."""
        members: set[int] = set()
        for replica, reason in losses.items():
            logger.error("KunServe: %s", reason)
            self._deployment.health.lost[replica] = reason
            self._latecomers.forget(replica)
            self._deployment.newcomers.on_lost(replica)
            if self._deployment.plan is not None:
                members |= left_behind_by(replica, self._deployment.plan, self._transition, self._recovery)
        if members:
            self._recover(members, "; ".join(losses.values()))
        elif self._transition is not None:
            for replica, reason in losses.items():
                self._transition.on_lost(replica, reason)
            self._after_event()
        self._degrade_lost()
        self._lend_to_newcomers()

    def _recover(self, members: Collection[int], reason: str) -> None:
        """Begins a recovery of those of `members` who live, whatever is under way. From now on the plan is the one that
        it leads to: nobody can go back."""
        plan, transition, recovery = self._deployment.known_plan(), self._transition, self._recovery
        epoch = plan.epoch if transition is None else max(plan.epoch, transition.new.epoch)
        if transition is not None and self._command is not None:
            transition.abandon(reason)
            self._take_off(transition, self._command)
        if recovery is not None:
            recovery.close()
            logger.warning("KunServe: %s; it begins again", recovery.summary)
            reason = f"{recovery.reason}; {reason}"
        self._deployment.set_alone(members, recovered_plan(plan, members, epoch + 1))
        alive = set(members) - self._deployment.health.lost.keys()
        self._recovery = Recovery(
            self._next_number(),
            self._deployment.known_plan(),
            alive,
            self._deployment.ranks,
            self._timeouts,
            self._send,
            self._clock,
            reason,
            self._deployment.loans_to,
            self._deployment.lend,
        )
        logger.warning("KunServe: replicas %s recover: %s", sorted(alive), reason)
        self._recovery.start()
        self._after_event()

    def _follow_recovery(self, recovery: Recovery) -> None:
        if recovery.failed:
            for replica, reason in recovery.failed.items():
                self._end_replica(replica, reason)
            self._lose(recovery.failed)
        elif recovery.has_ended:
            self._recovery = None
            recovery.close()
            logger.warning("KunServe: %s", recovery.summary)
            self._deployment.set_recovered(recovery.members)
            for member in recovery.members:
                self._latecomers.forget(member)
            if self._command is None:
                self._deployment.take_up_facts()
            else:
                who = f"; replicas {list(recovery.members)} serve by themselves again" if recovery.members else ""
                self._finish(self._command, Verdict.FAILED, f"{recovery.reason}{who}")
            self._deployment.welcome(range(self._deployment.replicas))
            self._lend_to_newcomers()

    @property
    def _under_way(self) -> Transition | Recovery | None:
        return self._transition or self._recovery

    def _finish(self, command: RunningCommand, verdict: Verdict, message: str) -> None:
        self._command = None
        self._degrade_lost()
        self._deployment.take_up_facts()
        command.done(
            CommandAnswer(
                verdict,
                message,
                0 if self._deployment.plan is None else self._deployment.plan.epoch,
                seconds=self._clock() - command.started_s,
                pause_seconds=command.pause_s,
                freed_bytes=command.freed_bytes,
                extension_slots=command.extension_slots,
            )
        )
        self._lend_to_newcomers()
        while self._waiting and self._under_way is None:
            self._waiting.popleft()()
        if self._under_way is None:
            self._exchange_on()

    def _degrade_lost(self) -> None:
        """Degrades a replica that is lost; not before a way back has ended."""
        if self._transition is None:
            self._deployment.health.degrade_dependents(self._deployment.plan)

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
