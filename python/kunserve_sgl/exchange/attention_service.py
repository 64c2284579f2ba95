"""The home's end of remote attention by message: attends to KV that is lent, for who asks. It is called in the thread
of `memory_service.py`."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kunserve_sgl.exchange.attention_parts import PartSlots
from kunserve_sgl.exchange.attention_work import (
    AttentionAnswer,
    AttentionOrder,
    AttentionShape,
    check_order_tensors,
    read_slots,
)
from kunserve_sgl.exchange.device_copies import finish, host_memory, on_host
from kunserve_sgl.exchange.tensor_layout import Activations, notes_of, pack, packed_bytes, unpack
from kunserve_sgl.exchange.work import TensorNote
from kunserve_sgl.exchange.work_check import MOST_ERROR
from kunserve_sgl.memory.slot_space import SlotRange
from kunserve_sgl.wire.rejections import BadMessageError, Rejections, require, require_range

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
_MOST_PARTS = 1024  # of one host; it has a few for each batch that it executes


class BatchPart(Protocol):
    """Is some KV of a batch's requests, planned for all layers of one pattern of homes."""

    def attend(self, layer: int, tensors: Activations) -> Activations:
        """Stores the new keys and values, and attends to all of the part. Takes the tensors of an `AttentionOrder`, and
        returns those of an `AttentionAnswer`."""
        ...


class PartAttention(Protocol):
    """Attends to KV of this rank, whoever's batch it belongs to. It is used by one thread. Tensors that it takes and
    gives are on its device, in the order of the stream that is current in the thread."""

    device: torch.device = CPU

    def shape(self, layer: int) -> AttentionShape:
        """Returns the shape of a layer's attention at this rank."""
        ...

    def part(self, slots: PartSlots) -> BatchPart:
        """Plans attention to some slots."""
        ...


class LentKv(Protocol):
    """Says what KV of this rank others may have attended to."""

    def held(self, borrower: int, layer: int, loans: Sequence[int]) -> AbstractContextManager[list[SlotRange]]:
        """Gives the slots of these loans to `borrower` in a layer, loan by loan; none of them ends before the block
        does. Any thread may call it. Raises BadMessageError where one of them does not stand."""
        ...


@dataclass(frozen=True, slots=True)
class _Known:
    """Keeps a part that a host has named, and the lent slots that it was checked against."""

    lent: list[SlotRange]
    slots: PartSlots
    part: BatchPart


class AttentionService:
    """Answers the orders of layer hosts to one rank."""

    def __init__(self, replica: int, replicas: int, layers: int, lent: LentKv, attention: PartAttention) -> None:
        """Hosts of all `replicas` but this one ask for any of the model's `layers`."""
        self._replica, self._replicas, self._layers = replica, replicas, layers
        self._lent = lent
        self._attention = attention
        self.device = attention.device
        self._known: dict[int, dict[int, _Known]] = {}  # by host and part
        self._rejections = Rejections()
        self.answered: Counter[int] = Counter()  # orders, by host

    def report(self) -> dict[str, int]:
        """Counts the orders that have been answered, by host."""
        return {str(host): count for host, count in sorted(self.answered.items())}

    def forget(self, host: int) -> None:
        """Forgets the parts of a host whose processes have ended: those that are there then number theirs anew. Any
        thread may call it."""
        self._known.pop(host, None)

    def answer(self, order: AttentionOrder, payload: memoryview) -> tuple[AttentionAnswer, memoryview]:
        """Returns the answer to an order with the tensors in `payload`, and those of the answer."""
        error, tensors, attending_us = "", Activations(), 0
        try:
            tensors, attending_us = self._serve(order, payload)
            self.answered[order.host] += 1
        except BadMessageError as refusal:
            error = str(refusal)
            self._rejections.add(AttentionOrder.__name__, refusal)
        except Exception as failure:
            logger.exception("KunServe: attention in layer %d for replica %d failed", order.layer, order.host)
            error = f"{type(failure).__name__}: {failure}"
        notes = notes_of(tensors, None)
        return AttentionAnswer(order.number, notes, error[:MOST_ERROR], attending_us), packed(tensors)

    def _serve(self, order: AttentionOrder, payload: memoryview) -> tuple[Activations, int]:
        """Returns what attention gives, and the microseconds that it took. Raises BadMessageError for what the host may
        not ask."""
        require_range("host", order.host, 0, self._replicas - 1)
        require(order.host != self._replica, "it is from this replica")
        require_range("layer", order.layer, 0, self._layers - 1)
        parts = self._known.setdefault(order.host, {})
        for part in order.ended:
            parts.pop(part, None)
        with self._lent.held(order.host, order.layer, order.loans) as lent:
            known = parts.get(order.part) if order.slots is None else None
            if order.slots is not None:
                slots = read_slots(order.slots, lent)
            else:
                require(known is not None and known.lent == lent, "part {} is not known here", order.part)
                assert known is not None
                slots = known.slots
            # Before anything is planned or kept: a part may say that it has any number of queries.
            check_order_tensors(order.tensors, slots, self._attention.shape(order.layer))
            tensors = unpacked(order.tensors, payload, self.device)
            if known is None:
                known = parts[order.part] = _Known(lent, slots, self._attention.part(slots))
                if len(parts) > _MOST_PARTS:
                    del parts[next(iter(parts))]
            began_ns = time.thread_time_ns()
            try:
                found = known.part.attend(order.layer, tensors)
            finally:  # the loan may end behind this, and the memory be unmapped
                finish(self.device)
            return found, (time.thread_time_ns() - began_ns) // 1000


def packed(tensors: Activations) -> memoryview:
    """Returns the bytes of `tensors`, as they lie behind one another, when the current stream has made them."""
    device = next((tensor.device for tensor in tensors.values() if tensor is not None), CPU)
    memory = torch.empty(packed_bytes(notes_of(tensors, None)), dtype=torch.uint8, device=device)
    pack(tensors, None, memory)
    data: memoryview = on_host(memory).numpy().data
    return data


def unpacked(notes: Sequence[TensorNote], payload: bytes | memoryview, device: torch.device = CPU) -> Activations:
    """Returns the tensors that `payload` holds, in memory of their own, which is aligned, on a device in stream order.
    Raises BadMessageError where it has another size."""
    require(packed_bytes(notes) == len(payload), "{} bytes of tensors that take {}", len(payload), packed_bytes(notes))
    memory = host_memory(len(payload), device)
    memory.numpy()[:] = np.frombuffer(payload, np.uint8)
    return unpack(notes, memory.to(device, non_blocking=True))
