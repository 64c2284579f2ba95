"""Replicas that each have the KV of some slots, and a batch that is attended to by messages between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
import torch

from kunserve_sgl.cpu_attention.merging import MergePlan, State
from kunserve_sgl.cpu_attention.paged_attention import NO_WINDOW, PagedAttention, plan_attention, plan_part
from kunserve_sgl.exchange.attention_parts import AttentionPart, divide_batch, slots_of_rows
from kunserve_sgl.exchange.attention_work import (
    KEY,
    LSE,
    OUTPUT,
    QUERY,
    VALUE,
    AttentionAnswer,
    AttentionOrder,
    AttentionShape,
    check_answer_tensors,
    check_order_tensors,
    note_of_slots,
    order_tensors,
    read_slots,
)
from kunserve_sgl.exchange.tensor_layout import Activations, notes_of, pack, packed_bytes, unpack
from kunserve_sgl.memory.slot_space import SlotRange

HOST = 0


def runs(*lengths_and_homes: tuple[int, int]) -> list[int]:
    """The homes of tokens that follow one another, of which so many have each."""
    return [home for length, home in lengths_and_homes for _ in range(length)]


def interpret_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's kernels run on the CPU as long as the test does. Imports SGLang."""
    from triton.runtime import jit

    from kunserve_sgl.integration.cpu_platform import kernels

    for name in ("run", "__call__"):
        monkeypatch.setattr(jit.JITFunction, name, getattr(jit.JITFunction, name))
    kernels.install()


@dataclass
class Requests:
    """A batch of requests with random KV. Lists have an entry per request: its cached and its new tokens, and the home
    of each of its tokens. The slots of home h are the ones from h * SPAN on."""

    cached: list[int]
    new: list[int]
    homes: list[list[int]]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    dtype: torch.dtype = torch.float32
    window: int = NO_WINDOW
    logit_cap: float = 0.0
    seed: int = 0
    is_latent: bool = False
    table: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.lengths = [cached + new for cached, new in zip(self.cached, self.new, strict=True)]
        assert [len(homes) for homes in self.homes] == self.lengths
        total = sum(self.lengths)
        self.span = total + 3
        self.home_of_entry = np.array([home for homes in self.homes for home in homes], np.int64)
        self.home_count = int(self.home_of_entry.max()) + 1
        inside = torch.stack([torch.randperm(self.span, generator=generator) for _ in range(self.home_count)])
        slots = inside[self.home_of_entry, torch.arange(total)] + torch.from_numpy(self.home_of_entry) * self.span
        requests = len(self.lengths)
        self.rows = torch.randperm(requests + 2, generator=generator)[:requests]
        self.table = torch.full((requests + 2, max(self.lengths) + 2), -1, dtype=torch.int32)
        for row, own in zip(self.rows.tolist(), slots.split(self.lengths), strict=True):
            self.table[row, : len(own)] = own.to(torch.int32)

        def filled(dim: int) -> torch.Tensor:
            memory = torch.full((self.home_count * self.span, self.kv_heads, dim), torch.nan, dtype=self.dtype)
            memory[slots] = torch.randn(total, self.kv_heads, dim, generator=generator).to(self.dtype)
            return memory

        self.key = filled(self.head_dim)
        self.value = self.key[..., : self.v_head_dim] if self.is_latent else filled(self.v_head_dim)
        shape = (sum(self.new), self.q_heads, self.head_dim)
        self.query = (2 * torch.randn(shape, generator=generator)).to(self.dtype)
        self.scale = self.head_dim**-0.5
        ends = torch.tensor(self.lengths)
        self.new_slots = torch.cat(
            [own[cached:] for own, cached in zip(slots.split(self.lengths), self.cached, strict=True)]
        )
        self.plan = plan_attention(self.table, self.rows, torch.tensor(self.new), ends)

    @property
    def shape(self) -> AttentionShape:
        value_dim = 0 if self.is_latent else self.v_head_dim
        name = str(self.dtype).removeprefix("torch.")
        return AttentionShape(self.q_heads, self.kv_heads, self.head_dim, self.v_head_dim, value_dim, name)

    def slots_at(self, home: int) -> list[SlotRange]:
        return [SlotRange(home * self.span, self.span)]

    def undivided(self, attention: PagedAttention, output_dtype: torch.dtype) -> State:
        return attention.attend(
            self.plan,
            self.query,
            self.key,
            self.value,
            scale=self.scale,
            logit_cap=self.logit_cap,
            sliding_window=self.window,
            output_dtype=output_dtype,
        )

    def divide(self) -> dict[int, AttentionPart]:
        slots = slots_of_rows(self.table.numpy(), self.rows.numpy(), np.array(self.lengths))
        return dict(divide_batch(slots, self.home_of_entry, np.array(self.lengths), np.array(self.new)))


