"""KV that changes its home in the background, as the coordinator sees it: what is next, and how far it has come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kunserve_sgl.args import Exchange
from kunserve_sgl.control.messages import ReadSpeeds
from kunserve_sgl.control.transition import End, Transition
from kunserve_sgl.policy.back_off import back_off_s
from kunserve_sgl.policy.demand import Rate, ReplicaLoad
from kunserve_sgl.policy.exchange import Worth, exchange_round, move_frames, remote_kv, why_no_round, worth
from kunserve_sgl.policy.plan import KvMove, Plan, ReplicaFacts, kv_moves

logger = logging.getLogger(__name__)

_FAR_SLOWER = 1.0  # what reading takes longer, as a share of what it takes at home
_LOOK_INTERVAL_S = 1.0  # between two looks at the load
_RATE_WINDOW_S = 5.0
# After a transition that failed, doubled with every further one.
_FIRST_BACK_OFF_S = 1.0
_LONGEST_BACK_OFF_S = 60.0


class BackgroundExchange:
    """Decides what moves next, and keeps book. `clock` is monotonic, in seconds; `stay_s` is the shortest time that a
    group stays merged."""

    def __init__(self, mode: Exchange, ranks: int, clock: Callable[[], float], stay_s: float) -> None:
        self.mode = mode
        self._ranks = ranks
        self._clock = clock
        self._stay_s = stay_s
        self._reads: dict[tuple[int, int], ReadSpeeds] = {}  # by layer host and owner
        self._used_tokens: dict[int, int] = {}
        self._batches: dict[int, Rate] = {}
        self._worth: dict[tuple[int, int], Worth] = {}
        self._looks_again_s = float("-inf")
        self._asked: tuple[Plan, Sequence[ReplicaFacts], frozenset[int]] | None = None
        self._next: Plan | None = None
        self._failures = 0
        self._not_before_s = float("-inf")
        self.moved_bytes = 0  # to where it is read, since the start, over all ranks
        self.seconds = 0.0  # that this took
        self.returned_bytes = 0  # to where it was before
        self.last_failure = ""
        self.lacks = ""  # why nothing moves although KV should
        self._told_epoch = -1  # of the plan under which that was last said

    def due_s(self) -> float:
        """Says when something may be begun, on the clock's scale."""
        return self._not_before_s

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
        slower: what is measured there differs by chance, and slots would be lost for that."""
        if self.mode is not Exchange.AUTO:
            return self.mode is Exchange.ON
        pairs = [(host, owner) for host in members for owner in members if host != owner]
        known = [self._reads[pair] for pair in pairs if pair in self._reads]
        margin = 0.0 if are_apart else _FAR_SLOWER
        is_slower = any(1 / each.borrowed - 1 / each.own > max(each.noise, margin) / each.own for each in known)
        return is_slower or (are_apart and not known)

    def on_load(self, replica: int, load: ReplicaLoad) -> None:
        """Takes in a replica's report."""
        self._used_tokens[replica] = load.used_tokens
        self._batches.setdefault(replica, Rate(_RATE_WINDOW_S)).update(self._clock(), load.batches)

    def _wanted(self, plan: Plan, facts: Sequence[ReplicaFacts]) -> list[KvMove]:
        remote = remote_kv(plan)
        return [move for move in remote if self.mode is Exchange.ON or self._pays(move, facts)]

    def _pays(self, move: KvMove, facts: Sequence[ReplicaFacts]) -> bool:
        """Says whether a move saves more time than it takes, by what the layer host has measured and what is read."""
        pair = move.host, move.source
        speeds = self._reads.get(pair)
        if speeds is None or move.target != move.host:
            return False
        fact, owner = facts[move.target], move.extent.replica
        size_bytes = move_frames(move, fact) * fact.frame_bytes
        slots = move.extent.granules * fact.granule_slots
        batches = self._batches.get(owner)
        per_batch = size_bytes * min(slots, self._used_tokens.get(owner, 0)) / slots
        read = 0.0 if batches is None else per_batch * batches.per_second
        verdict = worth(speeds.own, speeds.borrowed, speeds.noise, size_bytes, read, self._stay_s)
        if verdict.pays != (pair in self._worth and self._worth[pair].pays) or pair not in self._worth:
            logger.info(
                "KunServe exchange: replica %d %s: %s",
                move.host,
                verdict.reason,
                f"KV of replica {owner} moves" if verdict.pays else f"KV of replica {owner} stays",
            )
        self._worth[pair] = verdict
        return verdict.pays

    def on_end(self, transition: Transition, facts: Sequence[ReplicaFacts], is_interrupted: bool) -> None:
        """Takes note of a transition that has ended: of what was measured, and of KV that should have moved, also
        homewards."""
        self._reads.update(transition.reads)
        if not kv_moves(transition.old, transition.new):
            return
        if transition.end is End.SUCCEEDED:
            self._failures, self.last_failure = 0, ""
            for move in kv_moves(transition.old, transition.new):
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

    def status(self, plan: Plan, facts: Sequence[ReplicaFacts], is_running: bool) -> dict[str, Any]:
        """Returns what GET /kunserve/status says: how much KV is read through mapped memory, per replica whose it is,
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


def _away_status(each: Sequence[int]) -> Mapping[str, int]:
    names = ("remote_layers", "remote_bytes", "away_layers", "away_bytes")
    return dict(zip(names, each, strict=True))
