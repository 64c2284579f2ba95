"""Attention on a CPU against a float64 reference, and its promises: batch invariance, touching only what is planned."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sgl.cpu_attention import attention_kernel, paged_attention
from kunserve_sgl.cpu_attention.merging import MergePlan
from kunserve_sgl.cpu_attention.paged_attention import (
    AttentionPlan,
    DecodePlanner,
    PagedAttention,
    plan_attention,
    plan_part,
)
from kunserve_sgl.errors import InvariantError

# Rounding of one float32 accumulation over up to 1100 keys; bfloat16 outputs are rounded once, at the end.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
LSE_TOLERANCE = 3e-6


@pytest.fixture
def attention() -> Iterator[PagedAttention]:
    instance = PagedAttention()
    yield instance
    instance.close()


@dataclass
class Batch:
    """Random queries over a paged cache whose every other slot is NaN. Lists have an entry per request."""

    kv_lengths: list[int]
    query_counts: list[int]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    v_head_dim: int = 64
    dtype: torch.dtype = torch.float32
    table_dtype: torch.dtype = torch.int32
    seed: int = 0
    slots: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        requests = len(self.kv_lengths)
        used = sum(self.kv_lengths)
        order = torch.randperm(2 * used + 16, generator=generator)
        self.slots = list(order[:used].split(self.kv_lengths))
        self.key = torch.full((len(order), self.kv_heads, self.head_dim), torch.nan, dtype=self.dtype)
        self.value = torch.full((len(order), self.kv_heads, self.v_head_dim), torch.nan, dtype=self.dtype)
        self.key[order[:used]] = torch.randn(used, self.kv_heads, self.head_dim, generator=generator).to(self.dtype)
        self.value[order[:used]] = torch.randn(used, self.kv_heads, self.v_head_dim, generator=generator).to(self.dtype)
        shape = (sum(self.query_counts), self.q_heads, self.head_dim)
        self.query = (2 * torch.randn(shape, generator=generator)).to(self.dtype)
        # Entries behind a request's length would be a fault if they were used.
        self.table = torch.full((requests + 3, max(self.kv_lengths, default=0) + 5), -1, dtype=self.table_dtype)
        self.rows = torch.randperm(requests + 3, generator=generator)[:requests]
        for row, slots in zip(self.rows.tolist(), self.slots, strict=True):
            self.table[row, : len(slots)] = slots.to(self.table_dtype)
        self.scale = self.head_dim**-0.5

    def plan(self) -> AttentionPlan:
        return plan_attention(self.table, self.rows, torch.tensor(self.query_counts), torch.tensor(self.kv_lengths))

    def queries(self, request: int) -> slice:
        start = sum(self.query_counts[:request])
        return slice(start, start + self.query_counts[request])

    def reference(
        self, *, logit_cap: float = 0.0, window: int | None = None, causal: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and LSE in float64, one dense softmax per request."""
        group = self.q_heads // self.kv_heads
        outputs, lses = [], []
        for request, slots in enumerate(self.slots):
            query = self.query[self.queries(request)].double()
            key, value = (cache[slots].double().repeat_interleave(group, dim=1) for cache in (self.key, self.value))
            scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
            if logit_cap:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            key_position = torch.arange(len(slots))
            query_position = torch.arange(len(slots) - len(query), len(slots)).unsqueeze(1)
            if causal:
                scores = scores.masked_fill(key_position > query_position, -torch.inf)
            if window is not None:
                scores = scores.masked_fill(key_position < query_position - window, -torch.inf)
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
            lses.append(torch.logsumexp(scores, -1).T)
        return torch.cat(outputs), torch.cat(lses)


