"""A batch at its host equals the one of its owner, as far as attention can see."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode

from kunserve_sgl.exchange.work import Work
from kunserve_sgl.integration.runner.foreign_batch import new_entries, rebuild, rows_to_keep, shape_of
from kunserve_sgl.policy.plan import Segment
from kunserve_sgl.replica.batch_shape import BatchShape

CPU = torch.device("cpu")
ROWS, LENGTHS, COUNTS = [3, 1, 2], [3, 1, 2], [2, 1, 1]


def extend_batch(logprob: bool = False) -> SimpleNamespace:
    """The last tokens of three prompts, as many as `COUNTS` says."""
    lengths = torch.tensor(LENGTHS)
    return SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        input_ids=torch.tensor([6, 7, 8, 10]),
        out_cache_loc=torch.tensor([12, 13, 21, 32]),
        req_pool_indices=torch.tensor(ROWS),
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        extend_seq_lens=torch.tensor(COUNTS, dtype=torch.int32),
        extend_seq_lens_cpu=list(COUNTS),
        positions=torch.tensor([1, 2, 0, 1]),
        return_logprob=logprob,
        capture_hidden_mode=CaptureHiddenMode.NULL,
    )


def decode_batch() -> SimpleNamespace:
    """The last token of each of the three."""
    batch = extend_batch()
    batch.forward_mode = ForwardMode.DECODE
    batch.input_ids, batch.out_cache_loc = torch.tensor([7, 8, 10]), torch.tensor([13, 21, 32])
    batch.positions = torch.tensor([2, 0, 1])
    batch.extend_seq_lens = batch.extend_seq_lens_cpu = None
    return batch


def sent(batch: SimpleNamespace) -> ForwardBatch:
    """The batch as it arrives at another replica."""
    shape = shape_of(batch)
    extends = b"" if shape.extends is None else shape.extends.tobytes()
    parts = (shape.rows.tobytes(), shape.lengths.tobytes(), extends, shape.slots.tobytes())
    work = Work(0, 0, 1, 1, (Segment(1, 0, 2),), shape.mode, *parts, (), (), 0, None)
    return rebuild(BatchShape.of_work(work), "torch_native", CPU)


def test_a_decode_step() -> None:
    ours = decode_batch()
    theirs = sent(ours)
    assert theirs.forward_mode is ForwardMode.DECODE
    assert theirs.batch_size == 3
    for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc", "positions"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
        assert getattr(theirs, name).dtype == torch.int64
    assert theirs.seq_lens_sum == 6
    assert len(theirs.input_ids) == 3
    assert theirs.extend_seq_lens is None


def test_a_prefill_with_prefixes() -> None:
    ours = extend_batch()
    theirs = sent(ours)
    assert theirs.forward_mode is ForwardMode.EXTEND
    for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "out_cache_loc", "positions", "extend_seq_lens"):
        assert torch.equal(getattr(theirs, name), getattr(ours, name)), name
    assert theirs.extend_prefix_lens.tolist() == theirs.extend_prefix_lens_cpu == [1, 0, 1]
    assert theirs.extend_seq_lens_cpu == COUNTS
    assert theirs.extend_start_loc.tolist() == [0, 2, 3]
    assert theirs.extend_num_tokens == len(theirs.input_ids) == 4


@pytest.mark.parametrize("batch", [decode_batch(), extend_batch()], ids=["decode", "extend"])
def test_a_host_knows_where_the_new_slots_go(batch: SimpleNamespace) -> None:
    theirs = sent(batch)
    rows, positions = new_entries(theirs)
    counts = [1, 1, 1] if batch.extend_seq_lens is None else COUNTS
    places = [(row, end - n + i) for row, end, n in zip(ROWS, LENGTHS, counts, strict=True) for i in range(n)]
    assert list(zip(rows.tolist(), positions.tolist(), strict=True)) == places
    assert len(theirs.out_cache_loc) == len(places)


def test_batches_do_not_share_what_is_set_later() -> None:
    first, second = sent(decode_batch()), sent(decode_batch())
    first.kunserve_attention_plan = "a plan"
    assert not hasattr(second, "kunserve_attention_plan")


def test_the_last_token_of_each_prompt_is_enough() -> None:
    batch = extend_batch()
    keep = rows_to_keep(batch)
    assert keep is not None
    assert keep.tolist() == [1, 2, 3]
    assert keep.dtype == np.int64


@pytest.mark.parametrize("why", ["decode", "logprobs", "hidden states"])
def test_all_tokens_are_needed(why: str) -> None:
    batch = decode_batch() if why == "decode" else extend_batch(logprob=why == "logprobs")
    if why == "hidden states":
        batch.capture_hidden_mode = CaptureHiddenMode.FULL
    assert rows_to_keep(batch) is None
