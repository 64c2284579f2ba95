"""The engine of a rank as its runtime sees it, without SGLang: a tiny model, request rows, and KV.

What the model computes tells which layers ran in which order, and that each read the right KV.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import numpy as np
import torch

from kunserve_sgl.exchange.row_ledger import RowLedger, apply_update
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.replica.batch_shape import BatchShape, Int32s, Int64s
from kunserve_sgl.replica.engine import Engine, LoadNow, Said, SlotAllocator, SlotsInUseError, Vacated
from kunserve_sgl.replica.engine import Request as ServedRequest
from kunserve_sgl.replica.layer_runner import Batch, LayerRunner, Output, RequestRows

LAYERS = 5
HIDDEN = 3
ROWS_PER_REPLICA = 4
WIDTH = 60
MODULUS = 997.0  # small enough that float32 is exact
DECODE, EXTEND = 2, 1
LIMIT_S = 240.0

Tag: TypeAlias = "int | str | tuple[int, int, int]"


class Exchange:
    """What tensor-parallel ranks exchange in every layer. They must all be in the same layer of the same batch."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=LIMIT_S)
        self._tags: list[Tag] = [""] * ranks

    def meet(self, rank: int, tag: Tag) -> None:
        if self._barrier.parties == 1:
            return  # with nobody
        self._tags[rank] = tag
        self._barrier.wait()
        tags = list(self._tags)
        self._barrier.wait()
        assert all(other == tag for other in tags), f"the ranks of a replica run different things: {tags}"

    def abort(self) -> None:
        self._barrier.abort()


class FakeRows:
    """The rows of all replicas, each with memory of its own. Rows of a replica that is not mapped must not be used."""

    def __init__(self, replica: int, replicas: int, rows: int = ROWS_PER_REPLICA, width: int = WIDTH) -> None:
        self.replica = replica
        self._rows = rows
        self.table = np.zeros((1 + replicas * rows, width), np.int32)
        self.ledger = RowLedger(len(self.table))
        self.mapped = {replica}
        self.reached: set[int] = set()  # of others, and so have memory

    @property
    def row_count(self) -> int:
        return len(self.table)

    @property
    def row_width(self) -> int:
        return int(self.table.shape[1])

    def rows_of(self, replica: int) -> range:
        return range(1 + replica * self._rows, 1 + (replica + 1) * self._rows)

    def map_rows_of(self, replica: int) -> None:
        self.mapped.add(replica)

    def reach(self, rows: Int32s) -> None:
        assert all(any(row in self.rows_of(replica) for replica in self.mapped) for row in rows.tolist())
        self.reached.update(rows.tolist())

    def unmap_rows_of(self, replica: int) -> None:
        assert replica != self.replica
        self.mapped.discard(replica)
        self.table[self.rows_of(replica)] = 0
        self.reached.difference_update(self.rows_of(replica))

    def update_for(self, host: int, rows: Int32s, lengths: Int32s, prefixes: Int32s) -> tuple[Int32s, Int32s] | None:
        update = self.ledger.update_for(host, rows.astype(np.int64), lengths.astype(np.int64), self.table)
        return None if (update[0] >= prefixes).all() else update

    def apply_update(self, rows: Int32s, starts: Int32s, lengths: Int32s, values: Int32s) -> None:
        assert self.reached.issuperset(rows.tolist()), "rows without memory"
        apply_update(self.table, rows, starts, lengths, values)

    def forget_hosts(self) -> None:
        self.ledger.clear()


@dataclass
class FakeBatch:
    """tokens: int64[tokens], None in a batch that was rebuilt."""

    shape: BatchShape
    tokens: torch.Tensor | None = None
    keeps_all: bool = False

    @property
    def batch_size(self) -> int:
        return len(self.shape.rows)


@dataclass
class FakeOutput:
    """One row per request, for all tokens of it or the last."""

    logits_output: torch.Tensor


@dataclass
class Request:
    row: int
    slots: list[int]
    tokens: list[int]


