"""The frame pool, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from cuda_model.driver import FakeBindings, make_fake_cuda
from kunserve_sgl.errors import InvariantError, KunserveError
from kunserve_sgl.memory.errors import (
    AlreadyMappedError,
    LedgerError,
    LoanError,
    MappingFailedError,
    NotMappedError,
    OutOfMemoryError,
    OutOfRangeError,
    PoolFullError,
    TransferError,
    ViewInUseError,
)
from kunserve_sgl.memory.frame_export import FrameExport
from kunserve_sgl.memory.frame_loans import Loan
from kunserve_sgl.memory.frame_pool import FramePool, PoolSnapshot
from kunserve_sgl.memory.virtual_range import LayerSpan, Span, VirtualRange
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

FRAME_BYTES = 4096


class Pools:
    """Two replicas' pools in one process, with a parameter and two KV ranges each."""

    def __init__(self, bindings: FakeBindings | None) -> None:
        self.bindings = bindings
        self.pool, self.peer = self.make("replica 0"), self.make("replica 1")
        self.parameters, self.k, self.v = (self.pool.vmm.reserve(8, name) for name in ("layer 3", "k 3", "v 3"))
        self.peer_k = self.peer.vmm.reserve(8, "k 3")

    def make(self, owner: str) -> FramePool:
        vmm = MemfdVmm(FRAME_BYTES) if self.bindings is None else make_fake_cuda(self.bindings)
        return FramePool(vmm, owner)

    def state(self) -> object:
        maps = [dict(r.frames) for r in (self.parameters, self.k, self.v, self.peer_k)]
        machine = self.bindings.state() if self.bindings is not None else None
        return self.pool.snapshot(), self.peer.snapshot(), maps, machine

    def check(self) -> None:
        self.pool.check()
        self.peer.check()


@pytest.fixture(params=["host", "cuda with a fake driver"])
def pools(request: pytest.FixtureRequest) -> Iterator[Pools]:
    pools = Pools(FakeBindings() if request.param != "host" else None)
    pools.pool.add_frames(10)
    yield pools
    pools.check()
    pools.pool.vmm.close()
    pools.peer.vmm.close()


def at(virtual_range: VirtualRange, first: int, count: int, layer: int = 3) -> LayerSpan:
    return LayerSpan(layer, Span(virtual_range, first, count))


def lend_parameters(pools: Pools, count: int) -> Loan:
    """Maps `count` frames of parameters, and lends them to the peer."""
    pools.pool.map_parameters([at(pools.parameters, 0, count)])
    return pools.pool.loans.lend("replica 1", pools.pool.vmm.frames_at(Span(pools.parameters, 0, count)))


def test_frames_move_between_parameters_and_kv(pools: Pools) -> None:
    pool = pools.pool
    pool.map_parameters([at(pools.parameters, 0, 6)])
    pool.map_kv([at(pools.k, 0, 2), at(pools.v, 0, 2)])
    assert pool.snapshot() == PoolSnapshot(
        owner="replica 0",
        frame_bytes=pool.vmm.frame_bytes,
        total=10,
        free=0,
        parameters=6,
        kv=4,
        lent=0,
        borrowed=0,
        parameters_by_layer={3: 6},
        kv_by_layer={3: 4},
        lent_by_borrower={},
        borrowed_by_owner={},
    )
    pool.unmap_parameters([at(pools.parameters, 0, 6)])
    pool.map_kv([at(pools.k, 2, 3), at(pools.v, 2, 3)])
    snapshot = pool.snapshot()
    assert (snapshot.free, snapshot.parameters, snapshot.kv) == (0, 0, 10)
    assert (pool.free_frames, pool.snapshot().total) == (0, 10)
    pool.unmap_kv([at(pools.k, 0, 5), at(pools.v, 0, 5)])
    assert pool.free_frames == 10


def test_growing_behind_several_buffers_is_all_or_nothing(pools: Pools) -> None:
    pool = pools.pool
    pool.map_kv([at(pools.v, 5, 1)])
    before = pools.state()
    with pytest.raises(PoolFullError, match="10 frames are needed, 9 of 10 are free"):
        pool.map_kv([at(pools.k, 0, 5), at(pools.v, 0, 5)])
    with pytest.raises(AlreadyMappedError):
        pool.map_kv([at(pools.k, 0, 2), at(pools.v, 4, 2)])
    assert pools.state() == before


