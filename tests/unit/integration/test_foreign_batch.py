"""A batch at its host equals the one of its owner, as far as attention can see."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hosting_world import Request, decode_batch, extend_batch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

from kunserve_sgl.execution.work import Leg, Work
from kunserve_sgl.integration.foreign_batch import rebuild, rows_to_keep

REQUESTS = [Request(3, [11, 12, 13], [5, 6, 7]), Request(1, [21], [8]), Request(2, [31, 32], [9, 10])]
COUNTS = [2, 1, 1]


def work_of(batch: SimpleNamespace) -> Work:
    decode = batch.forward_mode.is_decode()
    return Work(
        0,
        1,
        1,
        (Leg(1, 0, 2),),
        int(batch.forward_mode),
        batch.req_pool_indices.numpy().astype(np.int32).tobytes(),
        batch.seq_lens.numpy().astype(np.int32).tobytes(),
        b"" if decode else np.array(COUNTS, np.int32).tobytes(),
        batch.out_cache_loc.numpy().tobytes(),
        (),
        (),
        b"",
    )


def test_a_decode_step() -> None:
    ours = decode_batch(REQUESTS)
    theirs = rebuild(work_of(ours), "torch_native", "cpu")
    assert theirs.forward_mode is ForwardMode.DECODE
    assert theirs.batch_size == 3
    for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc", "positions"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
        assert getattr(theirs, name).dtype == torch.int64
    assert theirs.seq_lens_sum == 6
    assert len(theirs.input_ids) == 3
    assert theirs.extend_seq_lens is None


def test_a_prefill_with_prefixes() -> None:
    ours = extend_batch(REQUESTS, COUNTS)
    theirs = rebuild(work_of(ours), "torch_native", "cpu")
    assert theirs.forward_mode is ForwardMode.EXTEND
    for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc", "positions", "extend_seq_lens"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
    assert theirs.extend_prefix_lens.tolist() == theirs.extend_prefix_lens_cpu == [1, 0, 1]
    assert theirs.extend_seq_lens_cpu == COUNTS
    assert theirs.extend_start_loc.tolist() == [0, 2, 3]
    assert theirs.extend_num_tokens == len(theirs.input_ids) == 4


def test_the_last_token_of_each_prompt_is_enough() -> None:
    batch = extend_batch(REQUESTS, COUNTS)
    keep = rows_to_keep(batch)
    assert keep is not None
    assert keep.tolist() == [1, 2, 3]
    assert keep.dtype == torch.int64


@pytest.mark.parametrize("why", ["decode", "logprobs", "hidden states"])
def test_all_tokens_are_needed(why: str) -> None:
    batch = decode_batch(REQUESTS) if why == "decode" else extend_batch(REQUESTS, COUNTS, logprob=why == "logprobs")
    if why == "hidden states":
        batch.capture_hidden_mode = CaptureHiddenMode.FULL
    assert rows_to_keep(batch) is None