def extend_batch(requests: Sequence[Request], counts: Sequence[int], logprob: bool = False) -> FakeBatch:
    """The last `counts[i]` tokens of each request."""
    shape = BatchShape(
        EXTEND,
        np.array([r.row for r in requests], np.int32),
        np.array([len(r.tokens) for r in requests], np.int32),
        np.array(counts, np.int32),
        np.array([s for r, n in zip(requests, counts, strict=True) for s in r.slots[-n:]], np.int64),
    )
    tokens = torch.tensor([t for r, n in zip(requests, counts, strict=True) for t in r.tokens[-n:]])
    return FakeBatch(shape, tokens, keeps_all=logprob)


def decode_batch(requests: Sequence[Request]) -> FakeBatch:
    """The last token of each request."""
    shape = BatchShape(
        DECODE,
        np.array([r.row for r in requests], np.int32),
        np.array([len(r.tokens) for r in requests], np.int32),
        None,
        np.array([r.slots[-1] for r in requests], np.int64),
    )
    return FakeBatch(shape, torch.tensor([r.tokens[-1] for r in requests]))


@dataclass
class FakeRunner:
    """Implements `LayerRunner`. `kv` is (layers, slots, hidden), the same for all replicas of a rank: only who runs a
    layer for a slot's owner writes there."""

    rank: int
    kv: torch.Tensor
    exchange: Exchange
    rows: FakeRows
    broken: str = ""
    runs: list[tuple[int, int, int]] = field(default_factory=list)  # first slot of the batch, layers
    device_calls: list[str] = field(default_factory=list)  # what the device is given, in order

    layer_count = LAYERS
    hidden_size = HIDDEN
    dtype = torch.float32
    device = torch.device("cpu")
    modes = (DECODE, (EXTEND,))

    @contextmanager
    def batch_stream(self) -> Iterator[None]:
        self.device_calls.append("enter")
        yield
        self.device_calls.append("leave")

    def synchronize(self) -> None:
        self.device_calls.append("wait")

    def shape_of(self, batch: Batch) -> BatchShape:
        return cast(FakeBatch, batch).shape

    def rebuild(self, shape: BatchShape) -> FakeBatch:
        return FakeBatch(shape)

    def enter_slots(self, shape: BatchShape, batch: Batch) -> None:
        self.rows.apply_update(shape.rows, shape.prefixes, shape.lengths, shape.slots.astype(np.int32))

    def blank_state(self, tokens: int) -> Activations:
        return {name: torch.zeros(tokens, HIDDEN) for name in ("hidden_states", "residual")}

    def rows_to_keep(self, batch: Batch) -> Int64s | None:
        batch = cast(FakeBatch, batch)
        if batch.shape.extends is None or batch.keeps_all:
            return None
        return _ends(batch.shape).numpy()

    def run_layers(self, batch: Batch, state: Activations | None, start: int, end: int) -> Activations:
        batch = cast(FakeBatch, batch)
        if self.broken:
            raise ValueError(self.broken)
        self._note(batch, start, end)
        self.device_calls.append(f"layers {start} to {end}")
        if state is None:
            assert batch.tokens is not None
            state = {"hidden_states": batch.tokens.float()[:, None].repeat(1, HIDDEN), "residual": None}
        hidden, residual = state["hidden_states"], state["residual"]
        assert hidden is not None
        for layer in range(start, end):
            residual = hidden if residual is None else residual
            hidden = self._layer(layer, hidden, residual, batch)
            residual = (residual + hidden) % MODULUS
        return {"hidden_states": hidden, "residual": residual}

    def run_to_end(self, batch: Batch, state: Activations | None, start: int) -> FakeOutput:
        out = self.run_layers(batch, state, start, LAYERS)
        hidden, residual = out["hidden_states"], out["residual"]
        assert hidden is not None
        assert residual is not None
        return FakeOutput((hidden + residual)[_ends(cast(FakeBatch, batch).shape)])

    def copy_slots(self, targets: torch.Tensor, sources: torch.Tensor, layers: Iterable[int]) -> None:
        self.device_calls.append("copy")
        for layer in layers:
            self.kv[layer, targets] = self.kv[layer, sources]

    def _note(self, batch: FakeBatch, start: int, end: int) -> None:
        first_slot = int(batch.shape.slots[0])
        self.exchange.meet(self.rank, (first_slot, start, end))
        self.runs.append((first_slot, start, end))

    def _layer(self, layer: int, hidden: torch.Tensor, residual: torch.Tensor, batch: FakeBatch) -> torch.Tensor:
        """Writes the tokens' KV, then adds up what the request has so far."""
        self.exchange.meet(self.rank, layer)
        shape, kv = batch.shape, self.kv[layer].numpy()  # which is quicker with so few numbers
        kv[shape.slots] = hidden.numpy() + 1
        seen = [
            kv[self.rows.table[row, : cached + new]].cumsum(0)[cached:]
            for row, (cached, new) in zip(shape.rows.tolist(), shape.chunks, strict=True)
        ]
        out = (3 * hidden.numpy() + np.concatenate(seen) + residual.numpy() + (layer + 1)) % np.float32(MODULUS)
        return torch.from_numpy(out)


