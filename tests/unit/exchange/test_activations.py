"""Activations in a buffer that several processes map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kunserve_sgl.errors import InvariantError
from kunserve_sgl.exchange.activations import ActivationBuffer, buffer_bytes
from kunserve_sgl.exchange.tensor_layout import packed_bytes
from kunserve_sgl.exchange.work import TensorNote
from kunserve_sgl.memory.shared_buffer import SharedBuffer
from kunserve_sgl.memory.vmm_memfd import MemfdVmm

FRAME_BYTES = 4096
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def two_mappings(size_bytes: int = FRAME_BYTES) -> tuple[ActivationBuffer, ActivationBuffer]:
    """The owner's and that of a peer, each with a backend of its own."""
    shared = SharedBuffer.create(MemfdVmm(FRAME_BYTES), size_bytes)
    with shared.export() as export:
        peer = SharedBuffer.open(MemfdVmm(FRAME_BYTES), export)
    return ActivationBuffer(shared), ActivationBuffer(peer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_one_writes_the_other_reads(dtype: torch.dtype) -> None:
    ours, theirs = two_mappings()
    tensors = {"hidden_states": torch.randn(7, 9).to(dtype), "residual": None, "other": torch.randn(7, 3)}
    notes = ours.write(tensors, None)
    read = theirs.read(notes)
    assert list(read) == list(tensors)
    assert read["residual"] is None
    for name in ("hidden_states", "other"):
        assert torch.equal(read[name], tensors[name])
    # and back, over what was there
    changed = {name: None if tensor is None else tensor + 1 for name, tensor in read.items()}
    back = ours.read(theirs.write(changed, None))
    for name in ("hidden_states", "other"):
        assert torch.equal(back[name], changed[name])


def test_what_was_read_does_not_change_with_the_buffer() -> None:
    ours, theirs = two_mappings()
    read = theirs.read(ours.write({"x": torch.ones(4, 4)}, None))
    ours.write({"x": torch.zeros(4, 4)}, None)
    assert torch.equal(read["x"], torch.ones(4, 4))


@pytest.mark.parametrize("keep", [None, torch.tensor([1, 2])], ids=["all", "some"])
def test_what_was_borrowed_may_be_written_back_in_any_order(keep: torch.Tensor | None) -> None:
    x, y = torch.arange(12.0).view(4, 3), torch.arange(12.0, 24.0).view(4, 3)
    rows = slice(None) if keep is None else keep
    cases: list[tuple[Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]], str]] = [
        (lambda a, b: (a, b), "as they are"),
        (lambda a, b: (b, a), "the other way round"),
        (lambda a, b: (a, a), "one twice"),
        (lambda a, b: (b + 1, b), "one that is new"),
        (lambda a, b: (a.add_(1), b), "one that was changed in place"),
        (lambda a, b: (a[:1].expand(4, 3), b), "one that lies otherwise"),
    ]
    for change, what in cases:
        ours, theirs = two_mappings()
        borrowed = theirs.borrow(ours.write({"x": x, "y": y}, None))
        assert borrowed["x"] is not None
        assert borrowed["y"] is not None
        expected = [each.clone() for each in change(x.clone(), y.clone())]
        read = ours.read(theirs.write(dict(zip("xy", change(borrowed["x"], borrowed["y"]), strict=True)), keep))
        for name, tensor in zip("xy", expected, strict=True):
            assert read[name] is not None, what
            assert read[name].tolist() == tensor[rows].tolist(), what  # type: ignore[union-attr]


def test_only_the_kept_rows_travel() -> None:
    ours, theirs = two_mappings()
    x, y = torch.arange(40.0).view(10, 4), torch.arange(10.0).view(10, 1)
    keep = torch.tensor([2, 9, 5])
    notes = ours.write({"x": x, "none": None, "y": y}, keep)
    assert [note.shape for note in notes] == [(3, 4), (), (3, 1)]
    read = theirs.read(notes)
    assert torch.equal(read["x"], x[keep])
    assert torch.equal(read["y"], y[keep])


def test_rows_of_no_tokens() -> None:
    ours, theirs = two_mappings()
    read = theirs.read(ours.write({"x": torch.ones(0, 4), "y": torch.ones(3)}, None))
    assert read["x"].shape == (0, 4)
    assert torch.equal(read["y"], torch.ones(3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_the_size_for_a_batch_is_enough_and_not_less(dtype: torch.dtype, tokens: int) -> None:
    size_bytes = buffer_bytes(tokens, 48, 2, dtype)
    batch = {"hidden_states": torch.ones(tokens, 48, dtype=dtype), "residual": torch.zeros(tokens, 48, dtype=dtype)}
    shared = SharedBuffer.create(MemfdVmm(FRAME_BYTES), size_bytes)
    buffer = ActivationBuffer(shared)
    notes = buffer.write(batch, None)
    assert packed_bytes(notes) <= size_bytes < packed_bytes(notes) + 64


def test_pieces_have_places_of_their_own() -> None:
    """A buffer that is large enough for all pieces, and no larger by more than the borders."""
    ours, theirs = two_mappings(4 * FRAME_BYTES)
    sizes = (3, 1, 17)
    place, written = 0, []
    for size in sizes:
        tensors = {"x": torch.randn(size, 48), "y": torch.randn(size, 48)}
        written.append((ours.write(tensors, None, place), place, tensors))
        place += buffer_bytes(size, 48, 2, torch.float32)
    assert place <= buffer_bytes(sum(sizes), 48, 2, torch.float32, len(sizes))
    for notes, at, tensors in written:
        for name, tensor in theirs.read(notes, at).items():
            assert torch.equal(tensor, tensors[name])


def test_a_buffer_that_is_too_small_is_an_error() -> None:
    ours, _ = two_mappings()
    exact = torch.ones(FRAME_BYTES // 4)
    ours.write({"x": exact}, None)
    message = r"x \(1025,\) of float32 from byte 0 on end 64 bytes behind the activation buffer of 4096 bytes"
    with pytest.raises(InvariantError, match=message):
        ours.write({"x": torch.ones(FRAME_BYTES // 4 + 1)}, None)
    with pytest.raises(InvariantError, match=r"y .* end 64 bytes behind"):
        ours.write({"x": exact, "y": torch.ones(1)}, None)
    with pytest.raises(InvariantError, match="end 12288 bytes"):
        ours.read((TensorNote("x", "float32", (FRAME_BYTES,)),))


def test_types_that_do_not_travel() -> None:
    ours, _ = two_mappings()
    with pytest.raises(InvariantError, match="activations of type int64; accepted: float32, bfloat16, float16"):
        ours.write({"x": torch.ones(2, dtype=torch.int64)}, None)
