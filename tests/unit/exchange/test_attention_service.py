"""Layer hosts and homes that attend for each other over real sockets and threads: results are those of undivided
attention, nothing waits for ever, and what goes wrong is said."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq
from attention_world import Home, Requests

from kunserve_sgl.cpu_attention.merging import MergePlan
from kunserve_sgl.cpu_attention.paged_attention import AttentionPlan, PagedAttention, plan_part
from kunserve_sgl.errors import TransientError
from kunserve_sgl.exchange.attention_parts import PartSlots, slots_of_rows
from kunserve_sgl.exchange.attention_service import AttentionService, BatchPart, PartAttention, packed
from kunserve_sgl.exchange.attention_work import (
    KEY,
    LSE,
    OUTPUT,
    QUERY,
    VALUE,
    AttentionAnswer,
    AttentionOrder,
    AttentionShape,
    SlotsNote,
    note_of_slots,
    order_tensors,
)
from kunserve_sgl.exchange.kv_homes import KvHomes, RemoteKv
from kunserve_sgl.exchange.memory_reads import (
    ReadOrder,
    ReadRowsOrder,
    ReadService,
    WriteOrder,
    WriteRowsOrder,
)
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.offers import KvOffer, ParameterOffer
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.remote_attention import Division, KvUnreachableError, RemoteAttention
from kunserve_sgl.exchange.tensor_layout import Activations, notes_of
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.wire.asking import NOBODY_TO_ASK
from kunserve_sgl.wire.curve import Curve, make_keys
from kunserve_sgl.wire.rejections import require
from message_fuzz import fuzzed
from waiting import wait_until

DEADLINE_S = 120.0  # nothing takes nearly as long, unless it waits for what does not come
ROUNDS = 12
RUBBISH = 3000  # messages
LAST = 10**6


class Pool(PartAttention):
    """What one rank has of each batch: the batch of host m is in layer m."""

    def __init__(self, number: int, batches: Sequence[Requests]) -> None:
        self.homes = [Home(number, batch, PagedAttention()) for batch in batches]
        self.gate = threading.Event()  # nothing is attended to before it is set
        self.gate.set()
        self.seconds, self.pauses_s = 0.0, 0.0  # that attention takes of a processor, and that it waits, beside its own

    def shape(self, layer: int) -> AttentionShape:
        return self.homes[layer].requests.shape

    def part(self, slots: PartSlots) -> BatchPart:
        return Part(self, slots)


class Part(BatchPart):
    def __init__(self, pool: Pool, slots: PartSlots) -> None:
        self.pool, self.slots = pool, slots
        self.plan: AttentionPlan = plan_part(*slots.arrays)

    def attend(self, layer: int, tensors: Activations) -> Activations:
        assert self.pool.gate.wait(DEADLINE_S)
        threading.Event().wait(self.pool.pauses_s)
        ends_s = time.thread_time() + self.pool.seconds
        while time.thread_time() < ends_s:
            pass
        home = self.pool.homes[layer]
        new = torch.from_numpy(self.slots.new_slots.astype(np.int64))
        for name, memory in ((KEY, home.key), (VALUE, home.value)):
            if (stored := tensors[name]) is not None:
                memory[new] = stored
        query = tensors[QUERY]
        assert query is not None
        output, lse = home.attention.attend(
            self.plan, query, home.key, home.value, scale=home.requests.scale, output_dtype=torch.float32
        )
        return {OUTPUT: output, LSE: lse}


class Lent:
    """All that is at home here is lent to each of the others under the number of the borrower and the layer."""

    def __init__(self, number: int, batches: Sequence[Requests]) -> None:
        self.number, self.batches = number, batches
        self.ended: set[int] = set()

    @contextmanager
    def held(self, borrower: int, layer: int, loans: Sequence[int]) -> Iterator[list[SlotRange]]:
        require(tuple(loans) == (100 * borrower + layer,), "loans {}", loans)
        require(not self.ended.intersection(loans), "it has ended")
        yield self.batches[layer].slots_at(self.number)

    @contextmanager
    def held_bytes(self, borrower: int, loan: int, *, writes: bool = False) -> Iterator[Sequence[torch.Tensor]]:
        yield ()  # nobody reads


class Agreement:
    """What the ranks of one replica agree on, as in a collective: each has to say so."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=DEADLINE_S)
        self._said: list[bool] = []
        self.asked: list[bool] = []  # what each said, in the order in which they came

    def all_ranks(self, succeeded: bool) -> bool:
        if self._barrier.wait() == 0:
            self._said = []
        self._barrier.wait()
        self._said.append(succeeded)
        self.asked.append(succeeded)
        self._barrier.wait()
        return all(self._said)


