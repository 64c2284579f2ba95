"""A plan: which replica executes each layer for whom, and in whose memory each slot's KV lives.

A plan is a value. A transition leads from one plan to the next; `steps_of` derives from the two what each replica
has to do, so that all members of a transition agree without asking each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

Place = tuple[int, int, int]  # replica, first granule, granules


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """Says what planning has to know of one replica. Counts are per tensor-parallel rank, which are all alike.

    `layer_frames[i]` are the frames that the parameters of layer i take, `granule_frames[i]` those that one granule of
    slots takes in the KV buffers of layer i. `base_granules` of its own slots have memory at home; the address space
    has room for `max_granules`. `row_count` is the size of the common space of request rows. `least_granules` of its
    own slots cannot become free frames. `node` names the machine that it is on, where these differ. `link_speeds[r]` is
    how fast memory gets from replica r to it or from it to r, in bytes per second: 0 where that has not been measured,
    and empty where nothing has.
    """

    replica: int
    frame_bytes: int
    granule_slots: int
    base_granules: int
    max_granules: int
    free_frames: int
    layer_frames: tuple[int, ...]
    granule_frames: tuple[int, ...]
    row_count: int = 0
    least_granules: int = 1
    node: str = ""
    link_speeds: tuple[float, ...] = ()

    @property
    def layer_count(self) -> int:
        """Counts the model's decoder layers."""
        return len(self.layer_frames)


@dataclass(frozen=True, slots=True)
class Extent:
    """Names slots of one replica that come and go together, in granules of its own range.

    `homes[i]` is the replica whose memory holds the KV of layer i of these slots.
    """

    replica: int
    first_granule: int
    granules: int
    homes: tuple[int, ...]

    @property
    def place(self) -> Place:
        """Says which slots these are, wherever their KV lies."""
        return self.replica, self.first_granule, self.granules


@dataclass(frozen=True, slots=True)
class Plan:
    """Says who executes which layer for whom, who keeps which parameters and where KV lies; it never changes.
    `hosts[r][i]` executes layer i for replica r's batches; `resident[r]` are the layers whose parameters replica r
    keeps, ascending; `extents` are all slots of all replicas, base slots included."""

    epoch: int
    hosts: tuple[tuple[int, ...], ...]
    resident: tuple[tuple[int, ...], ...]
    extents: tuple[Extent, ...]

    @property
    def replica_count(self) -> int:
        """Counts all replicas of the deployment, lost ones included."""
        return len(self.hosts)

    @property
    def layer_count(self) -> int:
        """Counts the model's decoder layers."""
        return len(self.hosts[0])

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Lists the replicas that depend on each other's layers or memory, ascending; singles included."""
        parent = list(range(self.replica_count))

        def root(replica: int) -> int:
            while parent[replica] != replica:
                replica = parent[replica]
            return replica

        for replica, hosts in enumerate(self.hosts):
            for other in {*hosts, *(home for e in self.extents if e.replica == replica for home in e.homes)}:
                first, second = sorted((root(replica), root(other)))
                parent[second] = first
        groups: dict[int, list[int]] = {}
        for replica in range(self.replica_count):
            groups.setdefault(root(replica), []).append(replica)
        return tuple(tuple(group) for group in groups.values())

    @property
    def pipelines(self) -> tuple[tuple[int, ...], ...]:
        """Lists the groups of which layers run elsewhere, and the other replicas one by one: who shares compute."""
        return tuple(
            pipeline
            for group in self.groups
            for pipeline in ([group] if any(map(self.runs_apart, group)) else [(member,) for member in group])
        )

    def group_of(self, replica: int) -> tuple[int, ...]:
        """Returns the group that `replica` is in, itself included, ascending."""
        return next(group for group in self.groups if replica in group)

    def extents_of(self, replica: int) -> tuple[Extent, ...]:
        """Returns the replica's own slots, base slots first."""
        return tuple(sorted((e for e in self.extents if e.replica == replica), key=lambda e: e.first_granule))

    def is_merged(self, replica: int) -> bool:
        """Tells whether `replica` is in a group of two or more."""
        return len(self.group_of(replica)) > 1

    def runs_apart(self, replica: int) -> bool:
        """Tells whether layers of `replica` run elsewhere, or those of others at `replica`; else it shares memory with
        its group, and nothing more."""
        return self.hosts[replica] != (replica,) * self.layer_count or bool(self.owners_served_by(replica))

    def owners_served_by(self, replica: int) -> tuple[int, ...]:
        """Returns the other replicas that have layers run at `replica`."""
        return tuple(owner for owner, hosts in enumerate(self.hosts) if owner != replica and replica in hosts)

    def route_of(self, replica: int) -> tuple[Segment, ...]:
        """Returns the segments that a batch of `replica` visits, in order."""
        return segments_of(self.hosts[replica])


