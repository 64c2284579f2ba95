"""Replicas that host layers for each other, one thread per rank, with a tiny model in place of SGLang's: its result
tells which layers ran in which order, and that each read the right KV."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode, PPProxyTensors

from kunserve_sgl.exchange.activations import ActivationBuffer
from kunserve_sgl.exchange.collective_transport import CollectiveTransport
from kunserve_sgl.exchange.handover import CollectiveHandover, Handover, MappedHandover
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work_check import Limits, WorkCheck
from kunserve_sgl.integration.hosting import LayerHosting
from kunserve_sgl.integration.runner.request_rows import KunserveReqToTokenPool
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.memory.vmm_host import HostVmm
from kunserve_sgl.policy.plan import Plan
from kunserve_sgl.replica.held_plan import HeldPlan

LAYERS = 5
HIDDEN = 3
SLOTS_PER_REPLICA = 256
ROWS_PER_REPLICA = 4
WIDTH = 60
MODULUS = 997.0  # small enough that float32 is exact
ORDER_TIMEOUT_S = 30.0
LIMIT_S = 60.0


class Exchange:
    """What tensor-parallel ranks exchange in every layer. They must all be in the same layer of the same batch."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=LIMIT_S)
        self._tags: list[Any] = [None] * ranks

    def meet(self, rank: int, tag: Any) -> None:
        self._tags[rank] = tag
        self._barrier.wait()
        tags = list(self._tags)
        self._barrier.wait()
        assert all(other == tag for other in tags), f"the ranks of a replica run different things: {tags}"

    def abort(self) -> None:
        self._barrier.abort()


class Runner:
    """What `LayerHosting` needs of a model runner, and the model."""

    device = "cpu"
    server_args = SimpleNamespace(attention_backend="torch_native")
    dtype = torch.float32
    model_config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=HIDDEN)

    def __init__(self, replica: int, rank: int, replicas: int, kv: torch.Tensor, exchange: Exchange) -> None:
        self.rank = rank
        self.kv = kv
        self.exchange = exchange
        self.req_to_token_pool = KunserveReqToTokenPool(
            ROWS_PER_REPLICA, WIDTH, "cpu", HostVmm(4096), replica, replicas
        )
        for other in range(replicas):
            self.req_to_token_pool.map_rows_of(other)
        self.token_to_kv_pool = SimpleNamespace(copy_slots=self._copy_slots)
        self.broken = ""
        self.runs: list[tuple[int, int, int]] = []  # first slot of the batch, layers

    def _copy_slots(self, targets: torch.Tensor, sources: torch.Tensor, layers: Sequence[int]) -> None:
        for layer in layers:
            self.kv[layer, targets] = self.kv[layer, sources]

    def run_layers(self, batch: Any, state: Any, start: int, end: int, *, first: bool, last: bool) -> Any:
        if self.broken:
            raise ValueError(self.broken)
        first_slot = int(batch.out_cache_loc[0])
        self.exchange.meet(self.rank, (first_slot, start, end))
        self.runs.append((first_slot, start, end))
        if first:
            hidden = batch.input_ids.float()[:, None].repeat(1, HIDDEN)
            residual = None
        else:
            hidden, residual = state.tensors["hidden_states"], state.tensors["residual"]
        for layer in range(start, end):
            residual = hidden if residual is None else residual
            hidden = self._layer(layer, hidden, residual, batch)
            residual = (residual + hidden) % MODULUS
        if not last:
            output: Any = PPProxyTensors({"hidden_states": hidden, "residual": residual})
        else:
            ends = torch.arange(len(hidden)) if batch.forward_mode.is_decode() else batch.extend_seq_lens.cumsum(0) - 1
            output = (hidden + residual)[ends]
        return SimpleNamespace(logits_output=output)

    def _layer(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor, batch: Any) -> torch.Tensor:
        """Writes the tokens' KV, then adds up what the request has so far."""
        self.exchange.meet(self.rank, layer)
        kv = self.kv[layer]
        kv[batch.out_cache_loc] = hidden + 1
        table = self.req_to_token_pool.req_to_token
        decode = batch.forward_mode.is_decode()
        counts = [1] * len(batch.seq_lens) if decode else batch.extend_seq_lens.tolist()
        out, at = [], 0
        for row, length, count in zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), counts, strict=True):
            for position in range(length - count, length):
                seen = kv[table[row, : position + 1].long()].sum(0)
                assert int(batch.positions[at]) == position
                out.append((3 * hidden[at] + seen + residual[at] + layer + 1) % MODULUS)
                at += 1
        return torch.stack(out)


@dataclass
class Request:
    row: int
    slots: list[int]
    tokens: list[int]