@dataclass
class FakeLimits:
    """Implements `AnswerLimits`: every request has room. `unnamed` are those whose clients named no limit."""

    unnamed: list[ServedRequest] = field(default_factory=list)
    expected_capacity: int | None = None

    def is_named(self, request: ServedRequest) -> bool:
        return request not in self.unnamed

    def expect_capacity(self, tokens: int | None) -> None:
        self.expected_capacity = tokens

    def refusal(self, capacity: int) -> str | None:
        return None

    def cut_to(self, capacity: int) -> None:
        pass

    def cut_where_possible(self, capacity: int) -> None:
        pass


@dataclass
class FakeEngine:
    """Implements `Engine`. Requests are those that a test puts into the lists; nothing of them can be moved, so slots
    can go when they are free."""

    allocator: SlotAllocator
    rows: RequestRows
    layers: LayerRunner
    limits: FakeLimits = field(default_factory=FakeLimits)
    running: list[ServedRequest] = field(default_factory=list)
    waiting: list[ServedRequest] = field(default_factory=list)
    for_grammar: list[ServedRequest] = field(default_factory=list)
    prefill_rest_tokens: int = 0
    cached: int = 0
    batches: int = 0
    is_paused: bool = False
    capacity_changes: int = 0
    abandoned: int = 0
    ending_tokens: int = 0
    room_made: list[int] = field(default_factory=list)  # the capacity each time
    wrong_slots: list[str] = field(default_factory=list)
    most_tokens = 68
    rank_timeout_s = LIMIT_S
    max_running_requests = 4

    def load_now(self) -> LoadNow:
        return LoadNow(
            list(self.running),
            list(self.waiting),
            list(self.for_grammar),
            self.prefill_rest_tokens,
            self.cached,
            self.max_running_requests,
            self.batches,
            self.is_paused,
        )

    def evictable_tokens(self) -> int:
        return self.cached

    def cached_tokens(self, request: ServedRequest) -> int:
        return 0

    def prefill_room_tokens(self) -> int:
        return self.prefill_rest_tokens

    def vacate(self, slots: SlotRange) -> Vacated:
        if len(self.allocator.used_in(slots)):
            raise SlotsInUseError(f"{slots} are in use")
        return Vacated(0, 0)

    def make_room(self, capacity: int) -> int:
        self.room_made.append(capacity)
        return self.ending_tokens

    def abandon_batches(self) -> int:
        self.waiting, self.running = [*self.running, *self.waiting], []
        self.allocator.clear()  # type: ignore[attr-defined]
        self.abandoned += 1
        return len(self.waiting)

    def capacity_changed(self) -> None:
        self.capacity_changes += 1

    def all_ranks(self, succeeded: bool) -> bool:
        return succeeded

    def slot_differences(self) -> Sequence[str]:
        return self.wrong_slots

    def alike(self) -> Mapping[str, str]:
        return {"requests": str([each.rid for each in self.running])}

    def gather(self, mine: Said) -> Sequence[Said]:
        return [mine]

    def synchronize(self) -> None:
        pass


def _ends(shape: BatchShape) -> torch.Tensor:
    """The index of each request's last token, int64[requests]."""
    return torch.tensor([new for _, new in shape.chunks]).cumsum(0) - 1


def _implemented(
    engine: FakeEngine, runner: FakeRunner, rows: FakeRows, output: FakeOutput
) -> tuple[Engine, LayerRunner, RequestRows, Output]:
    """Never called: mypy checks here that the fakes implement the Protocols."""
    return engine, runner, rows, output
