"""Which replicas stand still: they have work, and make no progress. Pure: time comes in as data.

Progress is a batch that has run. Time counts only while there is work, and from the last batch on, so a long prefill
is no stall as long as it is shorter than the limit, and an idle replica never is one. What comes and goes without a
batch, as requests whose clients have given up, is no progress.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kunserve_sgl.policy.demand import ReplicaLoad

# From there on it is said who waits for whom. A batch of others may take a while.
TELLING_S = 5.0
# Who waits says so every second; not for so long means that it waits no more, or says nothing at all any more.
_BELIEVED_S = 10.0


@dataclass(slots=True)
class _Replica:
    sent_requests: int = 0  # since its start
    load: ReplicaLoad | None = None
    since_s: float | None = None  # since when there has been work, and no batch; None while there is no work
    stood_s: float = 0.0  # with work and without a batch, before that
    waits_for: tuple[int, ...] = ()
    waits_since_s: float = 0.0
    told_s: float = 0.0  # when it was last said
    heard_s: float = -math.inf  # when it last said anything
    is_lost: bool = False

    @property
    def has_work(self) -> bool:
        load = self.load
        if load is None:
            return self.sent_requests > 0
        if load.is_paused:  # somebody wants it to stand
            return False
        is_known = load.running_requests + load.queued_requests + load.behind_tokens > 0
        return is_known or self.sent_requests > load.received_requests


class StallWatch:
    """Finds out who stands still from what is sent to the replicas and from what they report."""

    def __init__(self, replicas: int, limit_s: float) -> None:
        self._replicas = [_Replica() for _ in range(replicas)]
        self._limit_s = limit_s

    # What it is told

    def on_sent(self, replica: int, now_s: float) -> None:
        """Takes note that a request was sent to `replica`."""
        self._replicas[replica].sent_requests += 1
        self._follow(replica, now_s)

    def on_report(self, replica: int, load: ReplicaLoad, now_s: float) -> None:
        """Takes in a replica's report. It comes between two of its batches, or while it has nothing to run."""
        state = self._replicas[replica]
        batches = 0 if state.load is None else state.load.batches
        state.load, state.waits_for, state.heard_s = load, (), now_s
        if load.batches > batches:
            state.stood_s, state.since_s = 0.0, None
        self._follow(replica, now_s)

    def on_waiting(self, replica: int, hosts: Iterable[int], waited_s: float, now_s: float) -> None:
        """Takes note that a batch of `replica` has been with these layer hosts, one after the other, for `waited_s`. It
        is to be told again as long as it is so."""
        state = self._replicas[replica]
        known = range(len(self._replicas))
        state.waits_for = tuple(host for host in hosts if host in known and host != replica)
        state.waits_since_s, state.told_s = now_s - max(0.0, waited_s), now_s
        state.heard_s = now_s

    def on_lost(self, replica: int, now_s: float) -> None:
        """Takes note that a replica has ended: that is no stall, and who waited for others begins anew, because it may
        have been the reason."""
        self._replicas[replica].is_lost = True
        for state in self._replicas:
            if state.waits_for:
                state.waits_for, state.stood_s = (), 0.0
                state.since_s = None if state.since_s is None else now_s

    def on_back(self, replica: int) -> None:
        """Takes note that a replica has been started again: it begins anew."""
        self._replicas[replica] = _Replica()

    # What it answers

    def sent_requests(self, replica: int) -> int:
        """Counts the requests that were sent to `replica` since its start."""
        return self._replicas[replica].sent_requests

    def stalled(self, now_s: float) -> dict[int, str]:
        """Says why, for each replica that stands still, or that another one has been waiting for too long."""
        found = self._waited_for(now_s, self._limit_s)
        for replica, state in enumerate(self._replicas):
            stood_s = self._stood_s(state, now_s)
            if stood_s > self._limit_s and not state.is_lost:
                waits = f"; {_waits(state, now_s)}" if self._is_waiting(state, now_s) else ""
                found[replica] = f"no batch has run for {stood_s:.0f} s, and requests stand{waits}"
        return found

    def to_blame(self, now_s: float) -> dict[int, str]:
        """Says why, for each replica that stands still by its own fault: others wait for it, it takes nothing in, or
        what it runs does not go on although it waits for nobody, or for such only as stand still no more: then one of
        its own ranks may. A queue that stands may do so for want of memory."""
        found = self._waited_for(now_s, self._limit_s)
        for replica, state in enumerate(self._replicas):
            # One that has just woken up has time to give the batch back.
            is_late = self._is_waiting(state, now_s) and now_s - state.waits_since_s > 1.5 * self._limit_s
            if is_late and not any(self._may_have(host, self._limit_s, now_s) for host in state.waits_for):
                found[replica] = f"{_waits(state, now_s)}, and nobody else stands still"
        for replica, why in self.stalled(now_s).items():
            state = self._replicas[replica]
            takes_in = state.load is not None and state.sent_requests <= state.load.received_requests
            runs = state.load is not None and state.load.running_requests > 0
            if not self._is_waiting(state, now_s) and (runs or not takes_in):
                found[replica] = why
        return found

    def notes(self, now_s: float) -> Mapping[int, str]:
        """Says who waits for whom, before that is a stall."""
        waiting = {
            replica: _waits(state, now_s)
            for replica, state in enumerate(self._replicas)
            if self._is_waiting(state, now_s) and now_s - state.waits_since_s > TELLING_S
        }
        return {**self._waited_for(now_s, TELLING_S), **waiting}

    def _is_waiting(self, state: _Replica, now_s: float) -> bool:
        return bool(state.waits_for) and not state.is_lost and now_s - state.told_s <= _BELIEVED_S

    def _waited_for(self, now_s: float, longer_than_s: float) -> dict[int, str]:
        """Says of each replica who waits for it, but for those that wait themselves: they can do nothing about it. A
        batch is with one of its layer hosts, and nobody knows with which: one that has said something for half as long
        stands still no more."""
        found: dict[int, str] = {}
        for other, state in enumerate(self._replicas):
            waited_s = now_s - state.waits_since_s
            if not self._is_waiting(state, now_s) or waited_s <= longer_than_s:
                continue
            for host in state.waits_for:
                if self._may_have(host, longer_than_s, now_s) and not self._is_waiting(self._replicas[host], now_s):
                    before = f"{found[host]}, " if host in found else ""
                    found[host] = f"{before}replica {other} has waited for it for {waited_s:.0f} s"
        return found

    def _may_have(self, host: int, longer_than_s: float, now_s: float) -> bool:
        """Tells whether a batch that is away for longer than that may be stuck at `host`, or behind it."""
        state = self._replicas[host]
        is_silent = now_s - state.heard_s > longer_than_s / 2
        return not state.is_lost and (is_silent or self._is_waiting(state, now_s))

    def _follow(self, replica: int, now_s: float) -> None:
        state = self._replicas[replica]
        if state.has_work:
            if state.since_s is None:
                state.since_s = now_s
        elif state.since_s is not None:
            # Who stood still and has no work left may try again.
            stood_s = self._stood_s(state, now_s)
            state.stood_s = 0.0 if stood_s > self._limit_s else stood_s
            state.since_s = None

    def _stood_s(self, state: _Replica, now_s: float) -> float:
        return 0.0 if state.since_s is None else state.stood_s + now_s - state.since_s


def _waits(state: _Replica, now_s: float) -> str:
    hosts = " and ".join(map(str, state.waits_for))
    return f"its batch has been with replica {hosts} for {now_s - state.waits_since_s:.0f} s"