class Home:
    """A replica with the KV of the cached tokens that are at home there. All other memory is NaN."""

    def __init__(self, number: int, requests: Requests, attention: PagedAttention) -> None:
        self.number = number
        self.requests = requests
        self.attention = attention
        own = slice(number * requests.span, (number + 1) * requests.span)
        self.key = torch.full_like(requests.key, torch.nan)
        self.key[own] = requests.key[own]
        self.key[requests.new_slots] = torch.nan
        if requests.is_latent:
            self.value = self.key[..., : requests.v_head_dim]
            return
        self.value = torch.full_like(requests.value, torch.nan)
        self.value[own] = requests.value[own]
        self.value[requests.new_slots] = torch.nan

    def serve(self, message: bytes, payload: torch.Tensor) -> tuple[bytes, torch.Tensor]:
        order = msgspec.msgpack.decode(message, type=AttentionOrder)
        requests = self.requests
        assert order.slots is not None
        slots = read_slots(order.slots, requests.slots_at(self.number))
        check_order_tensors(order.tensors, slots, requests.shape)
        assert payload.numel() == requests.shape.order_bytes(slots.queries, len(slots.new_slots))
        tensors = unpack(order.tensors, payload)
        new_slots = torch.from_numpy(slots.new_slots.astype(np.int64))
        for name, memory in ((KEY, self.key), (VALUE, self.value)):
            if (stored := tensors[name]) is not None:
                memory[new_slots] = stored
        query = tensors[QUERY]
        assert query is not None
        plan = plan_part(*slots.arrays, sliding_window=requests.window)
        output, lse = self.attention.attend(
            plan,
            query,
            self.key,
            self.value,
            scale=requests.scale,
            logit_cap=requests.logit_cap,
            sliding_window=requests.window,
            output_dtype=torch.float32,
        )
        found: Activations = {OUTPUT: output, LSE: lse}
        notes = notes_of(found, None)
        answer = AttentionAnswer(order.number, notes, "")
        return msgspec.msgpack.encode(answer), packed(found)


def packed(tensors: Activations) -> torch.Tensor:
    memory = torch.empty(packed_bytes(notes_of(tensors, None)), dtype=torch.uint8)
    pack(tensors, None, memory)
    return memory


def attend_by_messages(
    requests: Requests, attention: PagedAttention, output_dtype: torch.dtype, shuffled: Sequence[int] = ()
) -> State:
    """Attends to a batch at its homes, each asked once, and merges. `shuffled` says in which order they are asked."""
    parts = requests.divide()
    states: dict[int, State] = {}
    new = requests.new_slots
    value = None if requests.is_latent else requests.value[new]
    for home in [each for each in shuffled if each in parts] or list(parts):
        part = parts[home]
        tensors = order_tensors(part, requests.query, requests.key[new], value)
        order = AttentionOrder(HOST, 1, 0, (), 0, note_of_slots(part.slots), (), notes_of(tensors, None))
        message, payload = Home(home, requests, attention).serve(msgspec.msgpack.encode(order), packed(tensors))
        answer = msgspec.msgpack.decode(message, type=AttentionAnswer)
        check_answer_tensors(answer.tensors, part, requests.shape)
        assert payload.numel() == requests.shape.answer_bytes(part.slots.queries)
        found = unpack(answer.tensors, payload)
        output, lse = found[OUTPUT], found[LSE]
        assert output is not None
        assert lse is not None
        states[home] = output, lse
    plan = MergePlan(sum(requests.new), [part.tokens for part in parts.values()])
    return plan.merge([states[home] for home in parts], output_dtype)
