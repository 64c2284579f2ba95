"""What peers say between batches, checked: what is right passes, and nothing of 10,000 fuzzed messages that is out of
bounds."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest

from kunserve_sgl.exchange.work import (
    Answer,
    CopySlots,
    Have,
    Message,
    RowUpdate,
    TensorNote,
    Turn,
    TurnKind,
    Work,
)
from kunserve_sgl.exchange.work_check import Limits, WorkCheck
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.policy.plan import Segment
from kunserve_sgl.wire.rejections import BadMessageError, Sender
from message_fuzz import fuzzed

DECODE, EXTEND = 2, 1
LIMITS = Limits(
    replicas=3,
    layers=4,
    rows=[range(1 + 8 * r, 9 + 8 * r) for r in range(3)],
    slots=[SlotRange(16 + 64 * r, 64) for r in range(3)],
    row_width=32,
    most_tensor_bytes=4096,
    decode=DECODE,
    extend=(EXTEND,),
)
NOTES = (TensorNote("hidden_states", "float32", (3, 8)), TensorNote("residual", "none", ()))
replaced: Callable[..., Any] = msgspec.structs.replace


def int32s(*values: int) -> bytes:
    return np.array(values, np.int32).tobytes()


def int64s(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


# Replica 1's, of which replica 0 executes layers 1 and 2, and replica 2 layer 3.
PREFILL = Work(
    *(1, 1, 7, 3, (Segment(0, 1, 3), Segment(2, 3, 4)), EXTEND),
    rows=int32s(9, 16),
    lengths=int32s(5, 4),
    extends=int32s(2, 1),
    slots=int64s(80, 81, 143),
    updates=(RowUpdate(0, int32s(3, 4), int32s(80, 81)), RowUpdate(2, b"", b"")),
    tensors=NOTES,
    place=64,
    keep=int32s(1, 2),
)
STEP = replaced(
    PREFILL, mode=DECODE, extends=b"", slots=int64s(81, 0), keep=None, updates=(RowUpdate(0, int32s(5, 4), b""),)
)
COPY = CopySlots(1, 8, 3, int64s(80, 81), int64s(90, 91))
ANSWER = Answer(1, 0, 5, NOTES, "")
TURN = Turn(TurnKind.CUT, sizes=(4, 5))
HAVE = Have(1, 2, 5, 3)


def check(message: Message, sender: Sender = None, rank: int = 0, serves: bool = True, least_epoch: int = 0) -> None:
    """By who has believed right messages before, and checks again only what is new."""
    hosts, least = {5: (1, 2)}, [0]
    made = WorkCheck(0, rank, LIMITS, lambda batch: hosts.get(batch, ()), lambda: serves, lambda: least[0])
    for right in (PREFILL, STEP, ANSWER) if serves else (ANSWER,):
        made.check(right, None)
    least[0] = least_epoch
    made.check(message, sender)


def test_what_is_right_passes() -> None:
    for message in (PREFILL, STEP, COPY, ANSWER):
        check(message)
        check(message, (1, 0))
        check(message, (1, 3), rank=3)
    check(replaced(PREFILL, host=2), (2, 0))  # passed on
    check(replaced(PREFILL, updates=()))  # nothing is missing but the new slots
    check(replaced(PREFILL, keep=b""))  # a piece in which no request ends
    check(TURN, (0, 0), rank=1)


def test_who_serves_nobody_takes_no_orders() -> None:
    for message in (PREFILL, COPY):
        with pytest.raises(BadMessageError, match="nobody has layers here"):
            check(message, serves=False)
    check(ANSWER, serves=False)


def test_nothing_is_taken_in_by_a_plan_from_before_a_recovery() -> None:
    for message in (PREFILL, STEP, COPY):
        check(message, least_epoch=message.epoch)
        with pytest.raises(BadMessageError, match="epoch 3"):
            check(message, least_epoch=message.epoch + 1)
    check(ANSWER, least_epoch=9)


@pytest.mark.parametrize("sender", [(0, 1), (1, 1), (2, 0), (-1, -1)])
def test_nobody_speaks_for_others(sender: Sender) -> None:
    for message in (PREFILL, COPY, ANSWER):
        with pytest.raises(BadMessageError, match="it came from"):
            check(message, sender)
    with pytest.raises(BadMessageError, match="turns come from rank 0"):
        check(TURN, sender, rank=1)


@pytest.mark.parametrize(
    "message",
    [
        replaced(PREFILL, host=3),
        replaced(PREFILL, host=0),
        replaced(PREFILL, owner=0),
        replaced(PREFILL, batch=-1),
        replaced(PREFILL, epoch=-1),
        replaced(PREFILL, segments=()),
        replaced(PREFILL, segments=(Segment(2, 1, 3),)),
        replaced(PREFILL, segments=(Segment(0, 1, 5),)),
        replaced(PREFILL, segments=(Segment(0, -1, 3),)),
        replaced(PREFILL, segments=(Segment(0, 2, 2),)),
        replaced(PREFILL, segments=(Segment(0, 1, 2), Segment(2, 3, 4))),
        replaced(PREFILL, segments=(Segment(0, 1, 2), Segment(1, 2, 4))),
        replaced(PREFILL, mode=9),
        replaced(PREFILL, rows=int32s(8, 16)),  # another replica's
        replaced(PREFILL, rows=int32s(9, 17)),
        replaced(PREFILL, rows=int32s(9)),
        replaced(PREFILL, rows=b"abc"),
        replaced(PREFILL, lengths=int32s(5, 33)),
        replaced(PREFILL, lengths=int32s(5, 0)),
        replaced(PREFILL, extends=int32s(2, 0)),
        replaced(PREFILL, extends=int32s(6, 1)),
        replaced(PREFILL, extends=int32s(1, 1)),
        replaced(PREFILL, slots=int64s(80, 81, 144)),
        replaced(PREFILL, slots=int64s(80, 81, -1)),
        replaced(PREFILL, slots=int64s(80, 81)),
        replaced(PREFILL, updates=(RowUpdate(0, int32s(3, 4), int32s(80, 81)),) * 2),
        replaced(PREFILL, updates=(RowUpdate(0, int32s(-1, 4), int32s(80, 81)),)),
        replaced(PREFILL, updates=(RowUpdate(0, int32s(3, 5), int32s(80, 81)),)),
        replaced(PREFILL, updates=(RowUpdate(0, int32s(3, 4), int32s(80)),)),
        replaced(PREFILL, updates=(RowUpdate(0, int32s(3, 4), int32s(80, 15)),)),
        replaced(PREFILL, tensors=(TensorNote("x", "float64", (1,)),)),
        replaced(PREFILL, tensors=(TensorNote("x", "float32", (-1, -8)),)),
        replaced(PREFILL, tensors=(TensorNote("x", "float32", (2000,)),)),
        replaced(PREFILL, tensors=(TensorNote("x" * 65, "float32", (1,)),)),
        replaced(PREFILL, tensors=NOTES * 9),
        replaced(PREFILL, place=-64),
        replaced(PREFILL, place=4097),
        replaced(PREFILL, keep=int32s(3)),
        replaced(PREFILL, keep=int32s(-1)),
        replaced(PREFILL, keep=int32s(0, 1, 2, 2)),
        replaced(STEP, extends=int32s(1, 1)),
        replaced(COPY, owner=0),
        replaced(COPY, sources=int64s(80)),
        replaced(COPY, sources=int64s(80, 20)),
        replaced(COPY, targets=int64s(2**62, 90)),
        replaced(ANSWER, owner=2),
        replaced(ANSWER, batch=6),
        replaced(ANSWER, error="x" * 10_001),
        TURN,  # it is for the ranks behind rank 0
    ],
)
def test_what_is_not_believed(message: Message) -> None:
    with pytest.raises(BadMessageError):
        check(message)


@pytest.mark.parametrize(
    "turn",
    [
        Turn(TurnKind.SERVE, owner=3),
        Turn(TurnKind.SERVE, batch=-2),
        Turn(TurnKind.OWN, piece=2000),
        Turn(TurnKind.OWN, end=5),
        Turn(TurnKind.CUT, sizes=(0,)),
        Turn(TurnKind.CUT, sizes=(1,) * 2000),
    ],
)
def test_turns_that_are_not_believed(turn: Turn) -> None:
    with pytest.raises(BadMessageError):
        check(turn, rank=1)


@pytest.mark.parametrize(
    ("changes", "sender", "rank"),
    [
        ({"rank": 0}, None, 0),
        ({"owner": 3}, None, 0),
        ({"batch": -1}, None, 0),
        ({"start": -3}, None, 0),
        ({"error": "x" * 10_001}, None, 0),
        ({}, (1, 1), 0),
        ({}, (0, 2), 0),
        ({}, (0, 1), 1),
    ],
)
def test_what_other_ranks_say_to_have_is_not_believed(changes: dict[str, Any], sender: Sender, rank: int) -> None:
    check(HAVE, (0, 1))
    with pytest.raises(BadMessageError):
        check(msgspec.structs.replace(HAVE, **changes), sender, rank)


def test_fuzzed_messages() -> None:
    random = Random(1)
    passed = []
    for _ in range(10_000):
        try:
            message = msgspec.msgpack.decode(fuzzed(random, (PREFILL, STEP, COPY, ANSWER, TURN, HAVE)), type=Message)  # type: ignore[arg-type]
            check(message, random.choice((None, (1, 0), (2, 0))))
        except (BadMessageError, msgspec.DecodeError, UnicodeDecodeError):
            continue
        passed.append(message)
    assert 500 < len(passed) < 5000
    for message in passed:
        if isinstance(message, Work):
            slots, rows = np.frombuffer(message.slots, np.int64), np.frombuffer(message.rows, np.int32)
            own = LIMITS.slots[message.owner]
            assert all(slot == 0 or own.first <= slot < own.stop for slot in slots)
            assert all(row in LIMITS.rows[message.owner] for row in rows)
            assert message.segments[0].host == 0 != message.owner