class Segment(NamedTuple):
    """Names layers [start, end) that one layer host executes, `host`."""

    host: int
    start: int
    end: int


def segments_of(hosts: Iterable[int]) -> tuple[Segment, ...]:
    """Joins consecutive layers with the same layer host. `hosts[i]` executes layer i."""
    segments: list[Segment] = []
    for layer, host in enumerate(hosts):
        if segments and segments[-1].host == host:
            segments[-1] = Segment(host, segments[-1].start, layer + 1)
        else:
            segments.append(Segment(host, layer, layer + 1))
    return tuple(segments)


def normal_plan(facts: Iterable[ReplicaFacts], epoch: int = 0) -> Plan:
    """Makes the plan of every replica on its own, with all layers and its base slots."""
    ordered = sorted(facts, key=lambda f: f.replica)
    layers = ordered[0].layer_count
    return Plan(
        epoch=epoch,
        hosts=tuple((f.replica,) * layers for f in ordered),
        resident=tuple(tuple(range(layers)) for _ in ordered),
        extents=tuple(Extent(f.replica, 0, f.base_granules, (f.replica,) * layers) for f in ordered),
    )


# Transitions


@dataclass(frozen=True, slots=True)
class KvPart:
    """Names the KV of some layers of an extent; layers ascend."""

    extent: Extent
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvLoan:
    """Says that `owner` lets `borrower` map the frames behind these parts."""

    owner: int
    borrower: int
    parts: tuple[KvPart, ...]


@dataclass(frozen=True, slots=True)
class ParameterLoan:
    """Says that `owner` lets `borrower` read the parameters of these layers, to restore its own."""

    owner: int
    borrower: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvMove:
    """Says that the KV of one layer of an extent goes from the memory of `source` to that of `target`. `host`, one of
    the two, executes the layer before and after, and copies. `extent` is the one of the new plan."""

    extent: Extent
    layer: int
    source: int
    target: int
    host: int

    @property
    def part(self) -> KvPart:
        """Names the KV that goes."""
        return KvPart(self.extent, (self.layer,))


@dataclass(frozen=True, slots=True)
class ReplicaSteps:
    """Lists what one replica does in each phase of a transition. See `steps_of`."""

    # prepare: own slots that go away are drained; new slots whose layers run elsewhere get memory; memory that others
    # will need is lent, and mapped there
    close: tuple[Extent, ...]
    map_lent: tuple[KvPart, ...]
    lend_kv: tuple[KvLoan, ...]
    lend_parameters: tuple[ParameterLoan, ...]
    borrow_kv: tuple[KvLoan, ...]
    borrow_parameters: tuple[ParameterLoan, ...]
    # load: memory behind drained slots becomes memory for parameters, which are copied from those who kept them
    unmap_kv: tuple[KvPart, ...]
    load: tuple[int, ...]
    # switch: batches take the new route
    # release: nobody routes here any more for what goes away
    drop: tuple[int, ...]
    return_kv: tuple[KvLoan, ...]
    map_kv: tuple[KvPart, ...]
    # resume: all layer hosts have mapped the new slots, and all borrowers have returned what they do not need, so that
    # the memory of slots that are gone becomes free where their layers ran elsewhere
    open: tuple[Extent, ...]
    end_kv: tuple[KvLoan, ...]
    unmap_lent: tuple[KvPart, ...]
    # throughout: in prepare the target gets memory, in load the layer host copies, in release it changes over, and
    # where the memory of the source is another's, that frees it in resume
    moves: tuple[KvMove, ...]


def steps_of(old: Plan, new: Plan, replica: int) -> ReplicaSteps:
    """Derives what `replica` does on the way from `old` to `new`. It takes extents times layers steps."""
    before, after = _by_place(old), _by_place(new)
    begun = [loan for place, loan in after.items() if place not in before]
    ended = [loan for place, loan in before.items() if place not in after]
    loads = _parameter_loans(old, new)
    there, then = {extent.place for extent in old.extents}, {extent.place for extent in new.extents}
    gone = [extent for extent in old.extents if extent.place not in then]
    added = [extent for extent in new.extents if extent.place not in there]
    unmap_kv, unmap_lent = _at_home(gone, replica, old)
    map_kv, map_lent = _at_home(added, replica, new)
    return ReplicaSteps(
        close=tuple(e for e in gone if e.replica == replica),
        map_lent=map_lent,
        lend_kv=_joined(loan for loan in begun if loan.owner == replica),
        lend_parameters=tuple(loan for loan in loads if loan.owner == replica),
        borrow_kv=_joined(loan for loan in begun if loan.borrower == replica),
        borrow_parameters=tuple(loan for loan in loads if loan.borrower == replica),
        unmap_kv=unmap_kv,
        load=tuple(sorted(set(new.resident[replica]) - set(old.resident[replica]))),
        drop=tuple(sorted(set(old.resident[replica]) - set(new.resident[replica]))),
        return_kv=_joined(loan for loan in ended if loan.borrower == replica),
        map_kv=map_kv,
        open=tuple(e for e in added if e.replica == replica),
        end_kv=_joined(loan for loan in ended if loan.owner == replica),
        unmap_lent=unmap_lent,
        moves=tuple(move for move in kv_moves(old, new) if replica in (move.source, move.target)),
    )