def test_a_driver_failure_in_the_last_span_undoes_the_first() -> None:
    bindings = FakeBindings()
    pools = Pools(bindings)
    pools.pool.add_frames(10)
    pools.pool.map_kv([at(pools.k, 0, 2), at(pools.v, 0, 2)])
    before = pools.state()
    for failing in range(4, 8):
        bindings.fail_when(lambda name, number, failing=failing: number == failing)  # type: ignore[misc]
        with pytest.raises(MappingFailedError):
            pools.pool.map_kv([at(pools.k, 2, 3), at(pools.v, 2, 3)])
        assert pools.state() == before
    for failing in (0, 1):
        bindings.fail_when(lambda name, number, failing=failing: number == failing)  # type: ignore[misc]
        with pytest.raises(MappingFailedError):
            pools.pool.unmap_kv([at(pools.k, 0, 2), at(pools.v, 0, 2)])
        assert pools.state() == before
    pools.check()
    assert bindings.broken_rules == []


def test_a_mistake_in_any_span_is_found_before_the_machine_is_touched() -> None:
    """Otherwise the first spans would have to be undone, and the driver could fail at that."""
    bindings = FakeBindings()
    pools = Pools(bindings)
    pools.pool.add_frames(10)
    pools.pool.map_kv([at(pools.k, 0, 2)])
    tensor = pools.pool.vmm.tensor(pools.k, 0, 1)
    loan = lend_parameters(pools, 3)
    mistakes: list[tuple[type[Exception], Callable[[], object]]] = [
        (OutOfRangeError, lambda: pools.pool.map_kv([at(pools.v, 0, 2), at(pools.v, 7, 2)])),
        (AlreadyMappedError, lambda: pools.pool.map_kv([at(pools.v, 0, 2), at(pools.k, 1, 2)])),
        (AlreadyMappedError, lambda: pools.pool.map_kv([at(pools.v, 0, 3), at(pools.v, 2, 2)])),
        (PoolFullError, lambda: pools.pool.map_kv([at(pools.v, 0, 2), at(pools.k, 2, 4)])),
        (NotMappedError, lambda: pools.pool.unmap_kv([at(pools.k, 1, 1), at(pools.v, 0, 1)])),
        (NotMappedError, lambda: pools.pool.unmap_kv([at(pools.k, 1, 1), at(pools.k, 1, 1)])),
        (ViewInUseError, lambda: pools.pool.unmap_kv([at(pools.k, 1, 1), at(pools.k, 0, 1)])),
        (LedgerError, lambda: pools.pool.unmap_parameters([at(pools.k, 1, 1)])),
    ]
    with pools.pool.vmm.export_frames(loan.frames) as export:
        for first, second in (((0, 1), (7, 2)), ((0, 2), (1, 1))):
            spans = [at(pools.peer_k, *first), at(pools.peer_k, *second)]
            mistakes.append(
                (KunserveError, lambda spans=spans: pools.peer.loans.borrow("replica 0", loan.loan_id, export, spans))  # type: ignore[misc]
            )
        before = pools.state()
        bindings.log.clear()
        for kind, mistake in mistakes:
            with pytest.raises(kind):
                mistake()
            assert bindings.log == [], kind
        assert pools.state() == before
    del tensor
    pools.check()


@pytest.mark.parametrize("operation", ["map", "unmap", "borrow"])
def test_an_undo_that_fails_says_so(operation: str) -> None:
    bindings = FakeBindings()
    pools = Pools(bindings)
    pools.pool.add_frames(10)
    loan = lend_parameters(pools, 2)
    if operation == "unmap":
        pools.pool.map_kv([at(pools.k, 0, 1), at(pools.v, 0, 1)])
    export = pools.pool.vmm.export_frames(loan.frames)
    runs: dict[str, Callable[[], object]] = {
        "map": lambda: pools.pool.map_kv([at(pools.k, 0, 1), at(pools.v, 0, 1)]),
        "unmap": lambda: pools.pool.unmap_kv([at(pools.k, 0, 1), at(pools.v, 0, 1)]),
        "borrow": lambda: pools.peer.loans.borrow(
            "replica 0", loan.loan_id, export, [at(pools.peer_k, 0, 1), at(pools.peer_k, 4, 1)]
        ),
    }
    # The first span succeeds; the second fails, and so does what would undo the first.
    first_span = {"map": 2, "unmap": 1, "borrow": 4}[operation]
    bindings.fail_when(lambda name, number: number >= first_span)
    with export, pytest.raises(InvariantError, match=r"could not be undone: .*; it had failed because: "):
        runs[operation]()


