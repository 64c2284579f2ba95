"""Parts of batches in SGLang's pool by the kernels for CUDA, interpreted: SGLang's decode kernel and ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_world import Requests, interpret_triton, runs
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from kunserve_sgl.cpu_attention.merging import State
from kunserve_sgl.cpu_attention.paged_attention import PagedAttention, plan_part
from kunserve_sgl.cuda_attention.merging import DeviceMergePlan
from kunserve_sgl.exchange.attention_parts import AttentionPart
from kunserve_sgl.exchange.attention_work import LSE, OUTPUT, order_tensors
from kunserve_sgl.integration.attention.divided_attention import slots_on_device
from kunserve_sgl.integration.attention.part_attention import PoolAttention
from kunserve_sgl.integration.attention.triton_parts import TritonKernels, seen_slots

CPU = torch.device("cpu")
KV_SPLITS = 4


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_triton(monkeypatch)


def attention_of(requests: Requests, home: int | None = None) -> PoolAttention:
    """A rank with the cached KV of one home, or all, in SGLang's pool; everything else is NaN but slot 0."""
    slots = len(requests.key)
    pool = MHATokenToKVPool(
        slots, 1, requests.dtype, requests.kv_heads, requests.head_dim, layer_num=1, device="cpu",
        enable_memory_saver=False, enable_alt_stream=False,
    )  # fmt: skip
    own = slice(0, slots) if home is None else slice(home * requests.span, (home + 1) * requests.span)
    for buffer, there in ((pool.k_buffer[0], requests.key), (pool.v_buffer[0], requests.value)):
        buffer.fill_(torch.nan)
        buffer[own] = there[own]
        buffer[requests.new_slots] = torch.nan
        buffer[0] = buffer[0].nan_to_num(0.0)
    layer = RadixAttention(
        requests.q_heads, requests.head_dim, requests.scale, requests.kv_heads, 0, logit_cap=requests.logit_cap,
        sliding_window_size=requests.window,
    )  # fmt: skip
    return PoolAttention(TritonKernels(CPU, KV_SPLITS), pool, [layer], requests.dtype, CPU)


def attend(requests: Requests, part: AttentionPart, attention: PoolAttention) -> State:
    new = requests.new_slots
    tensors = order_tensors(part, requests.query, requests.key[new], requests.value[new])
    found = attention.part(part.slots).attend(0, tensors)
    output, lse = found[OUTPUT], found[LSE]
    assert output is not None
    assert lse is not None
    return output, lse


def by_parts(requests: Requests) -> State:
    parts = requests.divide()
    states = [attend(requests, part, attention_of(requests, home)) for home, part in parts.items()]
    plan = DeviceMergePlan(sum(requests.new), [part.tokens for part in parts.values()], CPU)
    return plan.merge(states, torch.float32)


BATCHES = {
    "decode": Requests([140, 5, 33], [1, 1, 1], [runs((141, 1)), runs((3, 0), (3, 1)), runs((34, 0))]),
    "decode, one KV head": Requests([40], [1], [runs((20, 1), (21, 2))], 4, 1),
    "decode, no group": Requests([40], [1], [runs((20, 1), (21, 0))], 2, 2),
    "decode, a cap": Requests([40], [1], [runs((20, 1), (21, 0))], logit_cap=5.0),
    "decode, a window that hides a part": Requests([90, 9], [1, 1], [runs((60, 1), (31, 0)), runs((10, 1))], window=20),
    "extend": Requests([60, 0], [20, 18], [runs((60, 1), (20, 0)), runs((18, 0))]),
    "mixed, new tokens at two homes": Requests([50, 9], [30, 1], [runs((50, 1), *[(3, 0), (3, 2)] * 5), runs((10, 2))]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_parts_that_are_merged_give_what_the_whole_gives(name: str) -> None:
    requests = BATCHES[name]
    expected, expected_lse = requests.undivided(PagedAttention(), torch.float32)
    output, lse = by_parts(requests)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5 * max(1.0, expected_lse.abs().max().item()))


@pytest.mark.parametrize("new", [1, 3])
def test_the_log_sum_exp_is_a_natural_logarithm(new: int) -> None:
    """Scores that are all 0 over n keys give log(n); by SGLang's decode kernel with one query, by ours with more."""
    requests = Requests([100], [new], [[0] * (100 + new)])
    requests.query.zero_()
    _, lse = attend(requests, requests.divide()[0], attention_of(requests))
    torch.testing.assert_close(lse[:, 0], torch.log(torch.arange(101.0, 101.0 + new)))


def test_half_is_rounded_in_the_weights_only() -> None:
    requests = Requests([70, 20], [1, 1], [runs((70, 1), (1, 0)), runs((11, 0), (10, 1))], dtype=torch.float16)
    output, lse = by_parts(requests)
    requests.query, requests.key, requests.value = (
        each.float() for each in (requests.query, requests.key, requests.value)
    )
    expected, expected_lse = requests.undivided(PagedAttention(), torch.float32)
    step = torch.finfo(torch.float16).eps
    assert (output - expected).abs().max().item() < 4 * step * expected.abs().max().item()
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-3)


def test_what_a_decode_step_sees() -> None:
    requests = Requests([9, 30], [1, 1], [runs((10, 0)), runs((31, 0))], window=4)
    pointers, slots = seen_slots(plan_part(*requests.divide()[0].slots.arrays, sliding_window=4))
    assert pointers.tolist() == [0, 5, 10]
    rows = requests.table[requests.rows]
    assert slots.tolist() == [*rows[0, 5:10].tolist(), *rows[1, 26:31].tolist()]


def test_slots_are_read_off_rows_as_on_the_cpu() -> None:
    requests = Requests([9, 30], [1, 5], [runs((10, 0)), runs((35, 0))])
    slots = slots_on_device(requests.table, requests.rows, torch.tensor(requests.lengths), sum(requests.lengths))
    expected = [
        requests.table[row, :length] for row, length in zip(requests.rows.tolist(), requests.lengths, strict=True)
    ]
    assert slots.tolist() == torch.cat(expected).tolist()
    assert slots.dtype == np.int32


def test_warming_up_writes_to_slot_0_only() -> None:
    requests = Requests([9], [1], [[0] * 10])
    attention = attention_of(requests)
    memory = attention.parts.pool.k_buffer[0]
    before = memory.clone()
    attention.warm_up()
    assert torch.equal(before[1:].nan_to_num(7.0), memory[1:].nan_to_num(7.0))
    assert not memory[0].any()
