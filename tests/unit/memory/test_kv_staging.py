"""KV of a layer that changes its home, at the level of memory, on both backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from cuda_model.driver import FakeBindings, make_fake_cuda
from kunserve_sgl.errors import InvariantError
from kunserve_sgl.memory.elastic_kv import ElasticKv
from kunserve_sgl.memory.errors import AlreadyMappedError, LedgerError, MappingFailedError, PoolFullError
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.frame_pool import FramePool
from kunserve_sgl.memory.slot_space import KvBuffer, SlotRange, plan_slot_space
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

LAYERS = 2
BASE = 3  # granules
UNIT = 3 * BASE  # frames of the base slots in a layer
SPARE = 10
K, V = "k", "v"


class Replica:
    """One replica's pool and KV cache, seen as float32."""

    def __init__(self, number: int, bindings: FakeBindings | None) -> None:
        vmm = MemfdVmm(4096) if bindings is None else make_fake_cuda(bindings)
        k_bytes = vmm.frame_bytes // 16
        buffers = [KvBuffer(layer, name, k_bytes * (1 + (name == V))) for name in (K, V) for layer in range(LAYERS)]
        self.number = number
        self.pool = FramePool(vmm, f"replica {number}")
        self.space = plan_slot_space(buffers, vmm.frame_bytes, 1, 2, 8 * 16)
        self.pool.add_frames(3 * LAYERS + SPARE)
        self.kv = ElasticKv(self.pool, self.space, buffers, number)
        self.kv.create_base(BASE)
        self.tensors = {(each.layer, each.name): self.kv.tensor(each, torch.float32, (-1,)) for each in buffers}

    def write(self, layer: int, slots: SlotRange, first: float) -> None:
        values = torch.arange(slots.count).float() + first
        self.tensors[layer, K][slots.first : slots.stop] = values[:, None]
        self.tensors[layer, V][slots.first : slots.stop] = -values[:, None]

    def read(self, layer: int, slots: SlotRange) -> list[float]:
        k, v = (self.tensors[layer, name][slots.first : slots.stop] for name in (K, V))
        assert (k == k[:, :1]).all()
        assert (v == -k[:, :1]).all()
        return [float(value) for value in k[:, 0]]

    def state(self) -> object:
        maps = {buffer.label: dict(area.frames) for buffer, area in self.kv._ranges.items()}
        return maps, self.pool.snapshot(), dict(self.kv.mapped_bytes), self.kv.away


@dataclass
class Pair:
    """Replica 0, whose base slots replica 1 has borrowed in layer 1."""

    bindings: FakeBindings | None
    owner: Replica = field(init=False)
    host: Replica = field(init=False)
    loan: Loan = field(init=False)

    def __post_init__(self) -> None:
        self.owner, self.host = (Replica(number, self.bindings) for number in (0, 1))
        self.slots = self.owner.kv.slots
        self.owner.write(1, self.slots, 100)
        self.loan = self.lend(self.owner, self.host)

    def lend(self, owner: Replica, borrower: Replica) -> Loan:
        frames = owner.kv.frames_behind(self.slots, [1])
        loan = owner.pool.loans.lend(f"replica {borrower.number}", frames)
        with owner.pool.vmm.export_frames(frames) as export:
            borrower.kv.borrow(f"replica {owner.number}", loan.loan_id, export, [(self.slots, [1])])
        return loan

    def go(self) -> None:
        """The whole way to the layer host."""
        staging = self.host.kv.stage(self.slots, 1)
        staging.take_own()
        staging.copy(0, self.slots.count)
        self.host.pool.loans.return_loan("replica 0", self.loan.loan_id)
        self.host.kv.take_staged(staging, self.slots, 1, after=())
        staging.close()
        self.owner.pool.loans.end_loan(self.loan.loan_id)
        self.owner.kv.lay_away(1)

    def check(self) -> None:
        for replica in (self.owner, self.host):
            replica.pool.check()
            frames = replica.pool.snapshot()
            assert sum(replica.kv.mapped_bytes.values()) == (frames.kv + frames.lent) * frames.frame_bytes

    def close(self) -> None:
        for replica in (self.host, self.owner):
            replica.pool.check()
            replica.tensors.clear()
            replica.pool.vmm.close()
        assert self.bindings is None or self.bindings.broken_rules == []


