"""The part of a transition in which KV changes its home, at one rank.

The layer host copies, in both directions, because it alone knows what its batches write: to its own memory, or to that
of their owner, between batches that go on using the old home. What they write meanwhile is noted and copied again. In
RELEASE it copies the rest between two batches, and the next one uses the new home. Where memory is mapped, what is
copied lies aside until it takes its place behind the slots, at the same addresses: batches and captured graphs do not
notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from kunserve_sgl.exchange.kv_homes import RemoteKv
from kunserve_sgl.policy.plan import KvMove
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.kv_copy import CopyPace, KvCopy
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.replica.steps import Step, named


class KvMoves:
    """Knows the steps of the moves that concern one rank."""

    def __init__(self, memory: ReplicaMemory, engine: Engine, loans: Loans, writes: KvWrites) -> None:
        self._replica = memory.replica
        self._memory = memory
        self._engine = engine
        self._loans = loans
        self._writes = writes
        self._copies: dict[KvMove, KvCopy] = {}
        self.pace = CopyPace()

    def preparing(self, moves: Iterable[KvMove]) -> Iterator[Step]:
        """Yields the steps that get memory, and note what is written from now on. They come before anything is lent."""
        memory, writes = self._memory, self._writes
        for move in moves:
            what, place = _named(move), (move.extent, move.layer)
            slots = memory.slots(move.extent)
            if move.host == self._replica:
                yield Step(
                    f"note what is written to {what}",
                    partial(writes.watch, slots, move.layer),
                    undo=partial(writes.forget, slots, move.layer),
                )
            if move.target == move.host == self._replica:
                way = self._loans.ways.of(self._lent(move))
                yield Step(
                    f"get memory to copy {what} to",
                    partial(way.get_room, move),
                    undo=partial(way.give_room_back, move),
                )
            elif move.target == self._replica:
                yield Step(
                    f"get memory for {what}",
                    partial(memory.take_home, *place),
                    reopen=partial(memory.leave_home, *place),
                    frees_lent=True,
                )

    def copying(self, moves: Iterable[KvMove]) -> Iterator[KvCopy]:
        """Yields what has to be copied here."""
        for move in moves:
            if move.host == self._replica:
                lent = self._lent(move)
                transfer = self._loans.ways.of(lent).transfer(move, lent)
                slots = self._memory.slots(move.extent)
                wait_for_device, wait_for_copy = self._engine.synchronize, self._engine.layers.synchronize
                copy = KvCopy(transfer, slots, move.layer, self._writes, self.pace, wait_for_device, wait_for_copy)
                self._copies[move] = copy
                yield copy

    def changing_over(self, moves: Iterable[KvMove]) -> Iterator[Step]:
        """Yields the steps that put what was copied behind the slots. Each waits for the device: batches run in
        between."""
        for move in moves:
            if move.host == self._replica:
                yield Step(f"use {_named(move)} at its new home", partial(self._change_over, move))

    def leaving(self, moves: Iterable[KvMove]) -> Iterator[Step]:
        """Yields the steps that free what was lent to the layer host, which has given it back."""
        for move in moves:
            if move.source == self._replica != move.host:
                yield Step(
                    f"free the memory of {_named(move)}",
                    partial(self._memory.leave_home, move.extent, move.layer, after=()),
                )

    def end(self) -> None:
        """Forgets what belongs to one transition."""
        while self._copies:
            self._copies.popitem()[1].close()
        self._writes.forget_all()

    def _lent(self, move: KvMove) -> RemoteKv:
        """Returns what the other home of a move has lent to this one, the layer host."""
        other = move.source if move.target == self._replica else move.target
        return self._loans.borrowed_of(other, move.extent, move.layer)

    def _change_over(self, move: KvMove) -> None:
        kv = self._lent(move)
        self._copies[move].finish()
        if move.target == self._replica:
            self._loans.give_back(move.source, move.extent, move.layer)
        self._loans.ways.of(kv).change_over(move, kv)
        self._writes.forget(self._memory.slots(move.extent), move.layer)


def _named(move: KvMove) -> str:
    return f"the KV of {named(move.extent)} in layer {move.layer}"
