"""Merging partial results of attention: the rule itself, against one softmax in float64, and its corners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sgl.cpu_attention.merging import MergePlan, State


def attended(scores: torch.Tensor, values: torch.Tensor) -> State:
    """Attention with these scores (tokens, heads, keys) over values (keys, heads, dim)."""
    seen = scores.isfinite().any(-1)
    weights = scores.softmax(-1).masked_fill(~seen.unsqueeze(-1), 0.0)
    return torch.einsum("thk,khd->thd", weights, values), torch.logsumexp(scores, -1)


def merged(*states: State, dtype: torch.dtype = torch.float32) -> State:
    """Merges parts that all have results for all tokens."""
    every_token = np.arange(len(states[0][0]))
    return MergePlan(len(every_token), [every_token] * len(states)).merge(states, dtype)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_parts_merge_to_the_softmax_over_all_keys(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, 9))
    parts = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=parts, max_size=parts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    spread = data.draw(st.sampled_from([1.0, 30.0, 1000.0]))
    scores = spread * torch.randn(tokens, 2, sum(sizes), generator=generator, dtype=torch.float64)
    scores = scores.masked_fill(torch.rand(scores.shape, generator=generator) < 0.2, -torch.inf)
    values = torch.randn(sum(sizes), 2, 3, generator=generator, dtype=torch.float64)
    # A part is about some of the tokens; of the others it has nothing.
    takes_part = torch.rand(parts, tokens, generator=generator) < 0.7
    visible = scores.clone()
    states, indices = [], []
    for some, keys in zip(takes_part, torch.arange(sum(sizes)).split(sizes), strict=True):
        visible[:, :, keys] = visible[:, :, keys].masked_fill(~some.view(-1, 1, 1), -torch.inf)
        index = torch.nonzero(some).squeeze(1)
        output, lse = attended(scores[index][:, :, keys], values[keys])
        states.append((output.float(), lse.float()))
        indices.append(index.numpy())
    output, lse = MergePlan(tokens, indices).merge(states, torch.float32)
    expected = attended(visible, values)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=1e-6)
    # A part's LSE is rounded to float32, and the error is in the exponent of its weight.
    largest_lse = lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 0.0
    torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=3e-6 + 8 * 2**-24 * largest_lse)


def test_an_empty_part_has_no_influence_whatever_it_holds() -> None:
    state = torch.randn(3, 2, 8), torch.randn(3, 2)
    nothing = torch.full((3, 2, 8), torch.nan), torch.full((3, 2), -torch.inf)
    for found in (merged(state, nothing), merged(nothing, state), merged(nothing, state, nothing)):
        assert torch.equal(found[0], state[0])
        torch.testing.assert_close(found[1], state[1])
    for found in (merged(nothing), merged(nothing, nothing)):
        assert (found[0] == 0).all()
        assert (found[1] == -torch.inf).all()


def test_a_token_of_one_part_is_passed_on_as_it_is() -> None:
    """Token 1 is in both parts, token 3 in none."""
    first, second = (
        (torch.randn(2, 2, 8), torch.randn(2, 2)),
        (torch.randn(2, 2, 8), torch.randn(2, 2)),
    )
    output, lse = MergePlan(4, [np.array([0, 1]), np.array([1, 2])]).merge([first, second], torch.float32)
    assert torch.equal(output[[0, 2]], torch.stack([first[0][0], second[0][1]]))
    assert torch.equal(lse[[0, 2]], torch.stack([first[1][0], second[1][1]]))
    assert (output[3] == 0).all()
    assert (lse[3] == -torch.inf).all()
    both = merged((first[0][1:], first[1][1:]), (second[0][:1], second[1][:1]))
    assert torch.equal(output[1], both[0][0])
    assert torch.equal(lse[1], both[1][0])


def test_very_different_weights_do_not_overflow() -> None:
    ones, twos = torch.ones(1, 1, 4), torch.full((1, 1, 4), 2.0)
    output, lse = merged((ones, torch.tensor([[300.0]])), (twos, torch.tensor([[100.0]])))
    assert torch.equal(output, ones)
    assert lse.item() == 300.0


@pytest.mark.parametrize("where", ["output", "lse"])
def test_a_nan_that_was_seen_reaches_the_output(where: str) -> None:
    """Also where its weight is too small for float32, as in one softmax over all keys."""
    small = torch.ones(1, 1, 4), torch.tensor([[-300.0]])
    small[0 if where == "output" else 1].fill_(torch.nan)
    output, _ = merged((torch.ones(1, 1, 4), torch.zeros(1, 1)), small)
    assert output.isnan().all()


def test_sums_are_float32_and_rounded_once() -> None:
    """In bfloat16 256 + 1 + 1 + 2 would be 258."""
    parts = [(torch.full((1, 1, 1), value), torch.zeros(1, 1)) for value in (256.0, 1.0, 1.0, 2.0)]
    assert merged(*parts, dtype=torch.bfloat16)[0].item() == 65.0


def test_what_a_token_gets_is_bitwise_independent_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(67, 3, 5, generator=generator), 9 * torch.randn(67, 3, generator=generator)) for _ in "abc"]
    together = merged(*parts)
    for token in range(67):
        alone = merged(*((output[token : token + 1].clone(), lse[token : token + 1].clone()) for output, lse in parts))
        assert torch.equal(alone[0][0], together[0][token])
        assert torch.equal(alone[1][0], together[1][token])


def test_parts_that_do_not_fit_are_refused() -> None:
    state = torch.ones(2, 1, 4), torch.ones(2, 1)
    plan = MergePlan(2, [np.arange(2)] * 2)
    for other in (
        (torch.ones(3, 1, 4), torch.ones(3, 1)),
        (torch.ones(2, 1, 5), torch.ones(2, 1)),
        (torch.ones(2, 1, 4), torch.ones(2, 2)),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            plan.merge([state, other], torch.float32)
    with pytest.raises(ValueError, match="do not fit together"):
        plan.merge([state], torch.float32)
    with pytest.raises(ValueError, match=r"must be float32 on cpu, got torch.bfloat16"):
        plan.merge([state, (state[0].bfloat16(), state[1])], torch.float32)
    for tokens in ([0, 2], [-1, 0], [1, 1], [1, 0]):
        with pytest.raises(ValueError, match=r"must ascend and lie in \[0, 2\)"):
            MergePlan(2, [np.array(tokens)])
