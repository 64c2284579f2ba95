"""KV that changes its home in the background, as the coordinator sees it: what is next, and how far it has come."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from kunserve_sgl.args import Exchange
from kunserve_sgl.control.messages import ReadSpeeds
from kunserve_sgl.control.transition import End, Transition
from kunserve_sgl.policy.back_off import back_off_s
from kunserve_sgl.policy.demand import Rate, ReplicaLoad
from kunserve_sgl.policy.exchange import exchange_round, move_frames, remote_kv, remote_layers, why_no_round
from kunserve_sgl.policy.exchange_worth import Asking, Moves, Worth, worth_of_asking, worth_of_reading
from kunserve_sgl.policy.plan import KvMove, Plan, ReplicaFacts, kv_moves

logger = logging.getLogger(__name__)

_FAR_SLOWER = 1.0  # what reading takes longer, as a share of what it takes at home
_LOOK_INTERVAL_S = 1.0  # between two looks at the load
_RATE_WINDOW_S = 5.0
_EXPERIENCE_WEIGHT = 0.3  # of the last move, among those before
# After a transition that failed, doubled with every further one.
_FIRST_BACK_OFF_S = 1.0
_LONGEST_BACK_OFF_S = 60.0


_T = TypeVar("_T")
Pair = tuple[int, int]  # the layer host, and the home of KV that it uses


@dataclass(slots=True)
class _Pair:
    """Keeps what was decided of KV at a home elsewhere, since when there is some."""

    remote_since_s: float
    pays_since_s: float | None = None
    moves: bool = False
    is_told: bool = False


class BackgroundExchange:
    """Decides what moves next, and keeps book. `clock` is monotonic, in seconds; `stay_s` is the shortest time that a
    group stays merged. `maps(host, home)` says whether a layer host maps KV that is elsewhere, and reads it; else
    its home attends to it."""

    def __init__(
        self,
        mode: Exchange,
        ranks: int,
        clock: Callable[[], float],
        stay_s: float,
        maps: Callable[[int, int], bool] = lambda host, home: True,
    ) -> None:
        self.mode = mode
        self._maps = maps
        self._ranks = ranks
        self._clock = clock
        self._stay_s = stay_s
        self._reads: dict[Pair, ReadSpeeds] = {}
        self._used_tokens: dict[int, int] = {}
        self._batches: dict[int, Rate] = {}
        self._asking: dict[Pair, Asking] = {}
        self._pairs: dict[Pair, _Pair] = {}
        self._worth: dict[Pair, Worth] = {}
        self._drop_pause_s = 0.0  # for each part of which the last drop has made the KV remote
        self._move_pause_s: float | None = None  # for each part that has moved
        self._looks_again_s = float("-inf")
        self._asked: tuple[Plan, Sequence[ReplicaFacts], frozenset[int]] | None = None
        self._next: Plan | None = None
        self._failures = 0
        self._not_before_s = float("-inf")
        self._held_until_s: dict[int, float] = {}
        self.moved_bytes = 0  # to where it is read, since the start, over all ranks
        self.seconds = 0.0  # that this took
        self.returned_bytes = 0  # to where it was before
        self.last_failure = ""
        self.lacks = ""  # why nothing moves although KV should
        self._told_epoch = -1  # of the plan under which that was last said

    def due_s(self) -> float:
        """Says when something may be begun, on the clock's scale."""
        return max((self._not_before_s, *self._held_until_s.values()))

    def hold(self, number: int, until_s: float) -> None:
        """Begins nothing until that time, or until `free` is called with the same number."""
        self._held_until_s[number] = until_s

    def free(self, number: int) -> None:
        """Ends what `hold` has begun, if it has not ended."""
        self._held_until_s.pop(number, None)

    def next_plan(self, plan: Plan, facts: Sequence[ReplicaFacts], unavailable: Collection[int]) -> Plan | None:
        """Returns the plan after the next transition; None where nothing is to move now. It is asked often, and looks
        anew only when something has changed."""
        if self.mode is Exchange.OFF:
            return None
        if self.mode is Exchange.AUTO and self._clock() >= self._looks_again_s:
            self._looks_again_s = self._clock() + _LOOK_INTERVAL_S
            self._asked = None
        asked = plan, facts, frozenset(unavailable)
        last = self._asked
        if last is None or asked[0] is not last[0] or asked[1] is not last[1] or asked[2] != last[2]:
            self._asked = asked
            wanted = self._wanted(plan, facts)
            self._next = exchange_round(plan, facts, wanted, unavailable)
            self.lacks = "" if self._next is not None else why_no_round(plan, facts, wanted, unavailable)
            if self.lacks and self._told_epoch != plan.epoch:
                self._told_epoch = plan.epoch
                logger.warning("KunServe exchange: no KV moves: %s", self.lacks)
        return self._next

    def leaves_spare(self, members: Collection[int], are_apart: bool) -> bool:
        """Says whether a drop is to leave frames for KV to move. `are_apart` says of `members` that they are on several
        GPUs: where nothing is measured, reading is taken to be slower there. On one, or on one host, it has to be far
        slower: what is measured there differs by chance, and slots would be lost for that. By messages attention
        elsewhere is slower wherever they are, and by how much is only known when batches run merged."""
        if self.mode is not Exchange.AUTO:
            return self.mode is Exchange.ON
        pairs = [(host, owner) for host in members for owner in members if host != owner]
        if not all(itertools.starmap(self._maps, pairs)):
            return True
        known = [self._reads[pair] for pair in pairs if pair in self._reads]
        margin = 0.0 if are_apart else _FAR_SLOWER
        is_slower = any(1 / each.borrowed - 1 / each.own > max(each.noise, margin) / each.own for each in known)
        return is_slower or (are_apart and not known)

    def on_load(self, replica: int, load: ReplicaLoad) -> None:
        """Takes in a replica's report."""
        now_s = self._clock()
        self._used_tokens[replica] = load.used_tokens
        self._batches.setdefault(replica, Rate(_RATE_WINDOW_S)).update(now_s, load.batches)
        for times in load.attention:
            self._asking.setdefault((replica, times.home), Asking(_RATE_WINDOW_S)).update(now_s, times)

    def _wanted(self, plan: Plan, facts: Sequence[ReplicaFacts]) -> list[KvMove]:
        remote = remote_kv(plan)
        if self.mode is Exchange.ON:
            return list(remote)
        now_s = self._clock()
        for rate in self._batches.values():
            rate.fade(now_s)
        for asking in self._asking.values():
            asking.fade(now_s)
        moves: dict[Pair, list[KvMove]] = {}
        for move in remote:
            moves.setdefault((move.host, move.source), []).append(move)
        self._pairs = {pair: self._pairs.get(pair) or _Pair(now_s) for pair in moves}
        paying = {pair for pair, known in self._pairs.items() if self._pays(pair, known, moves[pair], plan, facts)}
        return [move for move in remote if (move.host, move.source) in paying]

    def _pays(
        self, pair: Pair, known: _Pair, moves: Sequence[KvMove], plan: Plan, facts: Sequence[ReplicaFacts]
    ) -> bool:
        """Says whether the moves between two homes are to be made: where they have paid, by all that was measured, for
        as long as the rates reach back."""
        now_s, (host, home) = self._clock(), pair
        verdict = self._worth_of(pair, known, moves, plan, facts)
        if verdict is None:
            return False
        self._worth[pair] = verdict
        if not verdict.pays(known.moves):
            known.pays_since_s = None
        elif known.pays_since_s is None:
            known.pays_since_s = now_s
        pays = known.pays_since_s is not None and (known.moves or now_s >= known.pays_since_s + _RATE_WINDOW_S)
        if pays != known.moves or not known.is_told:
            known.is_told = True
            what = "moves" if pays else "stays"
            if not pays and known.pays_since_s is not None:
                what = f"moves when that has been so for {_RATE_WINDOW_S:g} s"
            logger.info("KunServe exchange: replica %d %s: KV of replica %d %s", host, verdict.reason, home, what)
        known.moves = pays
        return pays

    def _worth_of(
        self, pair: Pair, known: _Pair, moves: Sequence[KvMove], plan: Plan, facts: Sequence[ReplicaFacts]
    ) -> Worth | None:
        """Compares what moves between two homes save and take; None where something has not been measured."""
        speeds = self._reads.get(pair)
        if speeds is None:
            return None
        fact = facts[pair[0]]
        sizes = [move_frames(move, fact) * fact.frame_bytes for move in moves]
        stay_s = max(self._stay_s, self._clock() - known.remote_since_s)
        pause_s = self._drop_pause_s if self._move_pause_s is None else self._move_pause_s
        cost = Moves(len(moves), sum(sizes), pause_s, stay_s)
        if self._maps(*pair):
            read = sum(map(partial(self._read_bytes_per_s, granule_slots=fact.granule_slots), moves, sizes))
            return worth_of_reading(speeds.own, speeds.borrowed, speeds.noise, read, cost)
        asking = self._asking.get(pair)
        if asking is None:
            return None
        left, all_of_them = remote_layers(plan)[pair]
        return worth_of_asking(speeds.borrowed, asking, 1 - left / all_of_them, cost)

    def _read_bytes_per_s(self, move: KvMove, size_bytes: int, granule_slots: int) -> float:
        """Estimates what batches of the KV's owner read of it: all that is used, each."""
        owner, slots = move.extent.replica, move.extent.granules * granule_slots
        batches = self._batches.get(owner)
        used = min(slots, self._used_tokens.get(owner, 0)) / slots
        return 0.0 if batches is None else size_bytes * used * batches.per_second

    def forget(self, replica: int) -> None:
        """Takes note that a replica has been started again: it may be on another machine, and it counts anew."""
        self._reads, self._asking = _without(self._reads, replica), _without(self._asking, replica)
        self._pairs, self._worth = _without(self._pairs, replica), _without(self._worth, replica)
        self._used_tokens.pop(replica, None)
        self._batches.pop(replica, None)

    def on_end(
        self, transition: Transition, facts: Sequence[ReplicaFacts], is_drop: bool, is_interrupted: bool
    ) -> None:
        """Takes note of a transition that has ended: of what was measured, and of KV that should have moved, also
        homewards. `is_drop` says that it drops layers."""
        self._reads.update(transition.reads)
        moves = kv_moves(transition.old, transition.new)
        if transition.end is End.SUCCEEDED:
            self._learn_from(transition, len(moves), is_drop)
        if not moves:
            return
        if transition.end is End.SUCCEEDED:
            self._failures, self.last_failure = 0, ""
            for move in moves:
                fact = facts[move.target]
                size_bytes = move_frames(move, fact) * fact.frame_bytes * self._ranks
                if move.target == move.host:
                    self.moved_bytes += size_bytes
                else:
                    self.returned_bytes += size_bytes
            self.seconds += sum(transition.phase_seconds.values())
        elif not is_interrupted:
            self.last_failure = transition.reason
            self._not_before_s = self._clock() + back_off_s(_FIRST_BACK_OFF_S, _LONGEST_BACK_OFF_S, self._failures)
            self._failures += 1

    def _learn_from(self, transition: Transition, moves: int, is_drop: bool) -> None:
        """Takes note of what a transition has paused, and that fewer orders are sent when KV has moved. A drop does
        for all layers what a move does for one; a loan or a restore does something else."""
        before, after = (remote_layers(plan) for plan in (transition.old, transition.new))
        parts = sum(count - min(count, before.get(pair, (0, 0))[1]) for pair, (_, count) in after.items())
        if moves:
            last_s = transition.pause_s if self._move_pause_s is None else self._move_pause_s
            self._move_pause_s = last_s + _EXPERIENCE_WEIGHT * (transition.pause_s - last_s)
        elif is_drop and parts:
            self._drop_pause_s = transition.pause_s / parts
        for pair, asking in self._asking.items():
            (_, many), (_, few) = (each.get(pair, (0, 0)) for each in (before, after))
            if few < many:
                asking.scale(few / many)

    def status(self, plan: Plan, facts: Sequence[ReplicaFacts], is_running: bool) -> dict[str, Any]:
        """Returns what GET /kunserve/status says: how much KV is used at another home, per replica whose it is,
        and how much has gone to where it is read."""
        away: dict[int, list[int]] = {fact.replica: [0, 0, 0, 0] for fact in facts}
        for extent in plan.extents:
            for layer, (home, host) in enumerate(zip(extent.homes, plan.hosts[extent.replica], strict=True)):
                fact = facts[home]
                size_bytes = extent.granules * fact.granule_frames[layer] * fact.frame_bytes * self._ranks
                if home != host:
                    away[extent.replica][0] += 1
                    away[extent.replica][1] += size_bytes
                elif home != extent.replica and extent.first_granule == 0:
                    away[extent.replica][2] += 1
                    away[extent.replica][3] += size_bytes
        return {
            "mode": self.mode.value,
            "running": is_running,
            "parts": sum(each[0] + each[2] for each in away.values()),
            "parts_done": sum(each[2] for each in away.values()),
            "moved_bytes": self.moved_bytes,
            "returned_bytes": self.returned_bytes,
            "seconds": self.seconds,
            "bytes_per_second": self.moved_bytes / self.seconds if self.seconds and self.moved_bytes else 0.0,
            "last_failure": self.last_failure,
            "lacks": self.lacks,
            "reads": [
                {
                    "host": host,
                    "owner": owner,
                    "own_bytes_per_second": speeds.own,
                    "borrowed_bytes_per_second": speeds.borrowed,
                    "noise": speeds.noise,
                    "reason": self._worth[host, owner].reason if (host, owner) in self._worth else "",
                }
                for (host, owner), speeds in sorted(self._reads.items())
            ],
            "replicas": {replica: _away_status(each) for replica, each in away.items()},
        }


def _without(known: Mapping[Pair, _T], replica: int) -> dict[Pair, _T]:
    return {pair: each for pair, each in known.items() if replica not in pair}


def _away_status(each: Sequence[int]) -> Mapping[str, int]:
    names = ("remote_layers", "remote_bytes", "away_layers", "away_bytes")
    return dict(zip(names, each, strict=True))
