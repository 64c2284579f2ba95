"""Batches that visit other replicas: same results as at home, in whatever order everybody sends, and no deadlock."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from fake_engine import LAYERS, LIMIT_S, MODULUS, FakeBatch, Request, decode_batch, extend_batch
from hosting_world import SLOTS_PER_REPLICA, Rank, World, as_numbers, plan_of

from kunserve_sgl.errors import BatchCalledOffError, InvariantError, TransientError
from kunserve_sgl.exchange.remote_attention import KvUnreachableError
from kunserve_sgl.exchange.tensor_layout import notes_of
from kunserve_sgl.exchange.work import Answer, Message, Work
from kunserve_sgl.policy.cutting import Amount, ChunkCost
from kunserve_sgl.policy.plan import Plan, Segment
from kunserve_sgl.replica import hosting, layer_times, orders_away, own_batches
from kunserve_sgl.replica.pieces import whole_batch
from kunserve_sgl.wire.framing import control_message
from waiting import wait_until

MakeWorld = Callable[..., World]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    """Batches that fail are not called off afterwards, unless a test does so."""
    worlds: list[World] = []
    monkeypatch.setattr(hosting, "VERDICT_S", 0.0)
    monkeypatch.setattr(orders_away, "_CALL_OFF_S", 0.0)

    def make(replicas: int = 2, ranks: int = 1, **kwargs: Any) -> World:
        directory = tmp_path / str(len(worlds))
        directory.mkdir()
        worlds.append(World(directory, replicas, ranks, **kwargs))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


class Load:
    """The requests of one rank. Equal at all ranks of a replica, because it draws from the same numbers."""

    def __init__(self, rank: Rank, seed: int) -> None:
        self.rank = rank
        self.rng = random.Random(f"{seed} {rank.replica}")
        base = 1 + rank.replica * SLOTS_PER_REPLICA
        self.free = list(range(base, base + SLOTS_PER_REPLICA))
        self.rng.shuffle(self.free)
        self.requests: list[Request] = []
        self.rows = list(rank.rows.rows_of(rank.replica))

    def next_batch(self) -> FakeBatch:
        rng = self.rng
        if len(self.requests) == len(self.rows) or rng.random() < 0.1:
            for request in self.requests:
                self.free += request.slots
            self.rank.rows.ledger.forget_rows(request.row for request in self.requests)
            self.requests.clear()
        if not self.requests or rng.random() < 0.3:
            new = [self._begin() for _ in range(rng.randint(1, len(self.rows) - len(self.requests)))]
            chosen = new + [r for r in self.requests if r not in new and rng.random() < 0.3]
            counts = [rng.randint(1, 5) for _ in chosen]
            for request, count in zip(chosen, counts, strict=True):
                self._extend(request, count)
            return extend_batch(chosen, counts, logprob=rng.random() < 0.3)
        for request in self.requests:
            self._extend(request, 1)
        return decode_batch(self.requests)

    def _begin(self) -> Request:
        row = next(row for row in self.rows if row not in [r.row for r in self.requests])
        self.requests.append(Request(row, [], []))
        return self.requests[-1]

    def _extend(self, request: Request, count: int) -> None:
        start = len(request.slots)
        request.slots += [self.free.pop() for _ in range(count)]
        request.tokens += [self.rng.randrange(int(MODULUS)) for _ in range(count)]
        self.rank.write_row(request, start)


def at_home(load: Load, batches: int, kv: torch.Tensor) -> list[torch.Tensor]:
    """The same batches without any hosting, on memory of their own."""
    runner = load.rank.runner
    before, runner.kv = runner.kv, kv
    results = []
    for _ in range(batches):
        batch = load.next_batch()
        results.append(runner.run_to_end(batch, None, 0).logits_output)
    runner.kv = before
    runner.runs.clear()
    return results


def run_threads(world: World, work: Callable[[Rank], None]) -> list[BaseException]:
    """`work` at every rank; afterwards each goes on serving until all replicas have finished."""
    failures: list[BaseException] = []
    go_on: dict[int, bool] = {}

    def loop(rank: Rank) -> None:
        torch.set_num_threads(1)
        try:
            try:
                work(rank)
            finally:
                if rank.rank == 0:
                    world.done()
            exchange = world.exchanges[rank.replica]
            deadline_s = time.monotonic() + LIMIT_S
            while True:
                if rank.rank == 0:
                    go_on[rank.replica] = world.left > 0
                    assert time.monotonic() < deadline_s, "the others do not finish"
                exchange.meet(rank.rank, "go on?")
                if not go_on[rank.replica]:
                    return
                exchange.meet(rank.rank, "serve")
                if not rank.serving.serve() and rank.rank == 0:
                    rank.link.poll(5)
        except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - the test fails with all of them
            failures.append(error)
            world.exchanges[rank.replica].abort()

    threads = [threading.Thread(target=loop, args=(rank,), daemon=True) for rank in world.everybody]
    for thread in threads:
        thread.start()
    end_s = time.monotonic() + 2 * LIMIT_S
    for thread in threads:
        thread.join(max(0.0, end_s - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return failures


def random_hosts(rng: random.Random, replicas: int) -> list[list[int]]:
    kind = rng.random()
    if kind < 0.3:  # the same pipeline for all
        cut = sorted(rng.choices(range(LAYERS + 1), k=replicas - 1))
        hosts = [sum(layer >= at for at in cut) for layer in range(LAYERS)]
        return [hosts] * replicas
    if kind < 0.5:
        return [[(r + layer) % replicas for layer in range(LAYERS)] for r in range(replicas)]
    return [[rng.randrange(replicas) for _ in range(LAYERS)] for _ in range(replicas)]


def random_pieces(rng: random.Random) -> Callable[..., tuple[int, ...]]:
    """In place of `piece_sizes`: cuts anywhere."""

    def sizes(amount: Amount, *_: Any) -> tuple[int, ...]:
        tokens = amount.tokens
        borders = [0, *sorted(rng.sample(range(1, tokens), rng.randrange(min(6, tokens)))), tokens]
        return tuple(end - start for start, end in itertools.pairwise(borders))

    return sizes


def random_slices(rng: random.Random) -> Callable[..., int]:
    """In place of `slice_end`: a look for other work after any layer."""
    return lambda start, end, *_: end if rng.random() < 0.3 else rng.randrange(start, end) + 1


@pytest.mark.parametrize(("in_pieces", "sends"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("replicas", "ranks"), [(2, 1), (3, 1), (4, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_any_route_gives_the_results_of_home(
    make_world: MakeWorld,
    replicas: int,
    ranks: int,
    seed: int,
    in_pieces: bool,
    sends: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everybody sends at once; routes change between batches; batches go whole, or in pieces and slices; activations go
    through memory, or are sent."""
    pieces = random_pieces(random.Random(seed)) if in_pieces else lambda amount, *_: (amount.tokens,)
    monkeypatch.setattr(own_batches, "piece_sizes", pieces)
    if in_pieces:
        monkeypatch.setattr(layer_times, "slice_end", random_slices(random.Random(seed)))
    batches = 40
    single = make_world(replicas, 1)
    expected = {
        rank.replica: as_numbers(at_home(Load(rank, seed), batches, torch.zeros_like(single.kv[0])))
        for rank in single.everybody
    }
    world = make_world(replicas, ranks, sends=sends)
    rng = random.Random(f"routes {seed}")
    plans = [plan_of(random_hosts(rng, replicas), epoch) for epoch in range(6)]

    def work(rank: Rank) -> None:
        rank.connect()
        rank.plan.enter(all_to(0, replicas))  # others may take another route earlier
        load = Load(rank, seed)
        for number in range(batches):
            if number % 7 == 0:
                rank.switch(plans[number // 7])
            batch = load.next_batch()
            rank.results.append(rank.own.forward(batch).logits_output)

    assert run_threads(world, work) == []
    for rank in world.everybody:
        assert as_numbers(rank.results) == expected[rank.replica]
    reports = [rank.hosting.report() for rank in world.everybody]
    assert sum(report["own_batches_sent"] for report in reports) > batches
    assert any(report["pieces_sent"] > report["own_batches_sent"] for report in reports) == in_pieces
    served = sum(report["batches_served"] for report in reports)
    assert served >= sum(report["own_batches_sent"] for report in reports)


def requests_of(rank: Rank, count: int = 2) -> list[Request]:
    rows = list(rank.rows.rows_of(rank.replica))
    base = 1 + rank.replica * SLOTS_PER_REPLICA
    made = [Request(rows[i], [base + i], [10 + i]) for i in range(count)]
    for request in made:
        rank.write_row(request, 0)
    return made


def one_batch(rank: Rank, requests: int = 2) -> FakeBatch:
    return extend_batch(requests_of(rank, requests), [1] * requests)


def send_off(rank: Rank, requests: int = 2) -> int:
    """Sends an own batch without waiting for it; returns its number."""
    batch = one_batch(rank, requests)
    [piece] = whole_batch(batch, batch.shape, rank.runner)
    rank.own._advance(piece, LAYERS, is_whole=True)
    assert piece.order is not None
    return piece.order


def all_to(host: int, replicas: int, *, but: Sequence[int] = ()) -> Plan:
    return plan_of([[r if r in but else host] * LAYERS for r in range(replicas)])


def test_layers_run_once_and_in_order(make_world: MakeWorld) -> None:
    world = make_world(3)
    plan = plan_of([[0, 1, 1, 2, 0], [1] * LAYERS, [2] * LAYERS])

    def work(rank: Rank) -> None:
        rank.take(plan)
        if rank.replica == 0:
            rank.own.forward(one_batch(rank))

    assert run_threads(world, work) == []
    runs = [[(start, end) for _, start, end in row[0].runner.runs] for row in world.ranks]
    assert runs == [[(0, 1), (4, 5)], [(1, 3)], [(3, 4)]]
    assert world.ranks[0][0].hosting.report()["route"] == [[0, 0, 1], [1, 1, 3], [2, 3, 4], [0, 4, 5]]


def test_nobody_is_served_twice_before_the_own_batch(make_world: MakeWorld) -> None:
    """Orders of two owners wait at the host, three of one of them."""
    world = make_world(3)
    host = world.ranks[2][0]
    plan = all_to(2, 3)
    for owner in (0, 1):
        rank = world.ranks[owner][0]
        rank.take(plan)
        for _ in range(3 if owner == 0 else 1):
            send_off(rank)
    deadline_s = time.monotonic() + LIMIT_S
    while host.link.order_count < 4:
        assert time.monotonic() < deadline_s
        host.link.poll(100)
    host.take(plan)
    host.runner.runs.clear()
    own = one_batch(host)
    host.own.forward(own)
    first_slots = [1 + owner * SLOTS_PER_REPLICA for owner in range(3)]
    assert sorted(run[0] for run in host.runner.runs[:2]) == first_slots[:2]
    assert host.runner.runs[2] == (first_slots[2], 0, LAYERS)
    assert [host.serving.serve() for _ in range(3)] == [1, 1, 0]
    host.take(all_to(2, 3, but=range(3)))
    assert host.serving.serve() == 0


def test_who_waits_serves(make_world: MakeWorld) -> None:
    """Two replicas send each other everything: neither could go on without the other."""
    world = make_world(2)
    plan = plan_of([[1] * LAYERS, [0] * LAYERS])

    def work(rank: Rank) -> None:
        rank.take(plan)
        for _ in range(100):
            rank.own.forward(one_batch(rank))

    assert run_threads(world, work) == []
    for row in world.ranks:
        report = row[0].hosting.report()
        assert (report["own_batches_sent"], report["batches_served"]) == (100, 100)
        assert set(report["seconds"]) >= {"own", "serve", "send", "receive"}


def after_one_layer(tokens: int) -> Callable[..., int]:
    """In place of `slice_end`: batches of so many tokens or more are long."""
    return lambda start, end, layers, amount, cost: start + 1 if amount.tokens >= tokens else end


def wait_for_orders(rank: Rank, count: int) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while rank.link.order_count < count:
        assert time.monotonic() < deadline_s
        rank.link.poll(100)


def test_short_segments_go_between_the_slices_of_a_long_one(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second long one waits until the first has ended."""
    monkeypatch.setattr(layer_times, "slice_end", after_one_layer(3))
    world = make_world(4)
    host = world.ranks[3][0]
    plan = all_to(3, 4)
    for owner, requests in ((0, 3), (1, 3), (2, 2)):
        rank = world.ranks[owner][0]
        rank.take(plan)
        send_off(rank, requests)
        wait_for_orders(host, owner + 1)
    host.take(plan)
    first = [1 + owner * SLOTS_PER_REPLICA for owner in range(3)]
    rounds = 0
    while host.serving.serve():
        rounds += 1
    assert rounds == 2 * LAYERS - 1  # the second begins in the round in which the first ends
    slices = [(layer, layer + 1) for layer in range(LAYERS)]
    assert host.runner.runs[:2] == [(first[0], 0, 1), (first[2], 0, LAYERS)]
    assert host.runner.runs[2:] == [(first[0], *each) for each in slices[1:]] + [(first[1], *each) for each in slices]
    assert host.serving.served == 3


@pytest.mark.parametrize("tokens", [2, 3])
def test_the_own_batch_waits_for_a_long_segment_only_if_it_is_long_too(
    make_world: MakeWorld, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_times, "slice_end", after_one_layer(tokens))
    world = make_world(2)
    owner, host = (row[0] for row in world.ranks)
    plan = all_to(1, 2)
    for rank in (owner, host):
        rank.take(plan)
    send_off(owner, 3)
    wait_for_orders(host, 1)
    assert host.serving.serve() == 1
    # The own batch, of two requests, has a first segment here and one at the owner, who is not there to run it.
    route = plan_of([[1] * LAYERS, [1] * (LAYERS - 1) + [0]], 2)
    host.take(route)
    thread = threading.Thread(target=host.own.forward, args=(one_batch(host),), daemon=True)
    thread.start()
    wait_for_orders(owner, 1)
    owner.take(route)
    owner.serving.serve()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    while host.serving.serve():  # what is left of the owner's
        pass
    ours = host.runner.runs.index((1 + SLOTS_PER_REPLICA, 0, 1 if tokens == 2 else LAYERS - 1))
    assert (ours < host.runner.runs.index((1, LAYERS - 1, LAYERS))) == (tokens == 3)


def test_a_long_batch_that_stays_at_home_lets_others_in(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that hosts others' layers while all of its own run at home; two short segments wait there."""
    monkeypatch.setattr(layer_times, "slice_end", after_one_layer(3))
    world = make_world(2)
    owner, host = (row[0] for row in world.ranks)
    plan = all_to(1, 2)
    for rank in (owner, host):
        rank.take(plan)
    for _ in range(2):
        send_off(owner, 2)
    wait_for_orders(host, 2)
    batch = one_batch(host, 3)
    output = host.own.forward(batch).logits_output
    theirs, own = (1, 0, LAYERS), [(1 + SLOTS_PER_REPLICA, layer, layer + 1) for layer in range(LAYERS)]
    assert host.runner.runs == [theirs, own[0], theirs, *own[1:]]
    assert as_numbers([output]) == as_numbers([host.runner.run_to_end(batch, None, 0).logits_output])
    assert not host.plan.is_pipelined
    assert host.hosting.report()["own_batches_sent"] == 0


@pytest.mark.parametrize(("ranks", "tokens", "looks"), [(1, 3, LAYERS - 1), (1, 2, 0), (2, 3, 0)])
def test_a_long_batch_stops_between_layers_also_when_nobody_is_served(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, ranks: int, tokens: int, looks: int
) -> None:
    """A transition goes on there; not with several ranks, which have to agree on where they are in it."""
    monkeypatch.setattr(layer_times, "slice_end", after_one_layer(3))
    world = make_world(2, ranks)
    ran: list[int] = []
    outputs: dict[int, list[list[list[float]]]] = {}

    def work(rank: Rank) -> None:
        if rank.replica != 0:
            return
        if rank.rank == 0:
            rank.own.between_layers = lambda: ran.append(rank.runner.runs[-1][2])
        batch = one_batch(rank, tokens)
        outputs[rank.rank] = as_numbers([rank.own.forward(batch).logits_output])
        assert outputs[rank.rank] == as_numbers([rank.runner.run_to_end(batch, None, 0).logits_output])

    assert run_threads(world, work) == []
    assert ran == list(range(1, looks + 1))


def test_a_transition_goes_on_while_an_own_batch_is_away_but_not_while_slots_are_copied(make_world: MakeWorld) -> None:
    """Slots are copied in the middle of a step of a transition."""
    world = make_world(2)
    looks: dict[str, int] = {"batch": 0, "copy": 0}
    looked = threading.Event()

    def work(rank: Rank) -> None:
        rank.take(all_to(1, 2))
        if rank.replica != 0:
            assert looked.wait(LIMIT_S)  # and serves after that
            return
        what = "batch"

        def look() -> None:
            looks[what] += 1
            looked.set()

        rank.own.between_layers = look
        rank.own.forward(one_batch(rank))
        what = "copy"
        rank.hosting.slot_copies.copy(torch.tensor([5]), torch.tensor([1]))

    assert run_threads(world, work) == []
    assert looks["batch"] > 0
    assert looks["copy"] == 0


def test_orders_of_those_who_are_not_served_any_more_are_forgotten(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_times, "slice_end", after_one_layer(3))
    world = make_world(3)
    host = world.ranks[2][0]
    plan = all_to(2, 3)
    for owner, requests in ((0, 3), (1, 2)):
        world.ranks[owner][0].take(plan)
        send_off(world.ranks[owner][0], requests)
    wait_for_orders(host, 2)
    host.take(plan)
    assert host.serving.serve() == 2
    assert host.serving.is_waited_for, "of the long one layers are left"
    send_off(world.ranks[1][0], 2)
    wait_for_orders(host, 2)
    host.serving.forget_all_but([1])
    host.runner.runs.clear()
    assert [host.serving.serve() for _ in range(2)] == [1, 0]
    assert host.runner.runs == [(1 + SLOTS_PER_REPLICA, 0, LAYERS)]
    assert not host.serving.has_begun_long


def test_a_failure_at_a_host_is_the_owners_to_handle(make_world: MakeWorld) -> None:
    world = make_world(3)
    plan = plan_of([[0, 1, 2, 2, 0], [1] * LAYERS, [2] * LAYERS])
    world.ranks[2][0].runner.broken = "no such kernel"
    told: list[tuple[int, str]] = []
    world.ranks[0][0].hosting.away.tell_of_failure = lambda host, reason: told.append((host, reason))

    def work(rank: Rank) -> None:
        rank.take(plan)
        if rank.replica == 0:
            with pytest.raises(InvariantError, match="replica 2 could not execute batch 1: ValueError: no such kernel"):
                rank.own.forward(one_batch(rank))
            rank.take(plan_of([[0, 1, 1, 1, 0], [1] * LAYERS, [2] * LAYERS], 2))
            rank.own.forward(one_batch(rank))

    assert run_threads(world, work) == []
    assert told == [(2, "ValueError: no such kernel")]


def test_what_merged_batches_take_is_compared_with_home(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as it is known what they would have taken there; batches at home do not count."""
    world = make_world(2)
    owner, host = (row[0] for row in world.ranks)
    owner.own.forward(one_batch(owner))
    for rank in (owner, host):
        rank.take(all_to(1, 2, but=[1]))

    def forward() -> None:
        thread = threading.Thread(target=lambda: owner.own.forward(one_batch(owner)))
        thread.start()
        wait_for_orders(host, 1)
        while host.serving.serve():
            pass
        thread.join(LIMIT_S)
        assert not thread.is_alive()

    forward()
    assert (owner.own.merged_s, owner.own.home_s) == (0.0, 0.0)
    monkeypatch.setattr(layer_times.LayerTimes, "cost", ChunkCost(0.0, 0.0, 3.0))
    forward()
    assert owner.own.home_s == 3.0
    assert 0.0 < owner.own.merged_s < LIMIT_S
    host.own.forward(one_batch(host))
    assert host.own.home_s == 0.0


def test_a_host_that_was_not_meant_says_so(make_world: MakeWorld) -> None:
    world = make_world(2)
    owner, host = world.ranks[0][0], world.ranks[1][0]
    for rank in (owner, host):
        rank.link.check_with(lambda message, sender: None)  # it would be ignored
    owner.take(all_to(1, 2))
    shape = one_batch(owner).shape
    parts = (shape.rows.tobytes(), shape.lengths.tobytes(), b"", shape.slots.tobytes())
    work = Work(0, 0, 1, 1, (Segment(0, 0, LAYERS),), shape.mode, *parts, (), (), 0, None)
    owner.link.send(1, work)
    host.take(all_to(1, 2))
    deadline_s = time.monotonic() + LIMIT_S
    while not host.serving.serve():
        assert time.monotonic() < deadline_s
    answer = owner.link.wait_answer(work.batch, deadline_s)
    assert answer == Answer(1, 0, work.batch, (), "InvariantError: replica 1 received a segment for replica 0")


def test_a_batch_that_does_not_come_back(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the coordinator is told whom it is with."""
    world = make_world(2, order_timeout_s=1.0)
    owner = world.ranks[0][0]
    owner.take(all_to(1, 2))
    started_s = time.monotonic()
    monkeypatch.setattr(orders_away, "_TELL_INTERVAL_S", 0.0)
    monkeypatch.setattr(orders_away, "_POLL_SLICE_MS", 10)
    told: list[tuple[list[int], float]] = []
    owner.hosting.away.tell_of_waiting = lambda hosts, waited_s: told.append((list(hosts), waited_s))
    with pytest.raises(TransientError, match=r"replica 0: batch 1 did not come back within 1 s"):
        owner.own.forward(one_batch(owner))
    assert time.monotonic() - started_s >= 1.0
    assert told
    assert all(hosts == [1] and 0 <= waited_s <= 1.0 for hosts, waited_s in told)


def test_a_rank_waits_for_rank_0_longer_than_for_others(make_world: MakeWorld) -> None:
    """A replica that is stopped for a while, one process of it or all, goes on with all of its ranks."""
    world = make_world(2, 2, order_timeout_s=0.1)

    def work(rank: Rank) -> None:
        if rank.replica == 1:
            return
        rank.take(all_to(0, 2))
        if rank.rank == 0:
            time.sleep(0.3)
        rank.serving.serve()

    assert run_threads(world, work) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_slots_are_copied_where_their_layers_run(make_world: MakeWorld, ranks: int) -> None:
    world = make_world(3, ranks)
    plan = plan_of([[0, 1, 2, 1, 0], [1] * LAYERS, [2] * LAYERS])
    world.kv[:] = torch.arange(world.kv.numel()).view_as(world.kv)
    before = world.kv.clone()
    sources, targets = torch.tensor([3, 4, 9]), torch.tensor([20, 30, 25])

    def work(rank: Rank) -> None:
        rank.take(plan)
        if rank.replica == 0:
            rank.hosting.slot_copies.copy(targets, sources)

    assert run_threads(world, work) == []
    expected = before.clone()
    expected[:, :, targets] = before[:, :, sources]
    assert torch.equal(world.kv, expected)


def test_a_layer_host_answers_a_copy_when_its_device_has_copied(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(2)
    host = world.ranks[1][0]
    send = host.link.send

    def noting(replica: int, message: Message, rank: int | None = None) -> None:
        host.runner.device_calls.append(type(message).__name__)
        send(replica, message, rank)

    monkeypatch.setattr(host.link, "send", noting)

    def work(rank: Rank) -> None:
        rank.take(all_to(1, 2))
        if rank.replica == 0:
            rank.hosting.slot_copies.copy(torch.tensor([20]), torch.tensor([3]))

    assert run_threads(world, work) == []
    assert host.runner.device_calls == ["enter", "copy", "wait", "leave", "Answer"]


def test_slices_of_a_segment_run_in_the_stream_of_batches(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle layer host is called from the scheduler's stream, and what it begins may end in a batch of its own."""
    monkeypatch.setattr(layer_times, "slice_end", after_one_layer(1))
    world = make_world(2)
    owner, host = world.ranks[0][0], world.ranks[1][0]
    for rank in (owner, host):
        rank.take(all_to(1, 2))
    send_off(owner)
    wait_for_orders(host, 1)
    while host.serving.serve():
        pass
    slices = [("enter", f"layers {layer} to {layer + 1}", "leave") for layer in range(LAYERS)]
    assert host.runner.device_calls == [call for each in slices for call in each]


def test_a_replica_on_its_own_sends_nothing(make_world: MakeWorld) -> None:
    world = make_world(2)
    rank = world.ranks[0][0]
    rank.own.forward(one_batch(rank))
    rank.take(all_to(1, 2, but=[0]))
    rank.own.forward(one_batch(rank))
    assert [run[1:] for run in rank.runner.runs] == [(0, LAYERS)] * 2
    assert rank.hosting.report()["own_batches_sent"] == 0
    assert rank.hosting.report()["route"] == [[0, 0, LAYERS]]
    targets, sources = torch.tensor([5]), torch.tensor([1])
    rank.hosting.slot_copies.copy(targets, sources)
    assert torch.equal(world.kv[0, :, 5], world.kv[0, :, 1])


def leading(own: Sequence[Rank], left: list[int]) -> list[threading.Thread]:
    """Threads, one per rank, that run an own batch until its end, or until it is called off: then the rank goes to
    `left`."""

    def lead(rank: Rank) -> None:
        with contextlib.suppress(BatchCalledOffError):
            rank.own.forward(one_batch(rank))
            return
        left.append(rank.rank)

    for rank in own:
        rank.hosting.away.is_called_off = lambda rank=rank: rank.link.has_control
    return [threading.Thread(target=lead, args=(rank,), daemon=True) for rank in own]


def call_off(own: Sequence[Rank], leaders: Sequence[threading.Thread]) -> None:
    """Tells rank 0 to leave its batch, and waits for all."""
    order = zmq.Context.instance().socket(zmq.PUSH)
    order.connect(own[0].link.address)
    order.send(control_message(b"leave"))
    for thread in leaders:
        thread.join(LIMIT_S)
    order.close(linger=0)


@pytest.mark.parametrize("has_answer", [0, 1])
def test_an_own_batch_is_left_of_which_one_rank_only_has_the_answer(make_world: MakeWorld, has_answer: int) -> None:
    """Its layer host has died while it sent that. The rank that has it does not run on into a collective alone."""
    world = make_world(2, 2)
    own, dead = world.ranks
    for rank in world.everybody:
        rank.take(plan_of([[1, 1, 0, 0, 0], [1] * LAYERS]))
    left: list[int] = []
    leaders = leading(own, left)
    silent = dead[1 - has_answer].link
    send = silent.send
    silent.send = lambda *message: None if isinstance(message[1], Answer) else send(*message)  # type: ignore[method-assign]
    servers = [threading.Thread(target=serve_orders, args=(rank, 1), daemon=True) for rank in dead]
    for thread in (*leaders, *servers):
        thread.start()
    for thread in servers:
        thread.join(LIMIT_S)
    ends_at_s = time.monotonic() + LIMIT_S
    has = own[0].link
    while not (has.holds_back if has_answer == 0 else has._agreement._haves):  # what one of them has has come
        assert time.monotonic() < ends_at_s
        time.sleep(0.01)
    call_off(own, leaders)
    assert sorted(left) == [0, 1]
    own[0].link.take_control()
    for rank in own:
        rank.hosting.forget_everything()
    assert not has.holds_back
    assert not has._agreement._haves


def sends_no_activations(rank: Rank) -> None:
    """Its process dies when the message has left and what it announces has not."""
    assert rank.transport is not None
    rank.transport.send = lambda to, tensors, keep=None: notes_of(tensors, keep)  # type: ignore[method-assign]


def has_activations(rank: Rank) -> threading.Event:
    """Is set when the activations that the next message announces have come."""
    have_come = threading.Event()
    ask = rank.handover.has_come

    def asked(message: Work | Answer) -> bool:
        if ask(message):
            have_come.set()
        return have_come.is_set()

    rank.handover.has_come = asked  # type: ignore[method-assign]
    return have_come


def connected_world(make_world: MakeWorld) -> World:
    """Two replicas of two ranks each, which send activations."""
    world = make_world(2, 2, sends=True)
    threads = [threading.Thread(target=rank.connect, daemon=True) for rank in world.everybody]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return world


def leave_when_told(own: Sequence[Rank], others: Callable[[], None]) -> tuple[list[int], list[tuple[int, int, str]]]:
    """Own batches that are called off when `others` has returned and the coordinator has been told why. Returns the
    ranks that left theirs, and what was told: the rank, of which replica, and why."""
    told: list[tuple[int, int, str]] = []
    left: list[int] = []
    leaders = leading(own, left)
    for rank in own:
        rank.hosting.away.tell_of_failure = lambda host, reason, rank=rank: told.append((rank.rank, host, reason))
    for thread in leaders:
        thread.start()
    others()
    wait_until(lambda: told != [], "a rank that says what failed", LIMIT_S)
    call_off(own, leaders)
    return sorted(left), told


@pytest.mark.parametrize("lacks", [0, 1])
def test_an_own_batch_is_left_of_which_one_rank_lacks_the_activations(make_world: MakeWorld, lacks: int) -> None:
    """Its layer host has died while it sent them: all ranks have its answer. The rank that has the activations does not
    run on into a collective alone."""
    world = connected_world(make_world)
    own, dead = world.ranks
    for rank in world.everybody:
        rank.take(plan_of([[1, 1, 0, 0, 0], [1] * LAYERS]))
    sends_no_activations(dead[lacks])
    others_have_come = has_activations(own[1 - lacks])

    def die() -> None:
        threads = [threading.Thread(target=serve_orders, args=(rank, 1), daemon=True) for rank in dead]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert others_have_come.wait(LIMIT_S)
        for rank in dead:
            assert rank.transport is not None
            rank.transport.close()

    left, told = leave_when_told(own, die)
    assert left == [0, 1]
    assert [each[:2] for each in told] == [(lacks, 1)]
    assert "activations from replica 1" in told[0][2]
    assert all(run[1:] == (0, 0) for rank in own for run in rank.runner.runs), "only the embedding"


@pytest.mark.parametrize("fails", [0, 1])
def test_ranks_stay_together_where_one_cannot_send(
    make_world: MakeWorld, fails: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has sent its activations before it knew that the layer host is dead, and goes on with the next
    piece."""
    monkeypatch.setattr(own_batches, "piece_sizes", lambda *_: (1, 1))
    world = make_world(2, 2)
    own = world.ranks[0]
    for rank in world.everybody:
        rank.take(plan_of([[0, 0, 1, 1, 1], [1] * LAYERS]))

    def give(*_: object) -> None:
        raise TransientError("activations to replica 1: connection closed")

    own[fails].handover.give = give  # type: ignore[assignment, method-assign]
    left, told = leave_when_told(own, lambda: None)
    assert left == [0, 1]
    assert set(told) == {(fails, 1, "activations to replica 1: connection closed")}


@pytest.mark.parametrize("lacks", [0, 1])
def test_an_order_is_not_begun_of_which_one_rank_lacks_the_activations(make_world: MakeWorld, lacks: int) -> None:
    """Its owner has died while it sent them."""
    world = connected_world(make_world)
    dead, host = world.ranks
    for rank in world.everybody:
        rank.take(all_to(1, 2))
    sends_no_activations(dead[lacks])
    others_have_come = has_activations(host[1 - lacks])
    told: list[int] = []
    for rank in host:
        rank.hosting.away.tell_of_failure = lambda owner, reason, rank=rank: told.append(rank.rank)
    senders = [threading.Thread(target=send_off, args=(rank,), daemon=True) for rank in dead]
    for thread in senders:
        thread.start()
    for thread in senders:
        thread.join(LIMIT_S)

    def is_held_back() -> bool:
        for rank in host:
            rank.link.poll(0)
        return others_have_come.is_set() and host[0].link.holds_back and (lacks == 0 or host[1].link.holds_back)

    wait_until(is_held_back, "an order of which activations lack", LIMIT_S)
    assert not host[0].serving.is_waited_for
    for rank in dead:
        assert rank.transport is not None
        rank.transport.close()

    def is_told() -> bool:
        for rank in host:
            rank.link.poll(0)
        return told == [lacks]

    wait_until(is_told, "the end of the order", LIMIT_S)
    assert not host[0].serving.is_waited_for
    for rank in host:
        rank.hosting.forget_everything()
        assert not rank.link.holds_back
        assert rank.runner.runs == []


def test_a_failure_at_one_rank_of_a_layer_host_is_one_at_all_ranks_of_the_owner(make_world: MakeWorld) -> None:
    world = make_world(2, 2)
    own, host = world.ranks
    for rank in world.everybody:
        rank.take(plan_of([[1, 1, 0, 0, 0], [1] * LAYERS]))
    send = host[1].link.send
    failed = "RuntimeError: no memory"

    def failing(replica: int, message: Message, *rank: int) -> None:
        if isinstance(message, Answer):
            message = msgspec.structs.replace(message, error=failed, tensors=())
        send(replica, message, *rank)

    host[1].link.send = failing  # type: ignore[method-assign]
    told: list[tuple[int, str]] = []
    own[0].hosting.away.tell_of_failure = lambda host, reason: told.append((host, reason))
    left: list[BaseException] = []

    def lead(rank: Rank) -> None:
        try:
            rank.own.forward(one_batch(rank))
        except (BatchCalledOffError, InvariantError) as error:
            left.append(error)
            if rank.rank == 0:  # as where it is called off
                rank.hosting.away.is_called_off = lambda: True
                with contextlib.suppress(BatchCalledOffError):
                    rank.hosting.away.leave_if_called_off()

    threads = [threading.Thread(target=lead, args=(rank,), daemon=True) for rank in own]
    threads += [threading.Thread(target=serve_orders, args=(rank, 1), daemon=True) for rank in host]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert told == [(1, failed)]
    assert len(left) == 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("moment", ["before a layer host has it", "between two layer hosts"])
def test_an_own_batch_is_left_when_it_is_called_off(make_world: MakeWorld, ranks: int, moment: str) -> None:
    """Its layer host is dead. All ranks leave it, at the same place, and run it again at home."""
    world = make_world(2, ranks)
    hosts = [[1, 1, 0, 1, 1], [1] * LAYERS] if moment == "between two layer hosts" else [[0, 0, 1, 1, 1], [1] * LAYERS]
    own, dead = world.ranks
    for rank in world.everybody:
        rank.take(plan_of(hosts))
    expected = [at_home(Load(rank, 3), 1, torch.zeros_like(rank.runner.kv)) for rank in own] if ranks == 1 else None
    loads = [Load(rank, 3) for rank in own]
    batches = [load.next_batch() for load in loads]
    left: list[BaseException] = []

    def lead(rank: Rank, batch: FakeBatch) -> None:
        try:
            rank.own.forward(batch)
        except BatchCalledOffError as error:
            left.append(error)

    for rank in own:
        rank.hosting.away.is_called_off = lambda rank=rank: rank.link.has_control
    threads = [threading.Thread(target=lead, args=pair, daemon=True) for pair in zip(own, batches, strict=True)]
    for thread in threads:
        thread.start()
    if moment == "between two layer hosts":
        servers = [threading.Thread(target=serve_orders, args=(rank, 1), daemon=True) for rank in dead]
        for thread in servers:
            thread.start()
        for thread in servers:
            thread.join(LIMIT_S)
    wait_for_orders(dead[-1], 1)
    call_off(own, threads)
    assert len(left) == ranks
    results = {}

    def run_again(rank: Rank, batch: FakeBatch) -> None:
        rank.link.take_control()
        rank.plan.stand()
        rank.hosting.forget_everything()
        rank.take(plan_of([[0] * LAYERS, [1] * LAYERS], epoch=2))
        results[rank.rank] = rank.own.forward(batch).logits_output

    threads = [threading.Thread(target=run_again, args=pair, daemon=True) for pair in zip(own, batches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(results) == ranks
    assert as_numbers([results[0]]) == as_numbers([results[ranks - 1]])
    if expected is not None:
        assert as_numbers([results[0]]) == as_numbers(expected[0])


def test_those_who_recover_connect_again_to_each_other_and_others_stay_connected(make_world: MakeWorld) -> None:
    world = make_world(3, sends=True)

    def connect() -> None:
        threads = [threading.Thread(target=rank.connect, daemon=True) for rank in world.everybody]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert not any(thread.is_alive() for thread in threads)

    def connected() -> list[set[int]]:
        return [set(rank.transport.peers) for rank in world.everybody if rank.transport is not None]

    connect()
    everybody = connected()
    for rank in (world.ranks[0][0], world.ranks[1][0]):
        rank.hosting.disconnect({0, 1})
    assert connected() == [{2}, {2}, {0, 1}]
    connect()
    assert connected() == everybody == [{1, 2}, {0, 2}, {0, 1}]


@pytest.mark.parametrize("is_called_off", [True, False])
def test_a_batch_at_home_is_left_when_the_home_of_its_kv_has_failed(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, is_called_off: bool
) -> None:
    """No layer runs elsewhere: memory is lent, and nothing more. The coordinator is told at once, and then again and
    again who it is that is waited for."""
    world = make_world()
    rank = world.ranks[0][0]
    rank.take(plan_of([[0] * LAYERS, [1] * LAYERS]))

    def fail(*args: Any) -> Any:
        raise KvUnreachableError("no such kernel", [1])

    monkeypatch.setattr(rank.runner, "run_to_end", fail)
    monkeypatch.setattr(orders_away, "_TELL_INTERVAL_S", 0.01)
    told: list[tuple[int, str]] = []
    waiting: list[Sequence[int]] = []
    rank.hosting.away.tell_of_failure = lambda home, reason: told.append((home, reason))
    rank.hosting.away.tell_of_waiting = lambda homes, waited_s: waiting.append(homes)
    if is_called_off:
        monkeypatch.setattr(orders_away, "_CALL_OFF_S", LIMIT_S)
        rank.hosting.away.is_called_off = lambda: told != [] and len(waiting) > 1
    with pytest.raises(BatchCalledOffError if is_called_off else KvUnreachableError):
        rank.own.forward(one_batch(rank))
    assert told == [(1, "no such kernel")]
    assert waiting == ([(1,), (1,)] if is_called_off else [])


@pytest.mark.parametrize("where", ["in a layer", "between layers"])
def test_a_batch_that_fails_by_itself_is_not_waited_with(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Its replica contradicts itself, which is nobody else's fault, and others wait for it. Between layers a loan may
    be found that does not end."""
    monkeypatch.setattr(orders_away, "_CALL_OFF_S", LIMIT_S)
    world = make_world()
    rank = world.ranks[0][0]
    rank.take(plan_of([[0, 1, 1, 1, 0], [1] * LAYERS]))
    failed: list[str] = []

    def fail(*args: Any) -> Any:
        failed.append(where)
        raise InvariantError("the books do not balance")

    if where == "in a layer":
        monkeypatch.setattr(rank.runner, "run_layers", fail)
    else:
        monkeypatch.setattr(layer_times, "slice_end", after_one_layer(1))
        rank.own.between_layers = fail
    rank.hosting.away.is_called_off = lambda: failed != []
    with pytest.raises(InvariantError, match="the books do not balance"):
        rank.own.forward(one_batch(rank))
    assert failed == [where]


def test_copies_that_fail_at_a_layer_host_are_left_like_batches(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders_away, "_CALL_OFF_S", LIMIT_S)
    world = make_world()
    owner, host = world.ranks[0][0], world.ranks[1][0]
    told: list[tuple[int, str]] = []
    owner.hosting.away.tell_of_failure = lambda at, reason: told.append((at, reason))
    owner.hosting.away.is_called_off = lambda: told != []
    monkeypatch.setattr(host.runner, "copy_slots", lambda *_: 1 // 0)

    def work(rank: Rank) -> None:
        rank.take(all_to(1, 2))
        if rank.replica == 0:
            with pytest.raises(BatchCalledOffError):
                rank.hosting.slot_copies.copy(torch.tensor([20]), torch.tensor([3]))

    assert run_threads(world, work) == []
    assert [each[0] for each in told] == [1]
    assert "ZeroDivisionError" in told[0][1]


def serve_orders(rank: Rank, count: int) -> None:
    served = 0
    ends_at_s = time.monotonic() + LIMIT_S
    while served < count and time.monotonic() < ends_at_s:
        served += rank.serving.serve()
