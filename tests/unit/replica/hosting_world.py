"""Replicas that host layers for each other, one thread per rank, with a fake engine in each: its results tell which
layers ran in which order, and that each read the right KV."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from fake_engine import DECODE, EXTEND, HIDDEN, LAYERS, LIMIT_S, WIDTH, Exchange, FakeRows, FakeRunner, Request
from torch._C._distributed_c10d import FileStore
from transition_world import close_backends

from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.handover import CollectiveHandover, Handover, MappedHandover
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work_check import Limits, WorkCheck
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.memory.vmm_memfd import MemfdVmm
from kunserve_sgl.policy.plan import Plan
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.hosting import LayerHosting
from kunserve_sgl.replica.row_copies import RowCopies

SLOTS_PER_REPLICA = 256
ORDER_TIMEOUT_S = 120.0


class Rank:
    def __init__(self, directory: Path, replica: int, rank: int, world: World) -> None:
        self.replica, self.rank, self.world = replica, rank, world
        self.link = PeerLink(replica, rank, f"ipc://{directory}/{replica}-{rank}")
        self.rows = FakeRows(replica, world.replicas)
        for other in range(world.replicas):
            self.rows.map_rows_of(other)
        self.runner = FakeRunner(rank, world.kv[rank], world.exchanges[replica], self.rows)
        self.plan = HeldPlan(replica, LAYERS)
        self.transport: CollectiveTransport | None = None
        self.handover: Handover = MappedHandover()
        if world.sends:
            self.transport = CollectiveTransport(
                FileStore(str(directory / "store")),
                replica,
                rank,
                backend="gloo",
                device=torch.device("cpu"),
                timeout_s=LIMIT_S,
            )
            self.handover = CollectiveHandover(self.transport)
        self.hosting = LayerHosting(
            self.plan,
            self.runner,
            RowCopies(self.runner),
            self.link,
            self.handover,
            world.tensor_ranks,
            world.order_timeout_s,
            LIMIT_S,
        )
        self.own, self.serving = self.hosting.own_batches, self.hosting.serving
        hosts_of = self.hosting.away.hosts_of
        check = WorkCheck(replica, rank, self._limits(), hosts_of, lambda: True, lambda: self.plan.least_epoch)
        self.link.check_with(check.check)
        self.backends = [MemfdVmm(4096)]
        self.shared = SharedBuffer.create(self.backends[0], 4 * 4096)
        self.results: list[torch.Tensor] = []

    def _limits(self) -> Limits:
        everybody = range(self.world.replicas)
        return Limits(
            replicas=self.world.replicas,
            layers=LAYERS,
            rows=[self.rows.rows_of(other) for other in everybody],
            slots=[SlotRange(1 + other * SLOTS_PER_REPLICA, SLOTS_PER_REPLICA) for other in everybody],
            row_width=WIDTH,
            most_tensor_bytes=4 * 4096,
            decode=DECODE,
            extend=(EXTEND,),
        )

    def connect(self) -> None:
        """Before the first batch, at all replicas at the same time."""
        connection = self.hosting.connect(set(range(self.world.replicas)) - {self.replica}, LIMIT_S)
        ends_at_s = time.monotonic() + LIMIT_S
        while not connection.is_done():
            assert time.monotonic() < ends_at_s
            time.sleep(0.01)

    def take(self, plan: Plan) -> None:
        """All members have gone over to `plan`."""
        self.plan.enter(plan)
        self.switch(plan)

    def switch(self, plan: Plan) -> None:
        """Goes over to `plan`, as a transition does; what others may send stays as it was."""
        self.plan.route_by(plan)
        self.rows.forget_hosts()

    def write_row(self, request: Request, start: int) -> None:
        end = len(request.slots)
        if end > start:
            self.rows.table[request.row, start:end] = request.slots[start:end]
            self.rows.ledger.rewritten(request.row, start)


class World:
    def __init__(
        self,
        directory: Path,
        replicas: int,
        ranks: int,
        order_timeout_s: float = ORDER_TIMEOUT_S,
        sends: bool = False,
    ) -> None:
        """`sends`: activations are sent by gloo, not handed over in mapped memory."""
        self.replicas, self.tensor_ranks, self.order_timeout_s = replicas, ranks, order_timeout_s
        self.sends = sends
        self.kv = torch.zeros(ranks, LAYERS, 1 + replicas * SLOTS_PER_REPLICA, HIDDEN)
        self.exchanges = [Exchange(ranks) for _ in range(replicas)]
        self.ranks = [[Rank(directory, r, k, self) for k in range(ranks)] for r in range(replicas)]
        inboxes = [[rank.link.address for rank in row] for row in self.ranks]
        for rank in self.everybody:
            rank.link.connect(inboxes)
            for owner in self.ranks if not sends else ():
                with owner[rank.rank].shared.export() as export:
                    rank.backends.append(MemfdVmm(4096))
                    buffer = ActivationBuffer(SharedBuffer.open(rank.backends[-1], export))
                    rank.handover.share(owner[rank.rank].replica, buffer)
        self.left = replicas
        self._lock = threading.Lock()

    @property
    def everybody(self) -> list[Rank]:
        return [rank for row in self.ranks for rank in row]

    def done(self) -> None:
        with self._lock:
            self.left -= 1

    def close(self) -> None:
        """What the ranks said to each other was believed, all of it."""
        rejected = [rank.link.rejections.counts for rank in self.everybody]
        backends = [each for rank in self.everybody for each in rank.backends]
        for rank in self.everybody:
            rank.link.close()
            if rank.transport is not None:
                rank.transport.close()
            vars(rank).clear()
        close_backends(backends)
        assert not any(rejected), rejected


def plan_of(hosts: Sequence[Sequence[int]], epoch: int = 1) -> Plan:
    layers = tuple(range(LAYERS))
    return Plan(epoch, tuple(map(tuple, hosts)), tuple(layers for _ in hosts), ())


def as_numbers(results: Sequence[torch.Tensor]) -> list[list[list[float]]]:
    return [each.tolist() for each in results]
