"""What makes a plan, and a transition between two plans, possible: checked before anybody is ordered to do anything."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kunserve_sgl.errors import ConfigurationError, TransientError
from kunserve_sgl.policy.plan import Extent, KvPart, Plan, ReplicaFacts, kv_loans, kv_moves, lenders_of, steps_of


@dataclass(frozen=True, slots=True)
class FrameBalance:
    """Counts the frames of one replica's rank on the way from one plan to the next, in the order in which they come and
    go."""

    free: int
    taken: int
    unmapped: int
    loaded: int
    dropped: int
    mapped: int
    given: int

    @property
    def after_prepare(self) -> int:
        """Counts the frames that are free once those are taken where KV comes home, or that others borrow for new
        slots; negative where they are too few."""
        return self.free - self.taken

    @property
    def after_load(self) -> int:
        """Counts the frames that are free once layers are loaded; negative where they do not fit."""
        return self.after_prepare + self.unmapped - self.loaded

    @property
    def after_release(self) -> int:
        """Counts the frames that are free once new slots are mapped; negative where they do not fit."""
        return self.after_load + self.dropped - self.mapped

    @property
    def at_end(self) -> int:
        """Counts the frames that are free under the new plan."""
        return self.after_release + self.given


def frame_balance(old: Plan, new: Plan, facts: ReplicaFacts) -> FrameBalance:
    """Computes what the transition does to the free frames of the replica that `facts` describe."""
    steps = steps_of(old, new, facts.replica)
    return FrameBalance(
        free=facts.free_frames,
        taken=kv_frames((*steps.map_lent, *(m.part for m in steps.moves if m.target == facts.replica)), facts),
        unmapped=kv_frames(steps.unmap_kv, facts),
        loaded=sum(facts.layer_frames[layer] for layer in steps.load),
        dropped=sum(facts.layer_frames[layer] for layer in steps.drop),
        mapped=kv_frames(steps.map_kv, facts),
        given=kv_frames((*steps.unmap_lent, *(m.part for m in steps.moves if m.source == facts.replica)), facts),
    )


def kv_frames(parts: Iterable[KvPart], facts: ReplicaFacts) -> int:
    """Counts the frames behind these parts of extents."""
    return sum(part.extent.granules * facts.granule_frames[layer] for part in parts for layer in part.layers)


def check_facts(facts: Sequence[ReplicaFacts]) -> None:
    """Raises ConfigurationError unless all replicas can host each other's layers and slots."""
    if [f.replica for f in facts] != list(range(len(facts))):
        raise ConfigurationError(f"facts of replicas {[f.replica for f in facts]}; accepted: 0 to {len(facts) - 1}")
    for name in ("frame_bytes", "granule_slots", "max_granules", "layer_frames", "granule_frames", "row_count"):
        values = {getattr(f, name) for f in facts}
        if len(values) > 1:
            raise ConfigurationError(f"replicas differ in {name}: {[getattr(f, name) for f in facts]}")


def check_plan(plan: Plan, facts: Sequence[ReplicaFacts]) -> None:
    """Raises ConfigurationError with the reason why `plan` cannot be."""
    check_facts(facts)
    replicas, layers = len(facts), facts[0].layer_count
    if len(plan.hosts) != replicas or len(plan.resident) != replicas:
        raise ConfigurationError(f"the plan is for {len(plan.hosts)} replicas; there are {replicas}")
    for replica, hosts in enumerate(plan.hosts):
        if len(hosts) != layers:
            raise ConfigurationError(
                f"hosts of replica {replica}: {len(hosts)}; accepted: one for each of {layers} layers"
            )
        for layer, host in enumerate(hosts):
            if not 0 <= host < replicas:
                raise ConfigurationError(f"layer {layer} has no host for replica {replica}: there is no replica {host}")
            if layer not in plan.resident[host]:
                raise ConfigurationError(
                    f"layer {layer} has no host for replica {replica}: replica {host} does not keep its parameters"
                )
    for replica, resident in enumerate(plan.resident):
        if list(resident) != sorted(set(resident)) or not set(resident) <= set(range(layers)):
            raise ConfigurationError(f"resident layers of replica {replica}: {resident} is not an ascending choice")
    _check_extents(plan, facts)