def run(
    attention: PagedAttention, batch: Batch, *, logit_cap: float = 0.0, sliding_window: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    return attention.attend(
        batch.plan(),
        batch.query,
        batch.key,
        batch.value,
        scale=batch.scale,
        logit_cap=logit_cap,
        sliding_window=sliding_window,
    )


def assert_close(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    output, lse = found
    largest = expected[0].abs().max().item()
    assert output.shape == expected[0].shape
    assert lse.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=TOLERANCE[output.dtype] * max(1, largest))
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=LSE_TOLERANCE)


HEADS = [(8, 8), (4, 2), (8, 2), (8, 1), (40, 1)]
HEAD_DIMS = [(32, 32), (64, 64), (128, 128), (192, 128), (80, 80), (7, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("head_dim", "v_head_dim"), HEAD_DIMS)
def test_decode_of_many_lengths(
    attention: PagedAttention, dtype: torch.dtype, q_heads: int, kv_heads: int, head_dim: int, v_head_dim: int
) -> None:
    lengths = [1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 300, 1100]
    batch = Batch(lengths, [1] * len(lengths), q_heads, kv_heads, head_dim, v_head_dim, dtype)
    assert_close(run(attention, batch), batch.reference())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
def test_prefill_cached_prefix_and_decode_in_one_batch(
    attention: PagedAttention, dtype: torch.dtype, q_heads: int, kv_heads: int
) -> None:
    # No prefix; prefixes that end inside, at and behind a block; single new tokens; no new token at all.
    batch = Batch([150, 70, 128, 321, 200, 1, 90], [150, 1, 64, 193, 7, 1, 0], q_heads, kv_heads, dtype=dtype)
    assert_close(run(attention, batch), batch.reference())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_batches(data: st.DataObject) -> None:
    kv_heads = data.draw(st.sampled_from([1, 2, 3]))
    kv_lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=5))
    batch = Batch(
        kv_lengths,
        [data.draw(st.integers(0, length)) for length in kv_lengths],
        kv_heads * data.draw(st.sampled_from([1, 2, 5])),
        kv_heads,
        data.draw(st.sampled_from([16, 33])),
        data.draw(st.sampled_from([16, 40])),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        data.draw(st.sampled_from([torch.int32, torch.int64])),
        data.draw(st.integers(0, 1000)),
    )
    if batch.query.shape[0]:
        window = data.draw(st.one_of(st.none(), st.integers(0, 220)))
        found = run(PagedAttention(), batch, sliding_window=-1 if window is None else window)
        assert_close(found, batch.reference(window=window))


@pytest.mark.parametrize("window", [0, 1, 63, 64, 100, 5000])
def test_sliding_window_hides_what_is_further_back(attention: PagedAttention, window: int) -> None:
    batch = Batch([300, 200, 64], [1, 200, 30])
    assert_close(run(attention, batch, sliding_window=window), batch.reference(window=window))


def test_logit_cap(attention: PagedAttention) -> None:
    batch = Batch([300, 100], [1, 100])
    batch.query *= 20  # so that uncapped scores are far beyond the cap
    assert_close(run(attention, batch, logit_cap=3.0), batch.reference(logit_cap=3.0))


def test_bidirectional_plan_shows_every_key_to_every_query(attention: PagedAttention) -> None:
    batch = Batch([100, 70], [100, 70])
    found = attention.attend(batch.plan().bidirectional(), batch.query, batch.key, batch.value, scale=batch.scale)
    assert_close(found, batch.reference(causal=False))


def test_scores_far_apart_neither_overflow_nor_vanish(attention: PagedAttention) -> None:
    batch = Batch([200], [3])
    batch.query *= 1000
    assert_close(run(attention, batch), batch.reference())


def test_nan_in_an_own_key_reaches_the_output(attention: PagedAttention) -> None:
    batch = Batch([100, 100], [1, 1])
    batch.key[batch.slots[0][70], 0, 0] = torch.nan
    output, lse = run(attention, batch)
    assert output[0, :2].isnan().all()
    assert lse[0, :2].isnan().all()
    assert not output[1].isnan().any()