def test_a_loan_that_cannot_be_mapped_is_not_kept() -> None:
    bindings = FakeBindings()
    pools = Pools(bindings)
    pools.pool.add_frames(10)
    loan = lend_parameters(pools, 4)
    spans = [at(pools.peer_k, 0, 2), at(pools.peer_k, 4, 2)]
    before = pools.state()
    with pools.pool.vmm.export_frames(loan.frames) as export:
        # Four imports, two maps and a grant, two maps and a grant: each of them fails once.
        for failing in range(10):
            bindings.fail_when(lambda name, number, failing=failing: number == failing)  # type: ignore[misc]
            with pytest.raises((MappingFailedError, TransferError)):
                pools.peer.loans.borrow("replica 0", loan.loan_id, export, spans)
            assert pools.state() == before
        bindings.fail_when(lambda name, number: False)
        pools.peer.loans.borrow("replica 0", loan.loan_id, export, spans)
    pools.check()


def test_only_the_use_that_was_mapped_can_be_unmapped(pools: Pools) -> None:
    pool = pools.pool
    pool.map_parameters([at(pools.parameters, 0, 2)])
    pool.map_kv([at(pools.k, 0, 2)])
    before = pools.state()
    with pytest.raises(LedgerError, match="is parameters of layer 3 in 'layer 3', not kv"):
        pool.unmap_kv([at(pools.k, 0, 2), at(pools.parameters, 0, 2)])
    with pytest.raises(LedgerError, match=r"of layer 3 .* not parameters of layer 4"):
        pool.unmap_parameters([at(pools.parameters, 0, 2, layer=4)])
    with pytest.raises(NotMappedError):
        pool.unmap_kv([at(pools.k, 0, 3)])
    assert pools.state() == before


def test_a_living_tensor_keeps_all_spans_of_the_call(pools: Pools) -> None:
    pool = pools.pool
    pool.map_kv([at(pools.k, 0, 2), at(pools.v, 0, 2)])
    tensor = pool.vmm.tensor(pools.v, 0, 16)
    before = pool.snapshot()
    with pytest.raises(ViewInUseError):
        pool.unmap_kv([at(pools.k, 0, 2), at(pools.v, 0, 2)])
    assert pool.snapshot() == before
    pool.check()
    del tensor
    pool.unmap_kv([at(pools.k, 0, 2), at(pools.v, 0, 2)])


def test_the_pool_grows_and_shrinks_by_free_frames(pools: Pools) -> None:
    pool = pools.pool
    pool.map_kv([at(pools.k, 0, 6)])
    with pytest.raises(PoolFullError, match="5 frames are needed, 4 of 10 are free"):
        pool.remove_frames(5)
    pool.remove_frames(3)
    assert (pool.snapshot().total, pool.free_frames) == (7, 1)
    pool.add_frames(2)
    pool.map_kv([at(pools.v, 0, 3)])
    assert (pool.snapshot().total, pool.free_frames) == (9, 0)


def test_a_pool_cannot_grow_beyond_the_machine() -> None:
    pools = Pools(FakeBindings(memory_frames=12))
    pools.pool.add_frames(10)
    with pytest.raises(OutOfMemoryError, match="had memory for 2 of 3 frames"):
        pools.pool.add_frames(3)
    assert pools.pool.snapshot().total == 10
    pools.check()


def lend_kv(pools: Pools, first: int, count: int) -> tuple[int, FrameExport]:
    frames = pools.pool.vmm.frames_at(Span(pools.k, first, count))
    loan = pools.pool.loans.lend("replica 1", frames)
    return loan.loan_id, pools.pool.vmm.export_frames(loan.frames)