def _check_extents(plan: Plan, facts: Sequence[ReplicaFacts]) -> None:
    for extent in plan.extents:
        what = f"extent of granules [{extent.first_granule}, {extent.first_granule + extent.granules})"
        if not 0 <= extent.replica < len(facts):
            raise ConfigurationError(f"{what}: there is no replica {extent.replica}")
        if extent.granules < 1 or extent.first_granule < 0:
            raise ConfigurationError(f"{what} of replica {extent.replica} is empty or begins below 0")
        room = facts[extent.replica].max_granules
        if extent.first_granule + extent.granules > room:
            raise ConfigurationError(
                f"{what} of replica {extent.replica}: the address space has room for {room} granules; "
                "start with a larger --kunserve-max-slots"
            )
        if len(extent.homes) != facts[0].layer_count or not set(extent.homes) <= set(range(len(facts))):
            raise ConfigurationError(f"{what} of replica {extent.replica} has homes {extent.homes}")
    for fact in facts:
        own = plan.extents_of(fact.replica)
        if not own:
            raise ConfigurationError(f"replica {fact.replica} would have no KV slots")
        for first, second in itertools.pairwise(own):
            if first.first_granule + first.granules > second.first_granule:
                raise ConfigurationError(
                    f"extents of replica {fact.replica} overlap: {first.granules} granules from {first.first_granule}, "
                    f"{second.granules} from {second.first_granule}"
                )


def check_transition(old: Plan, new: Plan, facts: Sequence[ReplicaFacts]) -> None:
    """Raises when the steps from `old`, which holds, to `new` cannot be carried out: ConfigurationError where the
    plans are at odds, TransientError where memory is missing. `facts` describe the replicas under `old`."""
    check_plan(new, facts)
    if new.epoch <= old.epoch:
        raise ConfigurationError(f"epoch {new.epoch} does not follow epoch {old.epoch}")
    _check_moves(old, new)
    then = {extent.place for extent in new.extents}
    for extent in old.extents:
        if extent.place not in then and extent.first_granule == 0:
            raise ConfigurationError(f"the base slots of replica {extent.replica} must stay as they are")
    for extent in lent_to_the_end(old, new):
        raise ConfigurationError(
            f"the slots of replica {extent.replica} from granule {extent.first_granule} on cannot go while they are "
            "lent: what was dropped last must be restored first"
        )
    for replica in range(new.replica_count):
        for layer, lenders in lenders_of(old, new, replica).items():
            if not lenders:
                raise ConfigurationError(
                    f"replica {replica} would need the parameters of layer {layer}, which no member keeps throughout"
                )
    for fact in facts:
        balance = frame_balance(old, new, fact)
        if balance.after_prepare < 0:
            raise TransientError(
                f"replica {fact.replica} needs {balance.taken} frames for KV that comes home, or that others borrow; "
                f"free: {balance.free}"
            )
        if balance.after_load < 0:
            raise TransientError(
                f"replica {fact.replica} needs {balance.loaded} frames for the parameters that come back; "
                f"free: {balance.free}, and {balance.unmapped} behind the slots that go away"
            )
        if balance.after_release < 0:
            raise TransientError(
                f"replica {fact.replica} needs {balance.mapped} frames for new slots; free: {balance.after_load}, and "
                f"{balance.dropped} behind the parameters that it drops"
            )


def lent_to_the_end(old: Plan, new: Plan) -> tuple[Extent, ...]:
    """Lists the slots that go on the way from `old` to `new`, are lent until its last phase, and lie where parameters
    come back before: their frames would come too late."""
    loading = {r for r in range(new.replica_count) if set(new.resident[r]) - set(old.resident[r])}
    then = {extent.place for extent in new.extents}
    lent = dict.fromkeys(part.extent for loan in kv_loans(old) for part in loan.parts)
    return tuple(extent for extent in lent if extent.place not in then and loading & set(extent.homes))


def _check_moves(old: Plan, new: Plan) -> None:
    """Raises ConfigurationError where KV would move that a layer host cannot copy, or that routes change beside."""
    moves = kv_moves(old, new)
    for move in moves:
        if move.host not in (move.source, move.target):
            raise ConfigurationError(
                f"the KV of layer {move.layer} of replica {move.extent.replica} cannot go from replica {move.source} "
                f"to {move.target}: the layer runs at {move.host}, which has neither memory mapped to copy it"
            )
    # Who copies is the only one that writes there, from the first phase to the last.
    if moves and (old.hosts, old.resident) != (new.hosts, new.resident):
        raise ConfigurationError("KV cannot move while layers do: its homes have to change before, or after")
    places = [sorted(extent.place for extent in plan.extents) for plan in (old, new)]
    if moves and places[0] != places[1]:
        raise ConfigurationError("KV cannot move while slots come or go: its homes have to change before, or after")