@pytest.mark.parametrize("window", [-1, 20])
def test_nan_in_one_request_does_not_reach_the_next(attention: PagedAttention, window: int) -> None:
    """They share the kernel's scratch memory, in which a window leaves the first rows of a block unwritten."""
    batch = Batch([128, 128, 64], [64, 1, 3], q_heads=3, kv_heads=3)
    expected = run(attention, batch, sliding_window=window)
    batch.value[batch.slots[0]] = torch.nan
    found = run(attention, batch, sliding_window=window)
    assert found[0][:64].isnan().all()
    assert torch.equal(found[0][64:], expected[0][64:])


def test_bfloat16_outputs_are_rounded_to_nearest_even(attention: PagedAttention) -> None:
    """With one key the output is its value. Half of these lie exactly between two bfloat16 numbers."""
    batch = Batch([1], [1], q_heads=1, kv_heads=1)
    batch.value[batch.slots[0]] = 1 + torch.arange(64) * 2.0**-8
    output, _ = attention.attend(
        batch.plan(), batch.query, batch.key, batch.value, scale=batch.scale, output_dtype=torch.bfloat16
    )
    assert torch.equal(output, batch.value[batch.slots[0]].bfloat16())


def test_a_nan_stays_one_when_rounded_to_bfloat16(attention: PagedAttention) -> None:
    batch = Batch([1], [1], q_heads=1, kv_heads=1)
    batch.value.view(torch.int32)[batch.slots[0]] = 0x7FFFFFFF  # rounding its bits up would give -0
    output, _ = attention.attend(
        batch.plan(), batch.query, batch.key, batch.value, scale=batch.scale, output_dtype=torch.bfloat16
    )
    assert output.isnan().all()


def test_latent_attention_reads_values_out_of_the_key_buffer(attention: PagedAttention) -> None:
    batch = Batch([130, 40], [1, 9], q_heads=16, kv_heads=1, head_dim=96, v_head_dim=64)
    batch.value = batch.key[..., :64]
    assert_close(run(attention, batch), batch.reference())


def test_queries_may_be_a_slice_of_a_wider_tensor(attention: PagedAttention) -> None:
    batch = Batch([130, 40], [1, 9])
    expected = run(attention, batch)
    tokens = batch.query.shape[0]
    wide = torch.full((tokens, 4 * 64 + 100), torch.nan)
    wide[:, 50 : 50 + 4 * 64] = batch.query.view(tokens, -1)
    batch.query = wide[:, 50 : 50 + 4 * 64].view(tokens, 4, 64)
    found = run(attention, batch)
    assert torch.equal(found[0], expected[0])


def test_slots_may_lie_anywhere_in_a_range_that_is_hardly_backed_by_memory(attention: PagedAttention) -> None:
    heads, dim, slots = 2, 64, 1 << 26
    page = mmap.PAGESIZE
    size = slots * heads * dim * 4  # 32 GiB: element offsets beyond 2^31
    used = torch.tensor([5, 70_000, (1 << 24) + 3, (1 << 25) + 1, slots - 1])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)  # no access, no reserve
    assert address != ctypes.c_void_p(-1).value
    try:
        for slot in used.tolist():
            start = slot * heads * dim * 4 // page * page
            assert libc.mprotect(address + start, page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        memory = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.float32)
        cache = memory.view(slots, heads, dim)
        small = torch.randn(len(used), heads, dim)
        for index, slot in enumerate(used.tolist()):
            cache[slot] = small[index]
        query = torch.randn(2, 4, dim)
        one = torch.tensor([1, 1])
        rows, ends = torch.tensor([0, 0]), torch.tensor([5, 2])
        found = attention.attend(plan_attention(used.unsqueeze(0), rows, one, ends), query, cache, cache, scale=0.1)
        dense_table = torch.arange(len(used)).unsqueeze(0)
        expected = attention.attend(plan_attention(dense_table, rows, one, ends), query, small, small, scale=0.1)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    finally:
        libc.munmap(address, size)


