"""Executes segments of others' batches, and passes them on.

A long segment is executed in slices of layers: in between, this replica looks for other work. Which order is next, and
how far it goes, is decided in `serving.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from kunserve_sgl.exchange.handover import Handover
from kunserve_sgl.exchange.peer_link import PeerLink, require_own
from kunserve_sgl.exchange.remote_attention import KvUnreachableError
from kunserve_sgl.exchange.tensor_layout import Activations
from kunserve_sgl.exchange.work import Answer, CopySlots, PeerOrder, TensorNote, Work
from kunserve_sgl.exchange.work_check import MOST_ERROR
from kunserve_sgl.replica.batch_shape import BatchShape
from kunserve_sgl.replica.held_plan import HeldPlan
from kunserve_sgl.replica.kv_writes import KvWrites
from kunserve_sgl.replica.layer_runner import Batch, LayerRunner
from kunserve_sgl.replica.layer_times import LayerTimes
from kunserve_sgl.replica.row_copies import RowCopies
from kunserve_sgl.replica.time_spent import TimeSpent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Begun:
    """Keeps a segment of which layers are left; its next layer is `layer`."""

    layer: int
    shape: BatchShape
    batch: Batch
    state: Activations


class SegmentServer:
    """Executes segments at one rank. It is leaf work: nothing here waits for anybody."""

    def __init__(
        self,
        plan: HeldPlan,
        runner: LayerRunner,
        rows: RowCopies,
        link: PeerLink,
        handover: Handover,
        times: LayerTimes,
        spent: TimeSpent,
        writes: KvWrites,
    ) -> None:
        self._plan = plan
        self._runner = runner
        self._rows = rows
        self._link = link
        self._handover = handover
        self._times = times
        self._spent = spent
        self._writes = writes
        self._begun: dict[tuple[int, int], _Begun] = {}  # by owner and batch
        self._last: tuple[Work, BatchShape] | tuple[None, None] = None, None  # whose shape was asked for last
        self.served = 0  # orders executed to their end

    @property
    def has_begun(self) -> bool:
        """Tells whether there is a segment of which layers are left."""
        return bool(self._begun)

    def forget_all_but(self, owners: Collection[int]) -> None:
        """Drops the segments that were begun for others than `owners`."""
        self._begun = {key: begun for key, begun in self._begun.items() if key[0] in owners}

    def forget(self, owner: int) -> None:
        """Drops the segments that were begun for `owner`."""
        self._begun = {key: begun for key, begun in self._begun.items() if key[0] != owner}

    def begun_layer(self, work: Work) -> int | None:
        """Returns the next layer of a segment that was begun; None for one that was not."""
        begun = self._begun.get((work.owner, work.batch))
        return None if begun is None else begun.layer

    def shape_of(self, work: Work) -> BatchShape:
        """Returns the shape of an order's batch. Who decides and who executes ask for the same one."""
        if self._last[0] is not work:
            self._last = work, BatchShape.of_work(work)
        return self._last[1]

    def execute(self, order: PeerOrder, end: int) -> None:
        """Executes an order up to layer `end` and, where that is all of it, passes it on; it is put back otherwise. A
        failure is the owner's to handle: it is told, and this replica goes on serving."""
        replica = self._link.replica
        try:
            what = "copy" if isinstance(order, CopySlots) else "serve"
            # In one stream, whoever calls: what a slice leaves is used by the next one, which may be called from
            # elsewhere, and its memory would be given away meanwhile if it were another stream's.
            with self._spent.on(what), self._runner.batch_stream():
                require_own(order, replica)
                notes: tuple[TensorNote, ...] | None = ()
                if isinstance(order, CopySlots):
                    self._copy(order)
                else:
                    notes = self._segment(order, end)
        except Exception as error:
            logger.warning(
                "KunServe: batch %d of replica %d, sent in epoch %d, failed here: %s",
                *(order.batch, order.owner, order.epoch, error),
                exc_info=None if isinstance(error, KvUnreachableError) else error,
            )
            message = f"{type(error).__name__}: {error}"[:MOST_ERROR]
            self._link.send(order.owner, Answer(replica, order.owner, order.batch, (), message))
            return
        if notes is None:
            self._link.put_back(order)
            return
        self.served += 1
        if isinstance(order, Work) and len(order.segments) > 1:
            passed_on = msgspec.structs.replace(order, host=replica, segments=order.segments[1:], tensors=notes)
            self._link.send(order.segments[1].host, passed_on)
        else:
            self._link.send(order.owner, Answer(replica, order.owner, order.batch, notes, ""))

    def _segment(self, work: Work, end: int) -> tuple[TensorNote, ...] | None:
        """Returns what came out of the segment, or None where its layers from `end` on are left."""
        begun = self._begun.pop((work.owner, work.batch), None) or self._begin(work)
        self._writes.note(begun.shape.slots, range(begun.layer, end))
        with self._times.measure(begun.shape, end - begun.layer):
            state = self._runner.run_layers(begun.batch, begun.state, begun.layer, end)
        if end < work.segments[0].end:
            self._begun[work.owner, work.batch] = _Begun(end, begun.shape, begun.batch, state)
            self._times.pace()
            return None
        to, keep = work.owner, None
        if len(work.segments) > 1:
            to = work.segments[1].host
        elif work.keep is not None:
            keep = torch.from_numpy(np.frombuffer(work.keep, np.int32).astype(np.int64)).to(self._runner.device)
        return self._handover.give(work.owner, to, state, keep, work.place)

    def _begin(self, work: Work) -> _Begun:
        shape = self.shape_of(work)
        self._runner.rows.reach(shape.rows)
        batch = self._runner.rebuild(shape)
        update = next((u for u in work.updates if u.host == self._link.replica), None)
        if update is None:
            self._runner.enter_slots(shape, batch)
        else:
            starts, values = np.frombuffer(update.starts, np.int32), np.frombuffer(update.values, np.int32)
            self._runner.rows.apply_update(shape.rows, starts, shape.lengths, values)
        return _Begun(work.segments[0].start, shape, batch, self._handover.take(work, work.place))

    def _copy(self, order: CopySlots) -> None:
        ids = [torch.from_numpy(np.frombuffer(data, np.int64).copy()) for data in (order.targets, order.sources)]
        targets, sources = (each.to(self._runner.device) for each in ids)
        layers = self._plan.layers_here(order.owner)
        self._writes.note(ids[0].numpy(), layers)
        self._rows.copy(targets, sources, layers)
        # The owner gives the sources away when it has the answer.
        self._runner.synchronize()
