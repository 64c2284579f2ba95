"""Who has reported for duty, and what their facts say together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from kunserve_sgl.control.messages import Device, Hello
from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.plan import ReplicaFacts


class Roster:
    """Keeps the latest report of every rank of every replica."""

    def __init__(self, replicas: int, ranks: int) -> None:
        self._replicas = replicas
        self._ranks = ranks
        self._reports: dict[tuple[int, int], Hello] = {}
        self._first_checksums: dict[tuple[int, int], tuple[str, ...]] = {}
        self._first_rests: dict[tuple[int, int], str] = {}
        self._links: dict[tuple[int, int, int], float] = {}  # by replica, rank and peer
        self._returning: dict[tuple[int, int], Hello] = {}  # of replicas that were started again, not taken back yet

    def add(self, hello: Hello) -> bool:
        """Takes in a report; returns whether it says anything new. Raises ValueError for a rank that there is not."""
        if not (0 <= hello.replica < self._replicas and 0 <= hello.rank < self._ranks):
            raise ValueError(f"a report of replica {hello.replica} rank {hello.rank}, which is not of this deployment")
        known = self._reports.get((hello.replica, hello.rank))
        self._first_checksums.setdefault((hello.replica, hello.rank), hello.checksums)
        self._first_rests.setdefault((hello.replica, hello.rank), hello.rest_checksum)
        self._reports[hello.replica, hello.rank] = hello
        return hello != known

    def map_each_other(self, one: int, other: int) -> bool:
        """Tells whether the ranks of two replicas can map each other's memory, as they have reported."""
        return self.reaches(one, self.devices(other))

    def reaches(self, owner: int, devices: Sequence[Device]) -> bool:
        """Tells whether ranks that have these `devices` and those of `owner` can map each other's memory."""
        return all(mine.maps(theirs) for mine, theirs in zip(self.devices(owner), devices, strict=True))

    def devices(self, replica: int) -> list[Device]:
        """Returns where memory of the ranks of a replica is, which have reported."""
        return [self._reports[replica, rank].device for rank in range(self._ranks)]

    def are_apart(self, members: Collection[int]) -> bool:
        """Tells whether the same rank of some of `members` is on another GPU, as far as they have reported."""
        reports = self._reports
        return any(
            len({reports[m, rank].device.gpu for m in members if (m, rank) in reports}) > 1
            for rank in range(self._ranks)
        )

    # Replicas that come back

    def add_returning(self, hello: Hello) -> None:
        """Takes in a report of a replica that was started again. Nothing else changes before `take_back`."""
        self._returning[hello.replica, hello.rank] = hello

    def forget_returning(self, replica: int) -> None:
        """Forgets what a replica has reported that was not taken back."""
        for rank in range(self._ranks):
            self._returning.pop((replica, rank), None)

    def has_returned(self, replica: int) -> bool:
        """Tells whether all ranks of a replica that was started again have reported."""
        return all((replica, rank) in self._returning for rank in range(self._ranks))

    def has_new_parameters(self, replica: int) -> bool:
        """Tells whether a replica last had other parameters than at its first start."""
        return any(
            self._reports[replica, rank].checksums != self._first_checksums[replica, rank]
            or self._reports[replica, rank].rest_checksum != self._first_rests[replica, rank]
            for rank in range(self._ranks)
        )

    def checksums_for(self, replica: int, others: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """Returns the checksums that the layers of a replica which is started again have to have, by rank: those of
        one of `others`, who live, or where there is none those that it had."""
        whose = next(iter(others), replica)
        return tuple(self._reports[whose, rank].checksums for rank in range(self._ranks))

    def require_same_as_before(self, replica: int, others: Sequence[int]) -> None:
        """Raises TransientError unless a replica that has returned has the memory that it had, and the parameters that
        each of `others`, who live, has, or where there is none those that it had: it would give other answers. Where
        it says which machine it is on, it may be on another one, and on another GPU."""
        for rank in range(self._ranks):
            now, before = self._returning[replica, rank], self._reports[replica, rank]
            for what, one, other in (
                ("memory", _shape(now), _shape(before)),
                ("batches", (now.most_requests, now.most_tokens), (before.most_requests, before.most_tokens)),
                ("devices", now.device, now.device if now.device.machine else before.device),
            ):
                if one != other:
                    raise TransientError(f"rank {rank} was started with other {what} than before: {one}, not {other}")
            for owner in others or (replica,):
                known = self._reports[owner, rank]
                what = "parameters" if now.checksums != known.checksums else "embedding, norm or head"
                if now.checksums != known.checksums or not self._has_same_rest(now, known):
                    whose = "it had before" if owner == replica else f"replica {owner} has"
                    raise TransientError(
                        f"rank {rank} has loaded other {what} than {whose}, whose weights have been updated since "
                        "the server was started; restart the server with those"
                    )

    def _has_same_rest(self, one: Hello, other: Hello) -> bool:
        """Tells whether two reports of the same rank have the same parameters beside the layers. A model may have some
        that it never loads: where they differ from the start, they mean nothing."""
        first = {self._first_rests[replica, one.rank] for replica in range(self._replicas)}
        return len(first) > 1 or one.rest_checksum == other.rest_checksum

    def take_back(self, replica: int) -> None:
        """Takes what a replica has reported that has returned in place of what it had reported before. Its links are to
        be measured again: it may be on another machine."""
        for rank in range(self._ranks):
            self._reports[replica, rank] = self._returning.pop((replica, rank))
        self._links = {link: speed for link, speed in self._links.items() if replica not in (link[0], link[2])}

    # What is known

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Lists (replica, rank) of those that have not reported."""
        everybody = ((replica, rank) for replica in range(self._replicas) for rank in range(self._ranks))
        return [each for each in everybody if each not in self._reports]

    @property
    def inboxes(self) -> tuple[tuple[str, ...], ...]:
        """Returns the inbox address of rank k of replica r at [r][k]. All have reported."""
        return tuple(
            tuple(self._reports[replica, rank].address for rank in range(self._ranks))
            for replica in range(self._replicas)
        )

    @property
    def frame_addresses(self) -> tuple[tuple[str, ...], ...]:
        """Returns the address of the frame socket of rank k of replica r at [r][k]. All have reported."""
        return tuple(
            tuple(self._reports[replica, rank].frame_address for rank in range(self._ranks))
            for replica in range(self._replicas)
        )

    @property
    def memory_addresses(self) -> tuple[tuple[str, ...], ...]:
        """Returns where memory of rank k of replica r is used by messages at [r][k]. All have reported."""
        return tuple(
            tuple(self._reports[replica, rank].memory_address for rank in range(self._ranks))
            for replica in range(self._replicas)
        )

    @property
    def incarnations(self) -> tuple[int, ...]:
        """Returns the incarnation of each replica. All have reported."""
        return tuple(self._reports[replica, 0].incarnation for replica in range(self._replicas))

    @property
    def by_replica(self) -> dict[int, tuple[Hello, ...]]:
        """Returns the reports of each replica's ranks, in order. All have reported."""
        return {
            replica: tuple(self._reports[replica, rank] for rank in range(self._ranks))
            for replica in range(self._replicas)
        }

    def facts_of(self, replica: int) -> ReplicaFacts | None:
        """Returns what all ranks of `replica` say, with the least of their free frames. None while they differ in
        anything else, as they do for a moment when the replica's KV cache is resized."""
        facts = [self._reports[replica, rank].facts for rank in range(self._ranks)]
        if len({replace(each, free_frames=0) for each in facts}) > 1:
            return None
        return replace(min(facts, key=lambda each: each.free_frames), link_speeds=self.link_speeds_of(replica))

    def add_link(self, replica: int, rank: int, peer: int, bytes_per_second: float) -> None:
        """Takes note of how fast memory gets from a rank of `peer` to the same rank of `replica`."""
        self._links[replica, rank, peer] = bytes_per_second

    def link_speeds_of(self, replica: int) -> tuple[float, ...]:
        """Returns how fast the links to all replicas are, in bytes per second: that of the slowest rank in the slower
        direction, of what has been measured; 0 where some rank has measured neither. Empty where all are 0."""
        speeds = tuple(self._link_speed(replica, peer) for peer in range(self._replicas))
        return speeds if any(speeds) else ()

    def _link_speed(self, one: int, other: int) -> float:
        both = [((one, rank, other), (other, rank, one)) for rank in range(self._ranks)]
        return min(min((self._links[way] for way in ways if way in self._links), default=0.0) for ways in both)

    def have_same(self, one: int, other: int, layer: int) -> bool:
        """Tells whether the parameters of a layer are the same at two replicas, as far as their ranks have said."""
        return all(
            self._reports[one, rank].checksums[layer : layer + 1]
            == self._reports[other, rank].checksums[layer : layer + 1]
            for rank in range(self._ranks)
        )

    def require_same_parameters(self, members: Sequence[int]) -> None:
        """Raises TransientError where a rank of one member has other parameters than the same rank of another, as while
        weights are being updated: a layer must compute the same wherever it runs."""
        first = members[0]
        for rank in range(self._ranks):
            expected = self._reports[first, rank].checksums
            for other in members[1:]:
                found = self._reports[other, rank].checksums
                if len(found) != len(expected):
                    raise TransientError(
                        f"replicas {first} and {other} have checksums of different layers (rank {rank})"
                    )
                layers = [layer for layer, sums in enumerate(zip(expected, found, strict=True)) if len(set(sums)) > 1]
                if layers:
                    raise TransientError(
                        f"replicas {first} and {other} have different parameters in layers {layers} (rank {rank})"
                    )


def _shape(hello: Hello) -> ReplicaFacts:
    """Returns what no two incarnations of a replica may differ in: the number of its own slots may have been changed,
    and what is free with it."""
    return replace(hello.facts, base_granules=0, free_frames=0)
