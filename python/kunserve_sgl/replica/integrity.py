"""Whether what a rank has is what it should have: frames, parameters, slots and the memory behind them, loans.

A check is looked at in steps, one per batch boundary, so that batches run on in between; the longest is the checksum of
one layer. All ranks of a replica take the same steps at the same boundaries, and rank 0 says what all have found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from kunserve_sgl.errors import KunserveError, TransientError
from kunserve_sgl.memory.layer_parameters import LayerState
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.plan import Extent, Plan
from kunserve_sgl.replica.engine import Engine
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.replica_memory import ReplicaMemory

# So long a plan that is on its way may take; in boundaries, which all ranks count alike.
_PATIENCE_BOUNDARIES = 5000
_Look = Callable[[], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Findings:
    """Says what differs at one rank, and what must be alike at all ranks of its replica, by name."""

    differences: tuple[str, ...]
    alike: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Held:
    """Holds what a rank shares with other replicas. There is none without other replicas."""

    plan: HeldPlan
    loans: Loans
    in_transition: Callable[[], bool]


class IntegrityCheck:
    """Checks one rank when it is asked to."""

    def __init__(self, memory: ReplicaMemory, engine: Engine, held: Held | None) -> None:
        self._memory = memory
        self._engine = engine
        self._held = held
        self._looks: Iterator[_Look] | None = None
        self._found: list[str] = []
        self._patience = 0
        self._tell: Callable[[Sequence[str]], None] = lambda differences: None
        self._give_up: Callable[[str], None] = lambda reason: None

    @property
    def is_busy(self) -> bool:
        """Says whether a check is under way."""
        return self._looks is not None

    def begin(self, tell: Callable[[Sequence[str]], None], give_up: Callable[[str], None]) -> None:
        """Begins a check, at the same boundary at all ranks. Later `tell` is called with what differs, or `give_up`
        with what has come in between. Raises TransientError where none can begin now."""
        if self.is_busy:
            raise TransientError("another check is under way")
        # A rank may still be at the end of one that another rank has behind it.
        if self._held is not None and not self._engine.all_ranks(not self._held.in_transition()):
            raise TransientError("a transition is under way")
        self._found, self._tell, self._give_up, self._patience = [], tell, give_up, _PATIENCE_BOUNDARIES
        self._looks = self._all_looks()

    def advance(self) -> None:
        """Goes on by one step. Called at every batch boundary, by all ranks of the replica alike."""
        if self._looks is None:
            return
        if self._held is not None and self._held.in_transition():
            self._looks = None
            self._give_up("a transition has begun")
            return
        if self._patience > 0 and self._awaits_plan():
            self._patience -= 1
            return
        look = next(self._looks, None)
        if look is not None:
            try:
                self._found += look()
            except KunserveError as error:
                self._found.append(str(error))
            return
        self._looks = None
        mine = Findings(tuple(self._found), {**self._alike(), **self._engine.alike()})
        self._tell(joined(self._engine.gather(mine)))

    def _all_looks(self) -> Iterator[_Look]:
        yield self._frames
        for layer in range(self._memory.layer_count):
            yield partial(self._layer, layer)
        yield self._slots
        yield self._engine.slot_differences
        yield self._loans

    @property
    def _plan(self) -> Plan | None:
        return None if self._held is None else self._held.plan.agreed

    def _awaits_plan(self) -> bool:
        """Says whether the KV cache has been resized and the plan that follows from that is not here yet."""
        plan = self._plan
        return plan is not None and plan.extents_of(self._memory.replica)[0].granules != self._memory.kv.granules

    def _alike(self) -> Mapping[str, str]:
        return {} if self._plan is None else {"the plan": str(self._plan)}

    def _frames(self) -> Iterable[str]:
        self._memory.frames.check()
        return ()

    def _layer(self, layer: int) -> Iterator[str]:
        memory, plan, me = self._memory, self._plan, self._memory.replica
        state = memory.parameters.state(layer)
        expected = LayerState.RESIDENT if plan is None or layer in plan.resident[me] else LayerState.DROPPED
        if state is not expected:
            yield f"layer {layer} is {state.value}; by the plan it is {expected.value}"
        yield from memory.kv.differences(layer, self._slots_here(plan, layer))
        if state is LayerState.RESIDENT:
            memory.parameters.verify(layer)

    def _slots(self) -> Iterator[str]:
        """Yields slots that requests may have and that are not the replica's, and those of the plan that they may not
        have."""
        memory, plan, ranges = self._memory, self._plan, self._engine.allocator.slot_ranges
        own = [memory.kv.slots]
        if plan is not None:
            base, *extensions = plan.extents_of(memory.replica)
            if base.granules != memory.kv.granules:
                yield f"the KV cache has {memory.kv.granules} granules; by the plan it has {base.granules}"
            own += [memory.slots(extent) for extent in extensions]
            for slots in own[1:]:
                if self._engine.allocator.count_in(slots) != slots.count:
                    yield f"slots {slots.first} to {slots.stop} are the replica's, and no request may have all of them"
        for given in ranges:
            if sum(_common(given, slots) for slots in own) != given.count:
                yield f"requests may have slots {given.first} to {given.stop}, which are not all the replica's"
        if (total := sum(given.count for given in ranges)) != self._engine.allocator.size:
            yield f"requests may have {total} slots; the capacity is {self._engine.allocator.size}"

    def _slots_here(self, plan: Plan | None, layer: int) -> list[SlotRange]:
        """Lists the slots that have memory here in a layer: those at home here, and what others have lent and is mapped
        of those that the layer runs here for."""
        memory, me = self._memory, self._memory.replica
        if plan is None:
            return [memory.kv.slots]
        loans = None if self._held is None else self._held.loans

        def is_here(extent: Extent) -> bool:
            home = extent.homes[layer]
            runs_here = plan.hosts[extent.replica][layer] == me
            return home == me or (runs_here and loans is not None and loans.is_mapped(home, extent, layer))

        return [memory.slots(extent) for extent in plan.extents if is_here(extent)]

    def _loans(self) -> Iterable[str]:
        plan = self._plan
        return () if self._held is None or plan is None else self._held.loans.differences(plan)


def joined(ranks: Sequence[Findings]) -> list[str]:
    """Returns what all ranks of a replica have found, and where they differ from rank 0."""
    found = []
    for rank, findings in enumerate(ranks):
        where = f"rank {rank}: " if len(ranks) > 1 else ""
        found += [f"{where}{difference}" for difference in findings.differences]
        found += [
            f"{where}{name}: {findings.alike.get(name)}; at rank 0: {value}"
            for name, value in ranks[0].alike.items()
            if findings.alike.get(name) != value
        ]
    return found


def _common(one: SlotRange, other: SlotRange) -> int:
    return max(0, min(one.stop, other.stop) - max(one.first, other.first))
