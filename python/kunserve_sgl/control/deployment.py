"""What the coordinator knows of the deployment: who has reported what, what has happened to whom, and the plan that
holds; and what the replicas are told of it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import msgspec

from kunserve_sgl.args import Activations, RemoteAttentionBy
from kunserve_sgl.control.commands import Leg, Merge, latest_merges
from kunserve_sgl.control.health import Health
from kunserve_sgl.control.messages import Device, FromCoordinator, Hello, LayerLoan, Lend, LinkSpeed, Welcome
from kunserve_sgl.control.newcomers import Newcomers
from kunserve_sgl.control.partners import Partners
from kunserve_sgl.control.roster import Roster
from kunserve_sgl.control.transition import Transition, members_of
from kunserve_sgl.control.ways import Ways
from kunserve_sgl.errors import TransientError
from kunserve_sgl.policy.decision import DeploymentView, view_of
from kunserve_sgl.policy.drop_plan import DropWish, capacity_tokens, drop_plan, most_capacity, restore_plan
from kunserve_sgl.policy.exchange import MovesMade, after_moves, exchange_round, moves_before
from kunserve_sgl.policy.lenders import Layers, spread_loans
from kunserve_sgl.policy.lending import LendWish, lend_plan
from kunserve_sgl.policy.partial_restore import RestoreWish, is_as_before, partial_plan
from kunserve_sgl.policy.plan import ParameterLoan, Plan, ReplicaFacts, kv_moves, normal_plan
from kunserve_sgl.policy.plan_check import check_transition, frame_balance

logger = logging.getLogger(__name__)


class Deployment:
    """Keeps reports, facts, health, the plan and the merges that led to it. Whether any of them may change now is for
    the coordinator to say. Sends through `send(replica, rank, message)`, which must not block.

    `plan` is None until all have reported. `facts` are those that plans are made of; what is reported later becomes
    facts in `take_up_facts`. `merges` are in the order in which they were made; `moves` are those of KV since. `ways`
    say who maps whose memory.
    """

    def __init__(
        self,
        replicas: int,
        ranks: int,
        send: Callable[[int, int, FromCoordinator], None],
        activations: Activations,
        model: str,
        way: RemoteAttentionBy = RemoteAttentionBy.MAP,
    ) -> None:
        """`activations` is as the flag says, `model` is what people call the model. `way` is how memory of peers is
        used: AUTO where each two map each other's if they can."""
        self.replicas = replicas
        self.ranks = ranks
        self.health = Health()
        self.facts: tuple[ReplicaFacts, ...] = ()
        self.plan: Plan | None = None
        self.merges: list[Merge] = []
        self.moves = MovesMade()
        self._send = send
        self._requested = activations
        self._model = model
        self._roster = Roster(replicas, ranks)
        self.ways = Ways(way, self._roster, replicas)
        self.newcomers = Newcomers(ranks, self.lend)
        self._changed: set[int] = set()  # replicas whose facts have not been taken up yet
        self._first_facts: tuple[ReplicaFacts, ...] = ()
        self._capacities: tuple[Plan | None, tuple[int, ...]] = (None, ())
        self._partners: Partners | None = None  # from the first plan on

    # What it says

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Lists (replica, rank) of those that have not reported."""
        return self._roster.missing

    def known_plan(self) -> Plan:
        """Returns the plan. Raises TransientError while there is none."""
        if self.plan is None:
            missing = ", ".join(f"replica {replica} rank {rank}" for replica, rank in self.missing)
            raise TransientError(f"not everybody has reported yet; missing: {missing or 'ranks that agree'}")
        return self.plan

    def dependent_on(self, replica: int) -> tuple[int, ...]:
        """Returns `replica` and those that are merged with it, and so wait for it."""
        return (replica,) if self.plan is None else self.plan.group_of(replica)

    def view(self) -> DeploymentView | None:
        """Returns what an automatic decision has to know; None while there is no plan."""
        if self.plan is None:
            return None
        unavailable = frozenset({*self.health.unavailable, *self._changed, *self.newcomers.lenders()})
        merges = [(merge.members, merge.before) for merge in self.merges]
        islands = () if self._partners is None else self._partners.islands
        return view_of(self.plan, self.facts, merges, unavailable, islands, self.ways.that_differ)

    def capacities(self) -> tuple[int, ...]:
        """Returns the KV slots of each replica; none until all have reported."""
        plan = self.plan
        if plan is not None and plan is not self._capacities[0]:
            self._capacities = plan, tuple(capacity_tokens(plan, fact) for fact in self.facts)
        return self._capacities[1]

    def most_capacity(self) -> int:
        """Returns the slots that there would be in all memory of those who live, but for one copy of the layers, at a
        replica that has addresses for so many."""
        if self.plan is None:
            return 0
        return most_capacity(self.plan, [fact for fact in self.facts if fact.replica not in self.health.lost])

    def slots_at_start(self, replica: int) -> int:
        """Returns the KV slots that `replica` had when all had reported for the first time."""
        facts = self._first_facts[replica]
        return facts.base_granules * facts.granule_slots

    def has_new_parameters(self, replica: int) -> bool:
        """Tells whether a replica that has ended last had other parameters than when all had reported for the first
        time, or those who live have."""
        return any(map(self._roster.has_new_parameters, (replica, *self._living(replica))))

    def checksums_for(self, replica: int) -> tuple[tuple[str, ...], ...]:
        """Returns the checksums that the layers of a replica which is started again have to have, by rank."""
        return self._roster.checksums_for(replica, self._living(replica))

    def _living(self, besides: int) -> list[int]:
        return [other for other in range(self.replicas) if other != besides and other not in self.health.lost]

    # Plans to go to

    def require_healthy(self, members: Sequence[int]) -> None:
        """Raises TransientError where no transition may concern one of `members` now."""
        self.health.require(members)
        for member in members:
            if member in self._changed:
                raise TransientError(f"the memory of replica {member} is being resized")
            if (newcomer := self.newcomers.newcomer_of(member)) is not None:
                raise TransientError(f"replica {member} lends its parameters to replica {newcomer}, which is starting")

    def dropped(self, wish: DropWish) -> Plan:
        """Returns the plan that a wish leads to from the one that holds, whose members could take the way there now.
        Raises ConfigurationError, TransientError."""
        self.require_healthy([member for group in wish.groups for member in group])
        return self._merged(drop_plan(self.known_plan(), self.facts, wish))

    def lent(self, wish: LendWish) -> Plan:
        """Returns the plan in which memory is lent as wished, beside what holds now, whose members could take the way
        there now. Raises ConfigurationError, TransientError."""
        return self._merged(lend_plan(self.known_plan(), self.facts, wish))

    def _merged(self, new: Plan) -> Plan:
        if self._partners is not None:
            self._partners.require_fitting(new)
        self.require_healthy(members_of(self.known_plan(), new))
        return new

    def require_same_parameters(self, members: Sequence[int]) -> None:
        """Raises TransientError where the layers of one member have other parameters than those of another."""
        self._roster.require_same_parameters(members)

    def without(self, merges: Iterable[Merge]) -> Plan:
        """Returns the plan that undoes `merges`, those that came last first."""
        plan = new = self.known_plan()
        for merge in merges:
            new = replace(restore_plan(new, merge.before, sorted(merge.members)), epoch=plan.epoch + 1)
        return new

    def partly_without(self, merges: Sequence[Merge], wish: RestoreWish) -> Leg:
        """Returns the way to the plan that undoes a part of each of `merges`, as `wish` says, and those that nothing is
        left of then. Raises ConfigurationError, TransientError."""
        plan, facts = self._with_kv_at_home(merges)
        new = partial_plan(plan, facts, [(merge.members, merge.before) for merge in merges], wish)
        return Leg(new, tuple(merge for merge in merges if is_as_before(new, (merge.members, merge.before))))

    def _with_kv_at_home(self, merges: Sequence[Merge]) -> tuple[Plan, tuple[ReplicaFacts, ...]]:
        """Returns plan and facts as they will be when KV is home again that has moved since these merges."""
        plan = self.known_plan()
        home = after_moves(plan, moves_before(plan, self.without(merges)))
        facts = tuple(replace(f, free_frames=frame_balance(plan, home, f).at_end) for f in self.facts)
        return replace(home, epoch=plan.epoch), facts

    def homeward(self, new: Plan, members: Collection[int], *, retraces: bool) -> Plan | None:
        """Returns the plan in which some KV is back at the home that it has in `new`; None where all is. `retraces`
        takes back the last move of `members`, which always works, in place of any that is possible now. Raises
        TransientError where none is."""
        plan = self.known_plan()
        moves = moves_before(plan, new)
        if not moves:
            return None
        if not retraces:
            next_plan = exchange_round(plan, self.facts, moves)
        else:
            last = self.moves.last_undone(members)
            next_plan = None if last is None else after_moves(plan, [last])
        if next_plan is None:
            raise TransientError(f"there are no frames for KV that has to come home first, of {len(moves)} layers")
        check_transition(plan, next_plan, self.facts)
        return next_plan

    def require_possible(self, new: Plan) -> None:
        """Raises ConfigurationError, TransientError where there is no way from the plan that holds to `new`."""
        check_transition(self.known_plan(), new, self.facts)

    # Who lends parameters

    def loans_to(self, resident: Layers) -> tuple[ParameterLoan, ...]:
        """Returns who lends the layers that these replicas, which are alone by the plan, lack of those that they have:
        one of them where one has the layer, because they do not run anything else meanwhile, else another."""
        plan = self.known_plan()
        wanted = {member: set(range(plan.layer_count)).difference(layers) for member, layers in resident.items()}
        return spread_loans(wanted, [resident, self._lenders(resident)], self._may_lend)

    def lend_to_newcomers(self, next_number: Callable[[], int]) -> None:
        """Lets those who live lend their layers to replicas that wait for them, each by an order of its own. While
        nothing is under way: what a replica keeps must not change meanwhile."""
        for newcomer in self.newcomers.ready:
            wanted = {newcomer: range(self.known_plan().layer_count)}
            loans = spread_loans(wanted, [self._lenders(wanted)], self._may_lend)
            self.newcomers.lend_to(newcomer, next_number(), loans)

    def lend(self, lender: int, number: int, loans: Iterable[ParameterLoan]) -> None:
        """Tells `lender` to make these loans beside whatever it does, and no others under `number`."""
        if lender not in self.health.lost:
            self._send(lender, 0, Lend(number, tuple(self._layer_loan(lender, loan) for loan in loans)))

    def _layer_loan(self, lender: int, loan: ParameterLoan) -> LayerLoan:
        replica = loan.borrower
        if replica in self.health.lost:  # it has not reported yet
            incarnation, found = self.newcomers.incarnation(replica), self.newcomers.memory_addresses(replica)
        else:
            incarnation, found = self._roster.incarnations[replica], self._roster.memory_addresses[replica]
        maps = self.ways.maps_at(lender, self._devices(replica))
        return LayerLoan(replica, incarnation, loan.layers, found if any(found) else (), maps)

    def _lenders(self, besides: Collection[int]) -> Layers:
        """Returns the replicas besides these that can be expected to lend, with the layers that they keep."""
        plan = self.known_plan()
        away = {*besides, *self.health.unavailable}
        return {replica: plan.resident[replica] for replica in range(self.replicas) if replica not in away}

    def _may_lend(self, owner: int, borrower: int, layer: int) -> bool:
        """The checksums of one that has not reported yet are those of the first of the living."""
        known = self._living(borrower)[0] if borrower in self.health.lost else borrower
        can_lend = self.ways.can_lend(owner, self._devices(borrower))
        return can_lend and self._roster.have_same(owner, known, layer)

    def _devices(self, replica: int) -> list[Device]:
        return self.newcomers.devices(replica) if replica in self.health.lost else self._roster.devices(replica)

    # What changes

    def add_report(self, hello: Hello) -> bool:
        """Takes in a report of a rank; returns whether it says anything new of a replica that is there."""
        if hello.replica in self.health.lost:
            self._roster.add_returning(hello)
            return False
        try:
            if not self._roster.add(hello):
                return False
        except ValueError as error:
            logger.error("KunServe: ignored %s", error)
            return False
        self._changed.add(hello.replica)
        return True

    def add_link(self, link: LinkSpeed) -> None:
        """Takes note of how fast memory gets from one rank to another, unless it has another incarnation by now."""
        if self.plan is not None and self._roster.incarnations[link.peer] == link.peer_incarnation:
            self._roster.add_link(link.replica, link.rank, link.peer, link.bytes_per_second)
            self._take_up_links()

    def add_reads(self, reads: Mapping[tuple[int, int], float]) -> None:
        """Takes note of how fast replicas read what others have lent them, in bytes per second, by both."""
        for ((replica, owner), bytes_per_second), rank in itertools.product(reads.items(), range(self.ranks)):
            self._roster.add_link(replica, rank, owner, bytes_per_second)
        self._take_up_links()

    def _take_up_links(self) -> None:
        self.facts = tuple(replace(f, link_speeds=self._roster.link_speeds_of(f.replica)) for f in self.facts)

    def take_up_facts(self) -> None:
        """Makes what the ranks have reported the facts of the deployment, and adapts the plan to them. Between
        transitions only: a plan that is being left or entered must stay what the members know."""
        if self._roster.missing or not self._changed:
            return
        reported = {replica: self._roster.facts_of(replica) for replica in range(self.replicas)}
        known = {replica: facts for replica, facts in reported.items() if facts is not None}
        if self.plan is None:
            if len(known) < self.replicas:
                return
            self._partners = Partners(self._requested, self._roster.by_replica, self.ways.must_map)
            self.ways.choose()
            self.facts = self._first_facts = tuple(known.values())
            self.plan = normal_plan(self.facts)
            self._changed.clear()
            self.welcome(range(self.replicas))
            logger.info(
                "KunServe: all %d replicas of %d ranks have reported; activations are %s",
                self.replicas,
                self.ranks,
                self._partners.activations.value,
            )
            self._partners.report(self.plan, self.facts, self._model)
            return
        for replica in sorted(self._changed & set(known)):
            self._changed.remove(replica)
            if self.plan.is_merged(replica):
                logger.warning("KunServe: ignored new facts of replica %d, which is merged", replica)
                continue
            self.facts = tuple(known[replica] if f.replica == replica else f for f in self.facts)
        extents = tuple(
            replace(extent, granules=self.facts[extent.replica].base_granules) if extent.first_granule == 0 else extent
            for extent in self.plan.extents
        )
        if extents != self.plan.extents:
            self.plan = replace(self.plan, epoch=self.plan.epoch + 1, extents=extents)
            self.welcome(range(self.replicas))

    def adopt(self, transition: Transition, merges: Iterable[Merge]) -> None:
        """Makes the plan of a transition that has succeeded the one that holds, and tells those who were no members.
        `merges` are those that hold then."""
        self.facts = tuple(
            replace(f, free_frames=frame_balance(transition.old, transition.new, f).at_end) for f in self.facts
        )
        self.plan = transition.new
        kept, moves = list(merges), kv_moves(transition.old, transition.new)
        self.moves.add(self.plan, moves)
        if not moves and len(kept) <= len(self.merges):
            # A restore, wholly or in part: all KV was home, and frames have gone elsewhere since it moved.
            for merge in latest_merges(self.merges, transition.members):
                self.moves.forget(merge.members, merge.before.epoch)
        self.merges = kept
        self.welcome([r for r in range(self.replicas) if r not in transition.members])

    def set_alone(self, members: Collection[int], plan: Plan) -> None:
        """Makes `plan`, in which each of `members` is by itself, the one that holds."""
        self.plan = plan
        self.moves.forget(members)
        self.merges = [merge for merge in self.merges if not merge.members & set(members)]

    def set_recovered(self, members: Collection[int]) -> None:
        """Takes note that these are by themselves now; what is free there is as before any merge."""
        self.health.mend(members)
        self._changed.update(members)

    # Replicas that come back

    def set_restarting(self, replica: int, how: str) -> None:
        """Takes note that `replica`, which has ended or is about to be seen to have, is to be started again. What the
        processes of an earlier try have reported is forgotten."""
        self._roster.forget_returning(replica)
        self.newcomers.forget(replica)
        self.health.set_restarting(replica, how)

    def give_up(self, replica: int, reason: str) -> None:
        """Takes note that a replica which has ended is not started again."""
        self._roster.forget_returning(replica)
        self.newcomers.forget(replica)
        self.health.give_up(replica, reason)

    def has_returned(self, replica: int) -> bool:
        """Tells whether all ranks of a replica have reported whose processes were started anew."""
        return self._roster.has_returned(replica)

    def take_back(self, replica: int) -> None:
        """Takes a replica up again which has returned, and tells everybody. Raises TransientError where it is not the
        replica that it was."""
        plan = self.known_plan()
        self._roster.require_same_as_before(replica, self._living(replica))
        self._roster.take_back(replica)
        self.ways.choose()
        self._take_up_links()
        self.newcomers.forget(replica)
        self.health.on_back(replica)
        self._changed.add(replica)
        # In any case there is a new plan, so that everybody is told where the replica is now.
        self.plan = replace(plan, epoch=plan.epoch + 1)
        self.take_up_facts()
        self.welcome(range(self.replicas))

    def welcome(self, replicas: Sequence[int]) -> None:
        """Tells these replicas the plan. Rank 0 passes it on, as it does with orders, so that all ranks of a replica
        know it before the next order."""
        plan = self.plan
        if plan is None or self._partners is None:
            return
        roster = self._roster
        message = Welcome(
            roster.inboxes,
            roster.frame_addresses,
            roster.incarnations,
            plan,
            self._partners.activations,
            roster.memory_addresses,
        )
        for replica in replicas:
            if replica not in self.health.lost:
                self._send(replica, 0, msgspec.structs.replace(message, maps=self.ways.of(replica)))
