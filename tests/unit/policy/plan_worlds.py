"""Deployments to plan for, random plans in them, and a simulation of all members' memory through a transition."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from kunserve_sgl.control.messages import Phase
from kunserve_sgl.policy.drop_plan import DropWish
from kunserve_sgl.policy.partial_restore import RestoreWish, Undone, first_step
from kunserve_sgl.policy.plan import (
    KvLoan,
    KvMove,
    KvPart,
    Place,
    Plan,
    ReplicaFacts,
    ReplicaSteps,
    kv_loans,
    steps_of,
)

Piece = tuple[Place, int]  # the KV of one layer of an extent


def make_facts(
    replicas: int,
    layers: int | Sequence[int] = 8,
    *,
    granule: int | Sequence[int] = 1,
    base: int = 4,
    room: int = 1000,
    free: int | Sequence[int] = 0,
    granule_slots: int = 16,
) -> tuple[ReplicaFacts, ...]:
    """`layers` is a number of layers of 10 frames each, or their frames."""
    layer_frames = (10,) * layers if isinstance(layers, int) else tuple(layers)
    granule_frames = (granule,) * len(layer_frames) if isinstance(granule, int) else tuple(granule)
    return tuple(
        ReplicaFacts(
            replica=replica,
            frame_bytes=4096,
            granule_slots=granule_slots,
            base_granules=base,
            max_granules=room,
            free_frames=free if isinstance(free, int) else free[replica],
            layer_frames=layer_frames,
            granule_frames=granule_frames,
        )
        for replica in range(replicas)
    )


def pieces(parts: Sequence[KvPart]) -> list[Piece]:
    return [(part.extent.place, layer) for part in parts for layer in part.layers]


class Memory:
    """What is where in every replica, and the rules that must hold at every moment."""

    def __init__(self, plan: Plan, facts: Sequence[ReplicaFacts]) -> None:
        self.facts = facts
        self.replicas = range(len(facts))
        self.free = [fact.free_frames for fact in facts]
        self.resident = [set(layers) for layers in plan.resident]
        self.home: list[set[Piece]] = [
            {(e.place, layer) for e in plan.extents for layer, home in enumerate(e.homes) if home == r}
            for r in self.replicas
        ]
        self.lent: list[Counter[Piece]] = [Counter() for _ in self.replicas]
        self.borrowed: list[set[Piece]] = [set() for _ in self.replicas]
        # At a layer host, KV that is on its way: what is aside, and what of that has been copied.
        self.aside: list[dict[Piece, KvMove]] = [{} for _ in self.replicas]
        self.copied: list[set[Piece]] = [set() for _ in self.replicas]
        self.lent_parameters: list[Counter[int]] = [Counter() for _ in self.replicas]
        for loan in kv_loans(plan):
            self.lend(loan)
            self.borrow(loan)
        # what batches may touch: the routes in effect, and the slots that allocators give out
        self.route = [set(plan.hosts[r]) and plan.hosts[r] for r in self.replicas]
        self.open = [{e.place for e in plan.extents_of(r)} for r in self.replicas]
        self.total = [self.used(r) + self.free[r] for r in self.replicas]
        self.check()

    def used(self, r: int) -> int:
        fact = self.facts[r]
        own = [*self.home[r], *(piece for piece, move in self.aside[r].items() if move.target == r)]
        return sum(fact.layer_frames[layer] for layer in self.resident[r]) + sum(
            granules * fact.granule_frames[layer] for (_, _, granules), layer in own
        )

    def check(self) -> None:
        for r in self.replicas:
            assert self.free[r] >= 0
            assert self.free[r] + self.used(r) == self.total[r], "the ledger does not balance"
            assert all(piece in self.home[r] for piece in +self.lent[r]), "lent memory is not there"
            for place in self.open[r]:
                for layer, host in enumerate(self.route[r]):
                    piece = (place, layer)
                    assert layer in self.resident[host], f"{r} routes layer {layer} to {host}, which has no parameters"
                    assert piece in self.home[host] or piece in self.borrowed[host], f"{piece} is not mapped at {host}"
                    assert any(piece in home for home in self.home), "borrowed memory is not there"

    def lend(self, loan: KvLoan) -> None:
        for piece in pieces(loan.parts):
            assert piece in self.home[loan.owner]
            self.lent[loan.owner][piece] += 1

    def borrow(self, loan: KvLoan) -> None:
        for piece in pieces(loan.parts):
            assert self.lent[loan.owner][piece], "borrowed before it was lent"
            assert piece not in self.borrowed[loan.borrower]
            assert piece not in self.home[loan.borrower]
            self.borrowed[loan.borrower].add(piece)

    def unmap(self, r: int, parts: Sequence[KvPart]) -> None:
        for place, layer in pieces(parts):
            assert not self.lent[r][place, layer], "unmapped while lent"
            assert all((place, layer) not in borrowed for borrowed in self.borrowed), "unmapped while borrowed"
            self.home[r].remove((place, layer))
            self.free[r] += place[2] * self.facts[r].granule_frames[layer]

    def map(self, r: int, parts: Sequence[KvPart]) -> None:
        for place, layer in pieces(parts):
            assert (place, layer) not in self.home[r]
            self.home[r].add((place, layer))
            self.free[r] -= place[2] * self.facts[r].granule_frames[layer]
            assert self.free[r] >= 0, f"replica {r} has no frame for new slots"

    def take_aside(self, r: int, move: KvMove) -> None:
        piece = (move.extent.place, move.layer)
        assert piece not in self.aside[r]
        self.aside[r][piece] = move
        if move.target == r:
            self.free[r] -= move.extent.granules * self.facts[r].granule_frames[move.layer]
            assert self.free[r] >= 0, f"replica {r} has no frame for KV that comes home"

    def change_over(self, r: int, move: KvMove) -> None:
        piece = (move.extent.place, move.layer)
        del self.aside[r][piece]
        self.copied[r].remove(piece)
        if move.target == r:
            self.borrowed[r].remove(piece)
            self.home[r].add(piece)
        else:
            self.home[r].remove(piece)
            self.free[r] += move.extent.granules * self.facts[r].granule_frames[move.layer]
            self.borrowed[r].add(piece)

    def run(self, old: Plan, new: Plan, order: random.Random) -> None:
        """All phases; members take their part of each in a random order."""
        steps = {r: steps_of(old, new, r) for r in self.replicas}
        for phase in (Phase.PREPARE, Phase.LOAD, Phase.SWITCH, Phase.RELEASE, Phase.RESUME):
            members = list(self.replicas)
            order.shuffle(members)
            if phase is Phase.PREPARE:  # borrowers wait for lenders
                for r in members:
                    self.prepare_own(r, steps[r])
            for r in members:
                getattr(self, f"do_{phase.value}")(r, steps[r], new)
                self.check()

    def prepare_own(self, r: int, steps: ReplicaSteps) -> None:
        self.open[r] -= {extent.place for extent in steps.close}
        for move in steps.moves:
            if move.target == r != move.host:
                self.map(r, [move.part])
        self.map(r, steps.map_lent)
        for loan in steps.lend_kv:
            assert loan.owner == r
            self.lend(loan)
        for parameters in steps.lend_parameters:
            assert parameters.owner == r
            assert set(parameters.layers) <= self.resident[r]
            self.lent_parameters[r].update(parameters.layers)

    def do_prepare(self, r: int, steps: ReplicaSteps, new: Plan) -> None:
        for move in steps.moves:
            if move.host == r:
                assert move.target == r or self.lent[move.target][move.extent.place, move.layer]
                self.take_aside(r, move)
        coming = [(move.extent.place, move.layer) for move in steps.moves]
        for loan in steps.borrow_kv:
            assert loan.borrower == r
            for part in loan.parts:
                layers = tuple(layer for layer in part.layers if (part.extent.place, layer) not in coming)
                self.borrow(replace(loan, parts=(KvPart(part.extent, layers),)))

    def do_load(self, r: int, steps: ReplicaSteps, new: Plan) -> None:
        for move in steps.moves:
            if move.host == r:
                piece = (move.extent.place, move.layer)
                assert piece in self.home[r] or piece in self.borrowed[r], "nothing to copy from"
                self.copied[r].add(piece)
        self.unmap(r, steps.unmap_kv)
        assert sorted(layer for loan in steps.borrow_parameters for layer in loan.layers) == list(steps.load)
        for loan in steps.borrow_parameters:
            for layer in loan.layers:
                assert self.lent_parameters[loan.owner][layer]
                assert layer in self.resident[loan.owner]
                self.free[r] -= self.facts[r].layer_frames[layer]
                self.resident[r].add(layer)
        assert self.free[r] >= 0, f"replica {r} has no frame for parameters"

    def do_switch(self, r: int, steps: ReplicaSteps, new: Plan) -> None:
        self.route[r] = new.hosts[r]

    def do_release(self, r: int, steps: ReplicaSteps, new: Plan) -> None:
        for layer in steps.drop:
            self.resident[r].remove(layer)
            self.free[r] += self.facts[r].layer_frames[layer]
        coming = [(move.extent.place, move.layer) for move in steps.moves]
        for loan in steps.return_kv:
            for piece in pieces(loan.parts):
                if piece not in coming:
                    self.borrowed[r].remove(piece)
        for move in steps.moves:
            if move.host == r:
                self.change_over(r, move)
        self.map(r, steps.map_kv)

    def do_resume(self, r: int, steps: ReplicaSteps, new: Plan) -> None:
        self.open[r] |= {extent.place for extent in steps.open}
        for loan in steps.end_kv:
            for piece in pieces(loan.parts):
                assert piece not in self.borrowed[loan.borrower], "ended before it was returned"
                self.lent[r][piece] -= 1
        for move in steps.moves:
            if move.source == r != move.host:
                self.unmap(r, [move.part])
        self.unmap(r, steps.unmap_lent)


def facts_after(memory: Memory) -> tuple[ReplicaFacts, ...]:
    return tuple(replace(fact, free_frames=memory.free[fact.replica]) for fact in memory.facts)


def random_wish(rng: random.Random, plan: Plan) -> DropWish:
    """Some of the current groups, merged with each other, with all that a wish may say."""
    units = [list(group) for group in plan.groups]
    rng.shuffle(units)
    groups: list[list[int]] = []
    while units and (not groups or rng.random() < 0.4):
        group: list[int] = []
        while units and (len(group) < 2 or rng.random() < 0.4):
            group += units.pop()
        if len(group) > 1:
            groups.append(group)
    if not groups:
        groups = [list(range(plan.replica_count))]
    kind = rng.choice(["all", "tokens", "same", "each"])
    layers = range(plan.layer_count)
    wanted = tuple(tuple(group) for group in groups)
    if kind == "tokens":
        return DropWish(wanted, tokens=rng.randint(1, 300))
    if kind == "same" and len(groups) == 1:
        return DropWish(wanted, layers=tuple(rng.choice(keepers(plan, groups[0], layer)) for layer in layers))
    if kind == "each":
        return DropWish(
            wanted,
            layers={
                replica: tuple(rng.choice(keepers(plan, group, layer)) for layer in layers)
                for group in groups
                for replica in group
                if rng.random() < 0.7
            },
        )
    return DropWish(wanted)


def random_restore(rng: random.Random, plan: Plan, undone: Undone) -> RestoreWish:
    """A partial one."""
    members, before = undone
    if rng.random() < 0.4:
        return RestoreWish(tokens=rng.randint(1, 200))
    dropped = {member: sorted(set(before.resident[member]) - set(plan.resident[member])) for member in members}
    some = {member: rng.sample(layers, rng.randint(0, len(layers))) for member, layers in dropped.items()}
    return RestoreWish(layers={member: layers for member, layers in some.items() if layers})


def way_to(plan: Plan, target: Plan) -> list[Plan]:
    """The plans that a restore goes through."""
    first = first_step(plan, target)
    return [target] if first is target else [first, replace(target, epoch=first.epoch + 1)]


def keepers(plan: Plan, group: list[int], layer: int) -> list[int]:
    return [replica for replica in group if layer in plan.resident[replica]]


def last_merges(history: list[tuple[tuple[int, ...], Plan]]) -> list[int]:
    """Where in the history the merges are that no later one builds on."""
    later = [{r for members, _ in history[i + 1 :] for r in members} for i in range(len(history))]
    return [i for i, (members, _) in enumerate(history) if not later[i] & set(members)]
