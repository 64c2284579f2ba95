"""The resize of a replica's KV cache that the coordinator has ordered: by itself, outside any transition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kunserve_sgl.control.answers import CommandAnswer, Verdict
from kunserve_sgl.control.commands import Done
from kunserve_sgl.control.deployment import Deployment
from kunserve_sgl.control.messages import FromCoordinator, Resize, ResizeRefused
from kunserve_sgl.errors import TransientError


@dataclass(frozen=True, slots=True)
class _Ordered:
    replica: int
    number: int
    granules: int  # that it is to have then
    started_s: float
    done: Done


class Resizing:
    """Orders one resize at a time, and follows it until the replica has reported its new memory, has refused or ended,
    or `timeout_s` has passed."""

    def __init__(
        self,
        deployment: Deployment,
        timeout_s: float,
        send: Callable[[int, int, FromCoordinator], None],
        clock: Callable[[], float],
    ) -> None:
        self._deployment = deployment
        self._timeout_s = timeout_s
        self._send = send
        self._clock = clock
        self._ordered: _Ordered | None = None

    @property
    def deadline_s(self) -> float | None:
        """Says when `follow` has something to do; None while nothing is ordered."""
        return None if self._ordered is None else self._ordered.started_s + self._timeout_s

    def order(self, replica: int, tokens: int, number: int, done: Done) -> None:
        """Orders that `replica` gets so many slots of its own more out of free frames, or fewer where negative; they
        are whole granules. `done` gets the answer later. Raises TransientError where that is not possible now."""
        if self._ordered is not None:
            raise TransientError(f"the memory of replica {self._ordered.replica} is being resized")
        self._deployment.require_healthy([replica])
        if (plan := self._deployment.known_plan()).is_merged(replica):
            raise TransientError(f"replica {replica} shares memory with replicas {list(plan.group_of(replica))}")
        facts = self._deployment.facts[replica]
        granules = tokens // facts.granule_slots
        self._ordered = _Ordered(replica, number, facts.base_granules + granules, self._clock(), done)
        self._send(replica, 0, Resize(number, granules * sum(facts.granule_frames)))

    def lowered(self, capacities: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the KV slots of each replica without those that it has been ordered to give up."""
        if (ordered := self._ordered) is None:
            return capacities
        facts = self._deployment.facts[ordered.replica]
        less = max(0, facts.base_granules - ordered.granules) * facts.granule_slots
        return tuple(slots - less * (replica == ordered.replica) for replica, slots in enumerate(capacities))

    def on_refused(self, message: ResizeRefused) -> None:
        """Takes in that a replica could not; of an earlier order that is nothing new."""
        if self._ordered is not None and (self._ordered.replica, self._ordered.number) == (
            message.replica,
            message.number,
        ):
            self._end(self._ordered, Verdict.CONFLICT, message.reason)

    def follow(self) -> None:
        """Ends what has come to its end. To be called at `deadline_s`, and when a replica has reported or ended."""
        ordered = self._ordered
        if ordered is None:
            return
        replica = ordered.replica
        if replica in self._deployment.health.lost:
            self._end(ordered, Verdict.FAILED, self._deployment.health.lost[replica])
        elif self._deployment.facts[replica].base_granules == ordered.granules:
            self._end(ordered, Verdict.DONE, f"the KV cache of replica {replica} has {ordered.granules} granules")
        elif self._clock() >= ordered.started_s + self._timeout_s:
            self._end(ordered, Verdict.FAILED, f"replica {replica} has not resized within {self._timeout_s:g} s")

    def _end(self, ordered: _Ordered, verdict: Verdict, message: str) -> None:
        self._ordered = None
        epoch = self._deployment.known_plan().epoch
        ordered.done(CommandAnswer(verdict, message, epoch, seconds=self._clock() - ordered.started_s))
