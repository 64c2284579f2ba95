"""How loans of KV are named in the books of a rank, and which there are to be by a plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from kunserve_sgl.policy.plan import Extent, Plan, kv_loans

# (the other replica, replica of the slots, first granule, layer)
KvKey = tuple[int, int, int, int]


def kv_key(other: int, extent: Extent, layer: int) -> KvKey:
    """Names a loan of a layer of these slots, to or from another replica."""
    return other, extent.replica, extent.first_granule, layer


def differences(
    plan: Plan, replica: int, lent_now: Collection[KvKey], borrowed_now: Collection[KvKey]
) -> Iterator[str]:
    """Says which loans of `replica` there are that `plan`, which holds, does not want, and which it wants that there
    are not."""
    lent, borrowed = set[KvKey](), set[KvKey]()
    for loan in kv_loans(plan):
        for part in loan.parts:
            for layer in part.layers:
                if loan.owner == replica:
                    lent.add(kv_key(loan.borrower, part.extent, layer))
                if loan.borrower == replica:
                    borrowed.add(kv_key(loan.owner, part.extent, layer))
    for what, wanted, there in (("lent to", lent, lent_now), ("borrowed from", borrowed, borrowed_now)):
        for other, whose, granule, layer in sorted(wanted ^ set(there)):
            kv = f"the KV of replica {whose} from granule {granule} on in layer {layer}"
            how = "is not" if (other, whose, granule, layer) in wanted else "is"
            yield f"{kv} {how} {what} replica {other}, against the plan"
