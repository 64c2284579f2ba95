"""The controller when a replica ends or makes no progress: who gets requests then, what happens to those that it had,
and who is ended with it. What comes back afterwards is in `coming_back.py`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sglang.srt.managers.io_struct import sock_send
from typing_extensions import override

from kunserve_sgl.control.addresses import begun_requests_path
from kunserve_sgl.control.begun_requests import begun_of
from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.exits import EXIT_DEADLINE_S, await_exits
from kunserve_sgl.integration.attach import last_words
from kunserve_sgl.integration.controller.actor_process import how_ended, is_far
from kunserve_sgl.integration.controller.coming_back import ComingBack
from kunserve_sgl.integration.controller.open_requests import OpenRequests
from kunserve_sgl.integration.messages import ReplicasAlive, RequestsLost

logger = logging.getLogger(__name__)


class Losses(ComingBack):
    """Knows which replicas are lost or stand still. The rest of what it uses is made by who inherits."""

    _open: OpenRequests
    _stalled: set[int]
    _seen_ended: list[Any]

    def _follow_stalls(self) -> None:
        """Keeps who makes no progress from requests, by whatever method, and from new transitions."""
        self._give_up_far()
        now_s = self._clock()
        stalled = {**self._stalls.stalled(now_s), **self._leaving()}
        self._coordinator.set_stalled(stalled, self._stalls.notes(now_s))
        self._end_stalled(now_s)
        blocked = {member for replica in stalled for member in self._coordinator.dependent_on(replica)}
        if (self._stalled, self._blocked) == (set(stalled), blocked):
            return
        for replica in sorted(stalled.keys() - self._stalled):
            logger.error("KunServe: replica %d makes no progress and gets no requests: %s", replica, stalled[replica])
        for replica in sorted(self._stalled - stalled.keys()):
            if not self._coordinator.is_lost(replica):
                logger.warning("KunServe: replica %d makes progress again", replica)
        self._stalled, self._blocked = set(stalled), blocked
        for replica in self._active_workers:
            self.status[replica] = replica not in blocked  # SGLang's methods look there
        self.dp_budget.set_stalled(blocked)
        if self._by_need is not None:
            self._by_need.dispatcher.set_stalled(stalled)

    def _end_stalled(self, now_s: float) -> None:
        """Ends those who stand still while others depend on them, so that the others can recover: one that woke up then
        would go on with memory that is not its any more."""
        blamed = {
            replica: f"others depend on it, and it made no progress: {reason}"
            for replica, reason in self._stalls.to_blame(now_s).items()
            if len(self._coordinator.dependent_on(replica)) > 1 and not self._coordinator.is_lost(replica)
        }
        if blamed:
            self._end_replicas(blamed)

    def _leaving(self) -> dict[int, str]:
        """Says why, for each replica that is about to be lost and is waited for."""
        ended = {who[0] for process in self._seen_ended if (who := self._rank_of(process)) is not None}
        why = {**dict.fromkeys(ended, "a rank of it has ended"), **self._why_ended}
        return {
            replica: f"it is being ended: {why[replica]}"
            for replica in self._active_workers
            if replica in why and self._is_waited_for(replica)
        }

    def _on_processes_ended(self, processes: Sequence[Any]) -> None:
        """Goes on without processes that were seen to have ended. What is to be gone before is waited for once."""
        serving, others = set[int](), []
        for process in processes:
            who = self._rank_of(process)
            if who is None or self._restarts.rank_of(process) is not None:
                others.append(process)
            else:
                serving.add(who[0])
        # The other ranks of a replica cannot go on; they would fail in a collective, and end the whole server. They are
        # gone before those recover whose memory they have mapped.
        self._kill(serving)
        # A process closes its files a moment before its exit code is there. Nobody has to recover from the end of
        # these, so one that is not gone in time ends nobody else.
        await_exits(others)
        self._seen_ended += processes
        self._go_on_without()

    def _go_on_without(self) -> None:
        """Goes on without processes that have been seen to have ended, but for those whose replica is waited for."""
        seen, self._seen_ended = self._seen_ended, []
        for process in seen:
            who = None if self._restarts.rank_of(process) is not None else self._rank_of(process)
            if who is not None and self._is_waited_for(who[0]):
                self._ended.add(process)
                self._seen_ended.append(process)
            else:
                self._on_process_ended(process)

    def _is_waited_for(self, replica: int) -> bool:
        """Tells whether processes of a replica that are on another machine may be there yet, and memory of one that
        lives, and is about to use it otherwise, be mapped in them. They have been told to end; others on that machine
        that have been too are not waited for: nobody may be able to reach it."""
        if not any(is_far(process) and process.is_alive() for process in self._processes_of(replica)):
            return False
        members = set(self._coordinator.dependent_on(replica))
        if replica in self._coordinator.moving:  # who recovers has left the plan that they had
            members.update(self._coordinator.moving)
        living = members.intersection(self._active_workers) - {replica, *self._why_ended}
        maps = self._coordinator.maps
        return bool(maps) and any(maps[replica][other] for other in living)

    def _on_process_ended(self, process: Any) -> None:
        starting = self._restarts.rank_of(process)
        who = starting or self._rank_of(process)
        if who is None:
            # It ended before it could report. Without its number nobody else can be kept from waiting for it.
            raise TransientError(f"scheduler process {process.pid} {how_ended(process)}")
        if self._cluster is not None and self._cluster.is_lost:
            raise TransientError(f"the node of Ray that this server is on has ended; {how_ended(process)}")
        replica, rank = who
        words = last_words.words_of(self.server_args.kunserve_directory, last_words.scheduler_name(replica, rank))
        words = words or self._why_ended.pop(replica, None)
        how = how_ended(process) + ("" if words is None else f": {words}")
        end = f"replica {replica} rank {rank} {how}"
        if starting is not None:
            self._restarts.on_start_ended(process, end)
            return
        self._ended.add(process)
        self._lose(replica, rank, how)

    def _lose(self, replica: int, rank: int, how: str) -> None:
        """Goes on without a replica, a rank of which has ended or is given up as `how` says."""
        end = f"replica {replica} rank {rank} {how}"
        self._ends.append(end)
        is_first = replica in self._active_workers  # of its ranks
        self._stop_dispatch_to(replica)
        self._stalls.on_lost(replica, self._clock())
        self._autopilot.on_lost(replica)
        if is_first:
            self._expect(replica, self._restarts.incarnation(replica) + 1)
            self._restarts.on_lost(replica, end)
        self._coordinator.on_member_lost(replica, rank, how)
        self._follow_stalls()  # who waited for it may get requests again, of those that it had too
        sock_send(self._send_to_tokenizer, ReplicasAlive(alive=self._active_workers))
        self._tell_of_lost_requests(replica, f"replica {replica} has ended")
        self._require_somebody()

    def _tell_of_lost_requests(self, replica: int, reason: str) -> None:
        """Lets the HTTP server send on what a replica had that has ended, or answer it. What it answered before may
        still be on its way there; it tells that from answers of others. With which requests a replica on another
        machine had begun is known when all of its processes have ended."""
        can_go_on = bool(self._active_workers) or self._restarts.is_any_coming_back
        if can_go_on and any(is_far(each) and each not in self._ended for each in self._processes_of(replica)):
            return
        names = self._open.take_lost(replica)
        if not can_go_on:
            reason += ", the last one"
        if names:
            path = begun_requests_path(self.server_args, replica, self._restarts.incarnation(replica))
            lost = RequestsLost(names=names, begun=begun_of(path, names), reason=reason, can_go_on=can_go_on)
            sock_send(self._send_to_tokenizer, lost)

    def _end_replicas(self, reasons: Mapping[int, str]) -> Collection[int]:
        """Ends replicas that do not do what the coordinator orders, each for its reason. What follows comes when their
        processes are found to have ended; of those on other machines at once, unless they are waited for. Returns those
        that are not."""
        self._why_ended.update(reasons)
        self._kill(reasons)
        return [replica for replica in reasons if not self._is_waited_for(replica)]

    def _give_up_far(self) -> None:
        """Goes on without those on other machines that were told to end. They may not be reached, and then it is known
        late whether they have ended. Those who recover from that have nothing mapped there, or they are waited for."""
        self._go_on_without()
        for replica in sorted(self._why_ended):
            is_there = replica in self._active_workers  # a loss leads here, too
            is_given_up = any(map(is_far, self._processes_of(replica))) and not self._is_waited_for(replica)
            if is_there and is_given_up:
                self._lose(replica, 0, f"is given up: {self._why_ended[replica]}")

    def _kill(self, replicas: Collection[int]) -> None:
        """Kills what is left of replicas, also where they are stopped, and waits until all of it is gone; not on other
        machines, as the network must not keep the controller: see `_is_waited_for`. A replica is not started again
        before."""
        processes = [each for replica in sorted(replicas) for each in self._processes_of(replica)]
        for process in processes:
            if process.is_alive():
                process.kill()
        if left := await_exits([each for each in processes if not is_far(each)]):
            pids = ", ".join(str(each.pid) for each in left)
            of = sorted(replicas)
            raise InvariantError(f"processes of replicas {of} are not gone within {EXIT_DEADLINE_S:g} s: {pids}")

    def _stop_dispatch_to(self, replica: int) -> None:
        """Lets new requests and control messages go to the other replicas."""
        if replica not in self._active_workers:
            return
        self.status[replica] = False
        self.dp_active[replica] = False
        self._refresh_active_workers()
        self.round_robin_counter = 0
        self.dp_budget.exclude(replica)
        if self._by_need is not None:
            self._by_need.dispatcher.on_lost(replica)
        if self._active_workers:
            logger.error("KunServe: serving goes on with replicas %s", self._active_workers)

    @override
    def _refresh_active_workers(self) -> None:
        """Counts replicas that stand still as active: they are there, and come back by themselves."""
        self._active_workers = [replica for replica, is_active in enumerate(self.dp_active) if is_active]
        self._active_count_cache = len(self._active_workers)
