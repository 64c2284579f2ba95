"""What the coordinator says to people and programs: states, verdicts, answers and the status."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kunserve_sgl.control.health import Health
from kunserve_sgl.control.recovery import Recovery
from kunserve_sgl.control.transition import Transition
from kunserve_sgl.policy.drop_plan import PlanCost
from kunserve_sgl.policy.plan import Extent, Plan, ReplicaFacts


class State(str, enum.Enum):
    """Says what a group does. The deployment is in the last of these states that any of its groups is in."""

    NORMAL = "normal"
    LENDING = "lending"  # memory is shared, and all layers run at home
    MERGED = "merged"
    DROPPING = "dropping"
    RESTORING = "restoring"
    RECOVERING = "recovering"  # a member of its group has died
    STALLED = "stalled"  # of a replica that has work and makes no progress
    RESTARTING = "restarting"  # of a replica that has ended, and is started again
    DEGRADED = "degraded"


class Verdict(str, enum.Enum):
    """Says how a command ended."""

    DONE = "done"
    BAD_REQUEST = "bad request"
    CONFLICT = "conflict"
    FAILED = "failed"  # a deadline passed, or a process ended


@dataclass(frozen=True, slots=True)
class CommandAnswer:
    """Says how a command has ended. `plan` and `cost` are those that a drop would have, for a dry run."""

    verdict: Verdict
    message: str
    epoch: int
    seconds: float = 0.0
    pause_seconds: float = 0.0
    freed_bytes: int = 0
    extension_slots: int = 0
    plan: Plan | None = None
    cost: PlanCost | None = None


def plan_status(
    plan: Plan,
    facts: Sequence[ReplicaFacts],
    states: Mapping[int, State],
    health: Health,
    transition: Transition | Recovery | None,
) -> dict[str, Any]:
    """Returns what GET /kunserve/status says of the plan; `members` has one entry per replica. `transition` is what is
    under way."""
    order = list(State)
    return {
        "state": max(states.values(), key=order.index).value,
        "epoch": plan.epoch,
        "hosts": plan.hosts,
        "homes": [_home_status(extent, facts[extent.replica]) for extent in plan.extents],
        "members": [
            {
                "id": replica,
                "state": states[replica].value,
                "group": plan.group_of(replica),
                "lost": replica in health.lost,
                "stalled": replica in health.stalled,
                "reason": health.reasons.get(replica, ""),
                "link_bytes_per_second": {
                    str(peer): speed or None
                    for peer, speed in enumerate(facts[replica].link_speeds or [0.0] * plan.replica_count)
                    if peer != replica
                },
            }
            for replica in range(plan.replica_count)
        ],
        "transition": None
        if transition is None
        else {
            "number": transition.number,
            "phase": transition.phase.value,
            "members": transition.members,
            "waiting_for": transition.waiting_for,
        },
    }


def waiting_status(replicas: int, missing: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Returns what the status says until all ranks have reported; `missing` are (replica, rank) of those that have
    not."""
    return {
        "state": State.NORMAL.value,
        "epoch": 0,
        "hosts": [],
        "homes": [],
        "members": [
            {
                "id": replica,
                "state": State.NORMAL.value,
                "group": (replica,),
                "lost": False,
                "stalled": False,
                "reason": "",
                "link_bytes_per_second": {},
            }
            for replica in range(replicas)
        ],
        "transition": None,
        "missing": missing,
    }


def answer_body(answer: CommandAnswer) -> dict[str, Any]:
    """Returns the answer to a command as JSON, with plan and cost where it answers a dry run."""
    body: dict[str, Any] = {
        "success": answer.verdict is Verdict.DONE,
        "message": answer.message,
        "epoch": answer.epoch,
        "seconds": answer.seconds,
        "pause_seconds": answer.pause_seconds,
        "freed_bytes": answer.freed_bytes,
        "extension_slots": answer.extension_slots,
    }
    if answer.plan is not None and answer.cost is not None:
        body["plan"] = {"hosts": answer.plan.hosts, "resident": answer.plan.resident}
        body["cost"] = asdict(answer.cost)
    return body


def _home_status(extent: Extent, facts: ReplicaFacts) -> dict[str, Any]:
    return {
        "replica": extent.replica,
        "first_granule": extent.first_granule,
        "granules": extent.granules,
        "slots": extent.granules * facts.granule_slots,
        "homes": extent.homes,
    }
