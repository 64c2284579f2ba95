"""One rank's part of a pipeline: takes the own batches through their hosts, and executes others' segments.

Executing for others is leaf work: it never waits for anybody. So a replica that waits for its own batch executes
others' meanwhile, and there is no circle of waiting. Order of work: the own batch is sent off first; then come the
others, the one that has waited longest first, at most one batch of each before the own batch goes on here.

Where hosts would idle, an own batch goes in pieces that follow each other. Every host executes the pieces in order: a
request that goes on in the next piece finds there what the one before has written. A long segment, own or another's, is
executed in slices of layers, and short ones in between. At most one long segment is begun here at a time.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from kunserve_sgl.errors import InvariantError, TransientError
from kunserve_sgl.exchange.connecting import Connected, Connecting
from kunserve_sgl.exchange.handover import Handover
from kunserve_sgl.exchange.layer_clock import LayerClock
from kunserve_sgl.exchange.peer_link import PeerLink
from kunserve_sgl.exchange.work import Answer, CopySlots, Leg, Order, RowUpdate, Turn, TurnKind, Work
from kunserve_sgl.integration.runner.foreign_batch import BatchShape
from kunserve_sgl.integration.runner.micro_batches import Piece, cut, join, whole_batch
from kunserve_sgl.integration.segment_server import RunLayers, SegmentServer
from kunserve_sgl.policy.micro_batches import CostFit, piece_sizes, slice_end
from kunserve_sgl.policy.plan import Segment
from kunserve_sgl.replica.held_plan import HeldPlan

_POLL_SLICE_MS = 1000
_TELL_INTERVAL_S = 1.0  # how often the coordinator is told of a batch that does not come back


class LayerHosting:
    """Own batches take the route of the rank's plan; orders of others are executed while the plan says so."""

    def __init__(
        self,
        runner: Any,
        link: PeerLink,
        handover: Handover,
        run_layers: RunLayers,
        ranks: int,
        order_timeout_s: float,
        plan: HeldPlan,
    ) -> None:
        self._runner = runner
        self._link = link
        self._handover = handover
        link.tell_of_batches(handover.arrived)
        self._run_layers = run_layers
        self._ranks = ranks
        self._order_timeout_s = order_timeout_s
        # Told of hosts that have had an own order for a second or more, and for how long.
        self.tell_of_waiting: Callable[[Sequence[int], float], None] = lambda hosts, waited_s: None
        self._hosts_of: dict[int, tuple[int, ...]] = {}  # of own orders that are away
        self._layer_count: int = runner.model_config.num_hidden_layers
        self._plan = plan
        self._fit = CostFit()
        self._clock = LayerClock(runner.device)
        self._orders_sent = 0
        self.batches_sent = 0
        self.pieces_sent = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._server = SegmentServer(runner, link, run_layers, handover, self._clock, self._observe, self.seconds, plan)
        self._others_s: dict[int, float] = {}  # by owner: its last batch since the last own one
        self._has_begun_own = False

    @property
    def batches_served(self) -> int:
        return self._server.served

    def hosts_of(self, order: int) -> Collection[int]:
        """Of the own order of that number, as long as it is away."""
        return self._hosts_of.get(order, ())

    def report(self) -> dict[str, Any]:
        """The own batches' route, and where this rank's time has gone since the start, in seconds."""
        cost = self._fit.cost
        return {
            "route": [[segment.host, segment.start, segment.end] for segment in self._plan.route],
            "own_batches_sent": self.batches_sent,
            "pieces_sent": self.pieces_sent,
            "batches_served": self.batches_served,
            "seconds": {what: round(seconds, 6) for what, seconds in self.seconds.items()},
            "chunk_cost": None
            if cost is None
            else {"pair_s": cost.pair_s, "token_s": cost.token_s, "fixed_s": cost.fixed_s},
        }

    @property
    def is_waited_for(self) -> bool:
        """Whether there are orders that `serve` would execute."""
        return self._plan.serves and self._link.order_count > 0

    def looks_waited_for(self) -> bool:
        """The same, after a look at what has arrived."""
        self._link.poll(0)
        return self.is_waited_for

    def forget_all_but(self, owners: Iterable[int]) -> None:
        """Orders of others than `owners` are not executed any more. Every rank calls it at the same point."""
        self._link.poll(0)
        self._link.forget_orders_but(owners)
        self._server.forget_all_but(owners)

    def connect(self, peers: Iterable[int], timeout_s: float) -> Connecting | Connected:
        """See `Handover.connect`."""
        return self._handover.connect(peers, timeout_s)

    # Own batches

    def forward(self, batch: Any) -> Any:
        """The model runner's output for an own batch."""
        # Where the own batch starts elsewhere it is sent first, so that the other host has work too.
        if self._plan.serves and self._plan.route[0].host == self._link.replica:
            self.serve()
        others_s = tuple(self._others_s.values())
        self._others_s.clear()
        if not self._plan.serves and not self._plan.is_pipelined:
            return self._run_own(batch, None, 0, self._layer_count)
        shape = BatchShape.of_batch(batch)
        sizes = self._piece_sizes(shape, others_s)
        if len(sizes) == 1:
            pieces = whole_batch(batch, shape)
        else:
            pieces = cut(batch, shape, sizes, self._run_own(batch, None, 0, 0).logits_output.tensors, self._runner)
        if self._plan.is_pipelined:
            self.batches_sent += 1
            self.pieces_sent += len(pieces)
        output = self._lead(pieces) if self._link.rank == 0 else self._follow(pieces)
        if output is None:
            output = self._run_own(batch, join(pieces, shape.tokens), self._layer_count, self._layer_count)
        return output

    def _piece_sizes(self, shape: BatchShape, others_s: Sequence[float]) -> tuple[int, ...]:
        """Rank 0 decides: the clocks of the ranks differ."""
        shares = _shares(self._plan.route)
        if len(shares) == 1:
            return (shape.tokens,)
        if self._link.rank != 0:
            return self._link.wait_turn(self._deadline_s()).sizes
        sizes = piece_sizes(shape.chunks, self._fit.cost, shares, others_s)
        self._announce(Turn(TurnKind.CUT, sizes=sizes))
        return sizes

    def _lead(self, pieces: Sequence[Piece]) -> Any:
        """Takes the pieces along the route in turn, and serves others in between and while all are away. Returns the
        output if the last layers have run here on the whole batch."""
        ready, away = deque(pieces), deque[Piece]()
        output = None
        while ready or away:
            if ready:
                if (end := self._own_end(ready[0])) is not None:
                    piece = ready.popleft()
                    self._announce(Turn(TurnKind.OWN, piece=piece.index, end=end))
                    output = self._advance(piece, end, is_whole=len(pieces) == 1)
                    if piece.order is not None:
                        away.append(piece)
                    elif piece.at < len(self._plan.route):
                        ready.appendleft(piece)
                self._link.poll(0)
                if ready and self._plan.serves:
                    for order in self._link.take_one_order_per_owner():
                        self._serve(order)
            # Waits where there is nothing else to do, for the piece that was sent first.
            while away and (answer := self._answer_of(away[0], waits=not ready)) is not None:
                piece = away.popleft()
                self._receive(piece, answer)
                if piece.at < len(self._plan.route):
                    ready.append(piece)
        self._announce(Turn(TurnKind.END))
        return output

    def _answer_of(self, piece: Piece, waits: bool) -> Answer | None:
        assert piece.order is not None
        return self._serve_until(piece.order) if waits else self._link.take_answer(piece.order)

    def _follow(self, pieces: Sequence[Piece]) -> Any:
        """The same in the order that rank 0 announces."""
        output = None
        while (turn := self._link.wait_turn(self._deadline_s())).kind is not TurnKind.END:
            if turn.kind is TurnKind.SERVE:
                self._follow_turn(turn)
            else:
                self._wait_for(pieces[turn.piece])
                output = self._advance(pieces[turn.piece], turn.end, is_whole=len(pieces) == 1)
        for piece in pieces:
            self._wait_for(piece)
        return output

    def _wait_for(self, piece: Piece) -> None:
        if piece.order is not None:
            self._receive(piece, self._link.wait_answer(piece.order, self._deadline_s()))

    def _own_end(self, piece: Piece) -> int | None:
        """Up to which layer the piece goes on now; None where it has to wait for another's long segment."""
        segment = self._plan.route[piece.at]
        if segment.host != self._link.replica:
            return segment.end
        start = max(piece.layer, segment.start)
        end = slice_end(start, segment.end, self._layer_count, piece.shape.chunks, self._fit.cost)
        is_first_of_long = start == segment.start and end < segment.end
        return None if is_first_of_long and self._server.has_begun and self.is_waited_for else end

    def _advance(self, piece: Piece, end: int, is_whole: bool) -> Any:
        """Runs what comes next here, up to layer `end`, and sends the piece off if it has to go on elsewhere."""
        segment = self._plan.route[piece.at]
        if segment.host != self._link.replica:
            if piece.tensors is None:
                piece.tensors = self._run_own(piece.batch, None, 0, 0).logits_output.tensors
            self._send(piece)
            return None
        start = max(piece.layer, segment.start)
        last = is_whole and end == self._layer_count
        note = partial(self._observe, piece.shape, end - start)
        # The logits are no layer.
        with nullcontext() if last else self._clock.measure(note):
            output = self._run_own(piece.batch, piece.state, start, end, last=last)
        piece.layer = end
        self._has_begun_own = end < segment.end
        if not self._has_begun_own:
            piece.at += 1
        if last:
            return output
        piece.tensors = output.logits_output.tensors
        if self._has_begun_own:
            self._clock.pace()
        elif piece.at < len(self._plan.route):
            self._send(piece)
        return None

    def _run_own(self, batch: Any, state: Any, start: int, end: int, last: bool | None = None) -> Any:
        """Layers [start, end), with the embedding if there is no state yet, with the logits if `last`; that is, if not
        said, behind the last layer."""
        started_s = time.perf_counter()
        last = end == self._layer_count if last is None else last
        output = self._run_layers(batch, state, start, end, first=state is None, last=last)
        self.seconds["own"] += time.perf_counter() - started_s
        return output

    def _send(self, piece: Piece) -> None:
        """Sends the piece along the route, until it has to come back here."""
        assert piece.tensors is not None
        started_s = time.perf_counter()
        route, shape = self._plan.route, piece.shape
        until = next((i for i in range(piece.at, len(route)) if route[i].host == self._link.replica), len(route))
        legs, piece.at = route[piece.at : until], until
        piece.has_only_kept = until == len(route) and piece.keep is not None
        keep = (
            piece.keep.cpu().numpy().astype(np.int32).tobytes()
            if piece.has_only_kept and piece.keep is not None
            else None
        )
        self._orders_sent += 1
        piece.order = self._orders_sent
        work = Work(
            host=self._link.replica,
            owner=self._link.replica,
            batch=piece.order,
            epoch=self._plan.epoch,
            legs=tuple(Leg(segment.host, segment.start, segment.end) for segment in legs),
            mode=shape.mode,
            rows=shape.rows.tobytes(),
            lengths=shape.lengths.tobytes(),
            extends=b"" if shape.extends is None else shape.extends.tobytes(),
            slots=shape.slots.tobytes(),
            updates=self._row_updates(shape, legs),
            tensors=self._handover.give(self._link.replica, legs[0].host, piece.tensors, None, piece.place),
            place=piece.place,
            keep=keep,
        )
        self._hosts_of[piece.order] = tuple(dict.fromkeys(segment.host for segment in legs))
        self._link.send(legs[0].host, work)
        self.seconds["send"] += time.perf_counter() - started_s

    def _row_updates(self, shape: BatchShape, legs: Sequence[Segment]) -> tuple[RowUpdate, ...]:
        updates = []
        for host in dict.fromkeys(segment.host for segment in legs):
            starts, values = self._runner.req_to_token_pool.update_for(host, shape.rows, shape.lengths)
            updates.append(RowUpdate(host, starts.tobytes(), values.tobytes()))
        return tuple(updates)

    def _receive(self, piece: Piece, answer: Answer) -> None:
        self._hosts_of.pop(answer.batch, None)
        _require_executed(answer)
        started_s = time.perf_counter()
        piece.tensors = self._handover.take(answer, piece.place)
        piece.order = None
        self.seconds["receive"] += time.perf_counter() - started_s

    def _observe(self, shape: BatchShape, layers: int, seconds: float) -> None:
        """What so many layers took, taken as a part of what all take."""
        if self._link.rank == 0:
            self._fit.add(shape.chunks, seconds * self._layer_count / layers)

    def copy_slots(self, targets: torch.Tensor, sources: torch.Tensor) -> None:
        """Copies the KV of the own slots `sources` to `targets`, int64[n], in all layers, wherever they run."""
        pool = self._runner.token_to_kv_pool
        replica = self._link.replica
        pool.copy_slots(targets, sources, self._plan.layers_here(replica))
        for host in sorted({segment.host for segment in self._plan.route} - {replica}):
            self._orders_sent += 1
            data = [ids.cpu().numpy().astype(np.int64).tobytes() for ids in (sources, targets)]
            self._hosts_of[self._orders_sent] = (host,)
            self._link.send(host, CopySlots(replica, self._orders_sent, self._plan.epoch, *data))
            self._wait_for_answer(self._orders_sent)

    def _wait_for_answer(self, number: int) -> None:
        if self._link.rank == 0:
            answer = self._serve_until(number)
            self._announce(Turn(TurnKind.END))
        else:
            self._follow_turns()
            answer = self._link.wait_answer(number, self._deadline_s())
        self._hosts_of.pop(number, None)
        _require_executed(answer)

    def _serve_until(self, number: int) -> Answer:
        """The answer to the own order of that number; until it has come others are served."""
        deadline_s = self._deadline_s()
        told_s = time.monotonic()
        self._link.poll(0)
        while (answer := self._link.take_answer(number)) is None:
            order = self._link.take_order()
            if order is not None:
                self._serve(order)
                self._link.poll(0)
                continue
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TransientError(
                    f"replica {self._link.replica}: batch {number} did not come back within {self._order_timeout_s:g} s"
                )
            if time.monotonic() - told_s >= _TELL_INTERVAL_S:
                told_s = time.monotonic()
                self.tell_of_waiting(self._hosts_of.get(number, ()), self._order_timeout_s - left_s)
            started_s = time.perf_counter()
            self._link.poll(min(_POLL_SLICE_MS, max(1, int(1000 * left_s))))
            self.seconds["wait"] += time.perf_counter() - started_s
        return answer

    def _deadline_s(self) -> float:
        return time.monotonic() + self._order_timeout_s

    # Others' batches

    def serve(self) -> int:
        """Executes what others wait for, at most one batch each; returns how many. Every rank calls it at the same
        points."""
        if not self._plan.serves:
            return 0
        if self._link.rank != 0:
            return self._follow_turns()
        self._link.poll(0)
        served = sum([self._serve(order) for order in self._link.take_one_order_per_owner()])
        self._announce(Turn(TurnKind.END))
        return served

    def _serve(self, order: Order) -> bool:
        """At rank 0: all ranks execute it now, or a slice of it; not if it is long and has to wait for another one."""
        end = -1
        if isinstance(order, Work):
            leg, chunks, cost = order.legs[0], BatchShape.of_work(order).chunks, self._fit.cost
            begun = self._server.begun_layer(order)
            end = slice_end(leg.start if begun is None else begun, leg.end, self._layer_count, chunks, cost)
            if begun is None:
                if end < leg.end and (self._has_begun_own or self._server.has_begun):
                    self._link.put_back(order)
                    return False
                self._others_s[order.owner] = 0.0 if cost is None else cost.seconds(chunks)
        self._announce(Turn(TurnKind.SERVE, order.owner, order.batch, end=end))
        self._server.execute(order, end)
        return True

    def _follow_turns(self) -> int:
        served = 0
        while (turn := self._link.wait_turn(self._deadline_s())).kind is TurnKind.SERVE:
            self._follow_turn(turn)
            served += 1
        return served

    def _follow_turn(self, turn: Turn) -> None:
        self._server.execute(self._link.wait_order(turn.owner, turn.batch, self._deadline_s()), turn.end)

    def _announce(self, turn: Turn) -> None:
        for rank in range(1, self._ranks):
            self._link.send(self._link.replica, turn, rank)


def _shares(route: Sequence[Segment]) -> tuple[float, ...]:
    """The part of all layers that each host of the route executes, in the order of its first segment."""
    layers: defaultdict[int, int] = defaultdict(int)
    for segment in route:
        layers[segment.host] += segment.end - segment.start
    return tuple(count / route[-1].end for count in layers.values())


def _require_executed(answer: Answer) -> None:
    if answer.error:
        raise InvariantError(f"replica {answer.host} could not execute batch {answer.batch}: {answer.error}")
