"""Attention that is divided over the homes of its KV gives what one that has all of it gives, over real messages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from attention_world import Requests, attend_by_messages
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sgl.cpu_attention.merging import State
from kunserve_sgl.cpu_attention.paged_attention import PagedAttention

RELATIVE = 1e-5  # to the largest of what is compared
BFLOAT16_STEP = 2**-7  # between neighbours, relative


@pytest.fixture(scope="module")
def attention() -> Iterator[PagedAttention]:
    instance = PagedAttention()
    yield instance
    instance.close()


def assert_same(found: State, expected: State) -> None:
    for one, other in zip(found, expected, strict=True):
        assert not one.isnan().any()
        largest = other[other.isfinite()].abs().max().item() if other.isfinite().any() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=RELATIVE * max(1.0, largest))


def by_torch(requests: Requests) -> torch.Tensor:
    """The output by scaled_dot_product_attention, request by request, with a mask of its own."""
    outputs = []
    queries = requests.query.split(requests.new)
    for row, length, cached, query in zip(
        requests.rows.tolist(), requests.lengths, requests.cached, queries, strict=True
    ):
        slots = requests.table[row, :length].long()
        position = torch.arange(cached, length).unsqueeze(1)
        visible = torch.arange(length) <= position
        if requests.window >= 0:
            visible &= torch.arange(length) >= position - requests.window
        if len(query):
            output = torch.nn.functional.scaled_dot_product_attention(
                query.float().transpose(0, 1).unsqueeze(0),
                requests.key[slots].float().transpose(0, 1).unsqueeze(0),
                requests.value[slots].float().transpose(0, 1).unsqueeze(0),
                attn_mask=visible,
                scale=requests.scale,
                enable_gqa=True,
            )
            outputs.append(output.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def draw_homes(data: st.DataObject, length: int, homes: int) -> list[int]:
    """The home of each token of a request: one for all, runs, or one by one."""
    most = {"one": length, "runs": 40, "scattered": 1}[data.draw(st.sampled_from(["one", "runs", "scattered"]))]
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    found: list[int] = []
    while len(found) < length:
        run = length if most == length else int(random.integers(1, most + 1))
        found += [int(random.integers(homes))] * run
    return found[:length]


@st.composite
def batches(draw: st.DrawFn) -> Requests:
    data = draw(st.data())
    homes = draw(st.integers(1, 4))
    kinds = draw(st.lists(st.sampled_from(["decode", "prefill", "chunk", "nothing new"]), min_size=1, max_size=5))
    cached = [0 if kind == "prefill" else draw(st.integers(1, 200)) for kind in kinds]
    most_new = {"decode": 1, "prefill": 90, "chunk": 90, "nothing new": 0}
    new = [draw(st.integers(min(1, most_new[kind]), most_new[kind])) for kind in kinds]
    if not sum(new):
        new[0] = 1
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    is_latent = kv_heads == 1 and draw(st.booleans())
    head_dim, v_head_dim = (24, 16) if is_latent else draw(st.sampled_from([(16, 16), (33, 7)]))
    return Requests(
        cached,
        new,
        [draw_homes(data, length, homes) for length in map(sum, zip(cached, new, strict=True))],
        kv_heads * draw(st.sampled_from([1, 2, 5])),
        kv_heads,
        head_dim,
        v_head_dim,
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
        draw(st.one_of(st.just(-1), st.integers(0, 220))),
        draw(st.sampled_from([0.0, 5.0])),
        draw(st.integers(0, 1000)),
        is_latent,
    )


@settings(max_examples=100, deadline=None)
@given(batches())
def test_a_divided_batch_gives_what_the_whole_gives(requests: Requests) -> None:
    attention = PagedAttention()
    expected = requests.undivided(attention, torch.float32)
    assert_same(attend_by_messages(requests, attention, torch.float32), expected)
    if not requests.logit_cap:
        reference = by_torch(requests)
        largest = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(expected[0], reference, rtol=0, atol=RELATIVE * largest)
    if requests.dtype == torch.bfloat16:  # rounded once, so it is the same number or its neighbour
        found = attend_by_messages(requests, attention, torch.bfloat16)[0].float()
        whole = requests.undivided(attention, torch.bfloat16)[0].float()
        torch.testing.assert_close(found, whole, rtol=BFLOAT16_STEP, atol=RELATIVE * max(1.0, whole.abs().max().item()))


@pytest.mark.parametrize("home", [0, 2])
def test_a_batch_that_is_all_at_one_home_is_the_same_bit_by_bit(attention: PagedAttention, home: int) -> None:
    lengths = [200, 64, 90]
    requests = Requests([100, 63, 0], [100, 1, 90], [[home] * length for length in lengths])
    found = attend_by_messages(requests, attention, torch.float32)
    for one, other in zip(found, requests.undivided(attention, torch.float32), strict=True):
        assert torch.equal(one, other)


def test_requests_that_are_not_divided_are_the_same_bit_by_bit(attention: PagedAttention) -> None:
    """One is at home at the layer host, one elsewhere, one in two places."""
    requests = Requests([150, 80, 99], [1, 20, 1], [[0] * 151, [1] * 100, [0] * 60 + [1] * 40])
    found, whole = attend_by_messages(requests, attention, torch.float32), requests.undivided(attention, torch.float32)
    assert torch.equal(found[0][:21], whole[0][:21])
    assert torch.equal(found[1][:21], whole[1][:21])
    assert_same(found, whole)


@pytest.mark.parametrize("new_home", [0, 1])
def test_one_token_where_everything_else_is_remote(attention: PagedAttention, new_home: int) -> None:
    requests = Requests([130], [1], [[1] * 130 + [new_home]])
    assert_same(attend_by_messages(requests, attention, torch.float32), requests.undivided(attention, torch.float32))


def test_a_window_may_hide_all_that_a_home_has(attention: PagedAttention) -> None:
    requests = Requests([150], [4], [[1] * 100 + [0] * 54], window=20)
    parts = requests.divide()
    assert list(parts) == [0, 1]
    assert_same(attend_by_messages(requests, attention, torch.float32), requests.undivided(attention, torch.float32))


@pytest.mark.parametrize("window", [-1, 70])
def test_answers_depend_neither_on_chunks_nor_on_the_batch_nor_on_who_answers_first(
    attention: PagedAttention, window: int
) -> None:
    """Bit by bit, for one request over three homes whose prompt comes in chunks, with others beside it."""
    length = 200
    homes = np.random.default_rng(5).integers(3, size=length).tolist()
    whole = Requests([0], [length], [homes], window=window)
    expected = attend_by_messages(whole, attention, torch.float32)
    for start in range(0, length, 60):
        end = min(start + 60, length)
        beside = np.random.default_rng(start).integers(3, size=77).tolist()
        chunk = Requests([start, 76], [end - start, 1], [homes[:end], beside], window=window, seed=1)
        slots, own = (each.table[each.rows[0], :end].long() for each in (whole, chunk))
        chunk.key[own], chunk.value[own] = whole.key[slots], whole.value[slots]
        chunk.query[: end - start] = whole.query[start:end]
        found = attend_by_messages(chunk, attention, torch.float32, shuffled=[2, 0, 1])
        assert torch.equal(found[0][: end - start], expected[0][start:end])
        assert torch.equal(found[1][: end - start], expected[1][start:end])


def test_later_tokens_have_no_influence_wherever_they_are(attention: PagedAttention) -> None:
    requests = Requests([50], [50], [[0, 1] * 50])
    before = attend_by_messages(requests, attention, torch.float32)
    slots = requests.table[requests.rows[0], 80:100].long()
    requests.value[slots] = torch.finfo(torch.float32).max
    after = attend_by_messages(requests, attention, torch.float32)
    assert torch.equal(before[0][:30], after[0][:30])
    assert not torch.equal(before[0][30:], after[0][30:])
