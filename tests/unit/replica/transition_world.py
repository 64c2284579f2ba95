"""Ranks of several replicas in one process: real pools, parameters, KV memory, sockets, allocators and agents, led by
the coordinator's own state machine. Of a server only the batches are missing."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import random
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from fake_engine import Exchange, FakeEngine, FakeRows, FakeRunner
from torch import nn

from kunserve_sgl.args import KunserveOptions
from kunserve_sgl.control.messages import LayerLoan, Lend, Order, OrderReply, Phase
from kunserve_sgl.control.recovery import Recovery, left_behind_by, recovered_plan
from kunserve_sgl.control.transition import End, Timeouts, Transition, members_of
from kunserve_sgl.exchange import memory_reads
from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.attention_parts import PartSlots
from kunserve_sgl.exchange.attention_service import AttentionService, BatchPart, PartAttention
from kunserve_sgl.exchange.attention_work import AttentionShape
from kunserve_sgl.exchange.connecting import Connected
from kunserve_sgl.exchange.memory_reads import ReadService
from kunserve_sgl.exchange.memory_service import MemoryService
from kunserve_sgl.exchange.offer_messages import OfferMessages
from kunserve_sgl.exchange.offers import OfferAddress, OfferChannel, TwoChannels
from kunserve_sgl.integration.runner.elastic_allocator import make_elastic_allocator
from kunserve_sgl.memory.errors import ViewInUseError
from kunserve_sgl.memory.layer_parameters import LayerState
from kunserve_sgl.memory.layer_sources import BufferSource
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.slot_space import KvBuffer, SlotRange, granule_slots
from kunserve_sgl.memory.source_chain import NamedSource
from kunserve_sgl.memory.vmm import VmmBackend
from kunserve_sgl.memory.vmm_memfd import MemfdVmm
from kunserve_sgl.policy.lenders import Layers, spread_loans
from kunserve_sgl.policy.plan import ParameterLoan, Place, Plan, ReplicaFacts, normal_plan
from kunserve_sgl.replica import aside_loans, phases, recovery_phases, transition_agent
from kunserve_sgl.replica.aside_loans import AsideLoans
from kunserve_sgl.replica.capacity import CapacityManager
from kunserve_sgl.replica.frame_channel import FrameChannel
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.loans import Loans
from kunserve_sgl.replica.mapped_memory import MappedMemory
from kunserve_sgl.replica.memory_book import MemoryBook
from kunserve_sgl.replica.peer_memory import WaysToPeers
from kunserve_sgl.replica.read_memory import ReadMemory
from kunserve_sgl.replica.replica_memory import MemoryOptions, ReplicaMemory
from kunserve_sgl.replica.transition_agent import TransitionAgent

FRAME_BYTES = 4096
LAYERS = 4
BASE_GRANULES = 2
MAX_SLOTS = 512
PHASE_S = 30.0
TRANSFER_S = 5.0
SILENCE_S = 2.0  # who reads by messages waits for so long; nobody who lives takes nearly that
_HIDDEN = 32
_ROW_BYTES = {"k": FRAME_BYTES // 8, "v": FRAME_BYTES // 4}


class Model(nn.Module):
    """Layers of 12 to 14 frames; the same in every replica."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        sizes = [12 + layer % 3 for layer in range(LAYERS)]
        self.layers = nn.ModuleList(nn.Linear(_HIDDEN, _HIDDEN * size, bias=False) for size in sizes)


@functools.cache
def first_model() -> Model:
    """What others are copied from: making the same numbers again takes most of what a rank takes."""
    return Model()


class NoAttention(PartAttention):
    """Is asked by nobody: there are no batches."""

    def shape(self, layer: int) -> AttentionShape:
        raise AssertionError(f"attention in layer {layer}")

    def part(self, slots: PartSlots) -> BatchPart:
        raise AssertionError(f"attention to {slots}")


def memory_address(directory: Path, rank: int, replica: int, incarnation: int = 0) -> str:
    return f"ipc://{directory}/memory-{replica}-{rank}-{incarnation}"


