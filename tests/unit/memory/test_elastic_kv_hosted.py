"""Memory behind some layers of any replica's slots: hosted, lent, borrowed; by hand, and random sequences against a
plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cuda_model.driver import FakeBindings, make_fake_cuda
from kunserve_sgl.errors import InvariantError, KunserveError
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.errors import (
    AlreadyMappedError,
    LedgerError,
    LoanError,
    MappingFailedError,
    NotMappedError,
    OutOfMemoryError,
    PoolFullError,
)
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.slot_space import KvBuffer, SlotRange, plan_slot_space
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

LAYERS = 3
REPLICAS = 3
GRANULES = 4
# The order of SGLang's pools: all K, then all V. A row of V is twice a row of K.
K, V = "k", "v"


class Replica:
    """One replica's pool and KV cache, seen as float32."""

    def __init__(self, number: int, bindings: FakeBindings | None) -> None:
        vmm = MemfdVmm(4096) if bindings is None else make_fake_cuda(bindings)
        k_bytes = vmm.frame_bytes // 16
        buffers = [
            *(KvBuffer(layer, K, k_bytes) for layer in range(LAYERS)),
            *(KvBuffer(layer, V, 2 * k_bytes) for layer in range(LAYERS)),
        ]
        self.number = number
        self.pool = FramePool(vmm, f"replica {number}")
        self.space = plan_slot_space(buffers, vmm.frame_bytes, 1, REPLICAS, GRANULES * 16)
        # A granule takes 3 frames in a layer, 9 in all; the sink takes 9.
        self.pool.add_frames(9 + 4 * 9)
        self.kv = ElasticKv(self.pool, self.space, buffers, number)
        self.tensors = {(buffer.layer, buffer.name): self.kv.tensor(buffer, torch.float32, (-1,)) for buffer in buffers}

    def slots(self, replica: int, first: int, count: int) -> SlotRange:
        return self.space.slots_of(replica, first, count)

    def write(self, layer: int, slots: SlotRange, value: float) -> None:
        self.tensors[layer, K][slots.first : slots.stop] = value
        self.tensors[layer, V][slots.first : slots.stop] = -value

    def read(self, layer: int, slots: SlotRange) -> float:
        """The value of `write`, or 0 where memory is new. Fails where the bytes are of anything else."""
        k = self.tensors[layer, K][slots.first : slots.stop]
        v = self.tensors[layer, V][slots.first : slots.stop]
        value = float(k[0, 0])
        assert (k == value).all()
        assert (v == -value).all()
        return value

    def state(self) -> object:
        maps = {buffer.label: dict(area.frames) for buffer, area in self.kv._ranges.items()}
        return maps, self.pool.snapshot(), dict(self.kv.mapped_bytes), self.kv.slots

    def own_bytes(self) -> int:
        return self.pool.snapshot().kv * self.pool.vmm.frame_bytes


@dataclass
class Deployment:
    bindings: FakeBindings | None
    replicas: list[Replica] = field(init=False)

    def __post_init__(self) -> None:
        self.replicas = [Replica(number, self.bindings) for number in range(REPLICAS)]

    def state(self) -> object:
        machine = self.bindings.state() if self.bindings is not None else None
        return [replica.state() for replica in self.replicas], machine

    def close(self) -> None:
        for replica in self.replicas:
            replica.pool.check()
            replica.tensors.clear()
            replica.pool.vmm.close()
        assert self.bindings is None or self.bindings.broken_rules == []


@pytest.fixture(params=["host", "cuda with a fake driver"])
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    deployment = Deployment(FakeBindings() if request.param != "host" else None)
    yield deployment
    deployment.close()


