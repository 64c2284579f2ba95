"""What is under way in a deployment, one thing at a time: a transition, by itself or as a part of a command, the next
move of an exchange, or a recovery; and what each leads to when it has ended. `coordinator.py` says what begins."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from kunserve_sgl.args import Activations, Exchange, RemoteAttentionBy
from kunserve_sgl.control.answers import CommandAnswer, State, Verdict
from kunserve_sgl.control.commands import Leg, Merge, RunningCommand
from kunserve_sgl.control.deployment import Deployment
from kunserve_sgl.control.exchanging import BackgroundExchange
from kunserve_sgl.control.latecomers import Latecomers
from kunserve_sgl.control.messages import FromCoordinator, HostFailed
from kunserve_sgl.control.recovery import Recovery, left_behind_by, recovered_plan
from kunserve_sgl.control.resizing import Resizing
from kunserve_sgl.control.restoring import next_leg
from kunserve_sgl.control.transition import End, Timeouts, Transition, members_of
from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import PlanCost, plan_cost
from kunserve_sgl.policy.plan import Plan

logger = logging.getLogger(__name__)


class Leading:
    """Follows what is under way until the deployment has a plan again that holds."""

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
        end_replicas: Callable[[Mapping[int, str]], Collection[int]] = lambda reasons: reasons.keys(),
        exchange: Exchange = Exchange.OFF,
        way: RemoteAttentionBy = RemoteAttentionBy.MAP,
        stay_s: float = 0.0,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """`activations` and `exchange` are as the flags say, `model` is what people call the model. `way` is as in
        `Deployment`. `end_replicas(reasons)` ends all processes of replicas that do not do what they have to, each for
        its reason, and returns those that are gone, or are being ended on a machine where they have mapped memory of
        nobody who lives; `on_member_lost` tells of the others when they are gone. `on_broken` is told that a merge ends
        because a layer host could not execute a batch."""
        self._on_broken = on_broken
        self._on_transition = on_transition  # told of every transition that has ended
        self._end_replicas = end_replicas
        self._deployment = Deployment(replicas, ranks, send, activations, model, way)
        self._timeouts = timeouts
        self._send = send
        self._clock = clock
        self._exchange = BackgroundExchange(exchange, ranks, clock, stay_s, self._deployment.ways.maps)
        self._waiting: deque[Callable[[], None]] = deque()  # commands that go before an exchange which is being left
        self._command: RunningCommand | None = None
        self._transition: Transition | None = None
        self._recovery: Recovery | None = None  # never while a transition runs
        self._latecomers = Latecomers()
        self._resizing = Resizing(self._deployment, timeouts.phase_s, send, clock)
        self._transitions = 0

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
            # Memory by message has its links measured by itself, when nothing else runs. What is read beside batches
            # is slower.
            mapped = {pair: each for pair, each in transition.reads.items() if self._deployment.ways.maps(*pair)}
            if mapped:
                self._deployment.add_reads({pair: each.borrowed for pair, each in mapped.items()})
            is_drop = command.state is State.DROPPING
            self._exchange.on_end(transition, self._deployment.facts, is_drop, command.is_interrupted)
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
            gone = self._end_replicas(recovery.failed)
            if gone:
                self._lose({replica: recovery.failed[replica] for replica in gone})
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

    # Who is there

    def _lend_to_newcomers(self) -> None:
        if self._under_way is None:
            self._deployment.lend_to_newcomers(self._next_number)

    def _next_number(self) -> int:
        self._transitions += 1
        return self._transitions

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