def rows_of(batch: Batch, found: tuple[torch.Tensor, torch.Tensor], request: int) -> torch.Tensor:
    """Output and LSE of one request, side by side, as they are compared bit by bit."""
    output, lse = (part[batch.queries(request)] for part in found)
    return torch.cat([output.float(), lse.unsqueeze(-1)], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (8, 2), (40, 1)])
def test_answers_are_bitwise_independent_of_the_rest_of_the_batch(
    attention: PagedAttention, dtype: torch.dtype, q_heads: int, kv_heads: int
) -> None:
    batch = Batch([300, 70, 129, 64, 200], [1, 70, 30, 1, 5], q_heads, kv_heads, dtype=dtype)
    together = run(attention, batch)
    for request, (length, count) in enumerate(zip(batch.kv_lengths, batch.query_counts, strict=True)):
        row = batch.rows[request : request + 1]
        plan = plan_attention(batch.table, row, torch.tensor([count]), torch.tensor([length]))
        query = batch.query[batch.queries(request)].clone()
        output, lse = attention.attend(plan, query, batch.key, batch.value, scale=batch.scale)
        alone = torch.cat([output.float(), lse.unsqueeze(-1)], dim=-1)
        assert torch.equal(rows_of(batch, together, request), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 3, 64, 100])
@pytest.mark.parametrize("window", [-1, 75])
def test_answers_are_bitwise_independent_of_chunks_and_cached_prefix(
    attention: PagedAttention, dtype: torch.dtype, chunk: int, window: int
) -> None:
    length = 210
    batch = Batch([length], [length], 6, 2, dtype=dtype)
    whole = rows_of(batch, run(attention, batch, sliding_window=window), 0)
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        plan = plan_attention(batch.table, batch.rows, torch.tensor([end - start]), torch.tensor([end]))
        output, lse = attention.attend(
            plan, batch.query[start:end], batch.key, batch.value, scale=batch.scale, sliding_window=window
        )
        assert torch.equal(whole[start:end], torch.cat([output.float(), lse.unsqueeze(-1)], dim=-1))


def test_later_tokens_of_a_chunk_have_no_influence_at_all(attention: PagedAttention) -> None:
    batch = Batch([100], [100])
    before = run(attention, batch)
    batch.value[batch.slots[0][70:]] = torch.finfo(torch.float32).max
    after = run(attention, batch)
    assert torch.equal(before[0][:70], after[0][:70])
    assert not torch.equal(before[0][70:], after[0][70:])


