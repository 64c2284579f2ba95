"""Messages between a layer host and the homes of its batch's KV: what to attend to in a layer, and what came of it.

For one batch there is one order per home and layer, and one answer to each. Tensors travel beside the message, packed
as `tensor_layout` does; `*_bytes` say how much that is, before anything is computed.

The layer host (`remote_attention.py`) gives, once per batch and pattern of homes: the slots of its rows
(`slots_of_rows`) and their homes, from which it has the parts (`divide_batch`) and a `MergePlan` of their tokens; in
each layer the query, key and value of the batch, of which each other home is sent its own (`order_tensors`). Then it
stores and attends to its own part, and merges when the answers are there, in the order of the parts.

A home (`attention_service.py`) reads which of the slots that it has lent are asked for (`read_slots`), stores the new
keys and values at `PartSlots.new_slots`, plans with `plan_part` by the window of the layer, attends, and answers. It
waits for nothing meanwhile, so replicas may ask each other at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from kunserve_sgl.exchange.attention_parts import AttentionPart, PartSlots
from kunserve_sgl.exchange.tensor_layout import NOTHING, Activations, packed_bytes
from kunserve_sgl.exchange.work import TensorNote
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.wire.rejections import require

QUERY, KEY, VALUE = "query", "key", "value"
OUTPUT, LSE = "output", "lse"

_FLOAT32 = "float32"
_MOST_POSITION = (1 << 31) - 1


class SlotsNote(msgspec.Struct, frozen=True, array_like=True):
    """Says which slots a home attends to for a batch, and which queries do: a `PartSlots`, each array as the bytes of
    int32. Slot numbers are the same in every replica."""

    query_counts: bytes
    first_positions: bytes
    slot_counts: bytes
    slots: bytes
    positions: bytes


class AttentionOrder(msgspec.Struct, frozen=True, array_like=True, tag="attend"):
    """Asks the home of some KV to attend to it in one layer, for a batch of which `host` is the layer host.

    `number` is that of the order at the host, for its answer. `loans` are those under which the home has lent its KV of
    this layer to the host, by ascending slots: an order is served as long as they stand, so one that comes too late
    touches nothing. `part` numbers the divisions of batches at the host. `slots` comes with the first order to this
    home that names the part, and holds for all of its layers; `ended` are parts that the home may forget. `tensors`:
    "query" (tokens of the part, q_heads, head_dim), and "key" and "value" of its new tokens (n, kv_heads, head_dim and
    v_head_dim), None where it has none of them. "value" is None too where a model keeps one latent for both.
    """

    host: int
    number: int
    layer: int
    loans: tuple[int, ...]
    part: int
    slots: SlotsNote | None
    ended: tuple[int, ...]
    tensors: tuple[TensorNote, ...]

    @property
    def peer(self) -> int:
        """Gives the replica that asks."""
        return self.host


class AttentionAnswer(msgspec.Struct, frozen=True, array_like=True, tag="attended"):
    """Answers the order `number` with what one home has of a layer: "output", float32 (tokens of the part, q_heads,
    v_head_dim), and "lse", float32 (tokens of the part, q_heads), the natural logarithm of the sum of exponentiated
    scores, -inf where a token saw nothing. `error` is empty, or says why there are no tensors. Attention alone has
    taken `attending_us` of processor time of the thread that led it: what it takes where nobody waits for a processor.
    """

    number: int
    tensors: tuple[TensorNote, ...]
    error: str
    attending_us: int = 0


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Gives the shape of a layer's attention at one rank. `v_head_dim` is that of the output; `value_dim` is what is
    sent of a new token's value per KV head, 0 where key and value are one latent. `dtype` names the type of query, key
    and value, as notes do; results are float32, so that only the merged one is rounded."""

    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    value_dim: int
    dtype: str

    def order_notes(self, queries: int, new_tokens: int) -> tuple[TensorNote, ...]:
        """Describes the tensors of an order with so many query tokens and new tokens."""
        return (
            TensorNote(QUERY, self.dtype, (queries, self.q_heads, self.head_dim)),
            self._stored(KEY, new_tokens, self.head_dim),
            self._stored(VALUE, new_tokens, self.value_dim),
        )

    def answer_notes(self, queries: int) -> tuple[TensorNote, ...]:
        """Describes the tensors of an answer."""
        return (
            TensorNote(OUTPUT, _FLOAT32, (queries, self.q_heads, self.v_head_dim)),
            TensorNote(LSE, _FLOAT32, (queries, self.q_heads)),
        )

    def order_bytes(self, queries: int, new_tokens: int) -> int:
        """Counts the bytes of the tensors of an order, as they lie behind one another."""
        return packed_bytes(self.order_notes(queries, new_tokens))

    def answer_bytes(self, queries: int) -> int:
        """Counts the bytes of the tensors of an answer, as they lie behind one another."""
        return packed_bytes(self.answer_notes(queries))

    def _stored(self, name: str, new_tokens: int, dim: int) -> TensorNote:
        if not new_tokens or not dim:
            return TensorNote(name, NOTHING, ())
        return TensorNote(name, self.dtype, (new_tokens, self.kv_heads, dim))