@pytest.fixture(params=["host", "cuda with a fake driver"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(FakeBindings() if request.param != "host" else None)
    yield pair
    pair.close()


def test_a_layer_goes_to_its_host_and_comes_back(pair: Pair) -> None:
    owner, host, slots = pair.owner, pair.host, pair.slots
    at_start = owner.state()
    host_free = host.pool.free_frames
    pair.go()
    assert host.read(1, slots) == [100.0 + i for i in range(slots.count)]
    assert owner.kv.away == (1,)
    assert owner.pool.free_frames == SPARE + UNIT
    assert host.pool.free_frames == host_free - UNIT
    assert owner.pool.snapshot().lent == host.pool.snapshot().borrowed == 0
    assert host.kv.differences(1, [host.kv.slots, slots]) == []
    assert owner.kv.differences(1, []) == []
    pair.check()

    # The host goes on writing, and then it is the owner's again.
    host.write(1, slots, 500)
    owner.kv.take_back(1)
    assert owner.read(1, slots) == [0.0] * slots.count, "new memory is zero"
    staging = host.kv.stage(slots, 1)
    frames = owner.kv.frames_behind(slots, [1])
    loan = owner.pool.loans.lend("replica 1", frames)
    with owner.pool.vmm.export_frames(frames) as export:
        staging.borrow("replica 0", loan.loan_id, export)
    assert staging.loan == ("replica 0", loan.loan_id)
    staging.copy(0, slots.count)
    host.kv.unmap_hosted(slots, [1])
    staging.take_place()
    staging.close()
    pair.check()
    assert host.read(1, slots) == owner.read(1, slots) == [500.0 + i for i in range(slots.count)]
    host.write(1, slots, 700)
    assert owner.read(1, slots)[0] == 700, "it is one memory again"
    host.pool.loans.return_loan("replica 0", loan.loan_id)
    owner.pool.loans.end_loan(loan.loan_id)
    assert host.pool.free_frames == host_free
    assert owner.kv.away == ()
    assert owner.pool.free_frames == SPARE
    assert owner.state()[1:] != at_start, "the loan is over"  # type: ignore[index]
    assert owner.kv.differences(1, [slots]) == []


def test_parts_and_single_slots_are_copied(pair: Pair) -> None:
    host, slots = pair.host, pair.slots
    staging = host.kv.stage(slots, 1)
    staging.take_own()
    assert (staging.slot_count, staging.slot_bytes) == (slots.count, 3 * host.pool.vmm.frame_bytes // 16)
    for first in range(0, slots.count, 7):
        staging.copy(first, min(7, slots.count - first))
    host.write(1, slots, 1000)
    staging.copy_slots(torch.tensor([0, 5, slots.count - 1]))
    host.pool.loans.return_loan("replica 0", pair.loan.loan_id)
    host.kv.take_staged(staging, slots, 1, after=())
    staging.close()
    expected = [100.0 + i for i in range(slots.count)]
    for offset in (0, 5, slots.count - 1):
        expected[offset] = 1000.0 + offset
    assert host.read(1, slots) == expected


def test_who_changes_its_mind_gives_everything_back(pair: Pair) -> None:
    owner, host, slots = pair.owner, pair.host, pair.slots
    before = host.state(), owner.state()
    ranges = len(host.pool.vmm._ranges)
    staging = host.kv.stage(slots, 1)
    staging.take_own()
    staging.copy(0, 5)
    host.pool.check()
    staging.close()
    staging.close()
    assert (host.state(), owner.state()) == before
    assert len(host.pool.vmm._ranges) == ranges


def test_too_few_frames_are_refused(pair: Pair) -> None:
    host, slots = pair.host, pair.slots
    host.pool.remove_frames(host.pool.free_frames - UNIT + 1)
    before = host.state()
    staging = host.kv.stage(slots, 1)
    with pytest.raises(PoolFullError):
        staging.take_own()
    staging.close()
    assert host.state() == before
    with pytest.raises(LedgerError):
        pair.owner.kv.lay_away(1)  # it is lent
    assert pair.owner.kv.away == ()


def test_memory_aside_takes_no_place_that_is_taken(pair: Pair) -> None:
    host, slots = pair.host, pair.slots
    staging = host.kv.stage(slots, 1)
    staging.take_own()
    before = host.state()
    with pytest.raises(AlreadyMappedError):
        host.kv.take_staged(staging, slots, 1, after=())
    assert host.state() == before
    staging.close()


@pytest.mark.parametrize("fails_at", range(4))
def test_a_change_that_the_machine_refuses_changes_nothing(pair: Pair, fails_at: int) -> None:
    host, slots = pair.host, pair.slots
    staging = host.kv.stage(slots, 1)
    staging.take_own()
    host.pool.loans.return_loan("replica 0", pair.loan.loan_id)
    before = host.state()
    vmm = host.pool.vmm
    real: dict[str, Callable[..., object]] = {"_map": vmm._map, "_unmap": vmm._unmap}
    calls = 0

    def failing(name: str) -> Callable[..., object]:
        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == fails_at + 1:
                raise MappingFailedError("as the test says")
            return real[name](*args)

        return call

    for name in real:
        setattr(vmm, name, failing(name))
    with pytest.raises(MappingFailedError):
        host.kv.take_staged(staging, slots, 1, after=())
    for name, method in real.items():
        setattr(vmm, name, method)
    assert host.state() == before
    host.pool.check()
    host.kv.take_staged(staging, slots, 1, after=())
    staging.close()


def test_a_layer_that_is_away_stays_away_until_it_is_back(pair: Pair) -> None:
    pair.go()
    owner = pair.owner
    for change in (owner.kv.grow, owner.kv.shrink):
        with pytest.raises(InvariantError, match=r"layers \[1\] is at home at another replica"):
            change(1)
    owner.pool.remove_frames(owner.pool.free_frames - UNIT + 1)
    before = owner.state()
    with pytest.raises(PoolFullError):
        owner.kv.take_back(1)
    assert owner.state() == before
    owner.pool.add_frames(1)
    owner.kv.take_back(1)
    owner.pool.add_frames(9)
    owner.kv.grow(1)
    owner.kv.shrink(1)