def test_answers_are_bitwise_independent_of_the_thread_count(
    attention: PagedAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch([300, 70, 129, 64], [1, 70, 30, 1], 6, 3)
    torch_threads = torch.get_num_threads()
    monkeypatch.setattr(paged_attention, "_MULTIPLY_ADDS_PER_THREAD", 1)
    try:
        found = []
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            found.append(run(attention, batch))
    finally:
        torch.set_num_threads(torch_threads)
    assert_close(found[1], batch.reference())
    for output, lse in found[1:]:
        assert torch.equal(output, found[0][0])
        assert torch.equal(lse, found[0][1])


def test_ranges_of_positions_merge_to_the_whole(attention: PagedAttention) -> None:
    batch = Batch([300, 64, 10], [20, 1, 10])
    middles = [100, 64, 3]
    first, second = (
        attention.attend(part_of(batch, chosen), batch.query, batch.key, batch.value, scale=batch.scale)
        for chosen in (
            [torch.arange(middle) for middle in middles],
            [torch.arange(*each) for each in zip(middles, batch.kv_lengths, strict=True)],
        )
    )
    assert (second[1][20] == -torch.inf).all()  # request 1 has nothing behind position 64
    every_token = np.arange(sum(batch.query_counts))
    merged = MergePlan(len(every_token), [every_token] * 2).merge([first, second], torch.float32)
    assert_close(merged, batch.reference())


def part_of(batch: Batch, chosen: list[torch.Tensor], *, window: int = -1) -> AttentionPlan:
    """Plans the part of a batch that has these positions of each request."""
    counts, lengths = np.array(batch.query_counts), np.array(batch.kv_lengths)
    return plan_part(
        torch.cat([slots[positions] for slots, positions in zip(batch.slots, chosen, strict=True)]).numpy(),
        torch.cat(chosen).numpy(),
        np.array([len(positions) for positions in chosen]),
        counts,
        lengths - counts,
        sliding_window=window,
    )


@pytest.mark.parametrize("window", [-1, 0, 40, 64, 5000])
def test_a_part_with_all_positions_is_the_whole_bit_by_bit(attention: PagedAttention, window: int) -> None:
    batch = Batch([150, 70, 128, 321, 200, 1, 90], [150, 1, 64, 193, 7, 1, 0], 6, 2)
    plan = part_of(batch, [torch.arange(length) for length in batch.kv_lengths], window=window)
    found = attention.attend(plan, batch.query, batch.key, batch.value, scale=batch.scale, sliding_window=window)
    expected = run(attention, batch, sliding_window=window)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    if window < 0:
        assert plan.visible_pairs == batch.plan().visible_pairs


@pytest.mark.parametrize("window", [-1, 75])
def test_what_a_part_gives_is_bitwise_independent_of_chunks(attention: PagedAttention, window: int) -> None:
    length = 210
    batch = Batch([length], [length], 6, 2)
    positions = torch.nonzero(torch.rand(length, generator=torch.Generator().manual_seed(0)) < 0.6).squeeze(1)
    pool = {"key": batch.key, "value": batch.value, "scale": batch.scale, "sliding_window": window}
    whole = attention.attend(part_of(batch, [positions], window=window), batch.query, **pool)
    for start in range(0, length, 50):
        end = min(start + 50, length)
        seen = positions[positions < end]
        plan = plan_part(
            batch.slots[0][seen].numpy(),
            seen.numpy(),
            np.array([len(seen)]),
            np.array([end - start]),
            np.array([start]),
            sliding_window=window,
        )
        chunk = attention.attend(plan, batch.query[start:end], **pool)
        assert torch.equal(chunk[0], whole[0][start:end])
        assert torch.equal(chunk[1], whole[1][start:end])


def test_a_part_needs_no_other_code_than_the_whole(attention: PagedAttention) -> None:
    """Else the first request that is divided would wait for a compiler. The bytes of a message cannot be written."""
    batch = Batch([20], [1])
    table = batch.slots[0].to(torch.int32).numpy()
    run(attention, batch)
    dispatcher: Any = attention_kernel.attend
    compiled = len(dispatcher.signatures)
    one = np.array([1])
    slots = np.frombuffer(table.tobytes(), np.int32)
    plan = plan_part(slots, np.frombuffer(np.arange(20, dtype=np.int32).tobytes(), np.int32), 20 * one, one, 19 * one)
    attention.attend(plan, batch.query, batch.key, batch.value, scale=1.0)
    assert len(dispatcher.signatures) == compiled


def test_a_part_is_refused_for_another_window(attention: PagedAttention) -> None:
    batch = Batch([90], [1])
    plan = part_of(batch, [torch.arange(90)], window=20)
    with pytest.raises(InvariantError, match="planned for sliding window 20, got 30"):
        attention.attend(plan, batch.query, batch.key, batch.value, scale=1.0, sliding_window=30)


def test_a_part_that_contradicts_itself_is_refused() -> None:
    one = np.array([1])
    with pytest.raises(ValueError, match="do not fit together"):
        plan_part(np.arange(3), np.arange(4), 3 * one, one, one)
    with pytest.raises(ValueError, match="slot_counts are 2 entries, got 3"):
        plan_part(np.arange(3), np.arange(3), 2 * one, one, one)
    with pytest.raises(ValueError, match="positions must ascend"):
        plan_part(np.arange(3), np.array([0, 2, 1]), 3 * one, one, 3 * one)
    with pytest.raises(ValueError, match=r"positions must lie in"):
        plan_part(np.arange(2), np.array([-1, 2]), 2 * one, one, 3 * one)


@pytest.mark.parametrize("slot", [-1, 1000])
def test_a_slot_outside_the_buffer_is_a_fault_and_not_a_read(attention: PagedAttention, slot: int) -> None:
    batch = Batch([90, 80], [1, 1])
    batch.table[batch.rows[1], 70] = slot
    with pytest.raises(InvariantError, match=f"request 1, position 70: slot {slot} is not in"):
        run(attention, batch)


def test_a_plan_for_other_tokens_is_refused(attention: PagedAttention) -> None:
    batch = Batch([90, 80], [1, 1])
    with pytest.raises(InvariantError, match="planned for 2 query tokens, got 1"):
        attention.attend(batch.plan(), batch.query[:1], batch.key, batch.value, scale=1.0)


def test_a_decode_step_is_planned_as_any_other() -> None:
    batch = Batch([90, 1, 33], [1, 1, 1])
    planner = DecodePlanner(batch.table)
    plans = [planner.plan(batch.rows, torch.tensor(ends)) for ends in ([89, 5, 32], batch.kv_lengths)]
    general, plan = batch.plan(), plans[-1]
    assert plan.requests.tolist() == general.requests.tolist()
    assert (plan.query_tokens, plan.visible_pairs) == (general.query_tokens, general.visible_pairs)
    assert np.shares_memory(plan.table, batch.table.numpy())
    # Who has the plan of the step before still has it.
    assert plans[0].requests[:, attention_kernel.KV_END].tolist() == [89, 5, 32]
    table, one = torch.zeros(4, 10, dtype=torch.int32), torch.tensor([1])
    for rows, ends, what in ((torch.tensor([4]), one, "rows"), (torch.tensor([-1]), one, "rows")):
        with pytest.raises(ValueError, match=rf"{what} must lie in \[0, 3\]"):
            DecodePlanner(table).plan(rows, ends)
    with pytest.raises(ValueError, match=r"kv_ends must lie in \[0, 10\]"):
        DecodePlanner(table).plan(one, torch.tensor([11]))


def test_plan_refuses_what_lies_outside_the_table() -> None:
    table = torch.zeros(4, 10, dtype=torch.int32)
    one = torch.tensor([1])
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 3\]"):
        plan_attention(table, torch.tensor([4]), one, one)
    with pytest.raises(ValueError, match=r"kv_ends must lie in \[0, 10\]"):
        plan_attention(table, one, one, torch.tensor([11]))
    with pytest.raises(ValueError, match="query_counts must be integers"):
        plan_attention(table, one, torch.tensor([1.0]), one)
    with pytest.raises(ValueError, match="table must be int32 or int64"):
        plan_attention(table.float(), one, one, one)


def test_attend_refuses_what_the_kernel_does_not_know(attention: PagedAttention) -> None:
    batch = Batch([90], [1])
    plan = batch.plan()
    with pytest.raises(ValueError, match="query must be float32 or bfloat16"):
        attention.attend(plan, batch.query.half(), batch.key, batch.value, scale=1.0)
    with pytest.raises(ValueError, match="same dtype, slots and heads"):
        attention.attend(plan, batch.query, batch.key, batch.value.bfloat16(), scale=1.0)
    with pytest.raises(ValueError, match="does not fit key"):
        attention.attend(plan, batch.query[:, :3], batch.key, batch.value, scale=1.0)
    with pytest.raises(ValueError, match="contiguous in its last dimension"):
        attention.attend(plan, batch.query, batch.key.transpose(0, 2), batch.value, scale=1.0)
