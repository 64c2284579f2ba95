"""Which replica gets the next request: the one where it would wait least, for memory first and then for compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.demand import ReplicaLoad
from kunserve_sgl.policy.output_lengths import PRIOR_TOKENS

# How much of a merged replica's score is its own work; the rest is the mean of its group, whose members share their
# compute. Own work still counts: a request waits behind those of the same scheduler first.
_OWN_SHARE = 1 / 8


@dataclass(slots=True)
class _Replica:
    load: ReplicaLoad | None = None
    # Tokens of the requests that were sent to it and that `load` does not contain, in the order of sending.
    on_the_way: deque[int] = field(default_factory=deque)
    on_the_way_tokens: int = 0
    group: int = 0
    is_lost: bool = False
    is_stalled: bool = False

    @property
    def work_tokens(self) -> int:
        """Counts the tokens still to be computed: the rest of prompts, and answers."""
        load = self.load
        known = 0 if load is None else load.growth_tokens + load.queued_tokens + load.behind_tokens
        return known + self.on_the_way_tokens


@dataclass(slots=True)
class _Group:
    members: int  # that are left
    work_tokens: int
    is_moving: bool
    has_lost: bool
    has_stalled: bool


class Dispatcher:
    """Knows the newest report of each replica, and what was sent there since.

    Requests reach a replica in the order in which they were sent, and it counts those that it has received. So a
    report that counts n contains the first n that were sent to it, and no other.
    """

    def __init__(self, replicas: int) -> None:
        self._replicas = [_Replica() for _ in range(replicas)]
        self._groups: list[_Group] = []
        self._turn = 0
        self.set_groups([(replica,) for replica in range(replicas)], ())

    # What it is told

    def on_report(self, replica: int, load: ReplicaLoad) -> None:
        """Takes in a replica's report. One that counts less than an earlier one is older, and says nothing new."""
        state = self._replicas[replica]
        contained = load.received_requests - (0 if state.load is None else state.load.received_requests)
        if contained < 0:
            return
        before = state.work_tokens
        for _ in range(min(contained, len(state.on_the_way))):
            state.on_the_way_tokens -= state.on_the_way.popleft()
        state.load = load
        self._add_work(state, state.work_tokens - before)

    def record(self, replica: int, tokens: int) -> None:
        """Takes note that a request of `tokens`, see `tokens_of`, was sent to this replica, whoever chose it."""
        state = self._replicas[replica]
        state.on_the_way.append(tokens)
        state.on_the_way_tokens += tokens
        self._add_work(state, tokens)

    def on_lost(self, replica: int) -> None:
        """Takes note that a replica has ended: it is not picked until it is back."""
        state = self._replicas[replica]
        if not state.is_lost:
            group = self._groups[state.group]
            group.members -= 1
            group.work_tokens -= state.work_tokens
            group.has_lost = True
            state.is_lost = True

    def on_back(self, replica: int) -> None:
        """Takes note that a replica which had ended is there again: nothing has been sent to it yet."""
        number = self._replicas[replica].group
        self._replicas[replica] = _Replica(group=number)
        group = self._groups[number]
        group.members += 1
        group.has_lost = any(each.is_lost for each in self._replicas if each.group == number)

    def set_stalled(self, stalled: Collection[int]) -> None:
        """Says which replicas make no progress: they, and those that are merged with them, get nothing until they
        do."""
        for replica, state in enumerate(self._replicas):
            state.is_stalled = replica in stalled
        for number, group in enumerate(self._groups):
            group.has_stalled = any(each.is_stalled for each in self._replicas if each.group == number)

    def set_groups(self, groups: Iterable[Sequence[int]], moving: Collection[int]) -> None:
        """Says which replicas are merged, singles included, and which of all are in a transition."""
        self._groups = []
        for number, members in enumerate(groups):
            left = [member for member in members if not self._replicas[member].is_lost]
            for member in members:
                self._replicas[member].group = number
            self._groups.append(
                _Group(
                    members=len(left),
                    work_tokens=sum(self._replicas[member].work_tokens for member in left),
                    is_moving=any(member in moving for member in members),
                    has_lost=len(left) < len(members),
                    has_stalled=any(self._replicas[member].is_stalled for member in left),
                )
            )

    # What it answers

    def tokens_of(self, prompt_tokens: int, most_answer_tokens: int, goes_to_the_end: bool) -> int:
        """Estimates what a request needs: its prompt, and its answer. That is as long as it may be if nothing but the
        limit ends it, else as long as the replicas say that answers are on the average."""
        if not goes_to_the_end:
            means = [r.load.mean_answer_tokens for r in self._replicas if r.load is not None and not r.is_lost]
            known = [mean for mean in means if mean]
            most_answer_tokens = min(most_answer_tokens, round(sum(known) / len(known)) if known else PRIOR_TOKENS)
        return prompt_tokens + max(0, most_answer_tokens)

    def pick(self, tokens: int, among: Collection[int] | None = None) -> int:
        """Picks the replica for a request of `tokens`, `among` some or all, and books nothing: what is sent is to be
        told by `record`.

        In this order: not one whose group has lost a member, and may end for that; the least shortage of memory, as a
        share of the capacity; the least work; one that is not in a transition; the next in turn.

        Raises TransientError if all have ended, or stand still.
        """
        best: tuple[bool, float, float, bool] | None = None
        best_replica = 0
        count = len(self._replicas)
        for distance in range(count):
            replica = (self._turn + distance) % count
            state = self._replicas[replica]
            if state.is_lost or self._groups[state.group].has_stalled or (among is not None and replica not in among):
                continue
            score = self._score(state, tokens)
            if best is None or score < best:
                best, best_replica = score, replica
        if best is None:
            is_left = any(not state.is_lost for state in self._replicas)
            raise TransientError("no replica makes progress" if is_left else "all replicas have ended")
        self._turn = (best_replica + 1) % count
        return best_replica

    def on_the_way(self, replica: int) -> int:
        """Counts the requests that were sent to a replica and are in no report yet."""
        return len(self._replicas[replica].on_the_way)

    def work_tokens(self, replica: int) -> int:
        """Counts the tokens still to be computed of the requests that were sent to a replica."""
        return self._replicas[replica].work_tokens

    def _score(self, state: _Replica, tokens: int) -> tuple[bool, float, float, bool]:
        group, work = self._groups[state.group], state.work_tokens
        shortage = 0.0
        if (load := state.load) is not None:
            missing = load.used_tokens + work + tokens - load.capacity_tokens
            shortage = max(0, missing) / max(1, load.capacity_tokens)
        # For a single one both are the same number, exactly, so that ties stay ties.
        mean = group.work_tokens / group.members
        return group.has_lost, shortage, mean + _OWN_SHARE * (work - mean), group.is_moving

    def _add_work(self, state: _Replica, tokens: int) -> None:
        if not state.is_lost:
            self._groups[state.group].work_tokens += tokens
