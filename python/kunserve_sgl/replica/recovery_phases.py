"""The phases of a recovery at one rank: how it becomes a replica by itself again when one that it is merged with has
died, in whatever state that finds it. All members finish a phase before the next begins.

ABANDON   Nothing waits for anybody any more. A batch that is on its way or at another replica is given up: whoever
          waits for it leaves it (`OrdersAway.leave_if_called_off`), and all ranks of the replica leave the same one.
          All running requests go back into the queue, as SGLang takes requests back for want of memory, and every
          slot and row is free: who knows what was written. No batch is run from here on. What was borrowed is
          unmapped: KV of others, parameters, request rows. What a transition was about to do is forgotten. The answer
          says which layers are here.
RELOAD    Nobody has anything of this rank mapped any more, so loans end. Slots that a drop had made room for go, and KV
          of others that had its home here: the frames behind them become free. Base slots get memory again in layers
          whose KV had its home elsewhere. Layers that others lack are lent to them, as the order says, and layers
          that lack here get frames and their bytes: from the peer that the order names, which is waited for a while,
          else from what this rank has itself. Their checksums prove them.
REVIVE    The normal plan holds, and what was lent is given back. Requests are scheduled again: they are prefilled with
          what they have so far, and go on.

Nothing here looks at the plans that held, because a death may come between any two steps of a transition. Everything is
found in the books: what is lent, what is borrowed, which slots are hosted, which layers are dropped. There is no way
back, and a rank that cannot do a step says why; its replica is ended then, and the others begin again without it.

The KV in base slots of the layers that ran here is still whole, and is computed again all the same. That is simple, and
what a death costs is a prefill of what runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Protocol

from kunserve_sgl.control.messages import Phase
from kunserve_sgl.memory.source_chain import NamedSource
from kunserve_sgl.replica.active_transition import ActiveTransition
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_moves import KvMoves
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.replica.steps import LOAD_BYTES, LongStep, Step

logger = logging.getLogger(__name__)

# In these no batch may run.
STANDING_PHASES = (Phase.ABANDON, Phase.RELOAD)


class Batches(Protocol):
    """Says what a recovery needs of the part that runs batches; see `replica.hosting.LayerHosting`."""

    def forget_everything(self) -> None:
        """Drops others' batches, and what is known of own ones that are with others."""

    def disconnect(self, peers: Iterable[int]) -> None:
        """Ends the connections to `peers`, who do so too."""


class RecoveryPhases:
    """Knows the steps of each phase at one rank. What all ranks of a replica must do at the same batch boundary is done
    when a phase begins."""

    def __init__(
        self,
        plan: HeldPlan,
        engine: Engine,
        memory: ReplicaMemory,
        loans: Loans,
        batches: Batches,
        moves: KvMoves,
    ) -> None:
        self._plan = plan
        self._engine = engine
        self._memory = memory
        self._loans = loans
        self._batches = batches
        self._came_from: dict[str, list[int]] = {}  # layers that were lacking, by source
        self._moves = moves

    def begin(self, active: ActiveTransition) -> None:
        """Does what has to be done at once in the phase, and lists the rest. Raises KunserveError."""
        _BEGIN[active.phase](self, active)

    def _abandon(self, active: ActiveTransition) -> None:
        self._engine.synchronize()
        active.connection.cancel()
        self._plan.stand()
        self._batches.forget_everything()
        self._engine.abandon_batches()
        self._engine.allocator.prefer(None)
        self._engine.rows.forget_hosts()
        self._moves.end()
        active.todo.extend(self._loans.giving_all_back())
        for other in sorted(set(range(active.new.replica_count)) - {self._memory.replica}):
            unmap = partial(self._engine.rows.unmap_rows_of, other)
            active.todo.append(Step(f"unmap the request rows of replica {other}", unmap))

    def _reload(self, active: ActiveTransition) -> None:
        self._batches.forget_everything()  # what was still on its way
        # From those who do so too, and from who has died. Others keep their connections to this replica.
        self._batches.disconnect({*active.order.members, *active.old.group_of(self._memory.replica)})
        self._came_from.clear()
        allocator, limits = self._engine.allocator, self._engine.limits
        base = self._memory.kv.slots  # which may be in several ranges, after a resize by hand
        for slots in allocator.slot_ranges:
            if slots.first >= base.stop:
                allocator.remove_slots(slots)
        limits.expect_capacity(None)
        limits.cut_where_possible(allocator.size)
        self._engine.capacity_changed()
        active.todo.append(Step("end all loans", self._loans.end_all))
        number = active.order.transition
        active.todo.extend(self._loans.lending_lacking(number, active.loans))
        for slots, layer in self._memory.hosted:
            unmap = partial(self._memory.unmap_hosted, slots, layer)
            active.todo.append(Step(f"unmap slots {slots.first} to {slots.stop} in layer {layer}", unmap))
        for slots, layer in self._memory.staged:
            unmap = partial(self._memory.unstage, slots, layer, after=())
            active.todo.append(Step(f"free the memory aside for layer {layer}", unmap))
        for layer in self._memory.kv.away:
            active.todo.append(Step(f"map base slots in layer {layer}", partial(self._memory.kv.take_back, layer)))
        resident = self._memory.resident_layers
        lacking = [layer for layer in range(self._memory.layer_count) if layer not in resident]
        lent = {layer for loan in active.loans if loan.borrower == self._memory.replica for layer in loan.layers}
        self._loans.expect_layers(lent.intersection(lacking))
        active.todo.extend(self._loading(layer) for layer in lacking if layer not in lent)

    def _revive(self, active: ActiveTransition) -> None:
        self._batches.forget_everything()
        self._plan.enter(active.new)
        for source, layers in self._came_from.items():
            logger.info("KunServe: layers %s have come from %s", layers, source)
        active.todo.append(Step("see whether the books balance", self._memory.frames.check))

    def look_for_lent(self, active: ActiveTransition) -> LongStep | None:
        """Returns what to do next in RELOAD, where the steps so far are done; None where there is nothing now. Whoever
        lends too late is passed over."""
        layer = self._loans.receive_layer(active.order.transition)
        if layer is not None:
            return self._loading(layer)
        if self._loans.awaits_offers and time.monotonic() >= active.lend_until_s:
            late = self._loans.give_up_waiting()
            logger.warning("KunServe: layers %s are not lent in time", late)
            first, *others = map(self._loading, late)
            active.todo.extend(others)
            return first
        return None

    def _loading(self, layer: int) -> LongStep:
        return LongStep(f"load the parameters of layer {layer}", partial(self._load, layer))

    def _load(self, layer: int) -> Generator[None, None, None]:
        region = self._loans.take_region(layer)
        if region is None:
            source = yield from self._memory.restoring_layer(layer, None, LOAD_BYTES)
        else:
            with region:
                name = yield from self._memory.restoring_layer(layer, NamedSource(region.name, region), LOAD_BYTES)
                region.close(after=())  # the checksum has been read, so the copy has ended
            source = region.owner if name == region.name else name
        self._came_from.setdefault(source, []).append(layer)


_BEGIN: dict[Phase, Callable[[RecoveryPhases, ActiveTransition], None]] = {
    Phase.ABANDON: RecoveryPhases._abandon,
    Phase.RELOAD: RecoveryPhases._reload,
    Phase.REVIVE: RecoveryPhases._revive,
}
