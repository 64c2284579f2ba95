"""The phases of a transition at one rank, and their way back.

This is the story of a drop. All members finish a phase before the next begins.

PREPARE   A member proves that nothing keeps the parameters that go, gets memory behind the request rows of those whose
          layers it will execute, lends the KV of its slots to the layer hosts-to-be, and maps what is lent to it. The
          KV stays where it is, and is mapped at two replicas then. Others' batches may come from now on.
LOAD      Nobody has anything to do in a drop.
SWITCH    Own batches take the new route, between two batches. Both routes would work.
RELEASE   Parameters are dropped: from here on there is no way back. What was borrowed for the old route is given back,
          and frames that were behind parameters go behind the new slots, where each layer runs.
RESUME    New slots have memory in all layers, so requests may use them. Loans that have been given back are booked.

A restore goes through the same phases with other steps. In PREPARE slots that go are closed, once what lives there has
moved; whoever keeps parameters lends them. In LOAD frames behind closed slots become frames behind parameters, which
are copied out of the lender's memory and compared by checksum. RELEASE and RESUME end the loans that the drop began.

Lending brings a replica new slots in the memory of another, and moves no layer. In PREPARE the lender puts free frames
behind them, and lends these at once; in RESUME they are open. A restore closes them as it does those of a drop, and the
lender frees its frames in RESUME, when they have been given back.

An exchange changes the home of some KV and nothing else. In PREPARE its new home gets frames; in LOAD the layer host
copies, in the time that its batches leave; in RELEASE it uses what was copied, and in RESUME the old home frees its
frames. See `kv_moves.py`.

The way back begins where a member refuses, a deadline passes or a process ends before RELEASE:

REVERT    Own batches take the old route again.
UNDO      A member gives back what it has borrowed, unmaps and drops what has come.
REOPEN    Nobody uses anything of others any more: loans end, closed slots are open again, and all is as before.

LOAD and RELEASE begin with waiting for the device, once: what is unmapped in them is by then of no use to anything that
comes, so no unmapping waits again. On the way back each does.

When a process ends that others depend on, all of this is left where it is, for the phases of a recovery: see
`recovery_phases.py`.

Every phase is a list of steps (`steps.py`), and each step says how it is taken back. What changes which slots may be
allocated, and who is served, is done when a phase begins or slots have become free: all ranks of a replica do it at the
same batch boundary, because they must allocate alike. The rest may spread over several boundaries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from kunserve_sgl.control.messages import Phase
from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.memory.errors import TransferError
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.memory.source_chain import NamedSource
from kunserve_sgl.policy.plan import Extent, KvPart, Plan
from kunserve_sgl.replica.active_transition import ActiveTransition
from kunserve_sgl.replica.capacity import CapacityManager
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_moves import KvMoves
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.read_probe import measure, probe_bytes
from kunserve_sgl.replica.recovery_phases import RecoveryPhases
from kunserve_sgl.replica.replica_memory import ReplicaMemory
from kunserve_sgl.replica.steps import LOAD_BYTES, LongStep, Step, named

logger = logging.getLogger(__name__)


class Hosting(Protocol):
    """Says what a transition needs of the part that runs batches; see `replica.hosting.LayerHosting`."""

    def connect(self, peers: Iterable[int], timeout_s: float) -> Connecting | Connected:
        """Begins to connect to `peers`, before the first batch to or from them."""
        ...

    def looks_waited_for(self) -> bool:
        """Says whether others wait for this replica to execute their batches."""
        ...

    def forget_all_but(self, owners: Iterable[int]) -> None:
        """Drops the batches of all but `owners`."""

    def forget_everything(self) -> None:
        """Drops others' batches, and what is known of own ones that are with others."""

    def disconnect(self, peers: Iterable[int]) -> None:
        """Ends the connections to `peers`, who do so too."""


