"""A batch at its host equals the one of its owner, as far as attention can see."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hosting_world import Request, decode_batch, extend_batch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode

from kunserve_sgl.exchange.work import Leg, Work
from kunserve_sgl.integration.runner.foreign_batch import BatchShape, rebuild, rows_to_keep
from kunserve_sgl.integration.runner.micro_batches import cut, join

REQUESTS = [Request(3, [11, 12, 13], [5, 6, 7]), Request(1, [21], [8]), Request(2, [31, 32], [9, 10])]
COUNTS = [2, 1, 1]


def sent(batch: SimpleNamespace) -> ForwardBatch:
    """The batch as it arrives at another replica."""
    shape = BatchShape.of_batch(batch)
    extends = b"" if shape.extends is None else shape.extends.tobytes()
    parts = (shape.rows.tobytes(), shape.lengths.tobytes(), extends, shape.slots.tobytes())
    work = Work(0, 0, 1, 1, (Leg(1, 0, 2),), shape.mode, *parts, (), (), 0, None)
    return rebuild(BatchShape.of_work(work), "torch_native", "cpu")


def test_a_decode_step() -> None:
    ours = decode_batch(REQUESTS)
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
    ours = extend_batch(REQUESTS, COUNTS)
    theirs = sent(ours)
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


def test_pieces_of_a_prefill_are_prefills_of_their_own() -> None:
    shape = BatchShape.of_batch(extend_batch(REQUESTS, COUNTS))
    pieces = list(shape.cut([1, 2, 1]))
    assert [piece.rows.tolist() for piece in pieces] == [[3], [3, 1], [2]]
    assert [piece.lengths.tolist() for piece in pieces] == [[2], [3, 1], [2]]
    assert [piece.chunks for piece in pieces] == [[(1, 1)], [(2, 1), (0, 1)], [(1, 1)]]
    assert [piece.slots.tolist() for piece in pieces] == [[12], [13, 21], [32]]


def test_pieces_of_a_decode_step_are_requests() -> None:
    shape = BatchShape.of_batch(decode_batch(REQUESTS))
    pieces = list(shape.cut([2, 1]))
    assert [piece.rows.tolist() for piece in pieces] == [[3, 1], [2]]
    assert [piece.lengths.tolist() for piece in pieces] == [[3, 1], [2]]
    assert [piece.extends for piece in pieces] == [None, None]
    assert [piece.chunks for piece in pieces] == [[(2, 1), (0, 1)], [(1, 1)]]


@pytest.mark.parametrize("keeps", [True, False])
def test_cut_and_joined_a_batch_is_the_same(keeps: bool) -> None:
    batch = extend_batch(REQUESTS, COUNTS, logprob=not keeps)
    shape = BatchShape.of_batch(batch)
    runner = SimpleNamespace(
        device="cpu",
        dtype=torch.float32,
        server_args=SimpleNamespace(attention_backend="torch_native"),
        model_config=SimpleNamespace(hidden_size=3),
    )
    x = torch.randn(4, 3)
    pieces = cut(batch, shape, [1, 2, 1], {"x": x, "none": None}, runner)
    assert [piece.place for piece in pieces] == [0, 128, 256]
    for piece in pieces:
        assert piece.tensors is not None
        if keeps:
            assert piece.keep is not None
            part = piece.tensors["x"]
            assert part is not None
            piece.tensors["x"], piece.has_only_kept = part[piece.keep], True
    joined = join(pieces, 4).tensors
    assert joined["none"] is None
    expected = x.clone()
    if keeps:
        expected[0] = 0  # the first token of the first request
    assert torch.equal(joined["x"], expected)
