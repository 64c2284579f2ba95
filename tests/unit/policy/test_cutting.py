"""The chunk cost model, and where batches are cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve_sgl.policy.cutting import (
    MOST_PIECES,
    Chunk,
    ChunkCost,
    CostFit,
    amount_of,
    piece_sizes,
    slice_end,
)

COST = ChunkCost(pair_s=1e-8, token_s=5e-4, fixed_s=0.02)
EQUAL = (0.5, 0.5)
PROMPT: list[Chunk] = [(0, 1500)]
DECODE: list[Chunk] = [(400, 1)] * 16


def seconds(cost: ChunkCost, chunks: list[Chunk]) -> float:
    return cost.seconds(amount_of(chunks))


def variable_s(cost: ChunkCost, chunks: list[Chunk]) -> float:
    return cost.variable_s(amount_of(chunks))


def sizes_of(
    chunks: list[Chunk], cost: ChunkCost | None, shares: Sequence[float], others_s: Sequence[float]
) -> tuple[int, ...]:
    return piece_sizes(amount_of(chunks), lambda: chunks, cost, shares, others_s)


def random_chunks(rng: random.Random) -> list[Chunk]:
    if rng.random() < 0.5:
        return [(rng.randrange(2000), 1) for _ in range(rng.randint(1, 32))]
    return [(rng.randrange(500), rng.randint(1, 1000)) for _ in range(rng.randint(1, 4))]


def test_pairs_are_those_of_causal_attention() -> None:
    for prefix, new in [(0, 1), (7, 1), (3, 5)]:
        assert amount_of([(prefix, new)]).pairs == sum(prefix + 1 + i for i in range(new))
    assert amount_of([(0, 1), (3, 5)]).pairs == amount_of([(0, 1)]).pairs + amount_of([(3, 5)]).pairs


@pytest.mark.parametrize("true", [COST, ChunkCost(3e-7, 1e-5, 0.001), ChunkCost(0.0, 1e-3, 0.0)], ids=str)
def test_the_cost_is_found_from_observations(true: ChunkCost) -> None:
    rng = random.Random(3)
    fit = CostFit()
    for _ in range(400):
        chunks = random_chunks(rng)
        fit.add(amount_of(chunks), seconds(true, chunks) * rng.uniform(0.95, 1.05))
    assert fit.cost is not None
    for chunks in (PROMPT, DECODE, [(0, 200)], [(1000, 300), (0, 50)]):
        assert seconds(fit.cost, chunks) == pytest.approx(seconds(true, chunks), rel=0.1)


def test_decode_steps_do_not_make_it_forget_prefills() -> None:
    fit = CostFit()
    for tokens in (100, 300, 1000):
        fit.add(amount_of([(0, tokens)]), seconds(COST, [(0, tokens)]))
    for _ in range(10_000):
        fit.add(amount_of(DECODE), seconds(COST, DECODE))
    assert fit.cost is not None
    assert seconds(fit.cost, PROMPT) == pytest.approx(seconds(COST, PROMPT), rel=0.05)


def test_it_follows_a_change() -> None:
    fit = CostFit()
    slow = ChunkCost(COST.pair_s, 2 * COST.token_s, 2 * COST.fixed_s)
    for cost in (COST, slow):
        for _ in range(20):
            for chunks in (DECODE, [(0, 250)], PROMPT):
                fit.add(amount_of(chunks), seconds(cost, chunks))
    assert fit.cost is not None
    assert seconds(fit.cost, PROMPT) == pytest.approx(seconds(slow, PROMPT), rel=0.02)


def test_nothing_is_cut_before_sizes_differ() -> None:
    fit = CostFit()
    for _ in range(100):
        fit.add(amount_of(DECODE), seconds(COST, DECODE))
    assert fit.cost is None
    assert sizes_of(PROMPT, None, EQUAL, ()) == (1500,)
    fit.add(amount_of(PROMPT), seconds(COST, PROMPT))
    assert fit.cost is not None


def test_a_long_prompt_goes_in_pieces_while_peers_idle() -> None:
    sizes = sizes_of(PROMPT, COST, EQUAL, ())
    whole, stage = seconds(COST, PROMPT), [seconds(COST, [(0, size)]) / 2 for size in sizes]
    assert len(sizes) > 2
    assert sum(stage) + max(stage) < 0.7 * whole


def test_a_decode_step_stays_whole_where_the_fixed_cost_rules() -> None:
    assert sizes_of(DECODE, COST, EQUAL, ()) == (16,)
    assert sizes_of(DECODE, COST, EQUAL, (seconds(COST, DECODE),)) == (16,)


def test_a_decode_step_is_cut_where_its_tokens_cost() -> None:
    cost = ChunkCost(1e-6, 1e-3, 1e-4)
    sizes = sizes_of(DECODE, cost, EQUAL, ())
    assert len(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1


def test_a_long_prompt_stays_whole_where_others_keep_the_hosts_busy() -> None:
    assert sizes_of(PROMPT, COST, EQUAL, (seconds(COST, PROMPT),)) == (1500,)
    assert len(sizes_of(PROMPT, COST, EQUAL, (seconds(COST, DECODE),))) > 2
    # Three hosts need two other batches.
    thirds = (1 / 3,) * 3
    assert len(sizes_of(PROMPT, COST, thirds, (seconds(COST, PROMPT),))) > 2
    assert sizes_of(PROMPT, COST, thirds, (seconds(COST, PROMPT),) * 2) == (1500,)


def test_no_piece_more_than_is_worth_its_fixed_cost() -> None:
    def through_s(pieces: int) -> float:
        return (COST.fixed_s + variable_s(COST, PROMPT) / pieces) * (pieces + 1) / 2

    pieces = len(sizes_of(PROMPT, COST, EQUAL, ()))
    best_s = min(map(through_s, range(1, MOST_PIECES)))
    assert through_s(pieces) <= 1.05 * best_s < through_s(pieces - 1)


def test_a_slice_takes_at_most_about_two_decode_steps() -> None:
    layers, at, times_s = 16, 8, []
    while at < layers:
        end = slice_end(at, layers, layers, amount_of(PROMPT), COST)
        assert at < end <= layers
        times_s.append(seconds(COST, PROMPT) * (end - at) / layers)
        at = end
    per_layer_s = seconds(COST, PROMPT) / layers
    assert len(times_s) > 1
    assert max(times_s) <= max(2 * COST.fixed_s, per_layer_s) * 1.001
    ends = [8]
    while ends[-1] < 16:
        ends.append(slice_end(ends[-1], 16, 16, amount_of([(0, 250)]), COST))
    assert ends == [8, 12, 16]  # 3.6 fixed costs


def test_a_decode_step_is_not_sliced() -> None:
    assert slice_end(0, 16, 16, amount_of(DECODE), COST) == 16
    assert slice_end(0, 8, 16, amount_of([(0, 150)]), COST) == 8  # 2.4 fixed costs: not worth a look
    assert slice_end(0, 8, 16, amount_of(PROMPT), None) == 8


def test_what_lies_ahead_of_a_token_makes_its_piece_smaller() -> None:
    attention = ChunkCost(1e-6, 1e-6, 0.01)
    sizes = sizes_of([(0, 1000)], attention, EQUAL, ())
    assert list(sizes) == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[-1]
    start, times = 0, []
    for size in sizes:
        times.append(variable_s(attention, [(start, size)]))
        start += size
    assert max(times) < 1.05 * min(times)


def test_the_longest_stage_decides() -> None:
    """Where one host runs nearly all layers, cutting gains nothing."""
    assert sizes_of(PROMPT, COST, (0.97, 0.03), ()) == (1500,)
    assert len(sizes_of(PROMPT, COST, (0.25, 0.25, 0.25, 0.25), ())) > len(sizes_of(PROMPT, COST, EQUAL, ()))


chunks_strategy = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 3000)), min_size=1, max_size=40)


@given(
    chunks_strategy,
    st.tuples(*[st.floats(0, 1e-2, allow_subnormal=False)] * 3),
    st.sampled_from([(1.0,), EQUAL, (0.7, 0.2, 0.1), (0.25,) * 4]),
    st.lists(st.floats(0, 10, allow_subnormal=False), max_size=3),
)
def test_pieces_hold_every_token_once(
    chunks: list[Chunk], cost: tuple[float, float, float], shares: tuple[float, ...], others_s: list[float]
) -> None:
    sizes = sizes_of(chunks, ChunkCost(*cost), shares, others_s)
    assert sum(sizes) == sum(new for _, new in chunks)
    assert min(sizes) > 0
    assert len(sizes) <= MOST_PIECES