class Phases:
    """Knows the steps of each phase at one rank. The agent begins a phase when its order comes, and has them done."""

    def __init__(
        self,
        plan: HeldPlan,
        engine: Engine,
        capacity: CapacityManager,
        memory: ReplicaMemory,
        loans: Loans,
        hosting: Hosting,
        writes: KvWrites,
    ) -> None:
        self._replica = memory.replica
        self._plan = plan
        self._engine = engine
        self._capacity = capacity
        self._memory = memory
        self._loans = loans
        self._hosting = hosting
        self._measured: set[int] = set()
        self._moves = KvMoves(memory, engine, loans, writes)
        self._recovery = RecoveryPhases(plan, engine, memory, loans, hosting, self._moves)

    def begin(self, active: ActiveTransition) -> None:
        """Does what has to be done at once in the phase, and lists the rest. Raises KunserveError."""
        _BEGIN[active.phase](self, active)

    def look_for_lent(self, active: ActiveTransition) -> Step | LongStep | None:
        """Returns the step that takes what others have lent in this phase; None where nothing has come."""
        if active.phase is Phase.PREPARE:
            return self._loans.receive(active.order.transition)
        return self._recovery.look_for_lent(active) if active.phase is Phase.RELOAD else None

    def end(self, active: ActiveTransition) -> None:
        """Ends the transition here, with this phase: the plan that came of it holds."""
        self._plan.end(active.old if active.phase is Phase.REOPEN else active.new)
        self._loans.finish()
        self._moves.end()

    # The phases, in order

    def _prepare(self, active: ActiveTransition) -> None:
        steps, new, me = active.steps, active.new, self._replica
        self._plan.begin(new)
        active.closing = list(steps.close)
        if steps.close and active.order.forces:
            going = self._tokens_of(steps.close)
            force = partial(self._capacity.force, going)
            active.run(Step("let requests give up what has no room", force, reopen=self._capacity.give_up))
        if steps.close:
            active.run(
                Step(
                    "keep new requests out of the slots that go",
                    partial(self._prefer_others, active.old, steps.close),
                    reopen=partial(self._engine.allocator.prefer, None),
                )
            )
        for owner in sorted(set(new.owners_served_by(me)) - set(active.old.owners_served_by(me))):
            active.run(
                Step(
                    f"map the request rows of replica {owner}",
                    partial(self._engine.rows.map_rows_of, owner),
                    undo=partial(self._engine.rows.unmap_rows_of, owner),
                )
            )
        peers = [peer for peer in new.group_of(me) if peer != me]
        active.connection = self._hosting.connect(peers, active.order.timeout_s)
        active.done.append(Step(f"connect to replicas {peers}", lambda: None, undo=active.connection.cancel))
        # While there is a way back: in RELEASE, what keeps a layer from being dropped would degrade the group.
        for layer in steps.drop:
            prove = partial(self._memory.parameters.require_droppable, layer)
            active.todo.append(Step(f"prove that nothing keeps layer {layer}", prove))
        self._loans.expect(steps, peers)
        active.todo.extend(self._moves.preparing(steps.moves))
        for part in _by_layer(steps.map_lent):
            get, back = partial(self._memory.map_kv, part), partial(self._memory.unmap_kv, part)
            active.todo.append(Step(f"get memory to lend for {_named(part)}", get, reopen=back, frees_lent=True))
        active.todo.extend(self._loans.lending(active.order.transition, steps, peers))

    def forget(self, peer: int) -> None:
        """Takes note that a peer may be elsewhere now: its memory is measured again."""
        self._measured.discard(peer)

    def measuring(self, active: ActiveTransition) -> Iterator[Step]:
        """Yields the steps that measure how fast memory of others is read which has been borrowed meanwhile, once for
        each owner."""
        borrowed = self._loans.borrowed
        for loan in active.steps.borrow_kv:
            part = loan.parts[0]
            key = loan.owner, part.extent.replica, part.extent.first_granule, part.layers[0]
            if loan.owner not in self._measured and key in borrowed and not active.steps.moves:
                self._measured.add(loan.owner)
                measure = partial(self._measure, active, loan.owner, part)
                yield Step(f"measure how fast memory of replica {loan.owner} is read", measure)

    def _measure(self, active: ActiveTransition, owner: int, part: KvPart) -> None:
        kv, layer = self._memory.kv, part.layers[0]
        lent = self._loans.borrowed_of(owner, part.extent, layer)
        own = kv.bytes_behind(kv.slots, layer)[0]
        lent_bytes = own.numel() // kv.slots.count * lent.slots.count
        size = min(own.numel(), lent_bytes, probe_bytes(self._engine.layers.device))
        try:
            with self._loans.ways.of(lent).reading(lent) as reading:
                active.reads.append(measure(owner, own[:size], reading, self._engine.layers.synchronize))
        except TransferError as error:  # without a measurement nothing moves by itself
            logger.warning("KunServe: memory of replica %d has not been read to measure how fast: %s", owner, error)

    def close_slots(self, active: ActiveTransition) -> None:
        """Empties own slots that go away as soon as what lives there has room elsewhere. Until then requests run on,
        and new ones get other slots first. Every rank sees the same state, so all do it at the same boundary."""
        if active.closing and active.order.forces:
            self._capacity.force(self._tokens_of(active.closing))
        # Extents that follow each other together: what moves out of one must not move into another.
        for slots in _joined(self._memory.slots(extent) for extent in active.closing):
            if not self._capacity.can_shrink_by(slots):
                return
            take = partial(self._capacity.take, slots)
            active.run(
                Step(f"close slots {slots.first} to {slots.stop}", take, reopen=partial(self._open_slots, slots))
            )
            active.closing = [extent for extent in active.closing if self._memory.slots(extent).first not in slots]
            self._engine.capacity_changed()

    def _load(self, active: ActiveTransition) -> None:
        memory = self._memory
        if active.steps.unmap_kv:
            active.todo.append(self._wait)
        for part in _by_layer(active.steps.unmap_kv):
            unmap, back = partial(memory.unmap_kv, part, after=()), partial(memory.map_kv, part)
            active.todo.append(Step(f"unmap {_named(part)}", unmap, undo=back))
        for layer in active.steps.load:
            load, drop = partial(self._loading_layer, layer), partial(memory.drop_layer, layer)
            active.todo.append(LongStep(f"load the parameters of layer {layer}", load, undo=drop))
        active.copies.extend(self._moves.copying(active.steps.moves))

    def _switch(self, active: ActiveTransition) -> None:
        self._take_route(active.new)

    def _release(self, active: ActiveTransition) -> None:
        steps, new = active.steps, active.new
        active.done.clear()  # there is no way back any more
        self._hosting.forget_all_but(new.owners_served_by(self._replica))
        self._plan.settle(new)
        if steps.close:
            self._engine.allocator.prefer(None)
        if steps.drop or steps.return_kv:
            active.todo.append(self._wait)
        for layer in steps.drop:
            active.todo.append(Step(f"drop the parameters of layer {layer}", partial(self._drop_layer, active, layer)))
        active.todo.append(Step("unmap rows of those who are not served", partial(self._unmap_rows_but_of, new)))
        active.todo.extend(self._loans.giving_back(steps))
        active.todo.extend(self._moves.changing_over(steps.moves))
        for part in _by_layer(steps.map_kv):
            active.todo.append(Step(f"map {_named(part)}", partial(self._memory.map_kv, part)))

    def _resume(self, active: ActiveTransition) -> None:
        if active.steps.open:
            self._engine.limits.expect_capacity(None)
        for slots in _joined(map(self._memory.slots, active.steps.open)):
            self._open_slots(slots)
            active.extension_slots += slots.count
        self._loans.end_loans(active.steps.end_kv)
        active.todo.extend(self._moves.leaving(active.steps.moves))
        for part in _by_layer(active.steps.unmap_lent):
            free = partial(self._memory.unmap_kv, part, after=())
            active.todo.append(Step(f"free {_named(part)}, which was lent", free))
        active.todo.append(self._audit)

    def _revert(self, active: ActiveTransition) -> None:
        self._take_route(active.old)

    def _undo(self, active: ActiveTransition) -> None:
        # Everybody who lives has reverted: what is left of others is from one who has died.
        self._hosting.forget_all_but(active.old.owners_served_by(self._replica))
        active.closing.clear()
        active.todo.extend(active.undoing())

    def _reopen(self, active: ActiveTransition) -> None:
        while active.todo:  # where nobody waited for this rank to undo everything
            active.run_next()
        self._plan.settle(active.old)
        for step in active.reopening():
            if step.frees_lent:
                active.todo.append(step)  # an order may still be served
            else:
                active.run(step)
        active.todo.append(self._audit)

    def _recover(self, active: ActiveTransition) -> None:
        self._recovery.begin(active)

    # What the steps do

    @property
    def _audit(self) -> Step:
        return Step("see whether the books balance", self._memory.frames.check)

    @property
    def _wait(self) -> Step:
        return Step("wait for what the device was given to do", self._engine.synchronize)

    def _take_route(self, plan: Plan) -> None:
        """Lets own batches take the route of `plan` from the next one on, to layer hosts that know nothing of them
        yet."""
        routed = self._plan.routed
        if routed is not None and routed.route_of(self._replica) == plan.route_of(self._replica):
            self._plan.route_by(plan)
            return
        self._engine.synchronize()
        self._plan.route_by(plan)
        self._engine.rows.forget_hosts()

    def _prefer_others(self, old: Plan, closing: Sequence[Extent]) -> None:
        """Gives requests the slots first that are before those that go, and limits them to what will be left. The limit
        stays where the slots cannot go after all, because that is tried again."""
        allocator = self._engine.allocator
        base = self._memory.slots(old.extents_of(self._replica)[0])
        first = min(self._memory.slots(extent).first for extent in closing)
        allocator.prefer(SlotRange(base.first, first - base.first))
        left = allocator.size + allocator.withheld - self._tokens_of(closing)
        self._engine.limits.expect_capacity(left)

    def _tokens_of(self, extents: Iterable[Extent]) -> int:
        """Counts the tokens that may be allocated from `extents`, used or not."""
        return sum(self._engine.allocator.count_in(self._memory.slots(extent)) for extent in extents)

    def _open_slots(self, slots: SlotRange) -> None:
        self._engine.allocator.add_slots(slots)
        self._engine.allocator.prefer(None)
        self._engine.capacity_changed()

    def _loading_layer(self, layer: int) -> Generator[None, None, None]:
        """Brings a dropped layer back part by part, from what a peer lent, or from what this rank has itself. Raises as
        `ReplicaMemory.restore_layer`."""
        region = self._loans.take_region(layer)
        assert region is not None, "PREPARE has taken it"
        with region:
            yield from self._memory.restoring_layer(layer, NamedSource(region.name, region), LOAD_BYTES)
            region.close(after=())  # the checksum has been read, so the copy has ended

    def _drop_layer(self, active: ActiveTransition, layer: int) -> None:
        active.freed_bytes += self._memory.drop_layer(layer, after=())

    def _unmap_rows_but_of(self, plan: Plan) -> None:
        """Gives back the memory behind rows of those whose layers do not run here by `plan`. They have switched to it,
        and so know nothing of what was here."""
        for owner in set(range(plan.replica_count)) - {self._replica, *plan.owners_served_by(self._replica)}:
            self._engine.rows.unmap_rows_of(owner)