def kv_moves(old: Plan, new: Plan) -> tuple[KvMove, ...]:
    """Lists the KV whose home is another one in `new` than in `old`, of slots that stay."""
    there = {extent.place: extent.homes for extent in old.extents}
    return tuple(
        KvMove(extent, layer, source, target, new.hosts[extent.replica][layer])
        for extent in new.extents
        if there.get(extent.place, extent.homes) != extent.homes
        for layer, (source, target) in enumerate(zip(there[extent.place], extent.homes, strict=True))
        if source != target
    )


def kv_loans(plan: Plan) -> tuple[KvLoan, ...]:
    """Lists every loan that must stand while `plan` holds: one per extent and layer whose layer host is not its
    home."""
    return tuple(
        KvLoan(home, plan.hosts[extent.replica][layer], (KvPart(extent, (layer,)),))
        for extent in plan.extents
        for layer, home in enumerate(extent.homes)
        if plan.hosts[extent.replica][layer] != home
    )


def _by_place(plan: Plan) -> dict[tuple[int, int, Place, int], KvLoan]:
    """Returns the loans of `plan` by what they are about, which has nothing to do with the homes of other layers."""
    return {
        (loan.owner, loan.borrower, part.extent.place, layer): loan
        for loan in kv_loans(plan)
        for part in loan.parts
        for layer in part.layers
    }


def _joined(loans: Iterable[KvLoan]) -> tuple[KvLoan, ...]:
    """Joins the loans to one per pair of replicas, in a fixed order."""
    layers: dict[tuple[int, int], dict[Extent, list[int]]] = {}
    for loan in loans:
        parts = layers.setdefault((loan.owner, loan.borrower), {})
        for part in loan.parts:
            parts.setdefault(part.extent, []).extend(part.layers)
    return tuple(
        KvLoan(
            owner, borrower, tuple(KvPart(extent, tuple(sorted(parts[extent]))) for extent in sorted(parts, key=_key))
        )
        for (owner, borrower), parts in sorted(layers.items())
    )


def _key(extent: Extent) -> tuple[int, int]:
    return extent.replica, extent.first_granule


def _at_home(extents: Iterable[Extent], replica: int, plan: Plan) -> tuple[tuple[KvPart, ...], tuple[KvPart, ...]]:
    """Returns the parts of these extents of `plan` that are at home at `replica`: those whose layers run there too, and
    those whose layers run elsewhere."""
    here, lent = [], []
    for extent in extents:
        layers = [layer for layer, home in enumerate(extent.homes) if home == replica]
        runs_here = [plan.hosts[extent.replica][layer] == replica for layer in layers]
        here.append(KvPart(extent, tuple(itertools.compress(layers, runs_here))))
        lent.append(KvPart(extent, tuple(layer for layer, runs in zip(layers, runs_here, strict=True) if not runs)))
    return tuple(part for part in here if part.layers), tuple(part for part in lent if part.layers)


def lenders_of(old: Plan, new: Plan, borrower: int) -> dict[int, list[int]]:
    """Says who can give the parameters of each layer that comes back at `borrower`: replicas that keep them throughout.
    They are among those that depend on `borrower` before or after, because the others take no part in the
    transition."""
    back = sorted(set(new.resident[borrower]) - set(old.resident[borrower]))
    if not back:
        return {}
    members = sorted({*old.group_of(borrower), *new.group_of(borrower)})
    return {layer: [r for r in members if layer in old.resident[r] and layer in new.resident[r]] for layer in back}


def _parameter_loans(old: Plan, new: Plan) -> tuple[ParameterLoan, ...]:
    """Says who gives the parameters that are missing: those who can, in turn."""
    wanted: dict[tuple[int, int], list[int]] = {}
    turns: dict[int, int] = {}
    for borrower in range(new.replica_count):
        for layer, owners in lenders_of(old, new, borrower).items():
            turn = turns.get(layer, 0)
            turns[layer] = turn + 1
            wanted.setdefault((owners[turn % len(owners)], borrower), []).append(layer)
    return tuple(ParameterLoan(owner, borrower, tuple(layers)) for (owner, borrower), layers in sorted(wanted.items()))
