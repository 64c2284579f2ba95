"""Random sequences of pool operations against a plain model, with driver calls failing at any point.

The model knows which positions are mapped and lent and how many frames are free; from that it predicts
whether an operation must succeed. After every operation the ledger, the machine and the bytes must agree with
the model, and after a refused or failed one nothing may have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cuda_model.driver import FakeBindings, make_fake_cuda
from kunserve_sgl.errors import KunserveError
from kunserve_sgl.memory.errors import MappingFailedError, OutOfMemoryError, TransferError
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.virtual_range import Frame, LayerSpan, Span, VirtualRange
from kunserve_sgl.memory.vmm import VmmBackend
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

LAYERS = 2
POSITIONS = 5
BUFFERS = [(layer, kind) for layer in range(LAYERS) for kind in ("parameters", "k", "v")]

spans_of = st.lists(
    st.tuples(st.sampled_from(range(LAYERS)), st.integers(0, POSITIONS), st.integers(0, POSITIONS)),
    min_size=1,
    max_size=3,
)
sizes = st.integers(1, 8)
BORROWERS = ("b", "c")
borrowers = st.sampled_from(BORROWERS)
Place = tuple[int, str, int]


@dataclass
class Lent:
    """A loan in the model: the mapped positions that were lent, and where the borrower mapped them."""

    borrower: str
    things: list[Place]
    borrowed_at: list[int] | None = None


@dataclass
class Model:
    total: int = 0
    free: int = 0
    mapped: dict[Place, int] = field(default_factory=dict)
    loans: dict[int, Lent] = field(default_factory=dict)

    @property
    def lent(self) -> set[Place]:
        return {thing for loan in self.loans.values() for thing in loan.things}

    def lent_to(self, borrower: str) -> set[Place]:
        return {thing for loan in self.loans.values() if loan.borrower == borrower for thing in loan.things}

    def occupied_at(self, borrower: str) -> set[int]:
        loans = (loan for loan in self.loans.values() if loan.borrower == borrower)
        return {position for loan in loans for position in loan.borrowed_at or ()}


class PoolMachine(RuleBasedStateMachine):
    """One replica's pool and those of two borrowers, in one process."""

    capacity = 1 << 30

    def make_vmm(self) -> VmmBackend:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.bindings: FakeBindings | None = None
        self.armed: int | None = None
        self.pool = FramePool(self.make_vmm(), "a")
        self.peers = {name: FramePool(self.make_vmm(), name) for name in BORROWERS}
        self.ranges = {(layer, kind): self.pool.vmm.reserve(POSITIONS, f"{kind} {layer}") for layer, kind in BUFFERS}
        self.peer_ranges = {name: peer.vmm.reserve(3 * POSITIONS, "k 0") for name, peer in self.peers.items()}
        self.model = Model()
        self.stamp = 0

    def teardown(self) -> None:
        for pool in self.pools():
            pool.vmm.close()
        if self.bindings is not None:
            assert self.bindings.broken_rules == []
            assert (self.bindings.live_handles(), self.bindings.mappings) == (0, {})

    def pools(self) -> list[FramePool]:
        return [self.pool, *self.peers.values()]

    # What the model predicts

    def attempt(self, succeeds: bool, operation: Callable[[], object]) -> bool:
        """Runs an operation that must succeed, unless the driver fails, or must be refused with nothing
        changed."""
        before = self.state()
        armed, self.armed = self.armed, None
        if self.bindings is not None and armed is not None:
            # Releasing is left out: a driver that will not take memory back ends the process.
            self.bindings.fail_when(lambda name, number: number == armed and name != "cuMemRelease")
        refusal: KunserveError | None = None
        try:
            operation()
        except KunserveError as error:
            refusal = error
        if self.bindings is not None:
            self.bindings.fail_when(lambda name, number: False)
        if refusal is None:
            assert succeeds, "the operation had to be refused"
            return True
        of_driver = isinstance(refusal, (MappingFailedError, OutOfMemoryError, TransferError))
        assert not succeeds or (armed is not None and of_driver), repr(refusal)
        assert self.state() == before, f"{refusal!r} left a trace"
        return False

    def state(self) -> object:
        maps = [dict(r.frames) for r in (*self.ranges.values(), *self.peer_ranges.values())]
        books = [dict(iter(pool._ledger)) for pool in self.pools()]
        loans = [(dict(pool.loans._lent), dict(pool.loans._borrowed)) for pool in self.pools()]
        machine = self.bindings.state() if self.bindings is not None else None
        return maps, books, loans, machine, [pool.snapshot() for pool in self.pools()]

    def layer_spans(self, kind: str, wanted: list[tuple[int, int, int]]) -> list[LayerSpan]:
        return [LayerSpan(layer, Span(self.ranges[layer, kind], first, n)) for layer, first, n in wanted]

    def places(self, kind: str, wanted: list[tuple[int, int, int]]) -> list[Place] | None:
        """The positions of spans, or None where a span is outside or two overlap."""
        places = [(layer, kind, first + i) for layer, first, count in wanted for i in range(count)]
        inside = all(first + count <= POSITIONS for _, first, count in wanted)
        return places if inside and len(set(places)) == len(places) else None

    # Operations

    @precondition(lambda self: self.bindings is not None)
    @rule(number=st.integers(0, 12))
    def let_a_driver_call_of_the_next_operation_fail(self, number: int) -> None:
        self.armed = number

    @rule(count=sizes)
    def add(self, count: int) -> None:
        if self.attempt(self.model.total + count <= self.capacity, lambda: self.pool.add_frames(count)):
            self.model.total += count
            self.model.free += count

    @rule(count=sizes)
    def remove(self, count: int) -> None:
        if self.attempt(count <= self.model.free, lambda: self.pool.remove_frames(count)):
            self.model.total -= count
            self.model.free -= count

    @rule(kind=st.sampled_from(["parameters", "k", "v"]), wanted=spans_of)
    def map(self, kind: str, wanted: list[tuple[int, int, int]]) -> None:
        places = self.places(kind, wanted)
        fits = places is not None and self.model.mapped.keys().isdisjoint(places)
        succeeds = fits and places is not None and len(places) <= self.model.free
        operation = self.pool.map_parameters if kind == "parameters" else self.pool.map_kv
        if self.attempt(succeeds, lambda: operation(self.layer_spans(kind, wanted))):
            assert places is not None
            self.model.free -= len(places)
            for place in places:
                self.write(place)

    @rule(kind=st.sampled_from(["parameters", "k", "v"]), wanted=spans_of)
    def unmap(self, kind: str, wanted: list[tuple[int, int, int]]) -> None:
        places = self.places(kind, wanted)
        succeeds = places is not None and all(
            place in self.model.mapped and place not in self.model.lent for place in places
        )
        operation = self.pool.unmap_parameters if kind == "parameters" else self.pool.unmap_kv
        if self.attempt(succeeds, lambda: operation(self.layer_spans(kind, wanted))):
            assert places is not None
            self.model.free += len(places)
            for place in places:
                del self.model.mapped[place]

    @precondition(lambda self: self.model.mapped)
    @rule(data=st.data(), borrower=borrowers)
    def lend_mapped(self, data: st.DataObject, borrower: str) -> None:
        places = data.draw(st.lists(st.sampled_from(sorted(self.model.mapped)), min_size=1, max_size=4))
        self.lend(borrower, list(places), [self.frame(place) for place in places])

    @precondition(lambda self: self.model.loans)
    @rule(data=st.data(), borrower=borrowers)
    def lend_what_is_lent(self, data: st.DataObject, borrower: str) -> None:
        loan_id = data.draw(st.sampled_from(sorted(self.model.loans)))
        loan, frames = self.model.loans[loan_id], self.pool.loans._lent[loan_id].frames
        chosen = data.draw(st.lists(st.integers(0, len(frames) - 1), min_size=1, max_size=4))
        self.lend(borrower, [loan.things[at] for at in chosen], [frames[at] for at in chosen])

    def lend(self, borrower: str, things: list[Place], frames: list[Frame]) -> None:
        succeeds = len(set(things)) == len(things) and self.model.lent_to(borrower).isdisjoint(things)
        if self.attempt(succeeds, lambda: self.pool.loans.lend(borrower, frames)):
            self.model.loans[max(self.pool.loans._lent)] = Lent(borrower, things)

    @precondition(lambda self: self.model.loans)
    @rule(data=st.data(), start=st.integers(0, 3 * POSITIONS), gap=st.integers(0, 2))
    def borrow(self, data: st.DataObject, start: int, gap: int) -> None:
        loan_id = data.draw(st.sampled_from(sorted(self.model.loans)))
        frames, loan = self.pool.loans._lent[loan_id].frames, self.model.loans[loan_id]
        cut = data.draw(st.integers(0, len(frames)))
        parts = [(start, cut), (start + cut + gap, len(frames) - cut)]
        positions = [first + i for first, count in parts for i in range(count)]
        inside = all(first + count <= 3 * POSITIONS for first, count in parts)
        vacant = self.model.occupied_at(loan.borrower).isdisjoint(positions)
        succeeds = inside and vacant and loan.borrowed_at is None
        peer, area = self.peers[loan.borrower], self.peer_ranges[loan.borrower]
        spans = [LayerSpan(0, Span(area, first, count)) for first, count in parts]
        with self.pool.vmm.export_frames(frames) as export:
            if self.attempt(succeeds, lambda: peer.loans.borrow("a", loan_id, export, spans)):
                loan.borrowed_at = positions

    @precondition(lambda self: self.model.loans)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        loan_id = data.draw(st.sampled_from(sorted(self.model.loans)))
        loan = self.model.loans[loan_id]
        peer = self.peers[loan.borrower]
        if loan.borrowed_at is not None and not self.attempt(True, lambda: peer.loans.return_loan("a", loan_id)):
            return
        loan.borrowed_at = None
        if self.attempt(True, lambda: self.pool.loans.end_loan(loan_id)):
            del self.model.loans[loan_id]

    @rule(loan_id=st.integers(1000, 2000))
    def end_an_unknown_loan(self, loan_id: int) -> None:
        self.attempt(False, lambda: self.pool.loans.end_loan(loan_id))
        self.attempt(False, lambda: self.peers["b"].loans.return_loan("a", loan_id))

    # What must always hold

    @invariant()
    def the_books_balance(self) -> None:
        for pool in self.pools():
            pool.check()
        snapshot, model = self.pool.snapshot(), self.model
        assert snapshot.free + snapshot.parameters + snapshot.kv + snapshot.lent == snapshot.total
        assert (snapshot.total, snapshot.free) == (model.total, model.free)
        unlent = [place for place in model.mapped if place not in model.lent]
        for layer in range(LAYERS):
            own = [kind for at, kind, _ in unlent if at == layer]
            assert snapshot.parameters_by_layer.get(layer, 0) == own.count("parameters")
            assert snapshot.kv_by_layer.get(layer, 0) == len(own) - own.count("parameters")
        assert snapshot.lent == len(model.lent)
        for name, peer in self.peers.items():
            assert snapshot.lent_by_borrower.get(name, 0) == len(model.lent_to(name))
            occupied = model.occupied_at(name)
            assert peer.snapshot().borrowed == len(occupied)
            assert set(self.peer_ranges[name].frames) == occupied

    @invariant()
    def every_byte_is_where_it_was_written(self) -> None:
        for place, stamp in self.model.mapped.items():
            assert self.read(self.pool, *self.position(place)) == stamp
        for loan in self.model.loans.values():
            for thing, position in zip(loan.things, loan.borrowed_at or (), strict=False):
                peer, area = self.peers[loan.borrower], self.peer_ranges[loan.borrower]
                assert self.read(peer, area, position) == self.model.mapped[thing]

    def position(self, place: Place) -> tuple[VirtualRange, int]:
        return self.ranges[place[0], place[1]], place[2]

    def frame(self, place: Place) -> Frame:
        virtual_range, position = self.position(place)
        return virtual_range.frames[position]

    def write(self, place: Place) -> None:
        self.stamp = self.model.mapped[place] = (self.stamp + 1) % 251
        virtual_range, position = self.position(place)
        size = self.pool.vmm.frame_bytes
        self.pool.vmm.tensor(virtual_range, position * size, size).fill_(self.stamp)

    def read(self, pool: FramePool, virtual_range: VirtualRange, position: int) -> int:
        size = pool.vmm.frame_bytes
        tensor = pool.vmm.tensor(virtual_range, position * size, size)
        assert int(tensor[0]) == int(tensor[-1])
        return int(tensor[0])


class HostMachine(PoolMachine):
    def make_vmm(self) -> VmmBackend:
        return MemfdVmm(4096)


class FakeCudaMachine(PoolMachine):
    capacity = 40

    def make_vmm(self) -> VmmBackend:
        if self.bindings is None:
            self.bindings = FakeBindings(memory_frames=self.capacity)
        return make_fake_cuda(self.bindings)


# 100 sequences of up to 50 operations for each backend.
_SETTINGS = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestHostPool = HostMachine.TestCase
TestHostPool.settings = _SETTINGS
TestFakeCudaPool = FakeCudaMachine.TestCase
TestFakeCudaPool.settings = _SETTINGS