def extend_batch(requests: Sequence[Request], counts: Sequence[int], logprob: bool = False) -> Any:
    """The last `counts[i]` tokens of each request."""
    extends = torch.tensor(counts, dtype=torch.int32)
    lengths = torch.tensor([len(r.tokens) for r in requests])
    positions = [p for r, n in zip(requests, counts, strict=True) for p in range(len(r.tokens) - n, len(r.tokens))]
    return SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        input_ids=torch.tensor([t for r, n in zip(requests, counts, strict=True) for t in r.tokens[-n:]]),
        out_cache_loc=torch.tensor([s for r, n in zip(requests, counts, strict=True) for s in r.slots[-n:]]),
        req_pool_indices=torch.tensor([r.row for r in requests]),
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        extend_seq_lens=extends,
        extend_seq_lens_cpu=list(counts),
        positions=torch.tensor(positions),
        return_logprob=logprob,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )


def decode_batch(requests: Sequence[Request]) -> Any:
    batch = extend_batch(requests, [1] * len(requests))
    batch.forward_mode = ForwardMode.DECODE
    batch.extend_seq_lens = batch.extend_seq_lens_cpu = None
    return batch


class Rank:
    def __init__(self, directory: Path, replica: int, rank: int, world: World) -> None:
        self.replica, self.rank, self.world = replica, rank, world
        self.link = PeerLink(replica, rank, f"ipc://{directory}/{replica}-{rank}")
        self.runner = Runner(replica, rank, world.replicas, world.kv[rank], world.exchanges[replica])
        self.transport: CollectiveTransport | None = None
        self.handover: Handover = MappedHandover()
        if world.sends:
            self.transport = CollectiveTransport(
                directory / "store", replica, rank, backend="gloo", device=torch.device("cpu"), timeout_s=LIMIT_S
            )
            self.handover = CollectiveHandover(self.transport)
        self.plan = HeldPlan(replica, LAYERS)
        self.hosting = LayerHosting(
            self.runner,
            self.link,
            self.handover,
            self.runner.run_layers,
            world.tensor_ranks,
            world.order_timeout_s,
            self.plan,
        )
        self.link.check_with(WorkCheck(replica, rank, self._limits(), self.hosting.hosts_of, lambda: True).check)
        self.shared = SharedBuffer.create(HostVmm(4096), 4 * 4096)
        self.results: list[torch.Tensor] = []

    def _limits(self) -> Limits:
        everybody = range(self.world.replicas)
        return Limits(
            replicas=self.world.replicas,
            layers=LAYERS,
            rows=[self.runner.req_to_token_pool.space.rows_of(other) for other in everybody],
            slots=[SlotRange(1 + other * SLOTS_PER_REPLICA, SLOTS_PER_REPLICA) for other in everybody],
            row_width=WIDTH,
            most_tensor_bytes=4 * 4096,
            decode=int(ForwardMode.DECODE),
            extend=(int(ForwardMode.EXTEND),),
        )

    def take(self, plan: Plan) -> None:
        """All members have gone over to `plan`."""
        self.plan.enter(plan)
        self.switch(plan)

    def switch(self, plan: Plan) -> None:
        """Goes over to `plan`, as a transition does; what others may send stays as it was."""
        self.plan.route_by(plan)
        self.runner.req_to_token_pool.ledger.clear()

    def connect(self) -> None:
        """Before the first batch, at all replicas at the same time."""
        connection = self.hosting.connect(set(range(self.world.replicas)) - {self.replica}, LIMIT_S)
        ends_at_s = time.monotonic() + LIMIT_S
        while not connection.is_done():
            assert time.monotonic() < ends_at_s
            time.sleep(0.01)

    def write_row(self, request: Request, start: int) -> None:
        pool = self.runner.req_to_token_pool
        end = len(request.slots)
        if end > start:
            pool.write((request.row, slice(start, end)), torch.tensor(request.slots[start:end], dtype=torch.int32))


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
                    rank.handover.share(
                        owner[rank.rank].replica, ActivationBuffer(SharedBuffer.open(HostVmm(4096), export))
                    )
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
        for rank in self.everybody:
            rank.link.close()
            if rank.transport is not None:
                rank.transport.close()
        assert not any(rejected), rejected


def plan_of(hosts: Sequence[Sequence[int]], epoch: int = 1) -> Plan:
    layers = tuple(range(LAYERS))
    return Plan(epoch, tuple(map(tuple, hosts)), tuple(layers for _ in hosts), ())


def as_numbers(results: Sequence[torch.Tensor]) -> list[Any]:
    return [np.asarray(each).tolist() for each in results]
