"""Whether a drop can gain anything with this model and frames of this size, before anybody asks for one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.drop_plan import DropWish, drop_plan
from kunserve_sgl.policy.plan import Plan, ReplicaFacts

_LARGEST_GROUP = 16  # larger ones gain more for each member, but nobody merges so many


def why_nothing_is_gained(plan: Plan, facts: Sequence[ReplicaFacts], groups: Sequence[Collection[int]]) -> str | None:
    """Says why the largest drop would gain no slots in any of `groups`; None where one would, or where nobody can be
    merged anyway. `plan` is one in which nobody is merged. It makes a plan for each group, of 16 members at most."""
    refusal = ""
    for group in groups:
        if len(group) < 2:
            continue
        try:
            drop_plan(plan, facts, DropWish((tuple(sorted(group)[:_LARGEST_GROUP]),)))
        except TransientError as error:
            refusal = refusal or str(error)
        except ConfigurationError:
            return None  # it is said where a drop is asked for
        else:
            return None
    if not refusal:
        return None
    fact = facts[0]
    return (
        f"the parameters of a layer take {_numbers(fact.layer_frames)} frames of {fact.frame_bytes} bytes, and the KV "
        f"cache grows by granules of {fact.granule_slots} slots, which take {_numbers(fact.granule_frames)} frames in "
        f"a layer; {refusal}. Accepted: larger layers, smaller frames (--kunserve-frame-bytes, where the device has "
        "them), or --kunserve-reserve-frames"
    )


def _numbers(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"
