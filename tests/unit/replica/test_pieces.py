"""A batch that is cut and joined is the same."""

from __future__ import annotations

import pytest
import torch
from fake_engine import HIDDEN, Exchange, FakeRows, FakeRunner, Request, decode_batch, extend_batch

from kunserve_sgl.policy.cutting import amount_of
from kunserve_sgl.replica.batch_shape import BatchShape
from kunserve_sgl.replica.pieces import cut, join

REQUESTS = [Request(3, [11, 12, 13], [5, 6, 7]), Request(1, [21], [8]), Request(2, [31, 32], [9, 10])]
COUNTS = [2, 1, 1]


def test_pieces_of_a_prefill_are_prefills_of_their_own() -> None:
    shape = extend_batch(REQUESTS, COUNTS).shape
    pieces = list(shape.cut([1, 2, 1]))
    assert [piece.rows.tolist() for piece in pieces] == [[3], [3, 1], [2]]
    assert [piece.lengths.tolist() for piece in pieces] == [[2], [3, 1], [2]]
    assert [piece.chunks for piece in pieces] == [[(1, 1)], [(2, 1), (0, 1)], [(1, 1)]]
    assert [piece.slots.tolist() for piece in pieces] == [[12], [13, 21], [32]]


@pytest.mark.parametrize("shape", [extend_batch(REQUESTS, COUNTS).shape, decode_batch(REQUESTS).shape])
def test_the_amount_is_that_of_the_chunks(shape: BatchShape) -> None:
    assert shape.amount == amount_of(shape.chunks)
    assert shape.prefixes.tolist() == [prefix for prefix, _ in shape.chunks]


def test_pieces_of_a_decode_step_are_requests() -> None:
    shape = decode_batch(REQUESTS).shape
    pieces = list(shape.cut([2, 1]))
    assert [piece.rows.tolist() for piece in pieces] == [[3, 1], [2]]
    assert [piece.lengths.tolist() for piece in pieces] == [[3, 1], [2]]
    assert [piece.extends for piece in pieces] == [None, None]
    assert [piece.chunks for piece in pieces] == [[(2, 1), (0, 1)], [(1, 1)]]


@pytest.mark.parametrize("keeps", [True, False])
def test_cut_and_joined_a_batch_is_the_same(keeps: bool) -> None:
    batch = extend_batch(REQUESTS, COUNTS, logprob=not keeps)
    runner = FakeRunner(0, torch.zeros(0), Exchange(1), FakeRows(0, 1))
    x = torch.randn(4, HIDDEN)
    pieces = cut(batch, batch.shape, [1, 2, 1], {"x": x, "none": None}, runner)
    assert [piece.place for piece in pieces] == [0, 128, 256]
    for piece in pieces:
        assert piece.state is not None
        if keeps:
            assert piece.keep is not None
            part = piece.state["x"]
            assert part is not None
            piece.state["x"], piece.has_only_kept = part[piece.keep], True
    joined = join(pieces, 4)
    assert joined["none"] is None
    expected = x.clone()
    if keeps:
        expected[0] = 0  # the first token of the first request
    assert torch.equal(joined["x"], expected)
