"""Replicas that have ended and are started again, one try after the other, while the controller serves.

A try waits until every process of the one before has ended: what had been given up as dead is killed, so that it cannot
wake. Then the processes are started, report that they are ready, and the coordinator takes the replica back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kunserve_sgl.errors import TransientError
from kunserve_sgl.integration.controller.replica_start import ReplicaStart
from kunserve_sgl.policy.restarts import RestartHistory

logger = logging.getLogger(__name__)

# For the processes of a replica to be ready, as a multiple of what the first start took: the model may have to come
# from a disk again that was cached then, and the machine serves meanwhile.
START_FACTOR = 5.0
LEAST_START_DEADLINE_S = 300.0


class Home(Protocol):
    """Is the controller, as far as a restart needs it."""

    def has_living(self, replica: int) -> bool:
        """Tells whether a process that served for `replica` has not ended yet."""

    def start(self, replica: int, incarnation: int, from_others: bool) -> ReplicaStart:
        """Starts the processes of `replica`, all of which have ended. With `from_others` it is to take its layers from
        whoever has them. Raises OSError, TransientError."""

    def take_back(self, start: ReplicaStart) -> bool:
        """Takes a replica that is ready up again. Returns False where that is not possible yet. Raises TransientError
        for one that never can be."""

    def say(self, replica: int, what: str, is_for_good: bool) -> None:
        """Lets people know how it stands with a replica that has ended; `is_for_good` where it will not come back."""


@dataclass(slots=True)
class _Replica:
    history: RestartHistory
    incarnation: int = 0
    due_s: float | None = None  # when to start it
    start: ReplicaStart | None = None
    deadline_s: float = math.inf  # of the start
    waits_for: str | None = None  # what keeps it from being started, which has no deadline
    failed: str = ""  # why the start is given up, whose processes have not all ended yet
    is_refused: bool = False  # and will be the next time
    has_failed: bool = False  # since it served: what is tried next is to need nobody
    started: int = 0  # again, since the server runs


class Restarts:
    """Keeps book of all replicas. `most_tries` and `longest_pause_s` are as in `RestartHistory`; with 0 tries nobody is
    started again."""

    def __init__(
        self,
        home: Home,
        replicas: int,
        most_tries: int,
        longest_pause_s: float,
        first_start_s: float,
        clock: Callable[[], float],
    ) -> None:
        """`first_start_s` is what the start of the server took."""
        self._home = home
        self._clock = clock
        self._is_on = most_tries > 0
        self._most_tries = most_tries
        self._longest_s = max(LEAST_START_DEADLINE_S, START_FACTOR * first_start_s)
        self._replicas = [_Replica(RestartHistory(most_tries, longest_pause_s)) for _ in range(replicas)]

    # What it is told

    def on_lost(self, replica: int, how: str) -> None:
        """Takes note that a replica which served has ended."""
        if self._is_on:
            self._end(replica, how)

    def on_start_ended(self, process: Any, how: str) -> None:
        """Takes note that a process of a start has ended."""
        for replica, each in enumerate(self._replicas):
            if each.start is not None and each.start.rank_of(process) is not None:
                each.start.living.remove(process)
                self._fail(replica, how)

    def on_files(self, ready: Collection[int]) -> None:
        """Reads what has come from processes that are being started."""
        for replica, each in enumerate(self._replicas):
            start = each.start
            for file in () if start is None else [file for file in start.files if file in ready]:
                try:
                    start.read(file)  # type: ignore[union-attr]
                except TransientError as error:
                    self._fail(replica, str(error))

    def on_tick(self) -> None:
        """Does what is due. It is called whenever the controller wakes up."""
        now_s = self._clock()
        for replica, each in enumerate(self._replicas):
            if each.start is not None:
                self._go_on(replica, each, each.start, now_s)
            elif each.due_s is not None and now_s >= each.due_s and not self._home.has_living(replica):
                self._start(replica, each, now_s)

    # What it answers

    @property
    def files(self) -> Sequence[int]:
        """Lists the files to wait for."""
        return [file for each in self._replicas if each.start is not None for file in each.start.files]

    @property
    def processes(self) -> Sequence[Any]:
        """Lists the processes that are being started, without those whose end was told."""
        return [process for each in self._replicas if each.start is not None for process in each.start.living]

    def next_deadline_s(self) -> float | None:
        """Says when `on_tick` has something to do; None while it has not, and what it waits for is told otherwise."""
        now_s = self._clock()
        due = [each.due_s for each in self._replicas if each.due_s is not None]
        ends = [each.deadline_s for each in self._replicas if each.start is not None and not each.failed]
        return min((at_s for at_s in (*due, *ends) if now_s < at_s < math.inf), default=None)

    def is_coming_back(self, replica: int) -> bool:
        """Tells whether `replica` has ended, and is to be started again."""
        each = self._replicas[replica]
        return each.due_s is not None or each.start is not None

    @property
    def is_any_coming_back(self) -> bool:
        """Tells whether somebody is coming back."""
        return any(map(self.is_coming_back, range(len(self._replicas))))

    def rank_of(self, process: Any) -> tuple[int, int] | None:
        """Returns (replica, rank) of a process that is being started; None for others."""
        for replica, each in enumerate(self._replicas):
            if each.start is not None and (rank := each.start.rank_of(process)) is not None:
                return replica, rank
        return None

    def incarnation(self, replica: int) -> int:
        """Returns the number of the incarnation that is, was last, or is being started."""
        return self._replicas[replica].incarnation

    def status(self) -> dict[int, int]:
        """Returns how often each replica has been started again since the server runs."""
        return {replica: each.started for replica, each in enumerate(self._replicas)}

    # One try

    def _start(self, replica: int, each: _Replica, now_s: float) -> None:
        each.due_s = None
        each.incarnation += 1
        self._home.say(replica, self._told(each, "it is being started again"), False)
        try:
            each.start = self._home.start(replica, each.incarnation, from_others=not each.has_failed)
        except (OSError, TransientError) as error:
            each.has_failed = True
            self._end(replica, f"it could not be started: {error}")
            return
        each.started += 1
        each.waits_for = None
        each.deadline_s = now_s + self._longest_s

    def _go_on(self, replica: int, each: _Replica, start: ReplicaStart, now_s: float) -> None:
        if each.failed:
            self._clean_up(replica, each, start)
        elif start.is_ready:
            each.deadline_s = math.inf
            try:
                if not self._home.take_back(start):
                    return
            except TransientError as error:
                each.is_refused = True
                self._fail(replica, str(error))
                return
            each.start, each.has_failed = None, False
            each.history.on_serving(now_s)
        elif start.waits_for != each.waits_for:
            each.waits_for = start.waits_for
            each.deadline_s = now_s + self._longest_s if each.waits_for is None else math.inf
            what = "it is being started again" if each.waits_for is None else each.waits_for
            self._home.say(replica, self._told(each, what), False)
        elif now_s >= each.deadline_s:
            self._fail(replica, f"it was not ready within {self._longest_s:.0f} s")

    def _fail(self, replica: int, reason: str) -> None:
        each = self._replicas[replica]
        assert each.start is not None
        each.failed = each.failed or reason
        each.start.kill()
        self._clean_up(replica, each, each.start)

    def _clean_up(self, replica: int, each: _Replica, start: ReplicaStart) -> None:
        """Ends a start that has failed, once all of its processes have."""
        if start.living:
            return
        start.close()
        reason, each.start, each.failed = each.failed, None, ""
        each.has_failed |= not start.has_lost_node
        self._end(replica, reason, start.has_lost_node)

    def _end(self, replica: int, how: str, has_lost_node: bool = False) -> None:
        each, now_s = self._replicas[replica], self._clock()
        each.due_s = each.history.on_node_lost(how, now_s) if has_lost_node else each.history.on_ended(how, now_s)
        if each.is_refused:
            each.due_s = None
            self._home.say(replica, f"given up: {how}", True)
        elif each.due_s is None:
            self._home.say(replica, each.history.why_given_up(now_s), True)
        else:
            self._home.say(replica, self._told(each, f"it is started again in {each.due_s - now_s:g} s"), False)

    def _told(self, each: _Replica, what: str) -> str:
        return f"{each.history.last}; {what}, try {each.history.ends} of {self._most_tries}"