def test_an_extent_of_another_replica_is_hosted_in_some_layers(deployment: Deployment) -> None:
    here = deployment.replicas[0]
    here.kv.grow(1)
    extent = here.slots(2, 1, 2)
    assert here.kv.frames_for(extent, [0, 2]) == here.kv.frames_for(extent, {2, 0}) == 2 * 2 * 3
    assert here.kv.frames_for(extent, ()) == 0
    here.kv.map_hosted(extent, [2, 0])
    snapshot = here.pool.snapshot()
    assert dict(snapshot.kv_by_layer) == {0: 3 * 4, 1: 3 * 2, 2: 3 * 4}
    assert sum(here.kv.mapped_bytes.values()) == here.own_bytes()
    assert here.kv.mapped_bytes[V] == 2 * here.kv.mapped_bytes[K]
    for layer in (0, 2):
        assert here.read(layer, extent) == 0
        here.write(layer, extent, 5 + layer)
    assert here.kv.slots == here.slots(0, 0, 1), "hosted slots are not the replica's own"
    # A part goes; the rest stays, and the part comes back as zeros.
    part = here.slots(2, 2, 1)
    here.kv.unmap_hosted(part, [2])
    assert here.read(2, here.slots(2, 1, 1)) == 7
    here.kv.map_hosted(part, [2])
    assert here.read(2, part) == 0
    here.kv.unmap_hosted(extent, {0, 2})
    assert dict(here.pool.snapshot().kv_by_layer) == {0: 6, 1: 6, 2: 6}
    assert sum(here.kv.mapped_bytes.values()) == here.own_bytes()


def test_growing_into_hosted_slots_of_the_own_range_is_refused(deployment: Deployment) -> None:
    here = deployment.replicas[1]
    here.kv.grow(1)
    extension = here.slots(1, 2, 1)
    here.kv.map_hosted(extension, [1])
    here.write(1, extension, 8)
    before = deployment.state()
    for granules in (2, 3):
        with pytest.raises(AlreadyMappedError):
            here.kv.grow(granules)
        assert deployment.state() == before
    here.kv.grow(1)
    with pytest.raises(AlreadyMappedError):
        here.kv.grow(1)
    here.kv.shrink(2)
    assert here.read(1, extension) == 8
    here.kv.unmap_hosted(extension, [1])
    here.kv.grow(3)


def test_what_makes_no_sense_is_refused_and_changes_nothing(deployment: Deployment) -> None:
    here = deployment.replicas[0]
    here.kv.grow(2)
    hosted = here.slots(1, 0, 1)
    here.kv.map_hosted(hosted, [0])
    there = here.slots(1, 1, 1)
    attempts: list[tuple[type[Exception], Callable[[], object]]] = [
        (AlreadyMappedError, lambda: here.kv.map_hosted(here.slots(1, 0, 2), [0])),
        (AlreadyMappedError, lambda: here.kv.map_hosted(here.slots(0, 1, 1), [0])),
        (AlreadyMappedError, lambda: here.kv.map_hosted(here.space.sink, [0])),
        (NotMappedError, lambda: here.kv.unmap_hosted(there, [0])),
        (NotMappedError, lambda: here.kv.unmap_hosted(hosted, [0, 1])),
        (NotMappedError, lambda: here.kv.frames_behind(hosted, [0, 1])),
        (InvariantError, lambda: here.kv.unmap_hosted(here.slots(0, 1, 1), [0])),
        (InvariantError, lambda: here.kv.unmap_hosted(here.space.sink, [0])),
        (InvariantError, lambda: here.kv.map_hosted(there, [LAYERS])),
        (InvariantError, lambda: here.kv.map_hosted(SlotRange(there.first + 1, there.count), [1])),
        (InvariantError, lambda: here.kv.frames_for(SlotRange(there.first, there.count - 1), [1])),
        (PoolFullError, lambda: here.kv.map_hosted(here.slots(2, 0, 3), [0, 1, 2])),
    ]
    before = deployment.state()
    for number, (kind, attempt) in enumerate(attempts):
        with pytest.raises(kind):
            attempt()
        assert deployment.state() == before, number


