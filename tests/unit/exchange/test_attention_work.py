"""Messages of remote attention: what a peer may say, and how many bytes it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kunserve_sgl.cpu_attention.paged_attention import plan_part
from kunserve_sgl.exchange.attention_parts import AttentionPart, divide_batch
from kunserve_sgl.exchange.attention_work import (
    AttentionOrder,
    AttentionShape,
    SlotsNote,
    check_answer_tensors,
    check_order_tensors,
    note_of_slots,
    order_tensors,
    read_slots,
    slots_bytes,
)
from kunserve_sgl.exchange.tensor_layout import notes_of
from kunserve_sgl.exchange.work import TensorNote
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.wire.rejections import BadMessageError
from message_fuzz import fuzzed

SHAPE = AttentionShape(q_heads=4, kv_heads=2, head_dim=16, v_head_dim=8, value_dim=8, dtype="bfloat16")
AT_HOME = [SlotRange(64, 32), SlotRange(160, 64)]
replaced: Callable[..., Any] = msgspec.structs.replace


def int32s(*values: int) -> bytes:
    return np.array(values, np.int32).tobytes()


def part() -> AttentionPart:
    """Of home 1: one of two requests that decode, and two of four new tokens of a chunk."""
    homes = np.array([0, 0, 1, 1, 0, *(1, 1, 0, 1, 0, 1)])
    return divide_batch(
        np.array([1, 2, 64, 95, 3, *(160, 161, 4, 162, 5, 223)]), homes, np.array([5, 6]), np.array([1, 4])
    )[1]


NOTE = note_of_slots(part().slots)
ORDER = AttentionOrder(0, 7, 3, (1, 4), 0, NOTE, (2,), SHAPE.order_notes(5, 2))


def test_slots_come_out_as_they_went_in() -> None:
    order = msgspec.msgpack.decode(msgspec.msgpack.encode(ORDER), type=AttentionOrder)
    assert order == ORDER
    found, put = read_slots(order.slots, AT_HOME), part().slots
    for name in ("query_counts", "first_positions", "slot_counts", "slots", "positions"):
        got, expected = getattr(found, name), getattr(put, name)
        assert got.dtype == expected.dtype
        assert got.tolist() == expected.tolist()
    assert found.new_slots.tolist() == [162, 223]
    assert found.queries == 5


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"slots": int32s(64, 95, 160, 161, 162, 224)}, "not at home"),
        ({"slots": int32s(64, 95, 160, 161, 162, 96)}, "not at home"),
        ({"slots": int32s(64, -1, 160, 161, 162, 223)}, "not at home"),
        ({"slots": int32s(64, 95, 160)}, "3 slots of 6"),
        ({"slots": b"123"}, "3 bytes of int32"),
        ({"slot_counts": int32s(3, 4)}, "6 slots of 7"),
        ({"slot_counts": int32s(6, 0)}, "without tokens or slots"),
        ({"query_counts": int32s(0, 4)}, "without tokens or slots"),
        ({"query_counts": int32s(1)}, "different lengths"),
        ({"query_counts": int32s(1, 2**31 - 1)}, "positions up to 2147483649"),
        ({"first_positions": int32s(-1, 2)}, "positions up to"),
        ({"positions": int32s(2, 2, 0, 1, 3, 5)}, "do not ascend"),
        ({"positions": int32s(-1, 3, 0, 1, 3, 5)}, "do not ascend"),
        ({"positions": int32s(2, 3, 0, 1, 3, 6)}, "behind the last token"),
        (dict.fromkeys(SlotsNote.__struct_fields__, b""), "different lengths"),
    ],
)
def test_slots_that_make_no_sense_are_refused(changes: dict[str, bytes], complaint: str) -> None:
    with pytest.raises(BadMessageError, match=complaint):
        read_slots(replaced(NOTE, **changes), AT_HOME)


def test_what_passes_of_fuzzed_slots_can_be_planned_and_stays_at_home() -> None:
    random = Random(0)
    passed = 0
    for _ in range(5000):
        try:
            note = msgspec.msgpack.decode(fuzzed(random, [NOTE]), type=SlotsNote)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        data = [bytearray(getattr(note, field)) for field in SlotsNote.__struct_fields__]
        if random.random() < 0.8 and (some := random.choice(data)):
            some[random.randrange(len(some))] = random.choice((0, 1, 2, 5, 64, 127, 255))
        try:
            slots = read_slots(SlotsNote(*map(bytes, data)), AT_HOME)
            check_order_tensors(ORDER.tensors, slots, SHAPE)  # bounds the number of queries
        except BadMessageError:
            continue
        passed += 1
        assert all(any(slot in allowed for allowed in AT_HOME) for slot in slots.slots.tolist())
        plan = plan_part(*slots.arrays, sliding_window=3)
        assert plan.query_tokens == 5
        assert (plan.visible >= 0).all()
        assert (plan.visible[:, 1] <= np.repeat(slots.slot_counts, slots.query_counts)).all()
    assert passed > 100


def tensors(count: int, heads: int, dim: int) -> torch.Tensor:
    return torch.randn(count, heads, dim).bfloat16()


def test_an_order_has_the_tokens_of_its_part() -> None:
    query, key, value = tensors(5, 4, 16), tensors(5, 2, 16), tensors(5, 2, 8)
    sent = order_tensors(part(), query, key, value)
    check_order_tensors(notes_of(sent, None), part().slots, SHAPE)
    assert torch.equal(sent["query"], query)
    assert torch.equal(sent["key"], key[[2, 4]])
    assert torch.equal(sent["value"], value[[2, 4]])
    for other in (SHAPE.order_notes(4, 2), SHAPE.order_notes(5, 1), SHAPE.order_notes(5, 0), SHAPE.answer_notes(5)):
        with pytest.raises(BadMessageError, match="other tensors"):
            check_order_tensors(other, part().slots, SHAPE)
    check_answer_tensors(SHAPE.answer_notes(5), part(), SHAPE)
    with pytest.raises(BadMessageError, match="other tensors"):
        check_answer_tensors(SHAPE.answer_notes(4), part(), SHAPE)


def test_nothing_new_and_latent_keys_send_no_values() -> None:
    cached = divide_batch(np.array([64, 1]), np.array([1, 0]), np.array([2]), np.array([1]))[1]
    sent = order_tensors(cached, tensors(1, 4, 16), tensors(1, 2, 16), tensors(1, 2, 8))
    assert sent["key"] is None
    assert sent["value"] is None
    check_order_tensors(notes_of(sent, None), cached.slots, SHAPE)
    latent = AttentionShape(q_heads=4, kv_heads=1, head_dim=16, v_head_dim=8, value_dim=0, dtype="bfloat16")
    sent = order_tensors(part(), tensors(5, 4, 16), tensors(5, 1, 16), None)
    check_order_tensors(notes_of(sent, None), part().slots, latent)
    assert latent.order_notes(5, 2)[2] == TensorNote("value", "none", ())


def test_bytes_are_those_of_the_tensors() -> None:
    """Of each tensor up to a multiple of 64 bytes, and of the arrays what msgpack adds to them."""
    assert SHAPE.order_bytes(5, 2) == sum(
        64 * math.ceil(size / 64) for size in (5 * 4 * 16 * 2, 2 * 2 * 16 * 2, 2 * 2 * 8 * 2)
    )
    assert SHAPE.order_bytes(5, 0) == 5 * 4 * 16 * 2
    assert SHAPE.answer_bytes(5) == 640 + 128
    encoded = len(msgspec.msgpack.encode(NOTE))
    assert slots_bytes(2, 6) == sum(len(getattr(NOTE, field)) for field in SlotsNote.__struct_fields__)
    assert 0 < encoded - slots_bytes(2, 6) <= 5 * 5 + 1
