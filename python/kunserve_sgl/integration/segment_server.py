"""Executes segments of others' batches, and passes them on.

A long segment is executed in slices of layers: in between, this replica looks for other work. Short segments go in
between the slices of a long one; a second long one waits until the first has ended, or both would end late.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kunserve_sgl.exchange.handover import Handover
from kunserve_sgl.exchange.layer_clock import LayerClock
from kunserve_sgl.exchange.peer_link import PeerLink, require_own
from kunserve_sgl.exchange.work import Answer, CopySlots, Order, TensorNote, Work
from kunserve_sgl.exchange.work_check import MOST_ERROR
from kunserve_sgl.integration.runner.foreign_batch import BatchShape, rebuild
from kunserve_sgl.integration.runner.micro_batches import StageTensors
from kunserve_sgl.replica.held_plan import HeldPlan

logger = logging.getLogger(__name__)

# Runs layers [start, end) of the model on a batch; with the embedding if `first`, with norm and logits if `last`.
RunLayers = Callable[..., Any]
# What so many layers took for a batch of that shape, in seconds.
Observe = Callable[[BatchShape, int, float], None]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A segment whose next layer is `layer`."""

    layer: int
    shape: BatchShape
    batch: Any
    state: StageTensors


class SegmentServer:
    """One rank's. Leaf work: nothing here waits for anybody."""

    def __init__(
        self,
        runner: Any,
        link: PeerLink,
        run_layers: RunLayers,
        handover: Handover,
        clock: LayerClock,
        observe: Observe,
        seconds: defaultdict[str, float],
        plan: HeldPlan,
    ) -> None:
        self._runner = runner
        self._link = link
        self._run_layers = run_layers
        self._handover = handover
        self._clock = clock
        self._observe = observe
        self._seconds = seconds
        self._plan = plan
        self._begun: dict[tuple[int, int], _Begun] = {}  # by owner and batch
        self.served = 0

    @property
    def has_begun(self) -> bool:
        """Whether there is a segment of which layers are left."""
        return bool(self._begun)

    def forget_all_but(self, owners: Iterable[int]) -> None:
        """What was begun for others than `owners` is not finished."""
        kept = set(owners)
        self._begun = {key: begun for key, begun in self._begun.items() if key[0] in kept}

    def begun_layer(self, work: Work) -> int | None:
        """The next layer of a segment that was begun."""
        begun = self._begun.get((work.owner, work.batch))
        return None if begun is None else begun.layer

    def execute(self, order: Order, end: int) -> None:
        """Executes an order up to layer `end` and, where that is all of it, passes it on; it is put back otherwise. A
        failure is the owner's to handle: it is told, and this replica goes on serving."""
        replica = self._link.replica
        started_s = time.perf_counter()
        try:
            require_own(order, replica)
            notes: tuple[TensorNote, ...] | None = ()
            if isinstance(order, CopySlots):
                self._copy(order)
            else:
                notes = self._segment(order, end)
        except Exception as error:
            logger.exception(
                "KunServe: batch %d of replica %d, sent in epoch %d, failed here", order.batch, order.owner, order.epoch
            )
            message = f"{type(error).__name__}: {error}"[:MOST_ERROR]
            self._link.send(order.owner, Answer(replica, order.owner, order.batch, (), message))
            return
        finally:
            self._seconds["copy" if isinstance(order, CopySlots) else "serve"] += time.perf_counter() - started_s
        if notes is None:
            self._link.put_back(order)
            return
        self.served += 1
        if isinstance(order, Work) and len(order.legs) > 1:
            self._link.send(order.legs[1].host, _passed_on(order, notes, replica))
        else:
            self._link.send(order.owner, Answer(replica, order.owner, order.batch, notes, ""))

    def _segment(self, work: Work, end: int) -> tuple[TensorNote, ...] | None:
        """What came out of the segment, or None where its layers behind `end` are left."""
        leg, device = work.legs[0], self._runner.device
        begun = self._begun.pop((work.owner, work.batch), None) or self._begin(work)
        with self._clock.measure(partial(self._observe, begun.shape, end - begun.layer)):
            output = self._run_layers(begun.batch, begun.state, begun.layer, end, first=False, last=False)
        if end < leg.end:
            state = StageTensors(output.logits_output.tensors)
            self._begun[work.owner, work.batch] = _Begun(end, begun.shape, begun.batch, state)
            self._clock.pace()
            return None
        to, keep = work.owner, None
        if len(work.legs) > 1:
            to = work.legs[1].host
        elif work.keep is not None:
            keep = torch.from_numpy(np.frombuffer(work.keep, np.int32).astype(np.int64)).to(device)
        return self._handover.give(work.owner, to, output.logits_output.tensors, keep, work.place)

    def _begin(self, work: Work) -> _Begun:
        shape = BatchShape.of_work(work)
        self._update_rows(work, shape)
        state = StageTensors(self._handover.take(work, work.place))
        batch = rebuild(shape, self._runner.server_args.attention_backend, self._runner.device)
        return _Begun(work.legs[0].start, shape, batch, state)

    def _update_rows(self, work: Work, shape: BatchShape) -> None:
        update = next((u for u in work.updates if u.host == self._link.replica), None)
        if update is None:
            return
        starts, values = np.frombuffer(update.starts, np.int32), np.frombuffer(update.values, np.int32)
        self._runner.req_to_token_pool.apply_update(shape.rows, starts, shape.lengths, values)

    def _copy(self, order: CopySlots) -> None:
        ids = [torch.from_numpy(np.frombuffer(data, np.int64).copy()) for data in (order.targets, order.sources)]
        targets, sources = (each.to(self._runner.device) for each in ids)
        self._runner.token_to_kv_pool.copy_slots(targets, sources, self._plan.layers_here(order.owner))


def _passed_on(work: Work, notes: tuple[TensorNote, ...], host: int) -> Work:
    """The same batch for its next host."""
    fields: Mapping[str, Any] = {name: getattr(work, name) for name in work.__struct_fields__}
    return Work(**{**fields, "host": host, "legs": work.legs[1:], "tensors": notes})