def test_memory_that_cannot_be_zeroed_is_not_kept(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    here = deployment.replicas[0]
    before = deployment.state()
    zero, calls = here.pool.vmm.zero, []

    def fail_at_the_third(span: object) -> None:
        calls.append(span)
        if len(calls) == 3:
            raise OutOfMemoryError("no")
        zero(span)  # type: ignore[arg-type]

    for attempt in (lambda: here.kv.grow(1), lambda: here.kv.map_hosted(here.slots(1, 0, 1), [0, 1])):
        calls.clear()
        monkeypatch.setattr(here.pool.vmm, "zero", fail_at_the_third)
        with pytest.raises(OutOfMemoryError):
            attempt()
        monkeypatch.undo()
        assert deployment.state() == before


def test_frames_are_lent_and_mapped_in_the_same_order(deployment: Deployment) -> None:
    owner, borrower = deployment.replicas[:2]
    owner.kv.grow(2)
    owner.kv.map_hosted(owner.slots(2, 1, 1), [1, 2])
    parts = [(owner.slots(0, 0, 2), [2, 0]), (owner.slots(2, 1, 1), [1])]
    for number, (slots, layers) in enumerate(parts):
        for layer in layers:
            owner.write(layer, slots, 10 * number + layer + 1)
    frames = [frame for slots, layers in parts for frame in owner.kv.frames_behind(slots, layers)]
    loan = owner.pool.loans.lend("replica 1", frames)
    with owner.pool.vmm.export_frames(frames) as export:
        before = deployment.state()
        with pytest.raises(LoanError, match="cannot be mapped behind"):
            borrower.kv.borrow("replica 0", loan.loan_id, export, parts[:1])
        borrower.kv.map_hosted(owner.slots(2, 1, 1), [1])
        with pytest.raises(AlreadyMappedError):
            borrower.kv.borrow("replica 0", loan.loan_id, export, parts)
        borrower.kv.unmap_hosted(owner.slots(2, 1, 1), [1])
        assert deployment.state() == before
        borrowed = borrower.kv.borrow("replica 0", loan.loan_id, export, parts)
    assert len(borrowed.frames) == len(frames) == owner.pool.snapshot().lent
    for number, (slots, layers) in enumerate(parts):
        for layer in layers:
            assert borrower.read(layer, slots) == 10 * number + layer + 1
            borrower.write(layer, slots, 50 + number)
            assert owner.read(layer, slots) == 50 + number
    assert sum(borrower.kv.mapped_bytes.values()) == borrower.own_bytes() == 9 * borrower.pool.vmm.frame_bytes
    assert sum(owner.kv.mapped_bytes.values()) == owner.own_bytes() + len(frames) * owner.pool.vmm.frame_bytes
    refused = deployment.state()
    with pytest.raises(LedgerError):
        borrower.kv.unmap_hosted(owner.slots(2, 1, 1), [1])
    with pytest.raises(LedgerError):
        borrower.pool.loans.lend("replica 2", borrower.kv.frames_behind(*parts[0]))
    with pytest.raises(LedgerError, match="lent"):
        owner.kv.unmap_hosted(owner.slots(2, 1, 1), [1])
    with pytest.raises(LedgerError, match="lent"):
        owner.kv.shrink(1)
    assert deployment.state() == refused
    borrower.pool.loans.return_loan("replica 0", loan.loan_id)
    owner.pool.loans.end_loan(loan.loan_id)
    owner.kv.unmap_hosted(owner.slots(2, 1, 1), [1])
    owner.kv.shrink(2)


# Random sequences

Cell = tuple[int, int, int]  # replica whose slots they are, granule, layer
Part = tuple[int, int, int, frozenset[int]]

parts_of = st.tuples(
    st.integers(0, REPLICAS - 1),
    st.integers(0, GRANULES - 1),
    st.integers(1, 2),
    st.frozensets(st.integers(0, LAYERS - 1), min_size=1),
).filter(lambda part: part[1] + part[2] <= GRANULES)
replicas_of = st.integers(0, REPLICAS - 1)


def cells(part: Part) -> set[Cell]:
    replica, first, count, layers = part
    return {(replica, granule, layer) for granule in range(first, first + count) for layer in layers}


@dataclass
class Lent:
    owner: int
    borrower: int
    cells: set[Cell]


class KvMachine(RuleBasedStateMachine):
    """Replicas that map, lend and borrow. The model knows whose memory is behind each cell, and what it holds."""

    fake = False

    @initialize()
    def start(self) -> None:
        self.deployment = Deployment(FakeBindings() if self.fake else None)
        self.replicas = self.deployment.replicas
        self.home: list[dict[Cell, float]] = [{} for _ in range(REPLICAS)]
        self.loans: dict[tuple[int, int], Lent] = {}
        self.stamp = 0.0
        self.armed: int | None = None

    def teardown(self) -> None:
        if hasattr(self, "deployment"):
            self.deployment.close()

    def borrowed(self, replica: int) -> dict[Cell, int]:
        """What a replica sees of others' memory, and whose it is."""
        return {cell: loan.owner for loan in self.loans.values() if loan.borrower == replica for cell in loan.cells}

    def lent(self, owner: int, borrower: int | None = None) -> set[Cell]:
        loans = (loan for loan in self.loans.values() if loan.owner == owner and borrower in (None, loan.borrower))
        return {cell for loan in loans for cell in loan.cells}

    def own_range(self, replica: int, granules: int) -> set[Cell]:
        return cells((replica, 0, granules, frozenset(range(LAYERS))))

    def attempt(self, succeeds: bool, operation: Callable[[], object]) -> bool:
        """Runs an operation that must succeed, unless the driver fails, or must be refused with nothing changed."""
        before = self.deployment.state()
        bindings, armed, self.armed = self.deployment.bindings, self.armed, None
        if bindings is not None and armed is not None:
            bindings.fail_when(lambda name, number: number == armed and name in ("cuMemMap", "cuMemSetAccess"))
        refusal: KunserveError | None = None
        try:
            operation()
        except KunserveError as error:
            refusal = error
        if bindings is not None:
            bindings.fail_when(lambda name, number: False)
        if refusal is None:
            assert succeeds, "the operation had to be refused"
            return True
        of_driver = armed is not None and isinstance(refusal, MappingFailedError)
        assert not succeeds or of_driver, repr(refusal)
        assert self.deployment.state() == before, f"{refusal!r} left a trace"
        return False

    def can_map(self, replica: int, wanted: set[Cell]) -> bool:
        occupied = self.home[replica].keys() | self.borrowed(replica).keys()
        return occupied.isdisjoint(wanted) and 3 * len(wanted) <= self.replicas[replica].pool.free_frames

    @precondition(lambda self: self.fake)
    @rule(number=st.integers(0, 40))
    def let_a_driver_call_of_the_next_operation_fail(self, number: int) -> None:
        self.armed = number

    @rule(replica=replicas_of, granules=st.integers(0, 2))
    def grow(self, replica: int, granules: int) -> None:
        kv = self.replicas[replica].kv
        end = kv.granules + granules
        added = self.own_range(replica, end) - self.own_range(replica, kv.granules)
        if self.attempt(end <= GRANULES and self.can_map(replica, added), lambda: kv.grow(granules)):
            self.home[replica].update(dict.fromkeys(added, 0.0))

    @rule(replica=replicas_of, granules=st.integers(0, 2))
    def shrink(self, replica: int, granules: int) -> None:
        kv = self.replicas[replica].kv
        taken = self.own_range(replica, kv.granules) - self.own_range(replica, max(0, kv.granules - granules))
        succeeds = granules <= kv.granules and self.lent(replica).isdisjoint(taken)
        if self.attempt(succeeds, lambda: kv.shrink(granules)):
            for cell in taken:
                del self.home[replica][cell]

    @rule(replica=replicas_of, part=parts_of)
    def map_hosted(self, replica: int, part: Part) -> None:
        of, first, count, layers = part
        slots = self.replicas[replica].slots(of, first, count)
        operation = self.replicas[replica].kv.map_hosted
        if self.attempt(self.can_map(replica, cells(part)), lambda: operation(slots, layers)):
            self.home[replica].update(dict.fromkeys(cells(part), 0.0))

    @rule(replica=replicas_of, part=parts_of)
    def unmap_hosted(self, replica: int, part: Part) -> None:
        of, first, count, layers = part
        slots = self.replicas[replica].slots(of, first, count)
        kv = self.replicas[replica].kv
        hosted = self.home[replica].keys() - self.own_range(replica, kv.granules) - self.lent(replica)
        succeeds = cells(part) <= hosted and not (of == replica and first < kv.granules)
        if self.attempt(succeeds, lambda: kv.unmap_hosted(slots, layers)):
            for cell in cells(part):
                del self.home[replica][cell]

    @rule(owner=replicas_of, step=st.integers(1, REPLICAS - 1), parts=st.lists(parts_of, min_size=1, max_size=2))
    def lend(self, owner: int, step: int, parts: list[Part]) -> None:
        number = (owner + step) % REPLICAS
        lender, borrower = self.replicas[owner], self.replicas[number]
        wanted = [(lender.slots(of, first, count), layers) for of, first, count, layers in parts]
        union = set[Cell]().union(*map(cells, parts))
        if not union <= self.home[owner].keys() | self.borrowed(owner).keys():
            with pytest.raises(NotMappedError):
                [lender.kv.frames_behind(slots, layers) for slots, layers in wanted]
            return
        frames = [frame for slots, layers in wanted for frame in lender.kv.frames_behind(slots, layers)]
        # What is borrowed cannot be lent on.
        fits = union <= self.home[owner].keys() and len(union) == sum(len(cells(part)) for part in parts)
        fits = fits and self.lent(owner, number).isdisjoint(union)
        made: list[Loan] = []
        if not self.attempt(fits, lambda: made.append(lender.pool.loans.lend(f"replica {number}", frames))):
            return
        loan = made[0]
        vacant = (self.home[number].keys() | self.borrowed(number).keys()).isdisjoint(union)
        with lender.pool.vmm.export_frames(frames) as export:
            borrow = borrower.kv.borrow
            if self.attempt(vacant, lambda: borrow(f"replica {owner}", loan.loan_id, export, wanted)):
                self.loans[owner, loan.loan_id] = Lent(owner, number, union)
            else:
                lender.pool.loans.end_loan(loan.loan_id)

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        owner, loan_id = data.draw(st.sampled_from(sorted(self.loans)))
        borrower = self.replicas[self.loans[owner, loan_id].borrower].pool
        assert self.attempt(True, lambda: borrower.loans.return_loan(f"replica {owner}", loan_id))
        self.replicas[owner].pool.loans.end_loan(loan_id)
        del self.loans[owner, loan_id]

    @rule(data=st.data(), replica=replicas_of)
    def write(self, data: st.DataObject, replica: int) -> None:
        whose = {**dict.fromkeys(self.home[replica], replica), **self.borrowed(replica)}
        if not whose:
            return
        cell = data.draw(st.sampled_from(sorted(whose)))
        self.stamp += 1
        self.replicas[replica].write(cell[2], self.replicas[replica].slots(cell[0], cell[1], 1), self.stamp)
        self.home[whose[cell]][cell] = self.stamp

    @invariant()
    def every_cell_holds_what_was_written(self) -> None:
        for number, replica in enumerate(self.replicas):
            for cell, value in self.home[number].items():
                assert replica.read(cell[2], replica.slots(cell[0], cell[1], 1)) == value
            for cell, owner in self.borrowed(number).items():
                assert replica.read(cell[2], replica.slots(cell[0], cell[1], 1)) == self.home[owner][cell]

    @invariant()
    def the_books_balance(self) -> None:
        for number, replica in enumerate(self.replicas):
            replica.pool.check()
            snapshot = replica.pool.snapshot()
            assert snapshot.kv + snapshot.lent == 9 + 3 * len(self.home[number])
            assert snapshot.lent == 3 * len(self.lent(number))
            assert snapshot.borrowed == 3 * len(self.borrowed(number))
            own_bytes = (snapshot.kv + snapshot.lent) * snapshot.frame_bytes
            assert sum(replica.kv.mapped_bytes.values()) == own_bytes


class FakeCudaKvMachine(KvMachine):
    fake = True


_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestHostKv = KvMachine.TestCase
TestHostKv.settings = _SETTINGS
TestFakeCudaKv = FakeCudaKvMachine.TestCase
TestFakeCudaKv.settings = _SETTINGS
