"""Parts of attention by the Triton kernel, interpreted, and merged on a device: they give what the CPU's kernel gives
over the whole, and log-sum-exps are natural logarithms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_world import Requests, interpret_triton, runs

from kunserve_sgl.cpu_attention.merging import State
from kunserve_sgl.cpu_attention.paged_attention import NO_WINDOW, PagedAttention, plan_part
from kunserve_sgl.cuda_attention import part_kernel
from kunserve_sgl.cuda_attention.merging import DeviceMergePlan
from kunserve_sgl.exchange.attention_work import QUERY, order_tensors

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_triton(monkeypatch)


BATCHES = {
    "decode, prefix elsewhere": Requests([90, 5, 40], [1, 1, 1], [runs((91, 1)), runs((3, 0), (3, 1)), runs((41, 0))]),
    "extend, prefix elsewhere": Requests([70, 0], [20, 33], [runs((70, 1), (20, 0)), runs((33, 0))], 6, 2),
    "new tokens at several homes": Requests(
        [50, 9], [80, 1], [np.random.default_rng(1).integers(3, size=130).tolist(), runs((4, 2), (6, 0))], 4, 1
    ),
    "other dims, no group": Requests([30], [17], [runs((20, 1), (27, 0))], 3, 3, 33, 7),
    "a window": Requests([80], [30], [runs((40, 1), (50, 0), (20, 1))], window=25),
    "a cap": Requests([40], [9], [runs((20, 1), (29, 0))], logit_cap=5.0),
    "a token that sees nothing of a part": Requests([0], [40], [runs((20, 0), (20, 1))]),
}


def by_parts(requests: Requests, dtype: torch.dtype) -> State:
    """Each home by itself, without the KV of others, and merged."""
    parts = requests.divide()
    states = []
    for home, part in parts.items():
        own = slice(home * requests.span, (home + 1) * requests.span)
        key, value = torch.full_like(requests.key, torch.nan), torch.full_like(requests.value, torch.nan)
        key[own], value[own] = requests.key[own], requests.value[own]
        key[0], value[0] = 0, 0  # in a pool it is what padding reads
        if home == 0:
            key[0], value[0] = requests.key[0], requests.value[0]
        query = order_tensors(part, requests.query, None, None)[QUERY]
        assert query is not None
        plan = plan_part(*part.slots.arrays, sliding_window=requests.window)
        tables = part_kernel.tables_of(plan, CPU)
        states.append(part_kernel.attend(tables, query, key, value, scale=requests.scale, logit_cap=requests.logit_cap))
    return DeviceMergePlan(sum(requests.new), [part.tokens for part in parts.values()], CPU).merge(states, dtype)


@pytest.mark.parametrize("name", BATCHES)
def test_parts_that_are_merged_give_what_the_whole_gives(name: str) -> None:
    requests = BATCHES[name]
    output, lse = by_parts(requests, torch.float32)
    expected, expected_lse = requests.undivided(PagedAttention(), torch.float32)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5 * max(1.0, expected_lse.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float16])  # the interpreter multiplies no bfloat16
def test_shorter_types_are_rounded_once(dtype: torch.dtype) -> None:
    requests = Requests([70, 20], [20, 1], [runs((70, 1), (20, 0)), runs((11, 0), (10, 1))], dtype=dtype)
    output, lse = by_parts(requests, torch.float32)
    whole = Requests([70, 20], [20, 1], requests.homes)
    whole.query, whole.key, whole.value = (each.float() for each in (requests.query, requests.key, requests.value))
    expected, expected_lse = whole.undivided(PagedAttention(), torch.float32)
    step = torch.finfo(dtype).eps  # of the weights, which are rounded before they meet the values
    assert (output - expected).abs().max().item() < 4 * step * expected.abs().max().item()
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-4)


def test_the_log_sum_exp_is_a_natural_logarithm() -> None:
    """Scores that are all 0 over n keys give log(n)."""
    requests = Requests([9], [1], [[0] * 10])
    requests.query.zero_()
    _, lse = by_parts(requests, torch.float32)
    torch.testing.assert_close(lse, torch.full_like(lse, np.log(10.0)))


def test_queries_without_slots_give_nothing() -> None:
    empty, one = np.zeros(0, np.int64), np.ones(1, np.int64)
    plan = plan_part(empty, empty, np.zeros(1, np.int64), 3 * one, one)
    key = torch.full((4, 1, 16), torch.nan)
    key[0] = 0
    output, lse = part_kernel.attend(part_kernel.tables_of(plan, CPU), torch.ones(3, 2, 16), key, key, scale=1.0)
    assert not output.any()
    assert torch.equal(lse, torch.full((3, 2), -torch.inf))


def test_what_does_not_fit_is_refused() -> None:
    requests = Requests([9], [1], [[0] * 10])
    plan = plan_part(*requests.divide()[0].slots.arrays, sliding_window=NO_WINDOW)
    tables = part_kernel.tables_of(plan, CPU)
    for query in (requests.query[:0], requests.query.to(torch.bfloat16), requests.query[:, :3]):
        with pytest.raises(ValueError, match="a part of 1 queries"):
            part_kernel.attend(tables, query, requests.key, requests.value, scale=1.0)