def _joined(ranges: Iterable[SlotRange]) -> list[SlotRange]:
    """Joins ranges that follow each other; the last ones come first."""
    joined: list[SlotRange] = []
    for slots in sorted(ranges, key=lambda each: -each.first):
        if joined and slots.stop == joined[-1].first:
            joined[-1] = SlotRange(slots.first, slots.count + joined[-1].count)
        else:
            joined.append(slots)
    return joined


def _by_layer(parts: Iterable[KvPart]) -> Iterator[KvPart]:
    """Splits parts, each of which would be a long step, into those of one layer."""
    for part in parts:
        for layer in part.layers:
            yield KvPart(part.extent, (layer,))


def _named(part: KvPart) -> str:
    return f"{named(part.extent)} in layer {part.layers[0]}"


_BEGIN: dict[Phase, Callable[[Phases, ActiveTransition], None]] = {
    Phase.PREPARE: Phases._prepare,
    Phase.LOAD: Phases._load,
    Phase.SWITCH: Phases._switch,
    Phase.RELEASE: Phases._release,
    Phase.RESUME: Phases._resume,
    Phase.REVERT: Phases._revert,
    Phase.UNDO: Phases._undo,
    Phase.REOPEN: Phases._reopen,
    Phase.ABANDON: Phases._recover,
    Phase.RELOAD: Phases._recover,
    Phase.REVIVE: Phases._recover,
}
