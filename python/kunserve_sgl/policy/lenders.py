"""Who lends parameters to whom beside the way from plan to plan: to replicas that recover or start again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from kunserve_sgl.policy.plan import ParameterLoan

Layers = Mapping[int, Collection[int]]
"""Layers by replica."""


def spread_loans(
    wanted: Layers, keepers: Sequence[Layers], may_lend: Callable[[int, int, int], bool]
) -> tuple[ParameterLoan, ...]:
    """Returns who lends the layers that are `wanted`, by borrower. What nobody can lend is left out.

    A layer comes from the first of `keepers` where somebody has it, and there from who lends least so far.
    `may_lend(owner, borrower, layer)` says whether the borrower can have the owner's. It takes a look at each keeper
    for each layer that is wanted.
    """
    given: Counter[int] = Counter()
    loans: dict[tuple[int, int], list[int]] = {}
    for borrower, layers in sorted(wanted.items()):
        for layer in sorted(layers):
            for each in keepers:
                able = [r for r in sorted(each) if r != borrower and layer in each[r] and may_lend(r, borrower, layer)]
                if able:
                    owner = min(able, key=lambda r: given[r])
                    given[owner] += 1
                    loans.setdefault((owner, borrower), []).append(layer)
                    break
    return tuple(ParameterLoan(owner, borrower, tuple(layers)) for (owner, borrower), layers in sorted(loans.items()))