def test_a_loan_goes_to_the_borrower_and_comes_back(pools: Pools) -> None:
    pool, peer = pools.pool, pools.peer
    pool.map_kv([at(pools.k, 0, 5)])
    pool.vmm.tensor(pools.k, 0, 5 * pool.vmm.frame_bytes).fill_(8)
    loan_id, export = lend_kv(pools, 1, 3)
    with export:
        peer.loans.borrow("replica 0", loan_id, export, [at(pools.peer_k, 6, 1), at(pools.peer_k, 2, 2)])
    assert int(peer.vmm.tensor(pools.peer_k, 2 * peer.vmm.frame_bytes, 1)) == 8
    snapshot, other = pool.snapshot(), peer.snapshot()
    assert (snapshot.kv, snapshot.lent, snapshot.free) == (2, 3, 5)
    assert dict(snapshot.lent_by_borrower) == {"replica 1": 3}
    assert (other.total, other.borrowed, dict(other.borrowed_by_owner)) == (0, 3, {"replica 0": 3})
    pools.check()
    for refused in (lambda: pool.unmap_kv([at(pools.k, 0, 2)]), lambda: lend_kv(pools, 0, 2)):
        with pytest.raises(LedgerError, match="lent"):
            refused()
    assert pool.snapshot() == snapshot
    peer.loans.return_loan("replica 0", loan_id)
    pool.loans.end_loan(loan_id)
    assert (pool.snapshot().kv, pool.snapshot().lent, peer.snapshot().borrowed) == (5, 0, 0)
    pool.unmap_kv([at(pools.k, 0, 5)])


def test_parameters_and_kv_can_be_lent(pools: Pools) -> None:
    pool, peer = pools.pool, pools.peer
    weights = lend_parameters(pools, 2)
    pool.map_kv([at(pools.k, 0, 3)])
    loan = pool.loans.lend("replica 1", pool.vmm.frames_at(Span(pools.k, 0, 3)))
    assert (pool.snapshot().lent, pool.snapshot().parameters, pool.free_frames) == (5, 0, 5)
    with pool.vmm.export_frames(loan.frames) as export:
        peer.loans.borrow("replica 0", loan.loan_id, export, [at(pools.peer_k, 0, 3)])
    pools.check()
    peer.loans.return_loan("replica 0", loan.loan_id)
    for each in (loan, weights):
        pool.loans.end_loan(each.loan_id)
    snapshot = pool.snapshot()
    assert (snapshot.free, snapshot.parameters, snapshot.kv) == (5, 2, 3)


@pytest.mark.parametrize("first_ended", [0, 1, 2])
def test_frames_are_lent_until_the_last_of_several_borrowers_returned_them(pools: Pools, first_ended: int) -> None:
    """As when merged groups merge again: the new host borrows before the old one has returned."""
    pool = pools.pool
    pool.map_kv([at(pools.k, 0, 4)])
    pool.vmm.tensor(pools.k, 0, 4 * pool.vmm.frame_bytes).fill_(9)
    frames = pool.vmm.frames_at(Span(pools.k, 0, 4))
    borrowers = [pools.peer, pools.make("replica 2"), pools.make("replica 3")]
    loans = []
    for peer, lent in zip(borrowers, (frames[:3], frames[1:], frames[1:2]), strict=True):
        loans.append(pool.loans.lend(peer.owner, lent))
        area = peer.vmm.reserve(4, "k 3 again")
        with pool.vmm.export_frames(lent) as export:
            peer.loans.borrow("replica 0", loans[-1].loan_id, export, [at(area, 0, len(lent))])
        assert peer.vmm.tensor(area, 0, len(lent) * peer.vmm.frame_bytes).unique().tolist() == [9]
    snapshot = pool.snapshot()
    assert (snapshot.lent, snapshot.kv, snapshot.free) == (4, 0, 6)
    assert dict(snapshot.lent_by_borrower) == {"replica 1": 3, "replica 2": 3, "replica 3": 1}
    for peer, lent in zip(borrowers, (frames[:1], frames[3:], frames[:2]), strict=True):
        with pytest.raises(LedgerError, match=rf"are lent to .*{peer.owner} .*already"):
            pool.loans.lend(peer.owner, lent)
    assert pool.snapshot() == snapshot
    order = [first_ended, *(other for other in (2, 0, 1) if other != first_ended)]
    for number in order:
        borrowers[number].loans.return_loan("replica 0", loans[number].loan_id)
        pool.loans.end_loan(loans[number].loan_id)
        still = {frame for other in order[order.index(number) + 1 :] for frame in loans[other].frames}
        assert (pool.snapshot().lent, pool.snapshot().kv) == (len(still), 4 - len(still))
        pools.check()
        if still:
            with pytest.raises(LedgerError, match="lent"):
                pool.unmap_kv([at(pools.k, 0, 4)])
    pool.unmap_kv([at(pools.k, 0, 4)])
    for extra in borrowers[1:]:
        extra.vmm.close()