def slots_bytes(requests: int, entries: int) -> int:
    """Counts the bytes of the arrays of a `SlotsNote`, which is sent once per batch, home and pattern of homes."""
    return np.dtype(np.int32).itemsize * (3 * requests + 2 * entries)


def note_of_slots(slots: PartSlots) -> SlotsNote:
    """Writes down what a home has to know of its part."""
    arrays = (slots.query_counts, slots.first_positions, slots.slot_counts, slots.slots, slots.positions)
    return SlotsNote(*(array.astype(np.int32, copy=False).tobytes() for array in arrays))


def read_slots(note: SlotsNote, at_home: Sequence[SlotRange]) -> PartSlots:
    """Reads what a peer asks for. `at_home` are the slots that it may name: those that are lent to it. Raises
    BadMessageError for what does not fit together or names other slots, so that nothing is read or written
    elsewhere."""
    arrays = (note.query_counts, note.first_positions, note.slot_counts, note.slots, note.positions)
    counts, firsts, slot_counts, slots, positions = (_int32s(data) for data in arrays)
    require(len(counts) == len(firsts) == len(slot_counts) > 0, "a part with arrays of different lengths")
    require(int(counts.min()) > 0 and int(slot_counts.min()) > 0, "a request without tokens or slots in a part")
    entries = int(slot_counts.sum(dtype=np.int64))
    require(len(slots) == len(positions) == entries, "{} slots of {}", len(slots), entries)
    ends = firsts.astype(np.int64) + counts
    require(int(firsts.min()) >= 0 and int(ends.max()) <= _MOST_POSITION, "positions up to {}", int(ends.max()))
    stops = np.cumsum(slot_counts, dtype=np.int64)
    ascends = np.diff(positions) > 0
    ascends[stops[:-1] - 1] = True  # from one request to the next
    require(int(positions.min()) >= 0 and bool(ascends.all()), "positions that do not ascend")
    require(bool((positions[stops - 1] < ends).all()), "slots behind the last token of a request")
    inside = np.zeros(len(slots), bool)
    for allowed in at_home:
        inside |= (slots >= allowed.first) & (slots < allowed.stop)
    require(bool(inside.all()), "slots whose KV is not at home here")
    return PartSlots(counts.astype(np.int64), firsts.astype(np.int64), slot_counts.astype(np.int64), slots, positions)


def order_tensors(
    part: AttentionPart, query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None
) -> Activations:
    """Picks what a part's home is sent out of a layer's tensors of the whole batch: query (tokens, q_heads, head_dim),
    key and value (tokens, kv_heads, head_dim or v_head_dim), of the new tokens. They stay on their device."""
    tokens, new = part.indices(query.device)
    return {
        QUERY: query.index_select(0, tokens),
        KEY: key.index_select(0, new) if key is not None and len(new) else None,
        VALUE: value.index_select(0, new) if value is not None and len(new) else None,
    }


def check_order_tensors(notes: Sequence[TensorNote], slots: PartSlots, shape: AttentionShape) -> None:
    """Raises BadMessageError unless the tensors of an order are those of its part, in a layer of that shape."""
    require(tuple(notes) == shape.order_notes(slots.queries, len(slots.new_slots)), "other tensors than its part has")


def check_answer_tensors(notes: Sequence[TensorNote], part: AttentionPart, shape: AttentionShape) -> None:
    """Raises BadMessageError unless the tensors of an answer are those of this part, in a layer of that shape."""
    require(tuple(notes) == shape.answer_notes(len(part.tokens)), "other tensors than the part has")


def _int32s(data: bytes) -> npt.NDArray[np.int32]:
    require(len(data) % 4 == 0, "{} bytes of int32", len(data))
    return np.frombuffer(data, np.int32)