class Rank:
    def __init__(
        self,
        directory: Path,
        member: int,
        rank: int,
        members: int,
        ranks: int,
        batches: list[Requests],
        ports: Sequence[str] = (),
        curve: Curve | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        """Members are asked by sockets in `directory` or, with the keys in `curve`, at the `ports` of their ranks 0.
        The ranks of a member have one `agreement`; one by itself needs none."""
        self.member, self.batch = member, batches[member]
        self.link = PeerLink(member, rank, f"ipc://{directory}/inbox-{member}-{rank}", curve=curve)
        self.own, self.others = Pool(member, batches), Pool(member, batches)
        for one, other in zip(self.own.homes, self.others.homes, strict=True):
            other.key, other.value = one.key, one.value  # the same memory, for two threads
        remote = [
            RemoteKv(self.batch.slots_at(home)[0], member, home, 100 * member + member)
            for home in range(self.batch.home_count)
            if home != member
        ]
        self.homes = KvHomes(member, remote)

        def address(other: int) -> str:
            return ports[other] if ports else f"ipc://{directory}/attention-{other}-{rank}"

        self.lent = Lent(member, batches)
        self.attention = AttentionService(member, members, members, self.lent, self.others)
        self.service = MemoryService(
            address(member), rank, self.attention, ReadService(member, members, self.lent), lambda offer: None, curve
        )
        self.service.start()
        self.agreement = agreement or Agreement(1)
        self.remote = RemoteAttention(
            self.link, lambda: self.homes, address, ranks, self.agreement.all_ranks, DEADLINE_S, curve
        )

    def divide(self) -> Division:
        batch = self.batch
        lengths = np.array(batch.lengths)
        slots = slots_of_rows(batch.table.numpy(), batch.rows.numpy(), lengths)
        division = self.remote.divide(self.member, slots, lengths, np.array(batch.new))
        assert division is not None
        return division

    def attend(self, division: Division) -> torch.Tensor | None:
        """One layer, as the attention backend does it; None where an answer is missing."""
        batch, me, layer = self.batch, self.member, self.member
        new = batch.new_slots
        key, value = batch.key[new], batch.value[new]
        pending = self.remote.ask(division, layer, batch.shape, batch.query, key, value)
        found = {}
        if me in division.parts:
            part = division.parts[me]
            found[me] = self.own.part(part.slots).attend(layer, order_tensors(part, batch.query, key, value))
        answers = self.remote.collect(pending)
        if answers is None:
            return None
        found.update(answers)
        states = []
        for home in division.parts:
            output, lse = found[home][OUTPUT], found[home][LSE]
            assert output is not None
            assert lse is not None
            states.append((output, lse))
        plan = MergePlan(sum(batch.new), [part.tokens for part in division.parts.values()])
        return plan.merge(states, torch.float32)[0]

    def close(self) -> None:
        for pool in (self.own, self.others):
            pool.gate.set()
        self.service.close()
        self.remote.close()
        self.link.close()


def batches_of(members: int, seed: int) -> list[Requests]:
    """A batch for each member, with KV at all of them."""
    chance = random.Random(seed)
    batches = []
    for member in range(members):
        cached, new = [40, 90, 33], [1, chance.randint(1, 30), 1]
        homes = [[chance.randrange(members) for _ in range(sum(each))] for each in zip(cached, new, strict=True)]
        homes[0][:members] = range(members)
        batches.append(Requests(cached, new, homes, seed=seed + member))
    return batches


@contextmanager
def world(directory: Path, members: int, ranks: int, seed: int = 0) -> Iterator[list[list[Rank]]]:
    """Members of so many ranks, each of which is the layer host of a batch with KV at all members."""
    batches = batches_of(members, seed)
    agreements = [Agreement(ranks) for _ in range(members)]
    there = [
        [Rank(directory, member, rank, members, ranks, batches, agreement=agreements[member]) for rank in range(ranks)]
        for member in range(members)
    ]
    try:
        yield there
    finally:
        for rank in (rank for member in there for rank in member):
            rank.close()


def matches(found: torch.Tensor | None, batch: Requests) -> bool:
    whole, _ = batch.undivided(PagedAttention(), torch.float32)
    return found is not None and bool(
        torch.allclose(found, whole, rtol=0, atol=1e-5 * max(1.0, whole.abs().max().item()))
    )


@pytest.mark.parametrize(("members", "ranks", "seed"), [(2, 1, 0), (2, 2, 1), (3, 2, 2), (5, 1, 3)])
def test_all_come_to_an_end_in_any_order(tmp_path: Path, members: int, ranks: int, seed: int) -> None:
    """Each member runs layers that need the KV of all others, and after each of them its ranks wait for each other, as
    in a collective. In what order the threads run is chance, and who pauses where is random."""
    with world(tmp_path, members, ranks, seed) as there:
        collectives = [threading.Barrier(ranks, timeout=DEADLINE_S) for _ in range(members)]

        def run(rank: Rank, number: int) -> None:
            chance = random.Random(1000 * seed + 10 * rank.member + number)
            pause = threading.Event()
            division = rank.divide()
            for step in range(ROUNDS):
                if chance.random() < 0.2:
                    division = rank.divide()
                if chance.random() < 0.3:
                    pause.wait(chance.random() * 0.01)  # it computes
                with rank.remote.whole() as check:
                    found = rank.attend(division)
                    check([found])
                if step == ROUNDS - 1:
                    assert matches(found, rank.batch)
                collectives[rank.member].wait()

        everybody = [(rank, number) for member in there for number, rank in enumerate(member)]
        with ThreadPoolExecutor(len(everybody)) as threads:
            for done in [threads.submit(run, *each) for each in everybody]:
                done.result(DEADLINE_S)
        asked = sum(sum(rank.remote.asked.values()) for rank, _ in everybody)
        assert asked == len(everybody) * ROUNDS * (members - 1)
        assert sum(sum(rank.attention.answered.values()) for rank, _ in everybody) == asked


def test_a_home_answers_whatever_its_own_thread_does(tmp_path: Path) -> None:
    """Its batches' thread is this one, and does nothing."""
    with world(tmp_path, 2, 1) as ((host,), (_,)):
        assert matches(host.attend(host.divide()), host.batch)


def test_what_homes_take_is_known_by_home(tmp_path: Path) -> None:
    """Attention counts with the processor time that it takes, whatever the thread waits for meanwhile."""
    with world(tmp_path, 3, 1) as ((host,), *homes):
        batch, division, new = host.batch, host.divide(), host.batch.new_slots
        assert matches(host.attend(division), batch)  # what is compiled is compiled
        for (home,), seconds in zip(homes, (0.02, 0.04), strict=True):
            home.others.seconds, home.others.pauses_s = seconds, 1.0
        pending = host.remote.ask(division, 0, batch.shape, batch.query, batch.key[new], batch.value[new])
        assert host.remote.times() == ()
        assert host.remote.collect(pending) is not None
        host.remote.account(pending, 3.0)
        times = host.remote.times()
        assert [(each.home, each.orders, each.spent_ms) for each in times] == [(1, 2, 1500), (2, 2, 1500)]
        assert 20 <= times[0].attending_ms < 1000
        assert 40 <= times[1].attending_ms < 1000


def test_slots_are_told_once_and_parts_are_forgotten(tmp_path: Path) -> None:
    with world(tmp_path, 2, 1) as ((host,), (home,)):
        first = host.divide()
        for _ in range(3):
            assert matches(host.attend(first), host.batch)
        assert list(home.attention._known[0]) == [first.number]
        second = host.divide()
        del first
        assert matches(host.attend(second), host.batch)
        assert list(home.attention._known[0]) == [second.number]


def test_parts_of_a_host_that_has_ended_are_forgotten(tmp_path: Path) -> None:
    """Who is there then begins to number its parts anew."""
    with world(tmp_path, 2, 1) as ((host,), (home,)):
        division = host.divide()
        assert matches(host.attend(division), host.batch)
        home.attention.forget(0)
        with pytest.raises(KvUnreachableError, match=f"part {division.number} is not known here"):
            run_without_answer(host, division)
        assert matches(host.attend(host.divide()), host.batch)


def test_a_part_with_other_tensors_is_not_planned_or_kept(tmp_path: Path) -> None:
    """It may say that it has as many queries as there are numbers, and send none."""
    with world(tmp_path, 2, 1) as ((host,), (home,)):
        division = host.divide()
        part = division.parts[1]
        many = replace(part.slots, query_counts=np.full_like(part.slots.query_counts, 1 << 30))
        division.parts = {**division.parts, 1: replace(part, slots=many)}
        home.others.part = lambda slots: pytest.fail("it is planned")  # type: ignore[method-assign]
        with pytest.raises(KvUnreachableError, match="other tensors than its part has"):
            run_without_answer(host, division)
        assert home.attention._known == {0: {}}


def test_rubbish_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A layer host says what nobody should say, and sends as many frames as it likes: what makes sense is answered."""
    chance = random.Random(5)
    with world(tmp_path, 2, 1) as ((host,), (home,)):
        part, batch = host.divide().parts[1], host.batch
        tensors = order_tensors(part, batch.query, batch.key[batch.new_slots], batch.value[batch.new_slots])
        told = AttentionOrder(0, 1, 0, (0,), 1, note_of_slots(part.slots), (), notes_of(tensors, None))
        orders: list[msgspec.Struct] = [
            told,
            replace_slots(told, None),
            ReadOrder(0, 7, 0, 0, 4),
            WriteOrder(0, 7, 0, 0),
        ]
        orders += [ReadRowsOrder(0, 7, 0, 4, bytes(8)), WriteRowsOrder(0, 7, 0, 4, bytes(8))]
        payload = bytes(packed(tensors))
        asker = zmq.Context.instance().socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            asker.setsockopt(option, 0)
        asker.connect(home.service.address)
        for _ in range(RUBBISH):
            body = payload if chance.random() < 0.5 else chance.randbytes(chance.randrange(50))
            frames = [fuzzed(chance, [*orders, KvOffer(1, 0, 3, 1, 0, 4, 0), ParameterOffer(1, 0, 3, 0)]), body]
            asker.send_multipart(frames[: chance.choice((1, 2, 2, 2, 2, 2))] + [b""] * (chance.random() < 0.1))
        asker.send_multipart([msgspec.msgpack.encode(replace_slots(told, told.slots, LAST)), payload])
        answers: list[AttentionAnswer] = []
        while not answers or answers[-1].number != LAST:
            assert asker.poll(int(1000 * DEADLINE_S))
            head = asker.recv_multipart()[0]
            with contextlib.suppress(msgspec.ValidationError):  # another kind of answer
                answers.append(msgspec.msgpack.decode(head, type=AttentionAnswer))
        asker.close()
        assert not answers[-1].error
        assert not home.service.failure
        assert home.service.rejections.counts["unreadable"] > 0
        assert len({answer.error for answer in answers}) > 5
    assert "failed" not in caplog.text, "nothing that nobody has expected"


def replace_slots(order: AttentionOrder, slots: SlotsNote | None, number: int = 1) -> AttentionOrder:
    return msgspec.structs.replace(order, slots=slots, number=number)


def test_where_nothing_is_elsewhere_nobody_is_asked(tmp_path: Path) -> None:
    with world(tmp_path, 2, 1) as ((host,), (_,)):
        lengths = np.array([4])
        assert host.remote.divide(1, np.arange(4), lengths, np.array([1])) is None  # layer 1 is not lent to it
        assert host.remote.pattern(1) == ()


def run_without_answer(host: Rank, division: Division, layers: int = 1) -> None:
    with host.remote.whole() as check:
        for _ in range(layers):
            assert host.attend(division) is None
        check([])


def test_a_loan_that_has_ended_is_not_served(tmp_path: Path) -> None:
    with world(tmp_path, 2, 1) as ((host,), (home,)):
        division = host.divide()
        assert host.attend(division) is not None
        home.lent.ended.add(0)
        with pytest.raises(KvUnreachableError, match="replica 1 could not attend to its KV: it has ended") as failed:
            run_without_answer(host, division, layers=2)  # in the second nobody is asked any more
        assert failed.value.homes == (1,)
        assert host.remote.asked == {1: 2}
        home.lent.ended.clear()
        with host.remote.whole() as check:  # what has failed is over
            assert matches(host.attend(division), host.batch)
            check([])


def test_an_answer_is_waited_for_until_it_is_called_off(tmp_path: Path) -> None:
    with world(tmp_path, 2, 1) as ((host,), (home,)):
        home.others.gate.clear()
        told = threading.Event()
        host.remote.tell_of_waiting = lambda homes, waited_s: told.set()
        host.remote.why_to_leave = lambda: "it is called off" if told.is_set() else ""
        division = host.divide()
        with pytest.raises(KvUnreachableError, match="it is called off") as left:
            run_without_answer(host, division)
        assert left.value.homes == (), "it is nobody's fault"
        home.others.gate.set()  # the late answer is nobody's
        host.remote.why_to_leave = lambda: ""
        assert matches(host.attend(host.divide()), host.batch)


def test_a_home_that_has_no_address_any_more_fails_the_layers(tmp_path: Path) -> None:
    with world(tmp_path, 2, 1) as ((host,), (_,)):

        def gone(home: int) -> str:
            raise TransientError("no rank has written its address")

        host.remote._address_of = gone
        with pytest.raises(KvUnreachableError, match="replica 1 cannot be asked: no rank has written") as failed:
            run_without_answer(host, host.divide())
        assert failed.value.homes == (1,)


def test_a_home_that_refuses_the_connection_fails_the_layers(tmp_path: Path) -> None:
    """As where something else listens at the address of a home that is gone."""
    make_keys(tmp_path / "keys", 2, 1)
    curve = Curve(tmp_path / "keys", (1, 0))
    listener = curve.context.socket(zmq.ROUTER)
    curve.listen(listener)
    listener.bind("tcp://127.0.0.1:*")
    with world(tmp_path, 2, 1) as ((host,), (_,)):
        host.remote._address_of = lambda home: listener.getsockopt_string(zmq.LAST_ENDPOINT)
        socket = host.remote._socket(1)
        wait_until(lambda: not socket.poll(0, zmq.POLLOUT), "the connection is refused")
        with pytest.raises(KvUnreachableError, match=f"replica 1 cannot be asked: {NOBODY_TO_ASK}") as failed:
            run_without_answer(host, host.divide())
        assert failed.value.homes == (1,)
    listener.close(0)
    curve.close()


def test_a_home_that_is_gone_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    with world(tmp_path, 2, 1) as ((host,), (home,)):
        host.remote._timeout_s = 0.3
        home.others.gate.clear()
        with pytest.raises(KvUnreachableError, match=r"\[1\] did not attend to its KV within 0.3 s") as failed:
            run_without_answer(host, host.divide())
        assert failed.value.homes == (1,)


def run_ranks(ranks: Sequence[Rank], divisions: Sequence[Division]) -> list[Exception | None]:
    """A layer at all ranks of a replica, and how it fails at each. Its results are the sum over the ranks, as after a
    collective."""
    barrier, found = threading.Barrier(len(ranks), timeout=DEADLINE_S), dict[int, torch.Tensor]()

    def run(number: int) -> Exception | None:
        try:
            with ranks[number].remote.whole() as check:
                attended = ranks[number].attend(divisions[number])
                found[number] = torch.full((2,), torch.nan) if attended is None else attended
                barrier.wait()
                check([None, sum(part.sum() for part in found.values()) * torch.ones(2)])
        except KvUnreachableError as error:
            return error
        return None

    with ThreadPoolExecutor(len(ranks)) as threads:
        return [done.result(DEADLINE_S) for done in [threads.submit(run, number) for number in range(len(ranks))]]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_one_rank_lacks_fails_at_all(tmp_path: Path, failing: int) -> None:
    with world(tmp_path, 2, 3) as (hosts, homes):
        divisions = [host.divide() for host in hosts]
        assert run_ranks(hosts, divisions) == [None] * 3
        assert hosts[0].agreement.asked == [], "there is no NaN"
        homes[failing].lent.ended.add(0)
        failed = run_ranks(hosts, divisions)
        for rank, error in enumerate(failed):
            assert isinstance(error, KvUnreachableError)
            assert error.homes == ((1,) if rank == failing else ())
            assert ("it has ended" if rank == failing else "another rank lacks the answer") in str(error)
        assert sorted(hosts[0].agreement.asked) == [False, True, True]
        homes[failing].lent.ended.clear()
        assert run_ranks(hosts, divisions) == [None] * 3, "what has failed is over"


def test_a_model_that_gives_nan_by_itself_goes_on(tmp_path: Path) -> None:
    with world(tmp_path, 2, 2) as (hosts, _):
        divisions = [host.divide() for host in hosts]
        hosts[1].batch.query[0, 0, 0] = torch.nan
        assert run_ranks(hosts, divisions) == [None] * 2
        assert hosts[0].agreement.asked == [True, True]


def test_ranks_agree_where_layers_leave_nothing_that_could_be_nan(tmp_path: Path) -> None:
    """As after a batch whose prompts are scored, which has no logits."""
    with world(tmp_path, 2, 1) as ((host,), _):
        host.remote._ranks, host.remote._all_ranks = 2, lambda succeeded: False
        with pytest.raises(KvUnreachableError, match="another rank lacks the answer"), host.remote.whole() as check:
            check([None])


def test_a_rank_by_itself_asks_nobody(tmp_path: Path) -> None:
    with world(tmp_path, 2, 1) as ((host,), _), host.remote.whole() as check:
        check([torch.tensor([1.0, torch.nan])])
        assert host.agreement.asked == []
