"""One rank's part of a pipeline: takes the own batches through their hosts, and executes others' segments.

Executing for others is leaf work: it never waits for anybody. So a replica that waits for its own batch executes
others' meanwhile, and there is no circle of waiting. Order of work: the own batch is sent off first; then come the
others, first come first served, at most one batch of each before the own batch goes on here.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors

from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.execution.activations import ActivationBuffer
from kunserve_sgl.execution.peer_link import PeerLink, require_own
from kunserve_sgl.execution.work import Answer, CopySlots, Leg, Order, RowUpdate, TensorNote, Turn, TurnKind, Work
from kunserve_sgl.integration.foreign_batch import rebuild, rows_to_keep
from kunserve_sgl.policy.plan import Plan, Segment

logger = logging.getLogger(__name__)

_POLL_SLICE_MS = 1000

# Runs layers [start, end) of the model on a batch; with the embedding if `first`, with norm and logits if `last`.
RunLayers = Callable[..., Any]


class LayerHosting:
    """State: the route of the own batches, and whom this rank serves. Changed by transitions only, between batches."""

    def __init__(self, runner: Any, link: PeerLink, run_layers: RunLayers, ranks: int, order_timeout_s: float) -> None:
        self._runner = runner
        self._link = link
        self._run_layers = run_layers
        self._ranks = ranks
        self._order_timeout_s = order_timeout_s
        self._layer_count = runner.model_config.num_hidden_layers
        self._plan: Plan | None = None
        self._route: tuple[Segment, ...] | None = None
        self.batches_sent = 0
        self.batches_served = 0
        self._buffers: dict[int, ActivationBuffer] = {}
        self.serves = False
        self.seconds: defaultdict[str, float] = defaultdict(float)

    # Set by transitions

    def set_plan(self, plan: Plan) -> None:
        """Own batches take the plan's route from the next one on."""
        self._plan = plan
        route = plan.route_of(self._link.replica)
        self._route = None if len(route) == 1 and route[0].host == self._link.replica else route
        self._runner.req_to_token_pool.ledger.clear()

    def report(self) -> dict[str, Any]:
        """The own batches' route, and where this rank's time has gone since the start, in seconds."""
        route = self._route or (Segment(self._link.replica, 0, self._layer_count),)
        return {
            "route": [[segment.host, segment.start, segment.end] for segment in route],
            "own_batches_sent": self.batches_sent,
            "batches_served": self.batches_served,
            "seconds": {what: round(seconds, 6) for what, seconds in self.seconds.items()},
        }

    def share(self, owner: int, buffer: ActivationBuffer) -> None:
        """`buffer` carries the activations of `owner`'s batches."""
        self._buffers[owner] = buffer

    def shares(self, owner: int) -> bool:
        return owner in self._buffers

    # Own batches

    def forward(self, batch: Any) -> Any:
        """The model runner's output for an own batch."""
        if self.serves:
            self._serve_before_own()
        if self._route is None:
            return self._timed("own", self._run_layers, batch, None, 0, self._layer_count, first=True, last=True)
        replica, route, state = self._link.replica, self._route, None
        at = 0
        while at < len(route):
            if route[at].host == replica:
                segment = route[at]
                output = self._own_layers(batch, state, segment.start, segment.end)
                at += 1
                if segment.end == self._layer_count:
                    return output
                state = output.logits_output
                continue
            if state is None:
                state = self._own_layers(batch, None, 0, 0).logits_output
            end = next((i for i in range(at, len(route)) if route[i].host == replica), len(route))
            state = self._visit(batch, state, route[at:end], is_last=end == len(route))
            at = end
        return self._own_layers(batch, state, self._layer_count, self._layer_count)

    def _own_layers(self, batch: Any, state: Any, start: int, end: int) -> Any:
        return self._timed(
            "own", self._run_layers, batch, state, start, end, first=state is None, last=end == self._layer_count
        )

    def _visit(self, batch: Any, state: Any, route: Sequence[Segment], is_last: bool) -> Any:
        """Sends the batch along `route` and serves others until it is back."""
        started_s = time.perf_counter()
        buffer = self._buffers[self._link.replica]
        notes = buffer.write(state.tensors, None)
        keep = rows_to_keep(batch) if is_last else None
        self.batches_sent += 1
        work = self._describe(batch, route, notes, keep)
        self._link.send(route[0].host, work)
        self.seconds["send"] += time.perf_counter() - started_s
        answer = self._wait_for_answer(work.batch)
        started_s = time.perf_counter()
        tensors = buffer.read(answer.tensors)
        if keep is not None:
            tensors = {name: _scatter(part, keep, len(batch.input_ids)) for name, part in tensors.items()}
        self.seconds["receive"] += time.perf_counter() - started_s
        return PPProxyTensors(tensors)

    def _describe(
        self, batch: Any, route: Sequence[Segment], notes: tuple[TensorNote, ...], keep: torch.Tensor | None
    ) -> Work:
        assert self._plan is not None
        rows = batch.req_pool_indices.cpu().numpy()
        lengths = batch.seq_lens_cpu.numpy()
        pool = self._runner.req_to_token_pool
        updates = []
        for host in dict.fromkeys(segment.host for segment in route):
            starts, values = pool.update_for(host, rows, lengths)
            updates.append(RowUpdate(host, starts.tobytes(), values.tobytes()))
        is_decode = batch.forward_mode.is_decode()
        return Work(
            owner=self._link.replica,
            batch=self.batches_sent,
            epoch=self._plan.epoch,
            legs=tuple(Leg(segment.host, segment.start, segment.end) for segment in route),
            mode=int(batch.forward_mode),
            rows=rows.astype(np.int32).tobytes(),
            lengths=lengths.astype(np.int32).tobytes(),
            extends=b"" if is_decode else np.asarray(batch.extend_seq_lens_cpu, np.int32).tobytes(),
            slots=batch.out_cache_loc.cpu().numpy().astype(np.int64).tobytes(),
            updates=tuple(updates),
            tensors=notes,
            keep=b"" if keep is None else keep.cpu().numpy().astype(np.int32).tobytes(),
        )

    def copy_slots(self, targets: torch.Tensor, sources: torch.Tensor) -> None:
        """Copies the KV of the own slots `sources` to `targets`, int64[n], in all layers, wherever they run."""
        pool = self._runner.token_to_kv_pool
        replica = self._link.replica
        hosts = (replica,) * self._layer_count if self._plan is None else self._plan.hosts[replica]
        pool.copy_slots(targets, sources, [layer for layer, host in enumerate(hosts) if host == replica])
        for host in sorted(set(hosts) - {replica}):
            assert self._plan is not None
            self.batches_sent += 1
            data = [ids.cpu().numpy().astype(np.int64).tobytes() for ids in (sources, targets)]
            self._link.send(host, CopySlots(replica, self.batches_sent, self._plan.epoch, *data))
            self._wait_for_answer(self.batches_sent)

    def _wait_for_answer(self, batch: int) -> Answer:
        deadline_s = time.monotonic() + self._order_timeout_s
        if self._link.rank == 0:
            answer = self._serve_until(batch, deadline_s)
            self._announce(Turn(TurnKind.END))
        else:
            self._follow_turns(deadline_s)
            answer = self._link.wait_answer(batch, deadline_s)
        if answer.error:
            raise InvariantError(f"replica {answer.host} could not execute batch {batch}: {answer.error}")
        return answer

    def _serve_until(self, batch: int, deadline_s: float) -> Answer:
        self._link.poll(0)
        while (answer := self._link.take_answer(batch)) is None:
            order = self._link.take_order()
            if order is not None:
                self._announce(Turn(TurnKind.SERVE, order.owner, order.batch))
                self._execute(order)
                self._link.poll(0)
                continue
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransientError(
                    f"replica {self._link.replica}: batch {batch} did not come back within {self._order_timeout_s:g} s"
                )
            started_s = time.perf_counter()
            self._link.poll(min(_POLL_SLICE_MS, max(1, int(1000 * left_s))))
            self.seconds["wait"] += time.perf_counter() - started_s
        return answer

    # Others' batches

    def serve(self) -> int:
        """Executes what others wait for, at most one batch each; returns how many. Every rank calls it at the same
        points."""
        if not self.serves:
            return 0
        if self._link.rank != 0:
            return self._follow_turns(time.monotonic() + self._order_timeout_s)
        self._link.poll(0)
        orders = self._link.take_one_order_per_owner()
        for order in orders:
            self._announce(Turn(TurnKind.SERVE, order.owner, order.batch))
            self._execute(order)
        self._announce(Turn(TurnKind.END))
        return len(orders)

    def _serve_before_own(self) -> None:
        """Where the own batch starts elsewhere it is sent first, so that the other host has work too."""
        if self._route is None or self._route[0].host == self._link.replica:
            self.serve()

    def _follow_turns(self, deadline_s: float) -> int:
        served = 0
        while (turn := self._link.wait_turn(deadline_s)).kind is TurnKind.SERVE:
            self._execute(self._link.wait_order(turn.owner, turn.batch, deadline_s))
            served += 1
        return served

    def _announce(self, turn: Turn) -> None:
        for rank in range(1, self._ranks):
            self._link.send(self._link.replica, turn, rank)

    def _execute(self, order: Order) -> None:
        """Executes an order and passes it on. A failure is the owner's to handle: it is told, and this replica goes
        on serving."""
        replica = self._link.replica
        try:
            require_own(order, replica)
            if isinstance(order, CopySlots):
                self._timed("copy", self._execute_copy, order)
                notes: tuple[TensorNote, ...] = ()
            else:
                notes = self._timed("serve", self._execute_segment, order)
        except Exception as error:
            logger.exception(
                "KunServe: batch %d of replica %d, sent in epoch %d, failed here", order.batch, order.owner, order.epoch
            )
            message = f"{type(error).__name__}: {error}"
            self._link.send(order.owner, Answer(replica, order.owner, order.batch, (), message))
            return
        self.batches_served += 1
        if isinstance(order, Work) and len(order.legs) > 1:
            self._link.send(order.legs[1].host, _passed_on(order, notes))
        else:
            self._link.send(order.owner, Answer(replica, order.owner, order.batch, notes, ""))

    def _execute_segment(self, work: Work) -> tuple[TensorNote, ...]:
        leg = work.legs[0]
        self._update_rows(work)
        buffer = self._buffers[work.owner]
        state = PPProxyTensors(buffer.read(work.tensors))
        batch: ForwardBatch = rebuild(work, self._runner.server_args.attention_backend, self._runner.device)
        output = self._run_layers(batch, state, leg.start, leg.end, first=False, last=False)
        is_end = len(work.legs) == 1
        keep = torch.from_numpy(np.frombuffer(work.keep, np.int32).astype(np.int64)) if work.keep and is_end else None
        return buffer.write(output.logits_output.tensors, None if keep is None else keep.to(self._runner.device))

    def _update_rows(self, work: Work) -> None:
        update = next((u for u in work.updates if u.host == self._link.replica), None)
        if update is None:
            return
        starts, values = np.frombuffer(update.starts, np.int32), np.frombuffer(update.values, np.int32)
        rows, lengths = np.frombuffer(work.rows, np.int32), np.frombuffer(work.lengths, np.int32)
        self._runner.req_to_token_pool.apply_update(rows, starts, lengths, values)

    def _execute_copy(self, order: CopySlots) -> None:
        assert self._plan is not None
        hosted = [layer for layer, host in enumerate(self._plan.hosts[order.owner]) if host == self._link.replica]
        ids = [torch.from_numpy(np.frombuffer(data, np.int64).copy()) for data in (order.targets, order.sources)]
        targets, sources = (each.to(self._runner.device) for each in ids)
        self._runner.token_to_kv_pool.copy_slots(targets, sources, hosted)

    def _timed(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.seconds[what] += time.perf_counter() - started_s


def _passed_on(work: Work, notes: tuple[TensorNote, ...]) -> Work:
    """The same batch for its next host."""
    fields: Mapping[str, Any] = {name: getattr(work, name) for name in work.__struct_fields__}
    return Work(**{**fields, "legs": work.legs[1:], "tensors": notes})


def _scatter(part: torch.Tensor | None, keep: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """(tokens, hidden) with the rows `keep` from `part`; the others are zero and nobody reads them."""
    if part is None:
        return None
    whole = torch.zeros((tokens, *part.shape[1:]), dtype=part.dtype, device=part.device)
    whole[keep] = part
    return whole
