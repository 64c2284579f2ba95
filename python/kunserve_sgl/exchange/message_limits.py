"""How long messages of peers can be. Sockets take no longer ones, and close the connection: nobody makes this process
allocate what no message has."""

from __future__ import annotations

from collections.abc import Iterable

from kunserve_sgl.exchange.attention_work import AttentionShape, slots_bytes
from kunserve_sgl.exchange.memory_reads import CHUNK_BYTES
from kunserve_sgl.exchange.work_check import Limits
from kunserve_sgl.wire.framing import BESIDE_BYTES, MOST_CONTROL_BYTES


def most_work_bytes(limits: Limits, most_tokens: int) -> int:
    """Counts the bytes of the longest message to an inbox, where a batch has `most_tokens` at most: a `Work` for layer
    hosts that know nothing of any row, a `CopySlots`, or what the coordinator says."""
    requests = _most_requests(limits)
    rows = 4 * requests * (3 + limits.replicas * (1 + limits.row_width))
    work = rows + (8 + 4) * most_tokens
    copy = 2 * 8 * max(slots.count for slots in limits.slots)
    return max(MOST_CONTROL_BYTES, work, copy) + BESIDE_BYTES


def most_order_bytes(limits: Limits, shapes: Iterable[AttentionShape], most_tokens: int) -> int:
    """Counts the bytes of the longest frame to a memory socket: the slots or the tensors of an `AttentionOrder`, in
    layers of these shapes, or a part of what is written or of the numbers of rows."""
    requests = _most_requests(limits)
    slots = slots_bytes(requests, requests * limits.row_width)
    tensors = max(shape.order_bytes(most_tokens, most_tokens) for shape in shapes)
    return max(slots, tensors, CHUNK_BYTES) + BESIDE_BYTES


def most_answer_bytes(shapes: Iterable[AttentionShape], most_tokens: int) -> int:
    """Counts the bytes of the longest frame of an answer to an `AttentionOrder`."""
    return max(shape.answer_bytes(most_tokens) for shape in shapes) + BESIDE_BYTES


def _most_requests(limits: Limits) -> int:
    return max(map(len, limits.rows))
