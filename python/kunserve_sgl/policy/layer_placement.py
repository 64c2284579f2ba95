"""Which member of a group keeps which layers: balanced by bytes, in runs of consecutive layers where possible."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence


def place_layers(weights: Sequence[int], candidates: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """Chooses one keeper per layer. `weights[i]` is the size of layer i; member m can keep the layers `candidates[m]`,
    and every layer must have a candidate.

    The largest load is as small as one run per member allows. It takes members x layers^2 steps.
    """
    # Members of merged groups hold different parts; runs can follow each other only in the order of those.
    order = sorted(
        candidates,
        key=lambda member: (
            min(candidates[member], default=len(weights)),
            max(candidates[member], default=len(weights)),
            member,
        ),
    )
    return _runs(weights, candidates, order) or _one_by_one(weights, candidates)


def _runs(
    weights: Sequence[int], candidates: Mapping[int, Sequence[int]], order: Sequence[int]
) -> tuple[int, ...] | None:
    """Gives one run to each member in this order, or returns None where no such cut exists. Least is the pair (largest
    load, sum of squared loads): the second evens out what the first leaves open."""
    layers = len(weights)
    # best[end] = (largest, squares, starts of the runs) over all ways to cut layers [0, end) into runs so far
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for member in order:
        mine = set(candidates[member])
        following: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (largest, squares, starts) in best.items():
            load = 0
            for end in range(start, layers + 1):
                if end > start:
                    if end - 1 not in mine:
                        break
                    load += weights[end - 1]
                found = (max(largest, load), squares + load * load, (*starts, start))
                if end not in following or found < following[end]:
                    following[end] = found
        best = following
    if layers not in best:
        return None
    starts = (*best[layers][2], layers)
    return tuple(
        member
        for member, (start, end) in zip(order, itertools.pairwise(starts), strict=True)
        for _ in range(start, end)
    )


def _one_by_one(weights: Sequence[int], candidates: Mapping[int, Sequence[int]]) -> tuple[int, ...]:
    """Gives each layer, the one with the fewest candidates first, to the candidate with the least load."""
    can_keep = [sorted(m for m, layers in candidates.items() if layer in layers) for layer in range(len(weights))]
    load = dict.fromkeys(candidates, 0)
    keepers: dict[int, int] = {}
    for layer in sorted(range(len(weights)), key=lambda layer: (len(can_keep[layer]), layer)):
        # next to a layer that it keeps already, where loads are equal: fewer segments
        keeper = min(can_keep[layer], key=lambda m: (load[m], keepers.get(layer - 1) != m, m))
        load[keeper] += weights[layer]
        keepers[layer] = keeper
    return tuple(keepers[layer] for layer in range(len(weights)))
