"""How tensors lie in the bytes of a message."""

from __future__ import annotations

import pytest
import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.tensor_layout import notes_of, pack, packed_bytes, unpack


def test_tensors_come_out_as_they_went_in() -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "nothing": None,
        "empty": torch.empty(0, 5, dtype=torch.float16),
        "b": torch.randn(5, 3).to(torch.bfloat16).t(),
    }
    notes = notes_of(tensors, None)
    memory = torch.empty(packed_bytes(notes), dtype=torch.uint8)
    pack(tensors, None, memory)
    out = unpack(notes, memory)
    assert list(out) == list(tensors)
    assert out["nothing"] is None
    for name in ("a", "empty", "b"):
        got, put = out[name], tensors[name]
        assert got is not None
        assert put is not None
        assert got.dtype == put.dtype
        assert torch.equal(got, put)


def test_only_the_rows_to_keep() -> None:
    tensors = {"a": torch.arange(12.0).view(4, 3)}
    keep = torch.tensor([3, 1])
    notes = notes_of(tensors, keep)
    assert notes[0].shape == (2, 3)
    memory = torch.empty(packed_bytes(notes), dtype=torch.uint8)
    pack(tensors, keep, memory)
    assert torch.equal(unpack(notes, memory)["a"], tensors["a"][[3, 1]])  # type: ignore[arg-type]


def test_nothing_takes_no_bytes() -> None:
    assert packed_bytes(notes_of({"a": None, "b": torch.empty(0, 8)}, None)) == 0
    assert packed_bytes(notes_of({"a": torch.ones(4, 8)}, torch.empty(0, dtype=torch.int64))) == 0


def test_a_type_that_is_none_of_activations_is_refused() -> None:
    with pytest.raises(InvariantError, match="int64"):
        packed_bytes(notes_of({"a": torch.ones(2, 2, dtype=torch.int64)}, None))
