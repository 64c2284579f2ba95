"""Which replicas a transition may concern: what has happened to each, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.plan import Plan


class Health:
    """Knows what has happened to each replica. One is lost when one of its processes has ended, and restarting if it is
    to be started again; degraded when it cannot change any more because of a failure, stalled while it has work and
    makes no progress. A lost replica stays so until it is back, and a degraded one until it has recovered."""

    def __init__(self) -> None:
        self.lost: dict[int, str] = {}
        self.restarting: dict[int, str] = {}  # how that stands, in words
        self.degraded: dict[int, str] = {}
        self.stalled: Mapping[int, str] = {}
        self._notes: Mapping[int, str] = {}

    @property
    def unavailable(self) -> set[int]:
        """Lists the replicas that no new transition may concern."""
        return {*self.lost, *self.degraded, *self.stalled}

    @property
    def reasons(self) -> dict[int, str]:
        """Says what is to be said of some replicas in the status, the worst of each."""
        return {**self._notes, **self.stalled, **self.degraded, **self.restarting}

    def set_stalled(self, stalled: Mapping[int, str], notes: Mapping[int, str]) -> None:
        """Takes what is known of progress now: who makes none, and what else is to be said of some."""
        self.stalled, self._notes = stalled, notes

    def degrade(self, members: Iterable[int], reason: str) -> None:
        """Notes why these cannot change any more; the first reason stays."""
        for member in members:
            self.degraded.setdefault(member, reason)

    def mend(self, members: Iterable[int]) -> None:
        """Notes that these are replicas by themselves again, whatever happened to their group."""
        for member in members:
            self.degraded.pop(member, None)

    def set_restarting(self, replica: int, how: str) -> None:
        """Takes note that `replica`, which has ended or is about to be seen to have, is to be started again."""
        self.restarting[replica] = how
        self.degraded.pop(replica, None)

    def give_up(self, replica: int, reason: str) -> None:
        """Takes note that a lost replica is not started again."""
        self.restarting.pop(replica, None)
        self.degraded[replica] = reason

    def on_back(self, replica: int) -> None:
        """Takes note that a lost replica is there again, as it was at the start."""
        for what in (self.lost, self.restarting, self.degraded):
            what.pop(replica, None)

    def degrade_dependents(self, plan: Plan | None) -> None:
        """Notes that those who are merged with a lost replica by `plan` cannot change any more."""
        for replica, reason in self.lost.items():
            group = (replica,) if plan is None else plan.group_of(replica)
            self.degrade((member for member in group if member not in self.restarting), reason)

    def require(self, members: Iterable[int]) -> None:
        """Raises TransientError where a transition may not concern one of `members`."""
        for member in members:
            if member in self.restarting:
                raise TransientError(f"replica {member} is restarting: {self.restarting[member]}")
            if member in self.degraded:
                raise TransientError(f"replica {member} is degraded: {self.degraded[member]}")
            if member in self.stalled:
                raise TransientError(f"replica {member} makes no progress: {self.stalled[member]}")
