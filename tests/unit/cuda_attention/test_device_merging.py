"""Merging on a device gives what merging on the CPU gives; a device is the CPU here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve_sgl.cpu_attention.merging import MergePlan, State
from kunserve_sgl.cuda_attention.merging import DeviceMergePlan

CPU = torch.device("cpu")


@st.composite
def parts(draw: st.DrawFn) -> tuple[int, list[np.ndarray], list[State]]:
    tokens = draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    rows, states = [], []
    for _ in range(draw(st.integers(1, 4))):
        own = np.flatnonzero(random.random(tokens) < 0.7)
        lse = torch.from_numpy(random.normal(scale=30, size=(len(own), 2)).astype(np.float32))
        lse[torch.from_numpy(random.random((len(own), 2)) < 0.3)] = -torch.inf
        output = torch.from_numpy(random.normal(size=(len(own), 2, 3)).astype(np.float32))
        output[lse == -torch.inf] = torch.nan  # has no influence
        rows.append(own)
        states.append((output, lse))
    return tokens, rows, states


@settings(max_examples=200, deadline=None)
@given(parts())
def test_it_is_that_of_the_cpu(drawn: tuple[int, list[np.ndarray], list[State]]) -> None:
    tokens, rows, states = drawn
    expected, expected_lse = MergePlan(tokens, rows).merge(states, torch.float32)
    output, lse = DeviceMergePlan(tokens, rows, CPU).merge(states, torch.float32)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)
    seen = torch.zeros(tokens, 2, dtype=torch.int64)
    for own, (_, part_lse) in zip(rows, states, strict=True):
        seen[torch.from_numpy(own)] += part_lse > -torch.inf
    for one, other in ((output, expected), (lse, expected_lse)):
        assert torch.equal(one[seen == 1], other[seen == 1]), "what is in one part only is passed on"


def test_a_nan_that_was_seen_stays() -> None:
    states = [(torch.full((1, 1, 2), torch.nan), torch.zeros(1, 1)), (torch.zeros(1, 1, 2), torch.zeros(1, 1))]
    one = np.zeros(1, np.int64)
    assert DeviceMergePlan(1, [one, one], CPU).merge(states, torch.float32)[0].isnan().all()


def test_results_are_rounded_at_the_end() -> None:
    one = np.zeros(1, np.int64)
    output, lse = DeviceMergePlan(1, [one], CPU).merge([(torch.full((1, 1, 1), 1.001), torch.zeros(1, 1))], torch.half)
    assert output.dtype == torch.half
    assert lse.dtype == torch.float32


def test_results_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="must be float32"):
        DeviceMergePlan(1, [np.zeros(1, np.int64)], CPU).merge(
            [(torch.zeros(1, 1, 1, dtype=torch.half), torch.zeros(1, 1))], torch.half
        )
