"""Which replicas can be merged at all, by what their ranks have reported, and how activations go between them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

from kunserve_sgl.args import Activations
from kunserve_sgl.control.messages import Hello
from kunserve_sgl.errors import ConfigurationError
from kunserve_sgl.policy.gain import why_nothing_is_gained
from kunserve_sgl.policy.plan import Plan, ReplicaFacts

logger = logging.getLogger(__name__)

# What each rank of a replica has reported, by replica.
Reports = Mapping[int, Sequence[Hello]]


class Partners:
    """Knows who can be merged with whom, and how activations go, in a deployment whose replicas have all reported."""

    def __init__(self, requested: Activations, reports: Reports, must_map: bool = True) -> None:
        """`must_map` says that who is merged maps the other's memory. Raises ConfigurationError where what was
        `requested` cannot work for these replicas."""
        self._reports = reports
        self._must_map = must_map
        self.activations = choose_activations(requested, reports)
        self.islands = islands(reports, must_map)

    def report(self, plan: Plan, facts: Sequence[ReplicaFacts], model: str) -> None:
        """Says in the log what keeps replicas from being merged, and where it would gain nothing. `plan` is that of the
        start."""
        if len(self.islands) > 1:
            logger.error("KunServe: %s", self._why_not_one_group())
        if (reason := why_nothing_is_gained(plan, facts, self.islands)) is not None:
            logger.warning("KunServe: %s: a drop would gain nothing: %s", model, reason)

    def require_fitting(self, plan: Plan) -> None:
        """Raises ConfigurationError where `plan` has a group of replicas that cannot be merged."""
        for group in plan.groups:
            for one, other in itertools.combinations(group, 2):
                if (reason := why_apart(self._reports, one, other, self._must_map)) is not None:
                    raise ConfigurationError(f"groups: {reason}")

    def _why_not_one_group(self) -> str:
        """Says why not all replicas can be merged, by the first that cannot, and which can."""
        pairs = itertools.combinations(sorted(self._reports), 2)
        reasons = (why_apart(self._reports, *pair, self._must_map) for pair in pairs)
        reason = next(each for each in reasons if each is not None)
        groups = [sorted(island) for island in self.islands if len(island) > 1]
        return f"{reason}. Groups may be within {groups}" if groups else f"{reason}. Nothing will be dropped"


def why_apart(reports: Reports, one: int, other: int, must_map: bool = True) -> str | None:
    """Says why the two replicas can never be merged, None if they can. What a layer host has prepared for its own
    batches must be enough for those of its peers and, if it `must_map` it, the KV of either is mapped at the other."""
    for mine, theirs in _by_rank(reports, one, other):
        if must_map and not mine.device.maps(theirs.device):
            return (
                f"replicas {one} and {other} cannot be merged: GPU {mine.device.gpu} and GPU {theirs.device.gpu} (rank "
                f"{mine.rank}) do not have access to each other's memory"
            )
        for what, flag in (
            ("most_requests", "--max-running-requests"),
            ("most_tokens", "--chunked-prefill-size and --max-prefill-tokens"),
        ):
            values = getattr(mine, what), getattr(theirs, what)
            if len(set(values)) > 1:
                kind = what.removeprefix("most_")
                return (
                    f"replicas {one} and {other} cannot be merged: their batches have up to {values[0]} and "
                    f"{values[1]} {kind}, and each has room for its own only; give {flag}"
                )
    return None


def islands(reports: Reports, must_map: bool = True) -> tuple[frozenset[int], ...]:
    """Returns sets of replicas that can all be merged with each other, such that each replica is in one. It takes a
    comparison for each pair."""
    found: list[list[int]] = []
    for replica in sorted(reports):
        fitting = (
            island for island in found if all(why_apart(reports, one, replica, must_map) is None for one in island)
        )
        island = next(fitting, None)
        if island is None:
            found.append([replica])
        else:
            island.append(replica)
    return tuple(frozenset(island) for island in found)


def choose_activations(requested: Activations, reports: Reports) -> Activations:
    """Returns MAPPED or COLLECTIVE: as `requested`, or what works. Raises ConfigurationError where what was requested
    cannot work for these replicas.

    NCCL does not send from a GPU to itself, and a buffer is mapped where the GPUs have access to each other's memory.
    On a CPU both work.
    """
    pairs = list(itertools.combinations(sorted(reports), 2))
    devices = {pair: [tuple(hello.device for hello in ranks) for ranks in _by_rank(reports, *pair)] for pair in pairs}
    shared = [pair for pair in pairs if any(mine.gpu and mine.gpu == theirs.gpu for mine, theirs in devices[pair])]
    apart = [pair for pair in pairs if not all(mine.maps(theirs) for mine, theirs in devices[pair])]
    if requested is Activations.COLLECTIVE and shared:
        one, other = shared[0]
        raise ConfigurationError(
            f"--kunserve-activations collective: replicas {one} and {other} are on the same GPU, to which NCCL does "
            "not send; accepted: auto, mapped"
        )
    if requested is Activations.MAPPED and pairs and len(apart) == len(pairs):
        raise ConfigurationError(
            "--kunserve-activations mapped: no two replicas are on GPUs that have access to each other's memory; "
            "accepted: auto, or mapped where they have it or are on one GPU (--kunserve-replicas-per-gpu)"
        )
    if requested is not Activations.AUTO:
        return requested
    return Activations.COLLECTIVE if apart and not shared else Activations.MAPPED


def _by_rank(reports: Reports, one: int, other: int) -> Iterator[tuple[Hello, Hello]]:
    """Yields what the two replicas' ranks have said, rank by rank: each exchanges with the same rank of the other."""
    return zip(reports[one], reports[other], strict=True)
