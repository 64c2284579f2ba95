"""Which replicas stand still: they have work, and make no progress. Pure: time comes in as data.

Progress is a batch that has run. Time counts only while there is work, and from the last batch on, so a long prefill
is no stall as long as it is shorter than the limit, and an idle replica never is one. What comes and goes without a
batch, as requests whose clients have given up, is no progress.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kunserve_sgl.policy.demand import ReplicaLoad

# From there on it is said who waits for whom. A batch of others may take a while.
TELLING_S = 5.0


@dataclass(slots=True)
class _Replica:
    sent_requests: int = 0  # since the start
    load: ReplicaLoad | None = None
    since_s: float | None = None  # since when there has been work, and no batch; None while there is no work
    stood_s: float = 0.0  # with work and without a batch, before that
    waits_for: tuple[int, ...] = ()
    waits_since_s: float = 0.0
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
    """Told of what is sent to the replicas and of what they report."""

    def __init__(self, replicas: int, limit_s: float) -> None:
        self._replicas = [_Replica() for _ in range(replicas)]
        self._limit_s = limit_s

    # What it is told

    def on_sent(self, replica: int, now_s: float) -> None:
        """A request was sent there."""
        self._replicas[replica].sent_requests += 1
        self._follow(replica, now_s)

    def on_report(self, replica: int, load: ReplicaLoad, now_s: float) -> None:
        """Between two of its batches, or while it has nothing to run."""
        state = self._replicas[replica]
        batches = 0 if state.load is None else state.load.batches
        state.load, state.waits_for = load, ()
        if load.batches > batches:
            state.stood_s, state.since_s = 0.0, None
        self._follow(replica, now_s)

    def on_waiting(self, replica: int, hosts: Iterable[int], waited_s: float, now_s: float) -> None:
        """Its batch has been with these, one after the other, for so long. Until its next report."""
        state = self._replicas[replica]
        known = range(len(self._replicas))
        state.waits_for = tuple(host for host in hosts if host in known and host != replica)
        state.waits_since_s = now_s - max(0.0, waited_s)

    def on_lost(self, replica: int) -> None:
        """It has ended: that is no stall."""
        self._replicas[replica].is_lost = True

    # What it answers

    def stalled(self, now_s: float) -> dict[int, str]:
        """Why, for each replica that stands still, or that another one has been waiting for too long."""
        found = {}
        for replica, state in enumerate(self._replicas):
            if state.is_lost:
                continue
            stood_s, waiting = self._stood_s(state, now_s), self._waiting_for(replica, now_s, self._limit_s)
            if stood_s > self._limit_s:
                found[replica] = f"no batch has run for {stood_s:.0f} s, and requests stand{_clause(state, now_s)}"
            elif waiting:
                found[replica] = waiting
        return found

    def notes(self, now_s: float) -> Mapping[int, str]:
        """Who waits for whom, before that is a stall."""
        found = {}
        for replica, state in enumerate(self._replicas):
            if state.is_lost:
                continue
            if waiting := self._waiting_for(replica, now_s, TELLING_S):
                found[replica] = waiting
            elif state.waits_for and now_s - state.waits_since_s > TELLING_S:
                found[replica] = _clause(state, now_s).removeprefix("; ")
        return found

    def _waiting_for(self, replica: int, now_s: float, longer_than_s: float) -> str:
        """Who waits for this one, if it does not itself wait for others: then it can do nothing about it."""
        if self._replicas[replica].waits_for:
            return ""
        waiting = {
            other: now_s - state.waits_since_s
            for other, state in enumerate(self._replicas)
            if replica in state.waits_for and not state.is_lost and now_s - state.waits_since_s > longer_than_s
        }
        return ", ".join(
            f"replica {other} has waited for it for {waited_s:.0f} s" for other, waited_s in waiting.items()
        )

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


def _clause(state: _Replica, now_s: float) -> str:
    if not state.waits_for:
        return ""
    hosts = " and ".join(map(str, state.waits_for))
    return f"; its batch has been with replica {hosts} for {now_s - state.waits_since_s:.0f} s"