def offer_address(directory: Path, rank: int, by_message: bool, replica: int, incarnation: int = 0) -> OfferAddress:
    if by_message:
        return OfferAddress(memory_address(directory, rank, replica, incarnation), maps=False)
    return OfferAddress(str(directory / f"frames-{replica}-{rank}"), maps=True)


class Machines(NamedTuple):
    """Which machine each replica is on: memory is mapped within one, and used by messages between two."""

    of: Callable[[int], int]
    within: bool = True  # whether there is one with several replicas
    between: bool = True  # whether there are several

    def differ(self, one: int, other: int) -> bool:
        return self.of(one) != self.of(other)


ONE_MACHINE = Machines(lambda replica: 0, between=False)
ONE_EACH = Machines(lambda replica: replica, within=False)
IN_PAIRS = Machines(lambda replica: replica // 2)
WAYS = {"mapped": ONE_MACHINE, "by message": ONE_EACH, "both ways": IN_PAIRS}


def refuse_to_map(export: object) -> None:
    raise AssertionError("memory of another is mapped")


class Hosting:
    """Notes what `LayerHosting` would be told."""

    def __init__(self) -> None:
        self.buffers: dict[int, ActivationBuffer] = {}
        self.connected: set[int] = set()
        self.forgotten = 0
        self.connection: Any = Connected()
        self.is_waited_for = False
        self.remembered: set[int] = set()

    def connect(self, peers: Iterable[int], timeout_s: float) -> Any:
        self.connected.update(peers)
        return self.connection

    def looks_waited_for(self) -> bool:
        return self.is_waited_for

    def forget_all_but(self, owners: Iterable[int]) -> None:
        self.remembered = set(owners)

    def forget_everything(self) -> None:
        self.forgotten += 1

    def disconnect(self, peers: Iterable[int]) -> None:
        self.connected.difference_update(peers)


def close_backends(backends: Iterable[VmmBackend]) -> None:
    """Closes memory into which nothing looks that is still used. Its files stay open otherwise."""
    used = []
    for backend in backends:
        try:
            backend.close()
        except ViewInUseError:
            used.append(backend)
    if used:
        gc.collect()  # tensors that refer to each other; once for all, as it takes far longer than the rest
    for backend in used:
        with contextlib.suppress(ViewInUseError):  # what a test has patched still holds some
            backend.close()


class Rank:
    """One rank with everything that a transition touches."""

    def __init__(
        self,
        directory: Path,
        replica: int,
        rank: int,
        replicas: int,
        reserve_frames: int,
        machines: Machines = ONE_MACHINE,
    ) -> None:
        self.replica, self.rank = replica, rank
        options = MemoryOptions(FRAME_BYTES, reserve_frames, replicas, MAX_SLOTS)
        self.memory = ReplicaMemory(options, "cpu", 0, replica, f"replica {replica}")
        self.model = copy.deepcopy(first_model())
        self.memory.adopt_parameters(self.model, list(self.model.layers))
        buffers = [
            KvBuffer(layer, name, row_bytes) for name, row_bytes in _ROW_BYTES.items() for layer in range(LAYERS)
        ]
        base_tokens = BASE_GRANULES * granule_slots(buffers, FRAME_BYTES, 1)
        self.kv = self.memory.create_kv(buffers, 1, base_tokens)
        self.pool, self.parameters = self.memory.frames, self.memory.parameters
        self.tensors = {(each.layer, each.name): self.kv.tensor(each, torch.float32, (-1,)) for each in buffers}
        # The same memory: looking at a few rows takes numpy a tenth of what it takes torch.
        self._rows = {key: tensor.numpy() for key, tensor in self.tensors.items()}
        self._areas = {(each.layer, each.name): area for each, area in self.kv._ranges.items()}
        self.allocator: Any = make_elastic_allocator(
            base_tokens,
            1,
            first_slot=self.kv.slots.first,
            device="cpu",
            dtype=torch.float32,
            kvcache=None,
            need_sort=False,
        )
        self.rows = FakeRows(replica, replicas)
        runner = FakeRunner(rank, torch.empty(0), Exchange(1), self.rows)
        runner.layer_count = LAYERS
        self.engine = FakeEngine(self.allocator, self.rows, runner)
        self.capacity = CapacityManager(self.engine, self.memory)
        self.offers = OfferMessages(rank, None)
        self.channel: OfferChannel = self.offers
        if machines.within:
            self.channel = FrameChannel(str(directory / f"frames-{replica}-{rank}"), TRANSFER_S)
        if machines.within and machines.between:
            self.channel = TwoChannels(self.channel, self.offers)

        def address_of(peer: int, incarnation: int = 0) -> OfferAddress:
            return offer_address(directory, rank, machines.differ(peer, replica), peer, incarnation)

        vmm = self.activations_vmm = MemfdVmm(FRAME_BYTES)
        self.activations = SharedBuffer.create(vmm, 2 * FRAME_BYTES)
        self.hosting = Hosting()
        self.plan = HeldPlan(replica, LAYERS)
        book = MemoryBook(KunserveOptions(kunserve_directory=str(directory)), rank)
        read = ReadMemory(self.memory, rank, 0, book, SILENCE_S) if machines.between else None
        self.ways = WaysToPeers(MappedMemory(self.memory), read)
        if not machines.within:
            vars(self.memory.vmm).update(import_frames=refuse_to_map)
        share = self.hosting.buffers.__setitem__
        self.loans = Loans(self.memory, self.channel, self.ways, vmm, share, TRANSFER_S)
        if not machines.between:
            self.loans.offer_activations(self.activations)
        self.service: MemoryService | None = None
        if machines.between:
            self.reads = ReadService(replica, replicas, self.loans.lent)
            attention = AttentionService(replica, replicas, LAYERS, self.loans.lent, NoAttention())
            self.service = MemoryService(
                memory_address(directory, rank, replica), rank, attention, self.reads, self.offers.put
            )
            self.service.start()
        self.aside = AsideLoans(self.loans, address_of)
        self.loans.connect(address_of)
        self.writes = KvWrites()
        self.replies: deque[OrderReply] = deque()
        self.agent = TransitionAgent(
            rank,
            self.plan,
            self.engine,
            self.capacity,
            self.memory,
            self.loans,
            self.hosting,
            self.writes,
            self.replies.append,
        )

    @property
    def facts(self) -> ReplicaFacts:
        return self.memory.facts(self.rows.row_count)

    def note(self, layer: int, slots: SlotRange) -> None:
        """What a batch does that runs here, before it writes."""
        self.writes.note(np.arange(slots.first, slots.stop), [layer])

    def write(self, layer: int, slots: SlotRange, value: float) -> None:
        """What a home does."""
        self._rows[layer, "k"][slots.first : slots.stop] = value
        self._rows[layer, "v"][slots.first : slots.stop] = -value

    def read(self, layer: int, slots: SlotRange) -> float:
        """The value of `write`. Fails where the bytes are of anything else, or without memory."""
        self.require_memory(layer, slots)
        k = self._rows[layer, "k"][slots.first : slots.stop]
        v = self._rows[layer, "v"][slots.first : slots.stop]
        value, negated = float(k[0, 0]), float(v[0, 0])
        assert negated == -value
        assert k.tobytes() == struct.pack("=f", value) * k.size
        assert v.tobytes() == struct.pack("=f", negated) * v.size
        return value

    def require_memory(self, layer: int, slots: SlotRange) -> None:
        for name, row_bytes in _ROW_BYTES.items():
            rows = FRAME_BYTES // row_bytes
            behind = set(range(slots.first // rows, slots.stop // rows))
            assert self._areas[layer, name].frames.keys() >= behind, "no memory behind the slots"

    def state(self) -> dict[str, object]:
        """Everything that a transition may change here."""
        return {
            "frames": self.pool.snapshot(),
            "mapped": {str(each): sorted(area.frames) for each, area in self.kv._ranges.items()},
            "resident": [self.parameters.state(layer) for layer in range(LAYERS)],
            "slots": sorted((each.first, each.stop) for each in self.allocator_ranges),
            "free": self.allocator.available_size(),
            "preferred": self.allocator._preferred,
            "route": self.plan.route,
            "serves": self.plan.serves,
            "plan": self.plan.agreed,
            "busy": self.agent.is_busy,
        }

    @property
    def allocator_ranges(self) -> tuple[SlotRange, ...]:
        ranges: tuple[SlotRange, ...] = self.allocator.slot_ranges
        return ranges

    def close_sockets(self) -> None:
        """Takes no more offers, and gives nothing any more."""
        self.channel.close()
        if self.service is not None:
            self.service.close()
            self.service = None

    def close(self) -> list[VmmBackend]:
        """Closes everything, and forgets what looks into the memory, which is returned to be closed."""
        backends = [self.memory.frames.vmm, self.activations_vmm]
        self.close_sockets()
        vars(self).clear()
        return backends


class World:
    """All ranks of a deployment, its plan, and what the KV of every slot should be."""

    def __init__(
        self, directory: Path, replicas: int, ranks: int = 1, reserve_frames: int = 8, machines: Machines = ONE_MACHINE
    ) -> None:
        """`machines` say how memory of peers is used."""
        self.ranks = [
            [Rank(directory, r, k, replicas, reserve_frames, machines) for k in range(ranks)] for r in range(replicas)
        ]
        (self.space,) = {rank.kv.space for rank in itertools.chain(*self.ranks)}
        self.plan = normal_plan([rank[0].facts for rank in self.ranks], epoch=1)
        for rank in itertools.chain(*self.ranks):
            rank.plan.enter(self.plan)
        self.now_s = 100.0
        self.number = 0
        self.orders: list[deque[Order | Lend]] = [deque() for _ in range(replicas)]
        self.lend_s = PHASE_S  # half of it is how long a borrower waits for a lender
        self.lent: list[ParameterLoan] = []  # in recoveries, by order
        self.deaf: set[int] = set()  # those who do not hear that they are to lend
        self.stamp = 0.0
        self.dead: set[int] = set()
        self.transition: Any = None
        self.knows_all = True  # not after a death: what was being copied may be there in part
        self.content: dict[tuple[int, Place, int], float] = {}  # by rank, place of the extent and layer
        self.write_all()

    @property
    def everybody(self) -> list[Rank]:
        return [rank for replica in self.ranks for rank in replica if rank.replica not in self.dead]

    @property
    def facts(self) -> tuple[ReplicaFacts, ...]:
        return tuple(replica[0].facts for replica in self.ranks)

    def states(self) -> list[dict[str, object]]:
        return [rank.state() for rank in self.everybody]

    def close(self) -> None:
        self.dead.clear()
        close_backends([backend for rank in self.everybody for backend in rank.close()])

    @property
    def running(self) -> list[tuple[int, list[Rank]]]:
        """Those who live and whose batches run: not while they recover, or wait for somebody who does."""
        running = self.transition
        recovering = set(running.members) if isinstance(running, Recovery) and not running.has_ended else set()
        return [
            (r, ranks)
            for r, ranks in enumerate(self.ranks)
            if r not in self.dead and (r not in recovering or ranks[0].plan.agreed == self.plan)
        ]

    # What batches do: they write at the host of a layer, and read there what was written before.

    def open_slots(self, replica: int) -> dict[Place, SlotRange]:
        """The slots of its extents that requests may have, by the places of the extents."""
        ranges = self.ranks[replica][0].allocator_ranges
        agreed = self.ranks[replica][0].plan.agreed
        extents = {e.place: e for e in (*self.plan.extents_of(replica), *agreed.extents_of(replica))}
        slots = {place: self.space.slots_of(replica, e.first_granule, e.granules) for place, e in extents.items()}
        return {
            place: each
            for place, each in slots.items()
            if any(r.first <= each.first and each.stop <= r.stop for r in ranges)
        }

    def write_all(self) -> None:
        for replica, ranks in self.running:
            for place, slots in self.open_slots(replica).items():
                for k, layer in ((k, layer) for k in range(len(ranks)) for layer in range(LAYERS)):
                    self.stamp += 1
                    host = self.ranks[ranks[k].plan.routed.hosts[replica][layer]][k]
                    host.note(layer, slots)
                    if (home := self.home_of(host, layer, slots)) is not None:
                        home.write(layer, slots, self.stamp)
                        self.content[k, place, layer] = self.stamp

    def home_of(self, host: Rank, layer: int, slots: SlotRange) -> Rank | None:
        """Who attends to `slots` for the layer host, and writes to them; None where that has ended."""
        (home,) = set(host.loans.homes().of(np.array([slots.first, slots.stop - 1]), layer).tolist())
        return None if home in self.dead else self.ranks[home][host.rank]

    def check(self, acted: int | None = None) -> None:
        """The books of all ranks are right, or of those of the one replica that has `acted` since: nobody changes those
        of others. And every batch that could run now finds parameters and KV at the hosts of its layers."""
        for rank in self.everybody:
            if acted is None or rank.replica == acted:
                rank.pool.check()
        for replica, ranks in self.running:
            slots = self.open_slots(replica)
            edges = np.array([[each.first, each.stop - 1] for each in slots.values()], np.int64).reshape(-1)
            for key in [key for key in self.content if key[1][0] == replica and key[1] not in slots]:
                del self.content[key]  # nothing lives in closed slots
            for k, rank in enumerate(ranks):
                assert rank.allocator_ranges == ranks[0].allocator_ranges, "ranks of a replica allocate differently"
                assert rank.plan.serves == ranks[0].plan.serves, "ranks of a replica serve differently"
                assert rank.plan.routed == ranks[0].plan.routed
                for layer, owner in enumerate(rank.plan.routed.hosts[replica]):
                    host = self.ranks[owner][k]
                    assert host.parameters.state(layer) is LayerState.RESIDENT
                    assert host.replica == replica or host.plan.serves
                    assert host.replica == replica or replica in host.hosting.connected
                    assert host.replica == replica or replica in host.rows.mapped
                    self._require_homes(host, layer, slots.values(), edges)
                    for place, each in slots.items():
                        home = self.home_of(host, layer, each)
                        if home is None:
                            continue
                        if not self.knows_all and (k, place, layer) not in self.content:
                            home.require_memory(layer, each)
                            continue
                        value = home.read(layer, each)
                        assert value == self.content.setdefault((k, place, layer), value)

    def _require_homes(self, host: Rank, layer: int, slots: Iterable[SlotRange], edges: np.ndarray) -> None:
        """Where the layer host finds KV elsewhere, its home would attend to it. `edges` are the first and the last of
        the slots of each extent."""
        homes = host.loans.homes()
        found = homes.of(edges, layer).tolist()
        assert found[::2] == found[1::2]
        for home in {*found} - {host.replica, *self.dead}:
            loans = homes.loans(home, layer)
            with self.ranks[home][host.rank].loans.lent.held(host.replica, layer, loans) as lent:
                assert all(each in lent for each, where in zip(slots, found[::2], strict=True) if where == home)
            assert len(loans) == len(lent)

    # Transitions

    def begin(self, new: Plan, forces: bool = False) -> Transition:
        self.number += 1
        self.transition = Transition(
            self.number,
            self.plan,
            new,
            members_of(self.plan, new),
            len(self.ranks[0]),
            Timeouts(PHASE_S, PHASE_S),
            self._send,
            lambda: self.now_s,
            forces,
        )
        self.transition.start()
        return self.transition

    # Deaths

    def lose(self, replica: int) -> Recovery | None:
        """A replica ends, with its socket; what it has mapped of others was never unmapped by it. Returns the recovery
        that the coordinator begins, if it does."""
        self.dead.add(replica)
        self.knows_all = False
        for rank in self.ranks[replica]:
            rank.close_sockets()
        running = self.transition
        recovery = running if isinstance(running, Recovery) and not running.has_ended else None
        transition = running if isinstance(running, Transition) and running.end is None else None
        members = left_behind_by(replica, self.plan, transition, recovery)
        if not members:
            if transition is not None:
                transition.on_lost(replica, "it has ended")
            return None
        if recovery is not None:
            recovery.close()
        epoch = self.plan.epoch if transition is None else transition.new.epoch
        self.plan = recovered_plan(self.plan, members, epoch + 1)
        self.number += 1
        self.transition = Recovery(
            self.number,
            self.plan,
            members - self.dead,
            len(self.ranks[0]),
            Timeouts(self.lend_s, PHASE_S),
            self._send,
            lambda: self.now_s,
            "it has ended",
            self._loans_to,
            self._lend,
        )
        self.transition.start()
        return self.transition

    def _loans_to(self, resident: Layers) -> tuple[ParameterLoan, ...]:
        """As the coordinator does it."""
        wanted = {member: set(range(LAYERS)).difference(layers) for member, layers in resident.items()}
        others = set(range(len(self.ranks))) - {*resident, *self.dead}
        loans = spread_loans(wanted, [resident, {r: self.plan.resident[r] for r in others}], lambda *_: True)
        self.lent += loans
        return loans

    def _lend(self, lender: int, number: int, loans: Sequence[ParameterLoan]) -> None:
        if lender not in self.deaf | self.dead:
            loaned = tuple(LayerLoan(loan.borrower, 0, loan.layers) for loan in loans)
            self.orders[lender].append(msgspec.msgpack.decode(msgspec.msgpack.encode(Lend(number, loaned)), type=Lend))

    def recover(
        self, recovery: Recovery, rng: random.Random, after_boundary: Callable[[Recovery], None] = lambda recovery: None
    ) -> None:
        """Until the recovery has ended, or `after_boundary` has begun another one."""
        for _ in range(20_000):
            if recovery.has_ended or self.transition is not recovery:
                break
            assert not recovery.failed
            able = sorted({*recovery.members, *recovery.lenders} - self.dead)
            acted = rng.choice(able)
            self.boundary(acted, is_serving=rng.random() < 0.5)
            for key in [key for key in self.content if self.ranks[key[1][0]][0].agent.stands]:
                del self.content[key]  # its slots are free
            self.check(acted)
            after_boundary(recovery)
        else:
            raise AssertionError(f"stuck in {recovery.phase}, waiting for {recovery.waiting_for}")
        if recovery.has_ended:
            recovery.close()
            for replica in {*range(len(self.ranks))} - self.dead:
                self.boundary(replica, is_serving=True)  # who has lent gives it up
            self.settle()

    def settle(self) -> None:
        """Nothing is under way: everybody is told of the plan, and has nothing else mapped than it says."""
        for rank in self.everybody:
            if rank.plan.agreed != self.plan and not rank.agent.is_busy:
                rank.plan.enter(self.plan)  # what the coordinator's welcome does
            if not rank.agent.is_busy:
                others = {other for other in range(len(self.ranks)) if other != rank.replica}
                mapped = others & rank.rows.mapped
                assert mapped == set(self.plan.owners_served_by(rank.replica)), "rows of whom it does not serve"
        self.check()

    def _send(self, replica: int, rank: int, order: Order) -> None:
        self.orders[replica].append(msgspec.msgpack.decode(msgspec.msgpack.encode(order), type=Order))

    def boundary(self, replica: int, is_serving: bool) -> None:
        """One batch boundary of a replica: the same orders at all its ranks, then their steps."""
        ranks = self.ranks[replica]
        while self.orders[replica]:
            order = self.orders[replica].popleft()
            for rank in ranks:
                if isinstance(order, Lend):
                    rank.aside.on_lend(order)
                else:
                    rank.agent.on_order(order)
        for rank in ranks:
            rank.agent.advance(is_serving)
            rank.aside.advance(is_serving)
        self._take_replies(ranks)

    def between_layers(self, replica: int) -> None:
        """A look of a replica that has one rank, in the middle of a long batch."""
        (rank,) = self.ranks[replica]
        orders: Any = self.orders[replica]
        while orders and not isinstance(orders[0], Lend) and rank.agent.may_begin_between_layers(orders[0]):
            rank.agent.on_order(orders.popleft())
        rank.agent.advance_between_layers()
        self._take_replies([rank])

    def _take_replies(self, ranks: Iterable[Rank]) -> None:
        for rank in ranks:
            while rank.replies:
                self.transition.on_reply(rank.replies.popleft())

    def time_out(self) -> None:
        """The deadline of the phase passes."""
        self.now_s = self.transition.deadline_s
        self.transition.on_time()

    def run(
        self,
        new: Plan,
        rng: random.Random,
        *,
        after_boundary: Callable[[Transition], None] = lambda transition: None,
        is_serving: bool = True,
    ) -> Transition:
        transition = self.begin(new)
        for _ in range(20_000):
            if transition.end is not None or self.transition is not transition:
                break
            member = rng.choice([each for each in transition.members if each not in self.dead])
            if is_serving and len(self.ranks[member]) == 1 and rng.random() < 0.5:
                self.between_layers(member)
            else:
                self.boundary(member, is_serving)
            self.check(member)
            if rng.random() < 0.1:
                self.write_all()
            after_boundary(transition)
        if self.transition is not transition:
            return transition
        assert transition.end is not None, f"stuck in {transition.phase}, waiting for {transition.waiting_for}"
        if transition.end is End.SUCCEEDED:
            self.plan = new
        self.settle()
        return transition


@contextlib.contextmanager
def worlds_with_copies(
    directory: Path, replicas: int, machines: Machines = ONE_MACHINE
) -> Iterator[Callable[..., World]]:
    """Gives what makes worlds, of so many replicas unless told otherwise, whose ranks have a copy of each layer to
    restore it from. They are closed in the end."""
    worlds: list[World] = []

    def make(replicas: int = replicas, ranks: int = 1, reserve_frames: int = 8) -> World:
        own = directory / str(len(worlds))
        own.mkdir()
        worlds.append(World(own, replicas, ranks, reserve_frames, machines))
        for memory in (rank.memory for rank in worlds[-1].everybody):
            copies = {layer: memory.parameters.region(layer).clone() for layer in range(LAYERS)}
            memory.sources.append(NamedSource("a copy", BufferSource(copies)))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


def one_step_per_boundary(monkeypatch: Any) -> None:
    """A replica that serves does as little as it may."""
    monkeypatch.setattr(transition_agent, "BOUNDARY_BUDGET_S", 0.0)
    monkeypatch.setattr(aside_loans, "BUDGET_S", 0.0)
    monkeypatch.setattr(transition_agent, "LOAD_SHARE", 1e9)
    monkeypatch.setattr(transition_agent, "IDLE_BUDGET_S", 1e9)  # who is idle does all, however slow the machine is
    monkeypatch.setattr(phases, "LOAD_BYTES", 8 * FRAME_BYTES)
    monkeypatch.setattr(memory_reads, "CHUNK_BYTES", 3 * FRAME_BYTES)
    monkeypatch.setattr(memory_reads, "WINDOW_BYTES", 6 * FRAME_BYTES)
    # Parts are none where nobody answers only, and not by chance.
    monkeypatch.setattr(memory_reads, "_LOOK_MS", int(1000 * SILENCE_S))
    monkeypatch.setattr(recovery_phases, "LOAD_BYTES", 8 * FRAME_BYTES)


PHASES_WITH_A_WAY_BACK = (Phase.PREPARE, Phase.LOAD, Phase.SWITCH)