def test_a_loan_that_the_book_does_not_know_is_found(pools: Pools) -> None:
    pool = pools.pool
    loan = lend_parameters(pools, 2)
    pool.check()
    other = pool.loans._lent.pop(loan.loan_id)
    with pytest.raises(LedgerError, match=r"frames by loan are \{1: 2\}, the loans say \{\}"):
        pool.check()
    pool.loans._lent[loan.loan_id] = other


def test_loans_that_make_no_sense_are_refused(pools: Pools) -> None:
    pool, peer = pools.pool, pools.peer
    pool.map_kv([at(pools.k, 0, 5)])
    frames = pool.vmm.frames_at(Span(pools.k, 0, 2))
    for wrong in ((), (frames[0], frames[0])):
        with pytest.raises(LedgerError):
            pool.loans.lend("replica 1", wrong)
    loan_id, export = lend_kv(pools, 0, 2)
    before = pools.state()
    with export:
        with pytest.raises(LoanError, match="2 frames cannot be mapped behind 3"):
            peer.loans.borrow("replica 0", loan_id, export, [at(pools.peer_k, 0, 3)])
        with pytest.raises(AlreadyMappedError):
            peer.loans.borrow("replica 0", loan_id, export, [at(pools.peer_k, 0, 1), at(pools.peer_k, 0, 1)])
        wrong_size = FrameExport(export.backend, 3 * export.frame_bytes, export.runs, export.fds)
        with pytest.raises(TransferError):
            peer.loans.borrow("replica 0", loan_id, wrong_size, [at(pools.peer_k, 0, 2)])
        assert pools.state() == before
        peer.loans.borrow("replica 0", loan_id, export, [at(pools.peer_k, 0, 2)])
        with pytest.raises(LoanError, match="borrowed already"):
            peer.loans.borrow("replica 0", loan_id, export, [at(pools.peer_k, 4, 2)])
    with pytest.raises(LoanError, match="does not exist or has ended"):
        pool.loans.end_loan(loan_id + 1)
    with pytest.raises(LoanError, match="is not borrowed"):
        peer.loans.return_loan("replica 0", loan_id + 1)
    assert dict(peer.snapshot().borrowed_by_owner) == {"replica 0": 2}
    tensor = peer.vmm.tensor(pools.peer_k, 0, 1)
    with pytest.raises(ViewInUseError):
        peer.loans.return_loan("replica 0", loan_id)
    pools.check()
    del tensor
    peer.loans.return_loan("replica 0", loan_id)
    pool.loans.end_loan(loan_id)
    with pytest.raises(LoanError, match="has ended"):
        pool.loans.end_loan(loan_id)


def test_mapping_behind_the_pools_back_is_found(pools: Pools) -> None:
    pool = pools.pool
    pool.map_kv([at(pools.k, 0, 2)])
    pool.check()
    frames = pool.vmm.unmap(Span(pools.k, 0, 1))
    with pytest.raises(LedgerError, match="booked as kv of layer 3 in 'k 3', but mapped in None"):
        pool.check()
    pool.vmm.map(Span(pools.v, 0, 1), frames)
    with pytest.raises(LedgerError, match="but mapped in 'v 3'"):
        pool.check()
    pool.vmm.unmap(Span(pools.v, 0, 1))
    pool.vmm.map(Span(pools.k, 0, 1), frames)
    pool.check()
    extra = pool.vmm.create_frames(1)
    with pytest.raises(LedgerError, match="11 frames exist, 10 are booked"):
        pool.check()
    pool.vmm.destroy_frames(extra)
