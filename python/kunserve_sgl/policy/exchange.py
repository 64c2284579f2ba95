"""Which KV changes its home next: to where its layers run, and back before they move again.

Moves take turns in the frames that are free, so KV cannot come back in any order. Going back over the way that was
taken, last move first, always works, since nothing else has taken frames meanwhile: that is what `MovesMade` is for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from kunserve_sgl.policy.plan import Extent, KvMove, Plan, ReplicaFacts, kv_moves
from kunserve_sgl.policy.plan_check import kv_frames


class MovesMade:
    """Remembers in which order KV has moved."""

    def __init__(self) -> None:
        self._made: list[tuple[int, KvMove]] = []

    def add(self, plan: Plan, moves: Iterable[KvMove]) -> None:
        """Takes note of moves that have led to `plan`. One that undoes the last of its group is as if neither had
        been."""
        for move in moves:
            group = plan.group_of(move.host)
            last = next((at for at in reversed(range(len(self._made))) if self._made[at][1].host in group), None)
            if last is not None and _is_way_back(self._made[last][1], move):
                del self._made[last]
            else:
                self._made.append((plan.epoch, move))

    def last_undone(self, members: Collection[int]) -> KvMove | None:
        """Returns what undoes the last move of `members`; there are frames for it. None where there was none."""
        move = next((move for _, move in reversed(self._made) if move.host in members), None)
        return None if move is None else replace(move, source=move.target, target=move.source)

    def forget(self, members: Collection[int], since: int = -1) -> None:
        """Forgets the moves of `members` that led to plans of epochs after `since`: all have been undone."""
        self._made = [(epoch, move) for epoch, move in self._made if move.host not in members or epoch <= since]


def _is_way_back(one: KvMove, other: KvMove) -> bool:
    return (one.extent.place, one.layer, one.source, one.target) == (
        other.extent.place,
        other.layer,
        other.target,
        other.source,
    )


def remote_kv(plan: Plan) -> tuple[KvMove, ...]:
    """Lists what would have to move for the KV of base slots to be at home where its layer runs, by replica and layer.
    That of other slots is there from the start, but where merged groups have merged again or layers have come back:
    then it stays, since slots that go must be as they came."""
    wanted = {e.place: e.homes if e.first_granule else plan.hosts[e.replica] for e in plan.extents}
    return kv_moves(plan, _with_homes(plan, wanted))


def remote_layers(plan: Plan) -> dict[tuple[int, int], tuple[int, int]]:
    """Counts, by layer host and home, the layers of which a host uses KV at that home: those which are left when all
    KV of base slots has moved, and all of them."""
    base: dict[tuple[int, int], set[int]] = defaultdict(set)
    others: dict[tuple[int, int], set[int]] = defaultdict(set)
    for extent in plan.extents:
        for layer, (home, host) in enumerate(zip(extent.homes, plan.hosts[extent.replica], strict=True)):
            if home != host:
                (others if extent.first_granule else base)[host, home].add(layer)
    return {pair: (len(others[pair]), len(base[pair] | others[pair])) for pair in (*base, *others)}


def moves_before(plan: Plan, new: Plan) -> tuple[KvMove, ...]:
    """Lists what has to move before a transition from `plan` to `new` is possible, where KV has left the home that it
    has in `new`."""
    wanted = {extent.place: extent.homes for extent in new.extents}
    return kv_moves(plan, _with_homes(plan, {e.place: wanted.get(e.place, e.homes) for e in plan.extents}))


def exchange_round(
    plan: Plan, facts: Sequence[ReplicaFacts], moves: Iterable[KvMove], without: Collection[int] = ()
) -> Plan | None:
    """Returns the plan after the next few of `moves`: one to each home that has the frames for it, the first that fits.
    None where there is none. Moves that concern one of the groups of the replicas `without` are left out."""
    chosen: dict[int, KvMove] = {}
    for move in _possible(plan, moves, without):
        target = facts[move.target]
        if move.target not in chosen and move_frames(move, target) <= target.free_frames:
            chosen[move.target] = move
    return after_moves(plan, chosen.values()) if chosen else None


def why_no_round(
    plan: Plan, facts: Sequence[ReplicaFacts], moves: Iterable[KvMove], without: Collection[int] = ()
) -> str:
    """Says what lacks where `exchange_round` finds no frames for any of `moves`, and what would help; empty where none
    of them is to be made."""
    least: dict[int, int] = {}
    for move in _possible(plan, moves, without):
        frames = move_frames(move, facts[move.target])
        least[move.target] = min(frames, least.get(move.target, frames))
    lacks = [
        f"the KV of one layer takes {frames} frames at replica {home}, of which {facts[home].free_frames} are free"
        for home, frames in sorted(least.items())
    ]
    if not lacks:
        return ""
    return (
        f"{'; '.join(lacks)}. A drop leaves so many only where that is not more than half of the slots that it gains. "
        "Needed: fewer base slots (--max-total-tokens), a drop that gains more, or --kunserve-reserve-frames"
    )


def _possible(plan: Plan, moves: Iterable[KvMove], without: Collection[int]) -> Iterator[KvMove]:
    left_out = {member for replica in without for member in plan.group_of(replica)}
    return (move for move in moves if not left_out & {move.source, move.target})


def after_moves(plan: Plan, moves: Iterable[KvMove]) -> Plan:
    """Returns the plan that follows `plan` when these moves have been made."""
    homes = {extent.place: list(extent.homes) for extent in plan.extents}
    for move in moves:
        homes[move.extent.place][move.layer] = move.target
    new = _with_homes(plan, {place: tuple(each) for place, each in homes.items()})
    return replace(new, epoch=plan.epoch + 1)


def move_frames(move: KvMove, fact: ReplicaFacts) -> int:
    """Counts the frames that the KV takes at the replica that `fact` describes."""
    return kv_frames([move.part], fact)


def spare_frames(plan: Plan, fact: ReplicaFacts) -> int:
    """Counts the frames that the replica which `fact` describes needs to begin with: those of the largest part that is
    to come, or to come home."""
    return max(
        (move_frames(move, fact) for move in remote_kv(plan) if fact.replica in (move.source, move.target)), default=0
    )


def _with_homes(plan: Plan, homes: dict[tuple[int, int, int], tuple[int, ...]]) -> Plan:
    def moved(extent: Extent) -> Extent:
        return replace(extent, homes=homes[extent.place])

    return replace(plan, extents=tuple(map(moved, plan.extents)))
