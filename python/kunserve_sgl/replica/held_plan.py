"""The one place where a rank keeps the plan that it follows, and what follows from it.

A transition changes it in three moments. Between the first and the second, members of the group may send batches here
by either plan; own batches change over at a moment of their own, between those two.
"""

from __future__ import annotations

from collections import Counter

from kunserve_sgl.policy.plan import Plan, Segment


class HeldPlan:
    """Holds the plan of one rank. Its transition agent alone changes it, between two batches."""

    def __init__(self, replica: int, layer_count: int) -> None:
        """Begins without a plan: until `enter` there is none, and everything runs at home."""
        self._replica = replica
        self._home = (Segment(replica, 0, layer_count),)
        self._agreed: Plan | None = None
        self._routed: Plan | None = None
        self._set_route(self._home)
        self._serves = False
        self._depends = False
        self._stands = False
        self._least_epoch = 0

    @property
    def agreed(self) -> Plan | None:
        """Gives the plan that holds: while a transition runs, the one that it leaves. None before the first."""
        return self._agreed

    @property
    def routed(self) -> Plan | None:
        """Gives the plan by which own batches go."""
        return self._routed

    @property
    def epoch(self) -> int:
        """Gives the number of the plan by which own batches go; 0 before the first plan."""
        return 0 if self._routed is None else self._routed.epoch

    @property
    def route(self) -> tuple[Segment, ...]:
        """Gives the segments that an own batch visits, in order; layers of the whole model."""
        return self._route

    @property
    def shares(self) -> tuple[float, ...]:
        """Gives the part of the layers that each layer host of the route runs."""
        return self._shares

    @property
    def is_pipelined(self) -> bool:
        """Tells whether own batches have layers elsewhere."""
        return self._route != self._home

    @property
    def serves(self) -> bool:
        """Tells whether others may have batches executed here, or own ones may be elsewhere, by a plan that a member of
        the group may still follow. It is the same at all ranks of a replica."""
        return self._serves

    @property
    def depends(self) -> bool:
        """Tells whether this replica is in a group, by a plan that a member of it may still follow: it shares layers
        with others, or memory."""
        return self._depends

    @property
    def takes_orders(self) -> bool:
        """Tells whether orders of others are taken in: those that are executed here, and those that members of a group
        which recovers have sent before they heard of it, to be dropped."""
        return self._serves or self._stands

    @property
    def least_epoch(self) -> int:
        """Gives the least number of a plan by which others may have sent what is taken in. A recovery leads to a plan
        with a number that nobody had before: what comes by an earlier one is of who has been left behind."""
        return self._least_epoch

    def layers_here(self, owner: int) -> list[int]:
        """Returns the layers that run at this replica for `owner`."""
        if self._routed is None:
            return list(range(self._home[0].end)) if owner == self._replica else []
        return [layer for layer, host in enumerate(self._routed.hosts[owner]) if host == self._replica]

    def enter(self, plan: Plan) -> None:
        """Takes `plan` as the one of the deployment; no transition is under way here, or a recovery ends."""
        if self._stands:
            self._stands, self._least_epoch = False, plan.epoch
        self._agreed = plan
        self.route_by(plan)
        self.settle(plan)

    def begin(self, new: Plan) -> None:
        """Begins a transition to `new`: from now on members may send batches by the old plan or by this one."""
        assert self._agreed is not None
        self._set_in_force(self._agreed, new)

    def route_by(self, plan: Plan) -> None:
        """Lets own batches take this plan's route from the next one on."""
        self._routed = plan
        self._set_route(plan.route_of(self._replica))

    def settle(self, plan: Plan) -> None:
        """Takes note that all members route by `plan`: nothing comes by another one any more."""
        self._set_in_force(plan)

    def end(self, plan: Plan) -> None:
        """Ends the transition; `plan` is what came of it."""
        self._agreed = plan

    def stand(self) -> None:
        """Leaves every plan: nothing is executed for others, and own batches, which do not run until `enter`, would
        have their layers here."""
        self._set_in_force()
        self._set_route(self._home)
        self._stands = True

    def _set_route(self, route: tuple[Segment, ...]) -> None:
        layers = Counter[int]()
        for segment in route:
            layers[segment.host] += segment.end - segment.start
        self._route = route
        self._shares = tuple(count / layers.total() for count in layers.values())

    def _set_in_force(self, *plans: Plan) -> None:
        self._serves = any(plan.runs_apart(self._replica) for plan in plans)
        self._depends = any(plan.is_merged(self._replica) for plan in plans)
